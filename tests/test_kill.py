"""SIGKILL on the real pipeline: training, sampling, verification and writing, each cut short."""

import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest

REPOSITORY = Path(__file__).parent.parent
TRAIN, SAMPLE = "01_train_base_policy", "02_best_of_n"
# Small, but every phase is there: checkpoints of pretraining (every 100 steps) and of GRPO (every
# 4), several batches, several verdicts. What the policy writes is mostly wrong, which is no matter.
TINY = {
    "corpus_size": 7200,
    "hidden": 32,
    "layers": 2,
    "max_tokens": 24,
    "max_train_tasks": 4,
    "tasks_per_step": 2,
    "group_size": 2,
    "grpo_steps": 6,
    "baseline_samples": 1,
    "max_eval_tasks": 4,
    "check_samples": 2,
    "k": 4,
    "tasks_per_batch": 1,
    "timing_seconds": 0.05,
    "bootstrap": 50,
}
# A file, lines that it must have, and the longest pause before the kill: none of them can be missed
# by a slow watcher, since what has been written stays. What is killed: the runner alone (its kernel
# has to notice), or the runner and the kernel in one blow (the verifier's workers have to).
MOMENTS = {
    "pretraining": (f"{TRAIN}/journal/*/model.partial/checkpoint.pt", 0, 0.5, "runner"),
    "verification in 01": (f"{TRAIN}/journal/*/verdicts.jsonl", 2, 0.5, "runner and kernel"),
    "GRPO": (f"{TRAIN}/journal/*/grpo/checkpoint-4/ttkit.json", 0, 0.3, "runner"),
    "writing in 01": (f"{TRAIN}/history.parquet", 0, 0.3, "runner and kernel"),
    "sampling": (f"{SAMPLE}/journal/*/samples.jsonl", 1, 0.05, "runner"),
    "verification in 02": (f"{SAMPLE}/journal/*/verdicts.jsonl", 3, 0.5, "runner and kernel"),
    "writing in 02": (f"{SAMPLE}/samples.parquet", 0, 0.3, "runner"),
}
DRAWN = ["text", "token_ids", "nll_sum", "nll_mean", "nll_sum_temp", "nll_mean_temp"]


def start(out, tmp, *args):
    settings = [f"--set={name}={value}" for name, value in TINY.items()]
    command = [sys.executable, "-m", "ttkit", "run", "--profile=smoke", "--json", f"--out={out}"]
    # The verifier's scratch folders, and its lock of the device, belong to this test alone.
    return subprocess.Popen(
        [*command, *settings, *args],
        cwd=REPOSITORY,
        env={**os.environ, "TMPDIR": str(tmp), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    said, errors = process.communicate()
    assert process.returncode == 0, errors
    return json.loads(said)


def wait_for(out, pattern, lines, process):
    while process.poll() is None:
        for path in out.glob(pattern):
            if path.suffix != ".jsonl" or path.read_bytes().count(b"\n") >= lines:
                return
        time.sleep(0.01)
    raise AssertionError(f"the run ended before {pattern}: {process.communicate()[1]}")


def is_kernel(process):
    try:
        return "ipykernel_launcher" in " ".join(process.cmdline())
    except psutil.Error:  # a worker that has just ended
        return False


def kill(process, what):
    """Kill, and return all that then has to end by itself."""
    family = psutil.Process(process.pid).children(recursive=True)
    kernels = [p for p in family if is_kernel(p)]
    process.kill()
    if what == "runner and kernel":
        for kernel in kernels:
            kernel.kill()
    process.communicate()
    return family


def journaled(out, stage, name, **only):
    """All rows of a journal, from whatever folder, as lines hold them: nothing is deduplicated."""
    lines = [line for p in (out / stage).glob(f"journal/*/{name}.jsonl") for line in p.open()]
    table = pd.DataFrame([row for line in lines for row in json.loads(line)])
    for column, value in only.items():
        table = table[table[column] == value]
    return table


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A run killed at every moment of MOMENTS, each followed at once by the same command."""
    folder = tmp_path_factory.mktemp("killed")
    out, tmp = folder / "run", folder / "tmp"
    tmp.mkdir()
    chance, family = random.Random(11), []
    for pattern, lines, longest, what in MOMENTS.values():
        process = start(out, tmp, "--only=01,02")
        wait_for(out, pattern, lines, process)
        time.sleep(chance.uniform(0, longest))
        family += kill(process, what)
    result = finish(start(out, tmp, "--only=01,02"))
    return out, tmp, family, result


def test_a_killed_run_is_finished_and_leaves_nothing_behind(killed):
    out, tmp, family, result = killed
    assert list(result["executed"])[-1] == SAMPLE and len(result["summary"]) >= 4
    _, alive = psutil.wait_procs(family, timeout=60)
    assert family and not alive
    # A worker that was being started at the moment of the kill is not in the family.
    strays = [p for p in psutil.process_iter() if working_in(p, tmp) or working_in(p, out)]
    assert not strays
    partial = [p for p in out.rglob("*") if p.name.endswith((".partial", ".tmp"))]
    assert not partial


def working_in(process, folder):
    try:
        return Path(process.cwd()).is_relative_to(folder)
    except (psutil.Error, OSError):
        return False


def test_it_trained_what_an_uninterrupted_run_trains(killed, tmp_path):
    out, tmp, _, _ = killed
    whole = tmp_path / "whole"
    finish(start(whole, tmp, "--only=01"))
    weights = "01_train_base_policy/model/model.safetensors"
    assert (out / weights).read_bytes() == (whole / weights).read_bytes()
    steps = [pd.read_parquet(run / TRAIN / "history.parquet") for run in (out, whole)]
    assert [list(table["step"]) for table in steps] == [[1, 2, 3, 4, 5, 6]] * 2
    assert list(steps[0]["tasks"]) == list(steps[1]["tasks"])
    # Before GRPO, whose rewards are measured times, everything drawn is decided by the seed.
    drawn = [journaled(run, TRAIN, "samples", arm="pretrained") for run in (out, whole)]
    assert_same_draws(*drawn, ["arm", "task", "index"], TINY["check_samples"])


def test_no_sample_or_verdict_is_lost_or_doubled(killed, tmp_path):
    """Against the same stage run in one go, from the same policy."""
    out, tmp, _, _ = killed
    whole = tmp_path / "whole"
    shutil.copytree(out / TRAIN, whole / TRAIN)
    finish(start(whole, tmp, "--only=02"))
    tables = [pd.read_parquet(run / SAMPLE / "samples.parquet") for run in (out, whole)]
    assert_same_draws(*tables, ["temperature", "task", "index"], TINY["k"] * 2)
    assert (tables[0]["status"] != "infra_error").all()
    verdicts = journaled(out, SAMPLE, "verdicts")
    distinct = tables[0][["task", "code_sha256"]].drop_duplicates()
    assert len(verdicts) == len(distinct) == len(verdicts.merge(distinct))
    manifest = json.loads((out / SAMPLE / "manifest.json").read_text())
    assert manifest["rows_resumed"] >= 4


def assert_same_draws(mine, whole, key, each):
    tables = [t.sort_values(key, ignore_index=True) for t in (mine, whole)]
    assert not tables[0].duplicated(key).any()
    assert list(tables[0].groupby("task").size()) == [each] * TINY["max_eval_tasks"]
    for table in tables:
        table["token_ids"] = [tuple(map(int, ids)) for ids in table["token_ids"]]
    pd.testing.assert_frame_equal(*(t[key + DRAWN] for t in tables), rtol=1e-6)


def test_a_second_run_does_nothing_and_costs_less_than_importing_torch(killed):
    out, tmp, _, _ = killed
    before = cpu_seconds()
    again = finish(start(out, tmp, "--only=01,02"))
    unchanged = cpu_seconds()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    assert again["executed"] == {} and again["unchanged"] == [TRAIN, SAMPLE]
    assert unchanged - before < cpu_seconds() - unchanged


def cpu_seconds():
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
