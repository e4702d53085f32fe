"""The judge's view of the workers: a warm referee, and the two sides of a pair.

A side is a process that runs one implementation. The same failure means different things: the
candidate's is its verdict, the reference's is the harness's (`infra_error`).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import signal
import statistics
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ttkit.errors import InfraError
from ttkit.verify.channel import MAX_BYTES, BadMessage, ChannelClosed, ChannelTimeout
from ttkit.verify.launcher import Worker, describe_exit
from ttkit.verify.protocol import Limits

REFEREE_SECONDS = 300.0
NULL_TRIALS = 15
REUSED = "it returns the same memory from several calls: a later one overwrites what it returned"
# How long a stopped process may take until its last thread has come to rest.
STOP_SECONDS = 2.0
_ids = random.SystemRandom()
# Pages of a CUDA context and its libraries that count as resident but are not the candidate's.
CUDA_RESIDENT_BYTES = 8 << 30


class Outcome(Exception):
    """Ends a session early: the status, the reason in one sentence, the flags."""

    def __init__(self, status: str, reason: str, *flags: str):
        reason = reason.encode("utf-8", "replace").decode()  # no table takes a lone surrogate
        super().__init__(reason)
        self.status, self.reason, self.flags = status, reason, flags


@dataclass
class RefereeHandle:
    """A warm referee as the judge holds it, with the descriptors of the memory that it shares with
    each side, by whether that is trusted.

    `twin` is a process that runs the reference for timing, kept where a process is dear (CUDA);
    `usual_ms` the shortest median time that the reference has taken beside a candidate.
    """

    worker: Worker
    info: dict[str, Any]
    fds: dict[bool, list[int]] = field(default_factory=dict)
    twin: Side | None = None
    usual_ms: float = math.inf
    stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def ask(self, op: str, **fields: Any) -> dict[str, Any]:
        """One request. Raises InfraError when the referee or the reference failed."""
        return ask_referee(self.worker, {"op": op, **fields})[0]


def ask_referee(worker: Worker, message: dict[str, Any]) -> tuple[dict[str, Any], list[int]]:
    """One request to a referee; the answer and descriptors. Raises InfraError when it failed."""
    try:
        worker.channel.send(message)
        reply, fds = worker.channel.recv(REFEREE_SECONDS)
    except ChannelTimeout:
        raise InfraError("the reference did not finish in time") from None
    except (ChannelClosed, BadMessage):
        end = describe_exit(worker.exit_status())
        raise InfraError(f"the reference's process failed: {end}") from None
    if "error" in reply:
        raise InfraError(f"the reference failed: {reply['text']}")
    return reply, fds


class Side:
    """One process that loads one implementation and runs it on request."""

    def __init__(
        self, worker: Worker, trusted: bool, device: str, limits: Limits, compiles: bool = False
    ):
        self.worker, self.trusted, self.device, self.limits = worker, trusted, device, limits
        self.compile_seconds = limits.compile_seconds if compiles else 0.0
        self.cpu_limit = limits.cpu_time(device, compiles)
        # Serves several candidates, so that its history is its own.
        self.shared = False
        self.cases = 0  # run on it, besides what was timed
        self.guards: dict[str, Any] = {}
        self.weights_loaded: list[str] = []
        self.weights_unclear: list[str] = []  # it has their values, more or less often than there
        self.changes: dict[str, str] = {}
        self.strides: list[list[int]] = []  # of the last output, -1 where they mean nothing
        self.reuses = False  # whether timed runs returned what earlier ones had returned
        # What every turn took besides the timed run, in seconds: the delivery and what follows it
        # by the judge's clock, CPU time from the answer to the end of the turn, and between turns.
        self.deliveries: list[float] = []
        self.endings: list[float] = []
        self.late_cpu: list[float] = []
        self.idle_cpu: list[float] = []
        # The timed runs themselves: wall time by the judge's clock, and the process's CPU time.
        self.run_seconds: list[float] = []
        self.run_cpu: list[float] = []
        self._cpu_at_end = math.nan
        # Seconds that all its answers together have taken, and may take.
        self.spent, self.budget = 0.0, math.inf
        # What it shares with the process that it was forked from.
        self._resident_at_first = resident_bytes(worker.pid)

    def load(self, info: dict[str, Any], fds: Sequence[int]) -> None:
        """Load the module and build the model, with the reference's seed and weights."""
        usual = self.limits.load_seconds if self.device == "cpu" else self.limits.load_seconds_cuda
        limit = max(usual, self.compile_seconds)
        try:
            hello, _ = self.worker.channel.recv(60.0)
        except (ChannelClosed, ChannelTimeout, BadMessage):
            raise InfraError("a worker process did not start") from None
        self.guards = hello.get("guards", {})
        message = {"op": "load"} | {k: info[k] for k in ("seed", "weights", "libraries")}
        message |= info["twin" if self.trusted else "candidate"]
        _, loaded = self.ask(message, "loading its module", limit, fds=fds)
        self.weights_loaded = self._names(loaded.get("weights_loaded"), info["weights"])
        self.weights_unclear = self._names(loaded.get("weights_unclear"), info["weights"])
        self.changes = _texts(loaded.get("changes"))

    def reweigh(self, limit: float) -> None:
        """Let it take the weights that now lie in the shared memory."""
        self.ask({"op": "reweigh"}, "taking other weights", limit)

    @staticmethod
    def _names(value: Any, known: Collection[str]) -> list[str]:
        """A candidate's answer taken as some of the names that are known."""
        return [name for name in known if isinstance(value, list) and name in value]

    def ask(
        self,
        message: dict[str, Any],
        doing: str,
        limit: float,
        *,
        timed: bool = False,
        fds: Sequence[int] = (),
    ) -> tuple[float, dict[str, Any]]:
        """One request: seconds by the judge's clock (0 unless `timed`) and the answer.

        Raises Outcome for whatever the candidate did wrong, InfraError for a trusted side.
        """
        channel = self.worker.channel
        begun = time.monotonic()
        # A number that cannot be guessed: an answer sent before its question is not one.
        message = message | {"id": _ids.getrandbits(48)}
        try:
            if channel.pending():
                raise BadMessage("it spoke without being asked")
            if timed:
                seconds, reply = channel.timed(message, limit)
            else:
                channel.send(message, fds)
                seconds, (reply, sent) = 0.0, channel.recv(limit, self._watch_memory)
                for fd in sent:
                    os.close(fd)
                if sent:
                    raise BadMessage("it sent file descriptors")
            if reply.get("id") != message["id"]:
                raise BadMessage("it is no answer to what was asked")
            # Parts of it travel on to the referee, written in our way and maybe longer so.
            if len(json.dumps(reply)) > MAX_BYTES // 2:
                raise BadMessage("it is too long")
        except (ChannelClosed, ChannelTimeout, BadMessage) as error:
            raise self._wrap(self._failed(error, doing, limit)) from None
        if "error" in reply:
            raise self._wrap(_reported(str(reply["error"]), str(reply.get("text"))[:500], doing))
        self.spent += time.monotonic() - begun
        if self.spent > self.budget and not self.trusted:
            text = f"its answers took more than {self.budget:.3g} s in all"
            raise Outcome("timeout", text, "time_limit")
        return seconds, reply

    def _wrap(self, outcome: Outcome) -> Exception:
        if self.trusted:
            return InfraError(f"the reference failed while it was timed: {outcome.reason}")
        return outcome

    def _failed(self, error: Exception, doing: str, limit: float) -> Outcome:
        if isinstance(error, ChannelTimeout):
            return Outcome("timeout", f"it took more than {limit:.3g} s {doing}", "time_limit")
        if isinstance(error, BadMessage):
            text = f"its process sent a forged answer {doing}: {error}"
            return Outcome("rejected", text, "forged_answer")
        end = describe_exit(self.worker.exit_status())
        if self.worker.lost:
            raise InfraError("the verifier's fork server died")
        # The first process of a pid namespace does not heed SIGXCPU; SIGKILL follows.
        if "SIGXCPU" in end or self.worker.cpu_seconds >= self.cpu_limit:
            return Outcome("timeout", f"it used up its CPU time {doing}", "cpu_limit")
        return Outcome("runtime_error", f"its process died {doing}: {end}", "crashed")

    def _watch_memory(self) -> None:
        """Limits of the system hold for each process (and on CUDA, whose driver reserves terabytes,
        not at all); this one holds for all that the worker started, together."""
        pid = self.worker.pid
        known = CUDA_RESIDENT_BYTES if self.device != "cpu" else self._resident_at_first
        used = sum(max(resident_bytes(p) - known, 0) for p in (pid, *descendants(pid)))
        if used > self.limits.memory_bytes:
            text = f"out of memory: it used {used >> 20} MiB"
            raise Outcome("runtime_error", text, "memory_limit")

    def call_limit(self, limit: float) -> float:
        """Seconds for a call: `limit`, or what a compiler takes, which may run in any of them."""
        return max(limit, self.compile_seconds)

    def bind(self, case: dict[str, Any], limit: float) -> None:
        """Tell it where its inputs and the place for its output lie in the shared memory."""
        message = {"op": "bind", "sets": case["sets"], "output": case["output"]}
        self.ask(message, "taking its inputs", limit)

    def freeze(self) -> None:
        """Stop every thread of the process: it can neither work nor disturb while others do."""
        self._signal(signal.SIGSTOP)

    def set_aside(self) -> None:
        """Freeze it for as long as others are timed; raises Outcome if that would not stop all."""
        self.freeze()
        self._look_for_children("between its turns")
        # A thread that is inside the kernel stops when it comes out, which a long write may delay.
        limit = time.monotonic() + STOP_SECONDS
        while not is_stopped(self.worker.pid):
            if time.monotonic() > limit and not self.trusted:
                text = "it goes on working after it was stopped"
                raise Outcome("rejected", text, "deferred_work")
            time.sleep(1e-4)

    def _look_for_children(self, when: str) -> None:
        # On both sides, so that their turns take the same course.
        if has_children(self.worker.pid) and not self.trusted:
            raise Outcome("rejected", f"a process of its own is alive {when}", "child_process")

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def hand_over(self, referee: RefereeHandle) -> None:
        """Let the referee take what was delivered while nobody can write to it."""
        self.freeze()
        referee.ask("take")
        self.thaw()

    def release(self) -> None:
        """Let it give back the device's memory that it keeps for its next run."""
        self.thaw()
        self.ask({"op": "release"}, "giving back memory", 60.0)

    def _signal(self, number: int) -> None:
        with contextlib.suppress(OSError):
            os.killpg(self.worker.pid, number)

    def turn(
        self,
        slots: list[int],
        which: int,
        pad: int,
        limit: float,
        referee: RefereeHandle | None,
        keys: Sequence[int] = (),
    ) -> tuple[float, dict[str, Any]]:
        """One timed run and the delivery of slot `which`: raw seconds of the run, the answer.

        The process is frozen while the `referee`, if the outputs are compared, covers the inputs
        before the delivery, and takes what was delivered: what is written later changes nothing.
        `pad` shifts the buffers of the run after this one (Runner.shift). With `keys` every
        slot is a run of its own, which begins by making its inputs readable; `which` has to be the
        last, and the seconds are the median without the first.
        """
        doing = "while it was timed"
        pid = self.worker.pid
        self.thaw()
        begun = process_cpu_seconds(pid)
        self.idle_cpu.append(begun - self._cpu_at_end)
        runs: list[dict[str, Any]] = [{"op": "run", "slots": slots}]
        if keys:
            singles = zip(slots, keys, strict=True)
            runs = [{"op": "run", "slots": [slot], "key": key} for slot, key in singles]
        times = [self.ask(run, doing, limit, timed=True)[0] for run in runs]
        seconds = statistics.median(times[1:] or times)
        # Frozen at once: whatever it does after its answer is no part of what was timed.
        answered = process_cpu_seconds(pid)
        if referee is not None:
            self.freeze()
        self._look_for_children("while it is timed")
        if referee is not None:
            referee.ask("cover")
            self.thaw()
        # The outputs of a run are numbered by their place in it.
        delivery = {"op": "deliver", "which": 0 if keys else slots.index(which)}
        late, delivered = self.ask(delivery, doing, limit, timed=True)
        if referee is not None:
            self.hand_over(referee)
        finish = {"op": "finish", "look": False, "pad": pad}
        ending, finished = self.ask(finish, doing, limit, timed=True)
        self.reuses |= bool(finished.get("reuses"))
        self.set_aside()
        self._cpu_at_end = process_cpu_seconds(pid)
        self.deliveries.append(late)
        self.endings.append(ending)
        self.late_cpu.append(self._cpu_at_end - answered)
        self.run_seconds.append(seconds)
        self.run_cpu.append(answered - begun)
        self.strides = _integers(delivered.get("strides"))
        return seconds, delivered

    def start_counting(self) -> None:
        """Forget what the warm-up recorded."""
        for record in self._records():
            record.clear()

    def uncount(self) -> None:
        """Forget what the last turn recorded."""
        for record in self._records():
            record.pop()

    def _records(self) -> tuple[list[float], ...]:
        """What every turn adds one figure to."""
        besides = self.deliveries, self.endings, self.late_cpu, self.idle_cpu
        return *besides, self.run_seconds, self.run_cpu

    def null_seconds(self) -> float:
        """Seconds of a run of nothing, the lower quartile: what the round trip surely costs.

        Too much taken off would make ratios larger than they are, too little only smaller.
        """
        times = []
        for _ in range(NULL_TRIALS):
            run = {"op": "run", "slots": []}
            times.append(self.ask(run, "while it was timed", 60.0, timed=True)[0])
        self._cpu_at_end = process_cpu_seconds(self.worker.pid)
        return statistics.quantiles(times, n=4)[0]


def _reported(kind: str, text: str, doing: str) -> Outcome:
    """What the candidate's own harness reported about it: never to its advantage."""
    if kind == "compile_error":
        return Outcome("compile_error", text, "compile")
    if kind == "output_type":
        return Outcome("rejected", text, kind)
    if kind in ("output_dtype", "output_shape", "output_structure"):
        return Outcome("incorrect", text, kind)
    if text.startswith("too much output"):
        return Outcome("runtime_error", f"it wrote more than it may ({doing})", "output_flood")
    check = "memory_limit" if text.startswith("out of memory") else "exception"
    return Outcome("runtime_error", f"{text} ({doing})", check)


def _texts(value: Any) -> dict[str, str]:
    """A candidate's answer taken as names and texts, whatever it is."""
    items = value.items() if isinstance(value, dict) else ()
    return {str(k)[:40]: str(v)[:300] for k, v in items}


def _integers(value: Any) -> list[list[int]]:
    """A candidate's answer taken as lists of integers; what it is else is no list at all."""
    rows = value if isinstance(value, list) else []
    return [[n for n in row if isinstance(n, int)] for row in rows if isinstance(row, list)]


def has_children(pid: int) -> bool:
    """Whether a process has live children, those that its descendants orphaned included.

    A worker is the first process of its namespace, or its orphans go to the zygote, which ends
    them.
    """
    return any(True for _ in _children(pid))


def is_stopped(pid: int) -> bool:
    """Whether no thread of a process runs any more: each is stopped, or the process is gone."""
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{thread}/stat") as file:
                if file.read().rpartition(")")[2].split()[0] not in "TtZXx":
                    return False
    return True


def descendants(pid: int) -> list[int]:
    """All live children of a process, their children and so on."""
    return [found for child in _children(pid) for found in (child, *descendants(child))]


def _children(pid: int) -> Iterator[int]:
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{thread}/children") as file:
                yield from map(int, file.read().split())


def process_cpu_seconds(pid: int) -> float:
    """CPU seconds of another process, all threads; nan when the system does not tell."""
    try:
        return time.clock_gettime((~pid << 3) | 2)
    except OSError:
        return math.nan


def resident_bytes(pid: int) -> int:
    """Resident memory of another process, 0 when it is gone."""
    try:
        with open(f"/proc/{pid}/statm") as file:
            return int(file.read().split()[1]) * 4096
    except (OSError, ValueError, IndexError):
        return 0
