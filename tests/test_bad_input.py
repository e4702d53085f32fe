"""Bad input, end to end: one clear line or one verdict; the run goes on, or stops and keeps all.

What the verifier says to each hostile candidate by itself is in test_verify.py, wrong options are
in test_cli.py. Here a whole run meets hostile candidates, and disks fill up at every stage.
"""

import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from toy import DRAW, make_project, write_notebook

from ttkit import prompts, store
from ttkit.best_of_n import judge
from ttkit.errors import InfraError
from ttkit.pretrain import pretrain
from ttkit.tasks import load_split, load_tasks
from ttkit.train import train_grpo
from ttkit.verify import Verifier

REPOSITORY = Path(__file__).parent.parent
SPLIT = load_split(REPOSITORY / "splits/minibench_l2_seed42.json")
TASKS = {task.id: task for task in load_tasks("minibench", 2)}
CHOSEN = [TASKS[i] for i in (*SPLIT.train[:2], *SPLIT.eval[:2])]
HOSTILE = {
    "return (": "compile_error",
    "while True: pass": "timeout",
    "return bytearray(10**11)": "runtime_error",  # 100 GB
    "return torch.ones(25 * 10**9)": "runtime_error",  # 100 GB
    "import ctypes\nctypes.string_at(0)": "runtime_error",  # a segmentation fault
    "import sys\nsys.exit(0)": "runtime_error",
    "for _ in range(1024): print('x' * (1 << 20))": "runtime_error",  # a gigabyte of text
}


def ttkit(*args, cwd=REPOSITORY, **environment):
    """The command as a process of its own; what it says must be no traceback."""
    done = subprocess.run(
        [sys.executable, "-m", "ttkit", *map(str, args)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **environment},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert "Traceback" not in done.stderr
    return done


# --- a model that writes hostile programs


def no_program(task):
    """Runs the reference in place of a program of its own."""
    return f"return super().forward({', '.join(task.forward_args)})"


@pytest.fixture(scope="module")
def hostile_model(tmp_path_factory):
    """A scratch policy that has learnt these programs by heart, and the honest one of each task."""
    examples = [
        SimpleNamespace(prompt=prompts.messages(task, "compact")[0]["content"], completion=body)
        for task in CHOSEN
        for body in (*HOSTILE, no_program(task), *[task.forward_body] * 2)
    ]
    return pretrain(
        tmp_path_factory.mktemp("models") / "hostile",
        examples=examples,
        n_examples=len(examples),
        batch=8,
        epochs=60,
        hidden=32,
        layers=2,
        vocab=600,
        on_step=lambda *_: None,
    )


def test_hostile_candidates_cost_a_verdict_each_and_the_run_goes_on(hostile_model, tmp_path):
    settings = {
        "model": hostile_model,
        "max_train_tasks": 2,
        "tasks_per_step": 2,
        "group_size": 4,
        "grpo_steps": 1,
        "baseline_samples": 2,
        "max_eval_tasks": 2,
        "check_samples": 4,
        "k": 60,
        "temperatures": 1.0,
        "timing_seconds": 0.05,
        "bootstrap": 50,
    }
    done = ttkit(
        *("run", "--profile=smoke", "--only=01,02", "--json", f"--out={tmp_path / 'run'}"),
        *(f"--set={name}={value}" for name, value in settings.items()),
    )
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["executed"]) == 2
    samples = store.read_samples(tmp_path / "run/02_best_of_n/samples.parquet")
    assert list(samples.groupby("task").size()) == [60, 60]
    seen = samples.drop_duplicates(["task", "code"]).set_index(["task", "code"])["status"]
    for body, status in HOSTILE.items():
        said = samples.loc[samples["code"] == body, "status"]
        assert set(said) == {status}, f"{body!r}, written {len(said)} times"
    for task in CHOSEN[2:]:
        assert seen[task.key, no_program(task)] == "rejected"
    # Only the short one of the two is learnt to the last letter by so small a model.
    assert seen[CHOSEN[3].key, CHOSEN[3].forward_body] == "correct"
    assert (samples["status"] != "infra_error").all()


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("models/nothing", "model is models/nothing, and there is no such folder"),
        ("splits", "splits is incomplete, it lacks config.json"),
    ],
)
def test_a_run_without_its_model_is_wrong_usage(tmp_path, model, says):
    out = tmp_path / "run"
    done = ttkit("run", "--profile=smoke", "--only=01", f"--set=model={model}", f"--out={out}")
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("ttkit: ")]
    assert says in line
    assert not (out / "01_train_base_policy/DONE").exists()


def test_a_run_with_an_unknown_task_is_wrong_usage(tmp_path):
    out = tmp_path / "run"
    done = ttkit("run", "--profile=smoke", "--only=00", "--set=aa_tasks=3,400", f"--out={out}")
    assert done.returncode == 2
    assert "there is no task 400 in minibench level 1" in done.stderr


# --- full disks


class SmallDisk:
    """A file system of a given size that can be filled and enlarged; root alone may mount one."""

    def __init__(self, path, kib):
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        self._mount("-t", "tmpfs", "-o", f"size={kib}k", "tmpfs")

    def grow(self):
        self._mount("-o", "remount,size=64m")

    def fill(self):
        with contextlib.suppress(OSError), (self.path / "filler").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    def _mount(self, *args):
        command = ["mount", *args, str(self.path)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"needs a small file system to fill: {done.stderr.strip()}")

    def close(self):
        subprocess.run(["umount", "--lazy", str(self.path)], check=True)


@pytest.fixture
def small_disk():
    disks = []

    def mount(path, kib):
        disks.append(SmallDisk(path, kib))
        return disks[-1]

    yield mount
    for disk in disks:
        disk.close()


def assert_the_disk_is_full(done):
    assert done.returncode == 3, done.stderr
    # A kernel that is being stopped now and then falls over its own sockets and says so.
    [line] = [line for line in done.stderr.splitlines() if "signaler.cpp" not in line]
    assert line.startswith("ttkit: ") and "the disk is full" in line
    assert "free some space and give the same command again" in line


WIDE = {
    "parameters": DRAW["parameters"],
    "cells": [cell.replace("index * index", '"ab" * 4000') for cell in DRAW["cells"]],
}
# Sizes of the disk in KiB. With 60 rows of 8 kB, the journal needs 480 kB; the table, compressed,
# hardly anything, so in the last case a cell fills what is left when the journal is complete.
FULL_WHEN = {"opening the run": 100, "journaling": 300, "the table is written": 1000}
FILL = """
import contextlib, pathlib
if not pathlib.Path("fill-no-more").exists():
    with contextlib.suppress(OSError), open("runs/filler", "wb", buffering=0) as file:
        while file.write(bytes(4096)): pass
"""


@pytest.mark.parametrize("when", FULL_WHEN)
def test_a_run_on_a_full_disk_stops_keeps_its_rows_and_goes_on(tmp_path, small_disk, when):
    project = make_project(tmp_path)
    cells = list(WIDE["cells"])
    if when == "the table is written":
        cells.insert(3, FILL.strip())
    write_notebook(project / "notebooks/01_draw.ipynb", WIDE["parameters"], cells)
    disk = small_disk(project / "runs", FULL_WHEN[when])
    if when == "opening the run":
        disk.fill()
    command = ("run", "--only=01", "--out=runs/demo", "--set=rows=60")
    assert_the_disk_is_full(ttkit(*command, cwd=project))
    kept = sum(
        len(json.loads(line))
        for path in disk.path.glob("demo/01_draw/journal/*/rows.jsonl")
        for line in path.open()
    )
    low, high = {"opening the run": (0, 0), "journaling": (5, 59)}.get(when, (60, 60))
    assert low <= kept <= high
    assert not (disk.path / "demo/01_draw/DONE").exists()

    disk.grow()
    (project / "fill-no-more").touch()
    done = ttkit(*command, "--json", cwd=project)
    assert done.returncode == 0, done.stderr
    rows = pd.read_parquet(disk.path / "demo/01_draw/rows.parquet")
    assert list(rows["index"]) == list(range(60))
    manifest = json.loads((disk.path / "demo/01_draw/manifest.json").read_text())
    assert manifest["rows_resumed"] == kept


def test_training_on_a_full_disk_is_one_sentence_and_goes_on_from_its_checkpoint(
    hostile_model, tmp_path, small_disk
):
    task = CHOSEN[0]
    prompt = prompts.messages(task, "compact")[0]["content"]
    examples = [SimpleNamespace(prompt=prompt, completion=task.forward_body)] * 64
    tiny = {"examples": examples, "n_examples": 64, "batch": 8, "epochs": 4, "vocab": 300}
    tiny |= {"hidden": 32, "layers": 2, "checkpoint_every": 4}
    disk = small_disk(tmp_path / "pretraining", 64)
    with pytest.raises(InfraError, match="the disk is full") as error:
        pretrain(disk.path / "model", **tiny, on_step=lambda *_: None)
    assert "\n" not in str(error.value)

    # One checkpoint fits, the next does not: what was there stays usable.
    disk.grow()
    steps = []
    with pytest.raises(InfraError, match="the disk is full"):
        pretrain(disk.path / "model", **tiny, on_step=lambda *at: full_after(6, at, steps, disk))
    assert steps == list(range(1, 8))  # the checkpoint of step 8 is the one that did not fit
    (disk.path / "filler").unlink()
    pretrain(disk.path / "model", **tiny, on_step=lambda *at: steps.append(at[0]))
    assert steps[7:] == list(range(5, 33))

    def longer_is_faster(items):
        return [SimpleNamespace(status="correct", correct=True, speedup=len(c)) for _, c in items]

    disk = small_disk(tmp_path / "grpo", 400)
    settings = {"steps": 2, "tasks_per_step": 2, "group": 4, "max_tokens": 32, "save_steps": 1}
    call = (hostile_model, CHOSEN[:2], longer_is_faster, disk.path / "grpo")
    with pytest.raises(InfraError, match="the disk is full") as error:
        train_grpo(*call, **settings, on_step=lambda _: None)
    assert "\n" not in str(error.value)
    disk.grow()
    history = train_grpo(*call, **settings, on_step=lambda _: None).history
    assert list(history["step"]) == [1, 2] and math.isfinite(history["loss"].iloc[-1])


def full_after(step, at, steps, disk):
    steps.append(at[0])
    if at[0] == step:
        disk.fill()


def test_a_verifier_without_room_for_its_scratch_files_blames_itself(
    tmp_path, small_disk, monkeypatch
):
    disk = small_disk(tmp_path / "scratch", 256)
    monkeypatch.setattr(tempfile, "tempdir", str(disk.path))
    (task,) = CHOSEN[:1]
    source = prompts.candidate_source(task, task.forward_body)
    with Verifier("fast-proxy") as verifier:
        disk.fill()
        refused = verifier.verify(task, source)
        assert refused.status == "infra_error" and "No space left" in refused.reason
        nothing = SimpleNamespace(rows=[], append=lambda rows: None)
        drawn = pd.DataFrame([{"task": task.key, "code": "return x", "code_sha256": "0"}])
        with pytest.raises(InfraError, match="none of the 1 candidates .* No space left"):
            judge([task], drawn, verifier, nothing)
        (disk.path / "filler").unlink()
        assert verifier.verify(task, source).status == "correct"
