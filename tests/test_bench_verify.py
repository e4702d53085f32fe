"""`ttkit bench verify`: what is counted, and an evaluator beside that fails on one task."""

from __future__ import annotations

import dataclasses

import pandas as pd
import pytest

from ttkit.bench_verify import IDENTICAL, _beside, bench, evaluate_like_kernelbench, variants
from ttkit.errors import InfraError, UsageError
from ttkit.tasks import find_task
from ttkit.verify import PROTOCOLS

QUICK = dataclasses.replace(
    PROTOCOLS["rigorous"], variations=("declared",), looks=(5,), warmup=1, relaunches=0
)
TASKS = [find_task("minibench:1/3"), find_task("minibench:1/12")]
EVALUATOR = """
class Result:
    compiled = correctness = True
    runtime, ref_runtime = 1.0, 2.0

def eval_kernel_against_ref(code, source, **settings):
    assert settings["num_correct_trials"] == 1 and settings["num_perf_trials"] == 5
    if code == "casts":
        raise NotImplementedError("not for Float")
    if code == "dies":
        import os
        os._exit(3)
    return Result()
"""


@pytest.fixture
def clone(tmp_path):
    folder = tmp_path / "src" / "kernelbench"
    folder.mkdir(parents=True)
    (folder / "eval.py").write_text(EVALUATOR)
    return str(tmp_path)


def task(code):
    return dataclasses.replace(TASKS[0], code=code)


def test_each_candidate_is_judged_and_counted_once():
    seen, kept = [], []
    found = bench(
        TASKS,
        candidates=3,
        protocol=QUICK,
        progress=lambda *args: seen.append(args),
        keep=lambda result: kept.append(dict(result)),
    )
    assert kept == [found]
    assert [row["statuses"] for row in found["tasks"]] == [{"correct": 3}] * 2
    assert [row["task"] for row in found["tasks"]] == [t.key for t in TASKS]
    assert found["candidates"] == 6 and found["candidates_per_second"] > 0
    assert seen[-1] == ("verified candidates", 6, 6)
    # A thousand times the same source costs one measurement, not a thousand.
    assert found["identical"]["candidates"] == IDENTICAL
    assert found["identical"]["seconds"] < 20 * found["tasks"][0]["seconds_per_candidate"] + 5


def test_candidates_from_a_run_are_its_different_ones():
    rows = [
        {"task": TASKS[0].key, "code": code, "code_sha256": code}
        for code in ("return undefined", "return undefined", TASKS[0].forward_body)
    ]
    found = bench(TASKS[:1], candidates=5, samples=pd.DataFrame(rows), protocol=QUICK)
    assert found["tasks"][0]["statuses"] == {"runtime_error": 1, "correct": 1}
    with pytest.raises(UsageError, match=f"there is no sample of {TASKS[1].key}"):
        bench(TASKS, samples=pd.DataFrame(rows), protocol=QUICK)


def test_an_evaluator_that_fails_on_a_task_goes_on(clone):
    work = [(task("casts"), ["a"]), (task("fine"), ["a", "b"])]
    (failed,), fine = evaluate_like_kernelbench(clone, work)
    assert failed["failed"] == "NotImplementedError: not for Float" and failed["correct"] is None
    assert [row["correct"] for row in fine] == [True, True]
    assert fine[0]["failed"] is None and fine[0]["reference_ms"] == 2.0


def test_what_an_evaluator_was_told_is_known_before_it_ends(clone):
    rows = [{"seconds_per_candidate": 0.001}, {"seconds_per_candidate": 0.001}]
    work = [(task("casts"), ["a"]), (task("fine"), ["a", "b"])]
    result = {"tasks": rows}
    steps = _beside(result, evaluate_like_kernelbench(clone, work))
    next(steps)
    # A task that it fails on has no ratio, and is in none.
    assert rows[0]["ratio"] is None is result["ratio"]
    assert rows[0]["kernelbench_failed"] and "ratio" not in rows[1]
    next(steps)
    seconds = rows[1]["kernelbench_seconds_per_candidate"]
    assert result["ratio"] == rows[1]["ratio"] == seconds / 0.001
    assert rows[1]["kernelbench_correct"] == 2
    assert next(steps, "the end") == "the end"


def test_an_evaluator_that_dies_is_named(clone):
    with pytest.raises(InfraError, match="ended early"):
        next(evaluate_like_kernelbench(clone, [(task("dies"), ["a"])]))


def test_nonsense_is_refused(tmp_path):
    with pytest.raises(UsageError, match="at least one task and one candidate"):
        bench([], protocol=QUICK)
    with pytest.raises(UsageError, match="needs a GPU"):
        bench(TASKS, kernelbench=str(tmp_path))
    with pytest.raises(UsageError, match="no KernelBench clone"):
        next(evaluate_like_kernelbench(str(tmp_path), []))
    # Before anything is measured.
    with pytest.raises(UsageError, match="no KernelBench clone"):
        bench(TASKS, device="cuda", kernelbench=str(tmp_path))


def test_variants_differ_in_text():
    assert len(set(variants(TASKS[0], 4))) == 4
