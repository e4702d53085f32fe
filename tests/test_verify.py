"""Every outcome of the verifier, and bad input, each on a real run.

Cheats and hostile candidates: tests/adversarial.
"""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path

import pytest

from ttkit.errors import UsageError
from ttkit.prompts import candidate_source
from ttkit.tasks import Task
from ttkit.verify import PROTOCOLS, Limits, Verdict, Verifier
from ttkit.verify.desk import Desk
from ttkit.verify.session import Session

CODE = """
import torch
import torch.nn as nn

class Model(nn.Module):
    def __init__(self, k):
        super().__init__()
        self.k = k
    def forward(self, x, y):
        out = x * self.k
        for _ in range(4):
            out = torch.sin(out) * 0.5 + y
        return out

def get_inputs():
    return [torch.randn(128, 257), torch.randn(128, 257)]

def get_init_inputs():
    return [3]
"""
TASK = Task("file", 0, 0, "sines", CODE)
# Outcomes other than a speed need no long measurement.
QUICK = dataclasses.replace(PROTOCOLS["rigorous"], looks=(10,), warmup=2, seconds=1.0, relaunches=0)
# Where a speed is asserted, enough pairs that a third of them may meet a busy machine.
SURE = dataclasses.replace(QUICK, looks=(40,), seconds=20.0)
LIMITS = Limits(run_seconds=1.5, load_seconds=8.0, memory_bytes=1 << 30)


@pytest.fixture(scope="module")
def verifier():
    with Verifier(QUICK, limits=LIMITS) as v:
        yield v


def body(text: str) -> str:
    return candidate_source(TASK, text)


def forward(before: str, after: str = "return out") -> str:
    """The reference's own body with code around it."""
    return f"{before}\n{TASK.forward_body.replace('return out', after)}"


def module(top: str, text: str | None = None) -> str:
    """As `body`, with lines at module level between the reference and the candidate."""
    source = body(text if text is not None else TASK.forward_body)
    return source.replace("class ModelNew", f"{top}\n\nclass ModelNew")


def test_a_right_candidate_is_correct_and_its_verdict_is_complete(verifier):
    verdict = verifier.verify(TASK, body(TASK.forward_body))
    assert verdict.status == "correct", verdict.reason
    assert verdict.correct
    assert verdict.n_pairs == len(verdict.pairs) == 10
    assert 0 < verdict.speedup_lo <= verdict.speedup <= verdict.speedup_hi
    assert verdict.candidate_ms > 0 and verdict.reference_ms > 0 and verdict.null_ms > 0
    assert verdict.limit_ms < verdict.reference_ms
    assert verdict.kernelbench_allclose
    assert verdict.max_error == verdict.reference_error < 1e-4
    assert {"values_declared", "values_negated", "deferred_work"} <= set(verdict.checks)
    assert verdict.guards["parent_death_signal"] and verdict.guards["file_size_limit"]
    assert "load_average" in verdict.contention and verdict.contention["stolen_seconds"] >= 0
    assert Verdict.from_dict(verdict.to_dict()) == verdict


SLOW = Task(
    "file",
    0,
    1,
    "slow",
    CODE.replace("range(4)", "range(1)").replace(
        "out = torch.sin(out) * 0.5 + y",
        "out = torch.sin(out * torch.ones(128, 257)) * 0.5 + y"
        "\n            for _ in range(200): out = out + 0.0 * x",
    ),
)
SHORT = "out = torch.sin(x * self.k) * 0.5 + y\nreturn out"


def test_much_faster_is_fast_and_much_slower_is_not():
    with Verifier(SURE, limits=LIMITS) as v:
        fast = v.verify(SLOW, candidate_source(SLOW, SHORT))
        slow = v.verify(TASK, body(forward("for _ in range(40): torch.sin(x)")))
    assert fast.status == "correct", fast.reason
    assert fast.fast() and fast.speedup > 1.5
    assert slow.status == "correct", slow.reason
    assert not slow.fast() and slow.speedup_hi < 1


def test_a_narrow_winner_is_measured_again_in_fresh_processes(monkeypatch):
    narrow = dataclasses.replace(SURE, relaunches=2, relaunch_below=1e9)
    checked = []
    check = Session.check_values
    monkeypatch.setattr(Session, "check_values", lambda s, **k: checked.append(k) or check(s, **k))
    with Verifier(narrow, limits=LIMITS) as v:
        fast = v.verify(SLOW, candidate_source(SLOW, SHORT))
        assert len(checked) == 3  # each launch as the first: none can be told from it
        slow = v.verify(TASK, body(forward("for _ in range(40): torch.sin(x)")))
    assert fast.fast() and fast.checks.count("relaunched") == 2
    assert fast.n_pairs == len(fast.pairs) == 120
    assert slow.status == "correct" and "relaunched" not in slow.checks and slow.n_pairs == 40


def test_where_the_reference_keeps_its_process_both_sides_begin_side_by_side(monkeypatch):
    # As on CUDA, where a process is dear.
    plain, kept = Desk._referee, []

    def keeping(desk, task):
        handle = plain(desk, task)
        if handle.twin is None:
            desk._keep_twin(task, handle)
        kept.append(handle.twin)
        return handle

    monkeypatch.setattr(Desk, "_referee", keeping)
    narrow = dataclasses.replace(SURE, looks=(10,), relaunches=2, relaunch_below=1e9)
    with Verifier(narrow, limits=LIMITS) as v:
        fast = v.verify(SLOW, candidate_source(SLOW, SHORT))
        again = v.verify(SLOW, candidate_source(SLOW, "_ = 1\n" + SHORT))
    assert fast.fast() and fast.checks.count("relaunched") == 2, fast.reason
    assert again.fast() and again.checks.count("relaunched") == 2, again.reason
    assert kept[0] is not kept[1]  # a new one for every launch


WRONG = {
    "plain": "return x + 1",
    "nan": forward("", "out[3, 5] = float('nan')\nreturn out"),
    "one element": forward("", "out[3, 5] += 0.01\nreturn out"),
    "dtype": forward("", "return out.double()"),
    "shape": forward("", "return out[:-1]"),
    "structure": forward("", "return out, out"),
    "none": "return None",
    "only positive inputs": forward(
        "x = x + 0.0 * y", "return out if x.mean() > -9 else out * 2"
    ).replace("return out if x.mean() > -9 else out * 2", "return out * (1 if x.std() < 2 else 2)"),
    "zeros": "return torch.zeros_like(x)",
    "stale memory": "return torch.empty(x.shape)",
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_values_are_incorrect(verifier, name):
    verdict = verifier.verify(TASK, body(WRONG[name]))
    assert verdict.status == "incorrect", verdict
    assert not verdict.fast()
    assert verdict.reason


def test_kernelbenchs_tolerance_is_judged_for_incorrect_candidates_too(verifier):
    near = verifier.verify(TASK, body(forward("", "return out * (1 + 3e-5)")))
    far = verifier.verify(TASK, body(forward("", "return out * (1 + 3e-2)")))
    for verdict, close in ((near, True), (far, False)):
        assert (verdict.status, verdict.flags) == ("incorrect", ("values_declared",))
        assert verdict.kernelbench_allclose == close


ERRORS = {
    "syntax": (body("return ("), "compile_error", "SyntaxError"),
    "no ModelNew": (CODE, "compile_error", "ModelNew"),
    "empty body": (body(""), "compile_error", ""),
    "null byte": (body("return '\0'"), "compile_error", ""),
    "exception": (body("raise ValueError('boom')"), "runtime_error", "boom"),
    "at import": (module("raise KeyError('early')"), "runtime_error", "early"),
    "segfault": (body("import ctypes\nctypes.string_at(0)"), "runtime_error", "SIGSEGV"),
    "exit 0": (body("import sys\nsys.exit(0)"), "runtime_error", "status 0"),
    "_exit 0": (body("import os\nos._exit(0)"), "runtime_error", "status 0"),
    "exit at import": (module("import sys\nsys.exit(0)"), "runtime_error", "status 0"),
    "100 GB": (body("return torch.ones(25 * 10**9)"), "runtime_error", "memory"),
    "100 GB of bytes": (body("return bytearray(10**11)"), "runtime_error", "memory"),
    "a gigabyte of prints": (
        body("for _ in range(1024): print('x' * (1 << 20))\nreturn x"),
        "runtime_error",
        "wrote more",
    ),
    "endless loop": (body("while True: pass"), "timeout", "1.5 s"),
    "sleep": (body("import time\ntime.sleep(60)"), "timeout", "1.5 s"),
    "deep recursion": (body("return self.forward(x, y)"), "runtime_error", "RecursionError"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_have_their_own_status_and_a_reason(verifier, name):
    source, status, words = ERRORS[name]
    verdict = verifier.verify(TASK, source)
    assert verdict.status == status, verdict
    assert words in verdict.reason
    assert "\n" not in verdict.reason
    assert verdict.guards["file_size_limit"]


def test_a_reference_that_fails_is_never_the_candidates_fault(verifier):
    broken = Task("file", 0, 4, "broken", CODE.replace("out = x * self.k", "out = x @ y"))
    verdict = verifier.verify(broken, body(TASK.forward_body))
    assert verdict.status == "infra_error", verdict
    assert "reference" in verdict.reason
    random = Task("file", 0, 5, "random", CODE.replace("x * self.k", "torch.randn_like(x)"))
    assert verifier.verify(random, body(TASK.forward_body)).status == "infra_error"
    assert verifier.verify(TASK, body(TASK.forward_body)).correct


KINDS = """
import torch
import torch.nn as nn
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 64)
        self.register_buffer("shift", torch.rand(64))
    def forward(self, x, index, n):
        y = self.layer(x) + self.shift
        return [y[index], (y > 0).sum(dim=1)], {"n": n, "t": 1}["n"], float(n) / 4
def get_inputs():
    return [torch.randn(300, 64), torch.randint(0, 300, (200,)), 7]
def get_init_inputs():
    return []
"""


def test_weights_integers_nested_outputs_and_numbers(verifier):
    task = Task("file", 0, 6, "kinds", KINDS)
    right = verifier.verify(task, candidate_source(task, task.forward_body))
    assert right.status == "correct", right.reason
    wrong_number = task.forward_body.replace("/ 4", "/ 5")
    assert verifier.verify(task, candidate_source(task, wrong_number)).status == "incorrect"
    as_floats = task.forward_body.replace(".sum(dim=1)", ".sum(dim=1).float()")
    assert verifier.verify(task, candidate_source(task, as_floats)).flags == ("output_dtype",)
    # A whole module with layers of its own gets the reference's weights by name.
    own = KINDS.replace("class Model(", "class ModelNew(").replace(
        "torch.rand(64)", "torch.ones(64)"
    )
    loaded = verifier.verify(task, own)
    assert loaded.status == "correct", loaded.reason


def test_the_papers_protocols_report_a_ratio_of_means():
    for name, runs in (("fast-proxy", 5), ("full", 50)):
        with Verifier(name, limits=LIMITS, workers=2) as v:
            items = [(TASK, body(TASK.forward_body)), (TASK, body("return x + 1"))]
            right, wrong = v.verify_many(items)
        assert right.status == "correct", right.reason
        assert right.n_pairs == runs
        assert right.speedup == pytest.approx(right.reference_ms / right.candidate_ms)
        assert right.speedup_lo != right.speedup_lo and not right.fast()
        assert wrong.status == "incorrect"


def test_wrong_settings_are_refused_in_one_sentence():
    for settings in ({"protocol": "rigourous"}, {"device": "tpu"}, {"workers": 0}):
        with pytest.raises(UsageError):
            Verifier(**settings)


def test_a_killed_fork_server_is_started_again(verifier):
    verifier.verify(TASK, body("return x + 1"))
    process = verifier._room.launcher._process
    process.kill()
    process.wait()
    first = verifier.verify(TASK, body("return y + 1"))
    second = verifier.verify(TASK, body("return y + 0"))
    assert first.status in ("infra_error", "incorrect")
    assert second.status == "incorrect", second


def test_a_closed_verifier_leaves_no_process_and_no_directory():
    with Verifier(QUICK, limits=LIMITS) as v:
        v.verify(TASK, body("return x + 1"))
        scratch = Path(v._room.scratch_root())
        server = v._room.launcher._process.pid
        assert scratch.exists()
    assert not scratch.exists()
    assert _gone(lambda: _running(server) or _descendants(server))


def _running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _descendants(session: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == session:
            found.append(int(path.parent.name))
    return found


def _gone(present) -> bool:
    """Whether `present` turns false within a generous time: ending a process takes a moment."""
    for _ in range(200):
        if not present():
            return True
        time.sleep(0.05)
    return False


def test_a_referee_that_fails_costs_one_verdict_of_those_loaded_together(monkeypatch):
    judge, seen = Desk._judge, []

    def fails_first(self, task, *args):
        if not seen:
            self._drop(task.sha256)
            seen.append(Verdict("infra_error", "the reference's process failed"))
            return seen[0]
        return judge(self, task, *args)

    monkeypatch.setattr(Desk, "_judge", fails_first)
    sources = [candidate_source(TASK, f"_ = {i}\n{TASK.forward_body}") for i in range(3)]
    with Verifier(QUICK) as verifier, verifier._desk() as desk:
        found = [v.status for v in desk.verify_several(TASK, sources)]
    assert found == ["infra_error", "correct", "correct"]


def test_all_answers_together_have_a_limit_of_their_own():
    """Each call is well within its limit; together they would hold the device for a minute."""
    limits = dataclasses.replace(LIMITS, total_seconds=1.0)
    with Verifier(QUICK, limits=limits) as v:
        verdict = v.verify(TASK, module("import time", forward("time.sleep(0.4)")))
    assert (verdict.status, verdict.flags) == ("timeout", ("time_limit",)), verdict.reason
    assert "in all" in verdict.reason


def test_whoever_names_a_compiler_may_run_it_in_any_call():
    # After the checks, so in a timed run: longer than a call may take, not than a compiler may.
    source = module(
        "import time\nCALLS = []",
        forward("CALLS.append(0)\nif len(CALLS) == 30:\n    time.sleep(1.2)"),
    )
    limits = dataclasses.replace(LIMITS, run_seconds=0.6, run_factor=0, compile_seconds=30.0)
    with Verifier(SURE, limits=limits) as v:
        verdict = v.verify(TASK, source)
        assert (verdict.status, verdict.flags) == ("timeout", ("time_limit",)), verdict.reason
        assert "timed" in verdict.reason
        assert v.verify(TASK, source + "\n# torch.compile").correct


def test_a_compiler_has_cpu_time_of_its_own():
    limits = Limits(cpu_seconds=60, compile_seconds=90.0)
    assert [limits.cpu_time("cpu", compiles) for compiles in (False, True)] == [60, 150]


def test_no_input_lies_where_torch_compile_would_compile_again(verifier):
    text = "assert x.storage_offset() > 1 and y.storage_offset() > 1"
    assert verifier.verify(TASK, body(forward(text))).correct
