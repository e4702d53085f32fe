"""Candidates checked side by side, timed one after the other: the lock, and who does what when."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from ttkit.prompts import candidate_source
from ttkit.tasks import Task
from ttkit.verify import PROTOCOLS, Limits, Verifier
from ttkit.verify.device import EXCLUSIVE, SHARED, DeviceLock
from ttkit.verify.race import Race
from ttkit.verify.session import Session
from ttkit.verify.sides import Side, process_cpu_seconds

CODE = """
import torch
import torch.nn as nn

class Model(nn.Module):
    def forward(self, x):
        return torch.softmax(torch.sin(x) * {factor}, dim=1)

def get_inputs():
    return [torch.randn(128, 256)]

def get_init_inputs():
    return []
"""
TASKS = [Task("file", 0, n, f"softmax {n}", CODE.format(factor=n + 2)) for n in range(2)]
QUICK = dataclasses.replace(PROTOCOLS["reward"], looks=(10,), warmup=1, seconds=1.0)
LIMITS = Limits(run_seconds=3.0)
SECONDS = 60.0  # for what comes at once unless something is wrong

two_cores = pytest.mark.skipif(
    len(os.sched_getaffinity(0)) < 2, reason="on one core nothing is checked side by side"
)


@pytest.fixture(autouse=True)
def lock_of_our_own(tmp_path, monkeypatch):
    """Or other verifiers on this machine would decide what waits for what."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def right(task: Task, number: int) -> tuple[Task, str]:
    return task, candidate_source(task, f"_ = {number}\n{task.forward_body}")


# The lock ---------------------------------------------------------------------------------------


def holding(lock: DeviceLock, mode: int) -> threading.Thread:
    """A thread that takes `lock` in `mode` and ends."""
    thread = threading.Thread(target=lock.hold, args=(mode,))
    thread.start()
    thread.join(0.3)
    return thread


def test_the_lock_is_shared_by_checks_and_excludes_them_from_a_timing():
    with DeviceLock("cpu") as one, DeviceLock("cpu") as two, DeviceLock("cpu") as other:
        one.hold(SHARED)
        assert not holding(two, SHARED).is_alive()
        with DeviceLock("cuda:0") as elsewhere:
            assert not holding(elsewhere, EXCLUSIVE).is_alive()
        timing = holding(other, EXCLUSIVE)
        one.release()
        timing.join(0.3)
        assert timing.is_alive(), "the second still checks"
        two.release()
        timing.join(SECONDS)
        assert not timing.is_alive()
        checking = holding(one, SHARED)
        assert checking.is_alive()
        other.release()
        checking.join(SECONDS)
        assert not checking.is_alive()


def test_checks_do_not_pass_by_who_waits_to_time():
    with DeviceLock("cpu") as one, DeviceLock("cpu") as two, DeviceLock("cpu") as other:
        one.hold(SHARED)
        timing = holding(other, EXCLUSIVE)
        checking = holding(two, SHARED)
        assert timing.is_alive() and checking.is_alive()
        one.release()
        timing.join(SECONDS)
        assert not timing.is_alive() and checking.is_alive()
        other.release()
        checking.join(SECONDS)
        assert not checking.is_alive()


def test_two_who_check_and_both_want_to_time_do_not_wait_for_each_other():
    with DeviceLock("cpu") as one, DeviceLock("cpu") as two:
        one.hold(SHARED)
        two.hold(SHARED)
        first = holding(one, EXCLUSIVE)
        second = holding(two, EXCLUSIVE)
        first.join(SECONDS)
        assert not first.is_alive() and second.is_alive()
        one.release()
        second.join(SECONDS)
        assert not second.is_alive()


HOLDER = """
import sys
from ttkit.verify.device import EXCLUSIVE, SHARED, DeviceLock
lock = DeviceLock("cpu")
lock.hold({"shared": SHARED, "exclusive": EXCLUSIVE}[sys.argv[1]])
print("held", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize(("theirs", "mode", "waits"), [
    ("shared", SHARED, False), ("shared", EXCLUSIVE, True), ("exclusive", SHARED, True),
])  # fmt: skip
def test_the_lock_holds_across_processes_and_ends_with_them(tmp_path, theirs, mode, waits):
    other = subprocess.Popen(
        [sys.executable, "-c", HOLDER, theirs],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert other.stdout.readline() == "held\n"
    with DeviceLock("cpu") as lock:
        thread = holding(lock, mode)
        assert thread.is_alive() == waits
        other.kill()
        other.communicate()
        thread.join(SECONDS)
        assert not thread.is_alive()


# Two desks --------------------------------------------------------------------------------------


@two_cores
def test_checks_overlap_each_other_and_never_a_timing(monkeypatch):
    spans: dict[str, list[tuple[float, float, int]]] = {"check": [], "time": [], "give": []}
    # Broken, and so an error, unless the first candidates of both tasks are checked side by side.
    together, firsts = threading.Barrier(2), set()

    def recorded(cls, method, kind):
        original = getattr(cls, method)

        def wrapper(self, *args, **kwargs):
            started = time.monotonic()
            try:
                if kind == "check" and threading.get_ident() not in firsts:
                    firsts.add(threading.get_ident())
                    together.wait(SECONDS)
                return original(self, *args, **kwargs)
            finally:
                spans[kind].append((started, time.monotonic(), threading.get_ident()))

        monkeypatch.setattr(cls, method, wrapper)

    recorded(Session, "_run_case", "check")
    recorded(Race, "run", "time")
    given = []

    def give(index, verdict):
        started = time.monotonic()
        time.sleep(0.02)
        given.append((index, verdict))
        spans["give"].append((started, time.monotonic(), threading.get_ident()))

    wrong = [(task, candidate_source(task, "return x")) for task in TASKS]
    items = [wrong[0], *(right(task, n) for task in TASKS for n in range(4)), wrong[1], wrong[0]]
    with Verifier(QUICK, limits=LIMITS) as verifier:
        verdicts = verifier.verify_many(items, give)
    # A busy machine may cost a right one its timing, never its correctness.
    refused = [v.status not in ("correct", "infra_error") for v in verdicts]
    assert refused == [True, *[False] * 8, True, True], [v.reason for v in verdicts]
    assert sorted(i for i, _ in given) == list(range(len(items)))
    assert all(verdicts[i] is v for i, v in given)
    assert {thread for *_, thread in spans["give"]} == {threading.get_ident()}
    assert len(spans["check"]) > 10 * len(QUICK.cases) and len(spans["time"]) >= 8
    assert len({thread for *_, thread in spans["time"]}) == 2
    for n, (started, ended, _) in enumerate(spans["time"]):
        others = [*spans["check"], *spans["give"], *spans["time"][:n]]
        assert not any(low < ended and started < high for low, high, _ in others)


SPINNING = """
import threading

def spin():
    while True:
        pass

class ModelNew(Model):
    def __init__(self):
        super().__init__()
        threading.Thread(target=spin, daemon=True).start()
    def forward(self, x):
        return torch.sin(x).mul_({factor}).softmax(dim=1)
"""


@two_cores
def test_who_waits_while_another_is_timed_uses_no_cpu_time(monkeypatch):
    prepare, run = Session.prepare, Race.run
    # Both first candidates come to the lock at the same time: one is timed, the other waits.
    together = threading.Barrier(2)
    sides: list[Side] = []
    used = []

    def prepare_both(self, reference):
        prepare(self, reference)
        sides.extend((self.candidate, reference))
        together.wait(SECONDS)

    def watched(self):
        mine = (self.candidate, self.reference)
        others = [side.worker.pid for side in sides if side not in mine]
        before = [process_cpu_seconds(pid) for pid in others]
        try:
            run(self)
        finally:
            spent = process_cpu_seconds(self.candidate.worker.pid)
            used.append(([process_cpu_seconds(pid) for pid in others], before, spent))

    monkeypatch.setattr(Session, "prepare", prepare_both)
    monkeypatch.setattr(Race, "run", watched)
    with Verifier(QUICK, limits=LIMITS) as verifier:
        found = verifier.verify_many(
            [(task, task.code + SPINNING.format(factor=n + 2)) for n, task in enumerate(TASKS)]
        )
    assert len(used) == 2, found
    after, before, spent = used[0]
    assert len(after) == 2 and before[0] > 0
    # It may take a moment until a signal has stopped every thread.
    assert after == pytest.approx(before, abs=1e-3)
    assert spent > 0.05, "the one that was timed did spin"


FORKING = """
import os

class ModelNew(Model):
    def forward(self, x):
        if not hasattr(self, "child"):
            self.child = os.fork()
            if self.child == 0:
                os.setsid()
                while True:
                    pass
        return super().forward(x)
"""


def test_a_process_that_would_not_be_frozen_with_its_candidate_is_found_before_it_waits(
    monkeypatch,
):
    timed = []
    monkeypatch.setattr(Race, "run", lambda self: timed.append(self))
    loose = dataclasses.replace(QUICK, variations=())
    with Verifier(loose, limits=LIMITS) as verifier:
        verdict = verifier.verify(TASKS[0], TASKS[0].code + FORKING)
    assert (verdict.status, verdict.flags) == ("rejected", ("child_process",)), verdict.reason
    assert not timed


@two_cores
def test_a_check_gives_way_between_two_cases_to_who_wants_to_time(monkeypatch):
    run_case, events, used = Session._run_case, [], []
    threads = []

    def time_alone(pid):
        with DeviceLock("cpu") as lock:
            lock.hold(EXCLUSIVE)
            events.append("timing")
            before = process_cpu_seconds(pid)
            time.sleep(0.3)
            used.append(process_cpu_seconds(pid) - before)

    def recorded(self, side, *args, **kwargs):
        result = run_case(self, side, *args, **kwargs)
        events.append("case")
        if not threads:
            threads.append(threading.Thread(target=time_alone, args=(side.worker.pid,)))
            threads[0].start()
            with DeviceLock("cpu") as lock:
                while not lock.wanted():
                    time.sleep(0.01)
        return result

    monkeypatch.setattr(Session, "_run_case", recorded)
    with Verifier(QUICK, limits=LIMITS) as verifier:
        verifier.verify(TASKS[0], TASKS[0].code + SPINNING.format(factor=2))
    threads[0].join()
    assert events[:3] == ["case", "timing", "case"]
    assert used[0] < 0.05, "the candidate was not frozen"


SLOW = """
import torch
import torch.nn as nn

class Model(nn.Module):
    def forward(self, x):
        out = torch.zeros_like(x)
        for _ in range(20):
            out = out + torch.sin(x)
        return out

def get_inputs():
    return [torch.randn(128, 256)]

def get_init_inputs():
    return []
"""


@two_cores
def test_nothing_but_the_timing_is_done_alone_when_a_winner_is_measured_again(monkeypatch):
    events = []

    def noted(owner, name, text):
        original = getattr(owner, name)

        def call(self, *args, **kwargs):
            events.append(text or {SHARED: "shared", EXCLUSIVE: "alone"}[args[0]])
            return original(self, *args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    noted(DeviceLock, "hold", "")
    noted(Session, "check_values", "checks")
    noted(Race, "run", "timing")
    noted(Session, "look_again", "another look")
    again = dataclasses.replace(QUICK, relaunches=1, relaunch_below=1e9)
    task = Task("file", 0, 0, "twenty sines", SLOW)
    with Verifier(again, limits=LIMITS) as verifier:
        verdict = verifier.verify(task, candidate_source(task, "return torch.sin(x) * 20"))
    assert verdict.correct and "relaunched" in verdict.checks, verdict
    launch = ["checks", "alone", "timing", "shared", "another look"]
    assert events[events.index("checks") :] == [*launch, *launch]


@two_cores
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interruption_ends_all_desks_with_their_processes(error):
    servers = []

    def fails(index, verdict):
        servers.append(verifier._room.launcher._process.pid)
        raise error("enough")

    items = [right(task, n) for task in TASKS for n in range(8)]
    with Verifier(QUICK, limits=LIMITS) as verifier:
        threads = threading.active_count()
        with pytest.raises(error, match="enough"):
            verifier.verify_many(items, fails)
        assert len(servers) == 1 and not Path(f"/proc/{servers[0]}").exists()
        assert threading.active_count() == threads
        assert not list(Path(tempfile.gettempdir()).glob("ttkit-verify-*"))
        assert verifier.verify(*items[0]).correct, "it can be used again"
