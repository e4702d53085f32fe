"""Every outcome of the verifier, bad input, and cheats, each on a real run."""

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
    assert "load_average" in verdict.contention
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


def test_much_faster_is_fast_and_much_slower_is_not(verifier):
    fast = verifier.verify(SLOW, candidate_source(SLOW, SHORT))
    assert fast.status == "correct", fast.reason
    assert fast.fast() and fast.speedup > 1.5
    slow = verifier.verify(TASK, body(forward("for _ in range(40): torch.sin(x)")))
    assert slow.status == "correct", slow.reason
    assert not slow.fast() and slow.speedup_hi < 1


def test_a_narrow_winner_is_measured_again_in_fresh_processes():
    narrow = dataclasses.replace(QUICK, relaunches=2, relaunch_below=1e9)
    with Verifier(narrow, limits=LIMITS) as v:
        fast = v.verify(SLOW, candidate_source(SLOW, SHORT))
        slow = v.verify(TASK, body(forward("for _ in range(40): torch.sin(x)")))
    assert fast.fast() and fast.checks.count("relaunched") == 2
    assert fast.n_pairs == len(fast.pairs) == 30
    assert slow.status == "correct" and "relaunched" not in slow.checks and slow.n_pairs == 10


WRONG = {
    "plain": "return x",
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


CHEATS = {
    "mutated input": (forward("", "x.mul_(2)\nreturn out"), "inputs_mutated"),
    "subclass": (
        forward("class T(torch.Tensor): pass", "return out.as_subclass(T)"),
        "output_type",
    ),
}


@pytest.mark.parametrize("name", CHEATS)
def test_cheats_are_rejected_by_name(verifier, name):
    text, flag = CHEATS[name]
    verdict = verifier.verify(TASK, body(text))
    assert verdict.status == "rejected", verdict
    assert verdict.flags == (flag,)


def test_an_output_that_aliases_an_input_is_rejected(verifier):
    code = CODE.replace("return out", "return x * 1.0")
    task = Task("file", 0, 2, "copy", code)
    verdict = verifier.verify(task, candidate_source(task, "return x"))
    assert (verdict.status, verdict.flags) == ("rejected", ("output_aliases_input",))
    honest = verifier.verify(task, candidate_source(task, "return x.clone()"))
    assert honest.status == "correct", honest.reason


def test_a_result_kept_by_pointer_is_incorrect(verifier):
    text = (
        "key = (x.data_ptr(), y.data_ptr())\n"
        "kept = self.__dict__.setdefault('kept', {})\n"
        "if key not in kept:\n"
        "    out = x * self.k\n"
        "    for _ in range(4):\n"
        "        out = torch.sin(out) * 0.5 + y\n"
        "    kept[key] = out\n"
        "return kept[key]"
    )
    verdict = verifier.verify(TASK, body(text))
    assert verdict.status == "incorrect", verdict


def test_work_left_to_a_thread_never_counts_as_saved(verifier):
    text = (
        "import threading\n"
        "out = torch.zeros_like(x)\n"
        "def work():\n"
        "    r = x * self.k\n"
        "    for _ in range(4):\n"
        "        r = torch.sin(r) * 0.5 + y\n"
        "    out.copy_(r)\n"
        "threading.Thread(target=work).start()\n"
        "return out"
    )
    verdict = verifier.verify(TASK, body(text))
    assert verdict.status in ("incorrect", "rejected"), verdict


def test_work_left_to_the_delivery_is_rejected(verifier):
    top = """
import ttkit.verify.worker as harness
def late(self, which, tree, types, targets, honest=harness.Runner.deliver):
    self.outputs = [output() if callable(output) else output for output in self.outputs]
    return honest(self, which, tree, types, targets)
harness.Runner.deliver = late
harness.Runner.aliases = lambda *a: False
"""
    code = CODE.replace("range(4)", "range(40)")
    task = Task("file", 0, 3, "long", code)
    text = (
        "def later():\n"
        + "\n".join(f"    {line}" for line in task.forward_body.splitlines())
        + "\nreturn later"
    )
    source = candidate_source(task, text).replace("class ModelNew", f"{top}\nclass ModelNew")
    verdict = verifier.verify(task, source)
    assert (verdict.status, verdict.flags) == ("rejected", ("tampered_runtime",)), verdict


def test_a_forged_answer_on_the_channel_gains_nothing(verifier):
    forged = 'import os\nos.write(3, b\'{"values": [], "strides": [[257, 1]]}\')\nreturn x'
    assert not verifier.verify(TASK, body(forged)).correct
    garbage = verifier.verify(TASK, body("import os\nos.write(3, b'\\x80garbage')\nreturn x"))
    assert (garbage.status, garbage.flags) == ("rejected", ("forged_answer",))
    endless = "import os\nwhile True: os.write(3, b'{}')"
    assert not verifier.verify(TASK, body(endless)).correct


def test_patched_clocks_and_comparisons_are_rejected(verifier):
    top = """
import time
time.perf_counter = time.monotonic = time.time = lambda: 0.0
torch.allclose = torch.equal = lambda *a, **k: True
torch.cuda.synchronize = lambda *a: None
"""
    for text in ("return x", TASK.forward_body):
        verdict = verifier.verify(TASK, module(top, text))
        assert (verdict.status, verdict.flags) == ("rejected", ("tampered_runtime",)), verdict


def test_secrets_of_the_environment_are_not_visible(monkeypatch):
    monkeypatch.setenv("TTKIT_TEST_SECRET", "hunter2")
    text = forward(
        "import os, glob\n"
        "seen = str(dict(os.environ))\n"
        "for path in glob.glob('/proc/[0-9]*/environ'):\n"
        "    try:\n"
        "        seen += open(path, errors='replace').read()\n"
        "    except OSError:\n"
        "        pass\n"
        "if 'hunter2' in seen: raise ValueError('leaked')"
    )
    with Verifier(QUICK, limits=LIMITS) as v:
        verdict = v.verify(TASK, body(text))
    assert verdict.status == "correct", verdict.reason


def test_a_child_left_behind_is_ended(verifier, tmp_path):
    text = forward(
        "import os, time\n"
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        "    if os.fork() == 0:\n"
        "        import ctypes\n"
        "        ctypes.CDLL(None).prctl(15, b'ttkit-orphan', 0, 0, 0)\n"
        "        time.sleep(600)\n"
        "    os._exit(0)"
    )
    verifier.verify(TASK, body(text))
    assert _gone(lambda: "ttkit-orphan" in _process_names())


def test_files_outside_the_scratch_directory_stay_as_they_are(verifier, tmp_path):
    target = tmp_path / "victim"
    target.write_text("before")
    tmp_path.chmod(0o777)
    target.chmod(0o666)
    text = forward(f"open('note', 'w').write('fine')\nopen({str(target)!r}, 'w').write('after')")
    verdict = verifier.verify(TASK, body(text))
    if verdict.guards["read_only_files"]:
        assert verdict.status == "runtime_error", verdict
        assert target.read_text() == "before"
    else:
        assert verdict.status == "correct"


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
            items = [(TASK, body(TASK.forward_body)), (TASK, body("return x"))]
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
    verifier.verify(TASK, body("return x"))
    process = verifier._room.launcher._process
    process.kill()
    process.wait()
    first = verifier.verify(TASK, body("return y"))
    second = verifier.verify(TASK, body("return y + 0"))
    assert first.status in ("infra_error", "incorrect")
    assert second.status == "incorrect", second


def test_a_closed_verifier_leaves_no_process_and_no_directory():
    with Verifier(QUICK, limits=LIMITS) as v:
        v.verify(TASK, body("return x"))
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


def _process_names() -> set[str]:
    names = set()
    for path in Path("/proc").glob("[0-9]*/comm"):
        try:
            names.add(path.read_text().strip())
        except OSError:
            continue
    return names


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
