"""How many candidates a second the verifier judges, and how many KernelBench's own evaluator does.

The candidates are the reference's own lines behind an assignment that makes each a different text,
honest, correct, as fast as the reference and nothing to be had from a cache; or what the policy of
a run wrote. `evaluate_like_kernelbench` runs the evaluator of a KernelBench clone, in a process of
its own, the way the paper's fast proxy does.
"""

from __future__ import annotations

import contextlib
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ttkit.errors import InfraError, UsageError
from ttkit.prompts import candidate_source
from ttkit.tasks import Task
from ttkit.verify import Verifier
from ttkit.verify.device import device_name
from ttkit.verify.protocol import Protocol, protocol_named
from ttkit.verify.verdict import Verdict

if TYPE_CHECKING:
    import pandas as pd

IDENTICAL = 1000

# Run by a Python of its own: `eval.py` of the clone imports service clients that no evaluation
# needs, which are replaced by empty modules where they are not installed.
EVALUATOR = """
import importlib.util, json, sys, time, types
for name in ("litellm", "openai", "dotenv"):
    if importlib.util.find_spec(name) is None:
        module = types.ModuleType(name)
        module.completion = module.OpenAI = module.load_dotenv = lambda *a, **k: None
        sys.modules[name] = module
sys.path.insert(0, sys.argv[1] + "/src")
import torch
from kernelbench.eval import eval_kernel_against_ref
for line in sys.stdin:
    task = json.loads(line)
    for source in task["sources"]:
        started, found, failed = time.perf_counter(), None, None
        try:
            found = eval_kernel_against_ref(
                task["code"], source, num_correct_trials=1, num_perf_trials=5,
                measure_performance=True, device=torch.device("cuda:0"),
            )
        except Exception as error:  # it has no answer for this task, but may have for the next
            failed = f"{type(error).__name__}: {error}"[:300]
        row = {"seconds": time.perf_counter() - started, "failed": failed}
        row |= dict.fromkeys(("compiled", "correct", "ms", "reference_ms"))
        if found is not None:
            row |= {"compiled": found.compiled, "correct": found.correctness}
            row |= {"ms": found.runtime, "reference_ms": getattr(found, "ref_runtime", None)}
        print("ROW " + json.dumps(row), flush=True)
"""


def variants(task: Task, count: int) -> list[str]:
    """`count` different sources that do just what the reference does."""
    return [candidate_source(task, f"_ = {i}\n{task.forward_body}") for i in range(count)]


def sampled(task: Task, samples: pd.DataFrame, count: int) -> list[str]:
    """Up to `count` different candidates for `task` from the table of a run's samples."""
    codes = samples.loc[samples["task"] == task.key, ["code", "code_sha256"]]
    different = codes.drop_duplicates("code_sha256")["code"].head(count)
    return [candidate_source(task, code) for code in different]


def bench(
    tasks: Sequence[Task],
    *,
    candidates: int = 4,
    samples: pd.DataFrame | None = None,
    device: str = "cpu",
    protocol: str | Protocol = "rigorous",
    seconds: float | None = None,
    kernelbench: str | None = None,
    beside: int = 1,
    progress: Callable[[str, int, int], None] = lambda label, done, total: None,
    keep: Callable[[dict[str, Any]], object] = lambda result: None,
) -> dict[str, Any]:
    """Candidates a second, per task and overall, as a dictionary for JSON.

    All tasks' candidates are handed in together, as the notebooks do. A task's seconds are those of
    its verdicts, their share of starting its referee included; where candidates are checked side by
    side they add up to more than the whole takes. With `samples`, the candidates are the first
    different ones there. `seconds` bounds one timing phase. With `kernelbench`, a clone, its
    evaluator (1 correctness trial, 5 timed runs) judges the first `beside` candidates of each task
    afterwards, which costs it the same for each; needs CUDA. `keep` gets what is known so far, when
    the candidates are judged and after each task of that evaluator, which can take an hour. Raises
    UsageError for nonsense, InfraError when the evaluator does not run.
    """
    if candidates < 1 or not tasks:
        raise UsageError("a benchmark needs at least one task and one candidate")
    if kernelbench and device == "cpu":
        raise UsageError("KernelBench's evaluator needs a GPU: give --device cuda")
    sources = {
        task: variants(task, candidates) if samples is None else sampled(task, samples, candidates)
        for task in tasks
    }
    if missing := [task.key for task, found in sources.items() if not found]:
        raise UsageError(f"there is no sample of {missing[0]}")
    parts = [(task, sources[task][:beside]) for task in tasks]
    theirs = evaluate_like_kernelbench(kernelbench, parts) if kernelbench else None
    settings = protocol_named(protocol)
    if seconds is not None:
        settings = replace(settings, seconds=seconds)
    work = [(task, source) for task in tasks for source in sources[task]]
    done = 0

    def on_verdict(*_: Any) -> None:
        nonlocal done
        done += 1
        progress("verified candidates", done, len(work))

    with Verifier(settings, device) as verifier:
        first = variants(tasks[0], 1)[0]
        verifier.verify(tasks[0], first)  # starts the fork server; measures the ceilings
        started = time.perf_counter()
        verdicts = verifier.verify_many(work, on_verdict, fresh=True)
        took = time.perf_counter() - started
        many = _identical(verifier, tasks[0], first)
    by_task: dict[Task, list[Verdict]] = {task: [] for task in tasks}
    for (task, _), verdict in zip(work, verdicts, strict=True):
        by_task[task].append(verdict)
    result: dict[str, Any] = {
        "device": device_name(device),
        "protocol": settings.name,
        "candidates": len(work),
        "tasks": [_row(task, found) for task, found in by_task.items()],
        "candidates_per_second": len(work) / took,
        "identical": many,
    }
    keep(result)
    if theirs is not None:
        for done, _ in enumerate(_beside(result, theirs), 1):
            progress("evaluated by KernelBench", done, len(tasks))
            keep(result)
    return result


def _row(task: Task, verdicts: list[Verdict]) -> dict[str, Any]:
    seconds = sum(v.seconds for v in verdicts)
    timed = [v.reference_ms for v in verdicts if math.isfinite(v.reference_ms)]
    return {
        "task": task.key,
        "name": task.name,
        "candidates": len(verdicts),
        "seconds": seconds,
        "seconds_per_candidate": seconds / len(verdicts),
        "seconds_each": [round(v.seconds, 3) for v in verdicts],
        "statuses": dict(Counter(v.status for v in verdicts)),
        "reasons": sorted({v.reason for v in verdicts if not v.correct}),
        "fast": sum(v.fast() for v in verdicts),
        "reference_ms": statistics.median(timed) if timed else None,
        "n_pairs": [v.n_pairs for v in verdicts],
    }


def _identical(verifier: Verifier, task: Task, source: str) -> dict[str, Any]:
    started = time.perf_counter()
    verifier.verify_many([(task, source)] * IDENTICAL)
    return {"candidates": IDENTICAL, "seconds": time.perf_counter() - started}


def _beside(result: dict[str, Any], theirs: Iterator[list[dict[str, Any]]]) -> Iterator[None]:
    """Adds KernelBench's seconds to each row, and the ratios, one task at a time."""
    ours = seconds = 0.0
    for row, found in zip(result["tasks"], theirs, strict=True):
        each = sum(item["seconds"] for item in found) / len(found)
        failed = next((item["failed"] for item in found if item["failed"]), None)
        row["kernelbench_seconds_per_candidate"] = each
        row["kernelbench_correct"] = sum(bool(item["correct"]) for item in found)
        row["kernelbench_failed"] = failed
        # What it gave up on says nothing about its speed.
        row["ratio"] = None if failed else each / row["seconds_per_candidate"]
        if not failed:
            ours, seconds = ours + row["seconds_per_candidate"], seconds + each
        result["ratio"] = seconds / ours if ours else None
        yield


def evaluate_like_kernelbench(
    clone: str, work: Sequence[tuple[Task, list[str]]]
) -> Iterator[list[dict[str, Any]]]:
    """What the evaluator of a KernelBench clone says of each source of each task, task by task.

    Dictionaries with seconds, compiled, correct, ms and reference_ms (None where it failed) and
    failed, its exception; one process for all, started when the first is asked for. Raises
    UsageError for a folder without it, at once, and InfraError when it ends early.
    """
    if not Path(clone, "src", "kernelbench", "eval.py").is_file():
        raise UsageError(f"{clone} is no KernelBench clone: it has no src/kernelbench/eval.py")
    return _evaluated(clone, work)


def _evaluated(
    clone: str, work: Sequence[tuple[Task, list[str]]]
) -> Iterator[list[dict[str, Any]]]:
    command = [sys.executable, "-c", EVALUATOR, clone]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        assert process.stdin is not None and process.stdout is not None
        try:
            for task, sources in work:
                line = json.dumps({"code": task.code, "sources": sources})
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.write(line + "\n")
                    process.stdin.flush()
                found: list[dict[str, Any]] = []
                while len(found) < len(sources):
                    said = process.stdout.readline()
                    if not said:
                        errors.seek(0)
                        last = (errors.read().strip().splitlines() or ["it said nothing"])[-1]
                        raise InfraError(f"KernelBench's evaluator ended early: {last}")
                    if said.startswith("ROW "):
                        found.append(json.loads(said.removeprefix("ROW ")))
                yield found
        finally:
            process.kill()
            process.wait()
