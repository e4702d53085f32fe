"""The judge's view of the workers: a warm referee, and the two sides of a pair.

A side is a process that runs one implementation. The same failure means different things: the
candidate's is its verdict, the reference's is the harness's (`infra_error`).
"""

from __future__ import annotations

import contextlib
import math
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ttkit.errors import InfraError
from ttkit.verify.channel import BadMessage, ChannelClosed, ChannelTimeout
from ttkit.verify.launcher import Worker, describe_exit
from ttkit.verify.protocol import Limits

REFEREE_SECONDS = 300.0
NULL_TRIALS = 15
# Pages of a CUDA context and its libraries that count as resident but are not the candidate's.
CUDA_RESIDENT_BYTES = 8 << 30


class Outcome(Exception):
    """Ends a session early: the status, the reason in one sentence, the flags."""

    def __init__(self, status: str, reason: str, *flags: str):
        super().__init__(reason)
        self.status, self.reason, self.flags = status, reason, flags


@dataclass
class RefereeHandle:
    """A warm referee as the judge holds it, with the descriptors of the memory it shares.

    `twin` is a process that runs the reference for timing, kept where a process is dear (CUDA).
    """

    worker: Worker
    info: dict[str, Any]
    fds: dict[str, int] = field(default_factory=dict)
    twin: Side | None = None
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

    def __init__(self, worker: Worker, trusted: bool, device: str, limits: Limits):
        self.worker, self.trusted, self.device, self.limits = worker, trusted, device, limits
        # Serves several candidates, so that its history is its own.
        self.shared = False
        self.guards: dict[str, Any] = {}
        self.deliveries: list[float] = []
        self.strides: list[Any] = []
        self.delivery_cpu: list[float] = []
        self.idle_cpu: list[float] = []
        self._cpu_at_end = math.nan

    def load(self, info: dict[str, Any], fds: Sequence[int]) -> None:
        """Load the module and build the model, with the reference's seed and weights."""
        limit = self.limits.load_seconds if self.device == "cpu" else self.limits.load_seconds_cuda
        try:
            hello, _ = self.worker.channel.recv(60.0)
        except (ChannelClosed, ChannelTimeout, BadMessage):
            raise InfraError("a worker process did not start") from None
        self.guards = hello.get("guards", {})
        fields = ("input_size", "input_handle", "output_size", "output_handle")
        message = {"op": "load", **{k: info[k] for k in fields}}
        message |= {k: info[k] for k in ("seed", "weights", "weights_size")}
        self.ask(message, "loading its module", limit, fds=fds)

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
        try:
            if timed:
                seconds, reply = channel.timed(message, limit)
            else:
                channel.send(message, fds)
                watch = None if self.device == "cpu" else self._watch_memory
                seconds, (reply, sent) = 0.0, channel.recv(limit, watch)
                for fd in sent:
                    os.close(fd)
                if sent:
                    raise BadMessage("it sent file descriptors")
        except (ChannelClosed, ChannelTimeout, BadMessage) as error:
            raise self._wrap(self._failed(error, doing, limit)) from None
        if "error" in reply:
            raise self._wrap(_reported(str(reply["error"]), str(reply.get("text"))[:500], doing))
        return seconds, reply

    def _wrap(self, outcome: Outcome) -> Exception:
        if self.trusted:
            return InfraError(f"the reference failed while it was timed: {outcome.reason}")
        return outcome

    def _failed(self, error: Exception, doing: str, limit: float) -> Outcome:
        if isinstance(error, ChannelTimeout):
            return Outcome("timeout", f"it took more than {limit:.3g} s {doing}")
        if isinstance(error, BadMessage):
            text = f"its process sent a forged answer {doing}: {error}"
            return Outcome("rejected", text, "forged_answer")
        end = describe_exit(self.worker.exit_status())
        if self.worker.lost:
            raise InfraError("the verifier's fork server died")
        if "SIGXCPU" in end:
            return Outcome("timeout", f"it used up its CPU time {doing}")
        return Outcome("runtime_error", f"its process died {doing}: {end}")

    def _watch_memory(self) -> None:
        # On CUDA no address-space limit is possible: the driver reserves terabytes.
        used = resident_bytes(self.worker.pid)
        if used > self.limits.memory_bytes + CUDA_RESIDENT_BYTES:
            raise Outcome("runtime_error", f"out of memory: it used {used >> 30} GiB")

    def turn(
        self, slots: list[int], which: int, pad: int, limit: float
    ) -> tuple[float, dict[str, Any]]:
        """One timed run and the delivery of output `which`: raw seconds of the run, the answer.

        `pad` shifts the buffers of the run after this one (worker.Runner.forget).
        """
        doing = "while it was timed"
        pid = self.worker.pid
        self.idle_cpu.append(process_cpu_seconds(pid) - self._cpu_at_end)
        seconds, _ = self.ask({"op": "run", "slots": slots}, doing, limit, timed=True)
        delivery = {"op": "deliver", "which": which}
        ran = process_cpu_seconds(pid)
        late, delivered = self.ask(delivery, doing, limit, timed=True)
        self.delivery_cpu.append(process_cpu_seconds(pid) - ran)
        self.ask({"op": "finish", "aliases": False, "pad": pad}, doing, limit)
        self._cpu_at_end = process_cpu_seconds(pid)
        self.deliveries.append(late)
        self.strides = delivered.get("strides", [])
        return seconds, delivered

    def start_counting(self) -> None:
        """Forget what the warm-up recorded."""
        self.deliveries.clear()
        self.delivery_cpu.clear()
        self.idle_cpu.clear()

    def null_seconds(self) -> float:
        """Seconds of a run of nothing, the lower quartile: what the round trip surely costs.

        Too much taken off would make ratios larger than they are, too little only smaller.
        """
        times = []
        for _ in range(NULL_TRIALS):
            run = {"op": "run", "slots": []}
            times.append(self.ask(run, "while it was timed", 60.0, timed=True)[0])
        return statistics.quantiles(times, n=4)[0]


def _reported(kind: str, text: str, doing: str) -> Outcome:
    """What the candidate's own harness reported about it: never to its advantage."""
    if kind == "compile_error":
        return Outcome("compile_error", text)
    if kind == "output_type":
        return Outcome("rejected", text, kind)
    if kind in ("output_dtype", "output_shape", "output_structure"):
        return Outcome("incorrect", text, kind)
    if text.startswith("too much output"):
        return Outcome("runtime_error", f"it wrote more than it may ({doing})", "output_flood")
    return Outcome("runtime_error", f"{text} ({doing})")


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
