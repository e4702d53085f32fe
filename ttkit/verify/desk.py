"""One thread's place at the verifier: its warm referees, and one candidate at a time."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import re
import shutil
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from ttkit.errors import InfraError
from ttkit.tasks import Task
from ttkit.verify.cache import normalised
from ttkit.verify.device import (
    EXCLUSIVE,
    SHARED,
    DeviceLock,
    contention_record,
    pinned,
    share_cores,
    stolen_seconds,
)
from ttkit.verify.launcher import Launcher, Worker
from ttkit.verify.limits import FIRST_UID, OUTPUT_NAME
from ttkit.verify.protocol import Limits, Protocol
from ttkit.verify.session import Session
from ttkit.verify.sides import Outcome, RefereeHandle, Side, ask_referee
from ttkit.verify.verdict import Verdict

WARM_REFEREES = 2
# Words of a source that may take long to compile; who writes them in vain only waits longer.
COMPILERS = r"\b(compile|triton|load_inline|cpp_extension|jit|cupy|numba|tilelang|cutlass)\b"
_user_ids = itertools.count(FIRST_UID + int.from_bytes(os.urandom(3), "little"))


class Room:
    """What all desks of a verifier share: settings, fork server, scratch folder, ceilings."""

    def __init__(self, protocol: Protocol, device: str, limits: Limits):
        self.protocol, self.device, self.limits = protocol, device, limits
        self.launcher = Launcher(device)
        self._lock = threading.Lock()
        self.ceiling: dict[str, float] | None = None

    def scratch_root(self) -> str:
        """The folder of all scratch directories, made when first needed."""
        return self.launcher.home()

    def measure_ceiling(self, referee: Worker) -> None:
        """Measure the device's read rates, once, by the first referee."""
        with self._lock:
            if self.ceiling is None:
                self.ceiling = ask_referee(referee, {"op": "ceiling"})[0]["ceiling"]

    def close(self) -> None:
        """End the fork server with all its workers and remove the scratch folder."""
        self.launcher.close()


class Desk:
    """Verifies one candidate after another for one thread; `number` counts a verifier's desks.

    Under an exclusive protocol desks load and check side by side, each on a core of its own, and
    time one after the other. Where there is no core for each, all they do is done alone: on one
    core, and on CUDA, where what a frozen process has launched runs on.
    """

    def __init__(self, room: Room, number: int = 0):
        self.room = room
        self.referees: OrderedDict[str, RefereeHandle] = OrderedDict()
        # Candidates that are contended on purpose spread over all cores.
        alone = room.protocol.exclusive
        self.cores, self.judge_cores = share_cores(room.device, number) if alone else ([], set())
        self._checking = SHARED if self.cores else EXCLUSIVE
        self._lock = DeviceLock(room.device) if alone else None

    def verify(self, task: Task, source: str) -> Verdict:
        return next(self.verify_several(task, [source]))

    def verify_several(self, task: Task, sources: Sequence[str]) -> Iterator[Verdict]:
        """Verdicts on candidates of one task, in order.

        All are loaded (compiled, their device context made) side by side before the first of them
        is checked and timed, so that no loading ever overlaps a timing; whoever waits is frozen.
        The device's lock is held at every `yield`.
        """
        with ExitStack() as stack:
            if self._lock is not None:
                stack.callback(self._lock.release)
            self._hold(self._checking)
            started = self._clock()
            try:
                referee = self._referee(task)
                referee.ask("renew")
            except (InfraError, OSError) as error:
                self._drop(task.sha256)
                for _ in sources:
                    yield self._verdict(Verdict("infra_error", _why(error)), started)
                return
            candidates = [Candidate(self, task, source, referee) for source in sources]
            for candidate in candidates:
                stack.enter_context(candidate)
            if len(candidates) > 1:
                with ThreadPoolExecutor(len(candidates)) as pool:
                    list(pool.map(Candidate.load, candidates))
            loading = (self._clock() - started) / len(candidates)
            waiting = list(sources)
            for candidate in candidates:
                waiting.pop(0)
                verdict = self._judge(task, referee, candidate, self._clock() - loading)
                candidate.close()
                yield verdict
                if self.referees.get(task.sha256) is not referee:
                    break
        # A referee that failed took what the others had loaded with it: they start anew.
        if waiting:
            yield from self.verify_several(task, waiting)

    def _hold(self, mode: int) -> None:
        """Wait for the device's lock in `mode`, and hold it from then on."""
        if self._lock is not None:
            self._lock.hold(mode)

    def _give_way(self, *sides: Side) -> None:
        """Between two steps of a check, let those go first who wait to time."""
        if self.cores and self._lock is not None and self._lock.wanted():
            for side in sides:
                side.set_aside()
            self._lock.release()
            self._lock.hold(SHARED)
            for side in sides:
                side.thaw()

    def _clock(self) -> float:
        """Seconds on a clock that stands still while the device's lock is waited for."""
        return time.monotonic() - (self._lock.waited if self._lock is not None else 0.0)

    def _judge(
        self, task: Task, referee: RefereeHandle, candidate: Candidate, started: float
    ) -> Verdict:
        session: Session | None = None
        contention, stolen = contention_record(self.room.device), stolen_seconds()
        record: dict[str, Any] = {"contention": contention}
        try:
            with ExitStack() as stack:
                if referee.twin is not None:
                    referee.twin.release()
                referee.ask("wipe")
                side = candidate.side()
                session = Session(
                    referee, side, self.room.protocol, self.room.limits, self._give_way
                )
                session.check_values()
                # Frozen, it cannot meddle with the reference, nor slow it down.
                side.set_aside()
                twin = referee.twin or stack.enter_context(self._twin(task, referee))
                self._measure(session, twin)
            candidate.close()  # what it holds of the device's memory the next launch may need
            self._relaunch(candidate.source, task, referee, session)
            verdict = Verdict("correct", _describe(session.record))
        except Outcome as outcome:
            verdict = Verdict(outcome.status, outcome.reason, flags=outcome.flags)
        except (InfraError, OSError) as error:
            self._drop(task.sha256)
            verdict = Verdict("infra_error", _why(error))
        if session is not None:
            record.update(session.record, checks=tuple(session.checks))
        record["guards"] = candidate.guards
        if not math.isnan(taken := stolen_seconds() - stolen):
            contention["stolen_seconds"] = round(taken, 2)
        return self._verdict(replace(verdict, **record), started)

    def _measure(self, session: Session, twin: Side) -> None:
        """Time the session's candidate, which is set aside, beside `twin`, alone on the device, and
        look at it once more."""
        twin.thaw()
        session.prepare(twin)
        sides = session.candidate, twin
        # Nothing that waits may disturb what another desk times meanwhile.
        for side in sides:
            side.set_aside()
        self._hold(EXCLUSIVE)
        with pinned(self.judge_cores):
            session.measure(twin)
        for side in sides:
            side.set_aside()
        self._hold(self._checking)
        session.candidate.thaw()
        session.look_again()

    def _verdict(self, verdict: Verdict, started: float) -> Verdict:
        room = self.room
        seconds = self._clock() - started
        return replace(verdict, protocol=room.protocol.name, device=room.device, seconds=seconds)

    def _relaunch(self, source: str, task: Task, referee: RefereeHandle, session: Session) -> None:
        """Measure a narrow winner, and what may be one, again, both sides in fresh processes, while
        these are ahead, too.

        Two processes that run the same code may differ by a factor that lasts as long as they live:
        a standard deviation of 5 % for a product of large matrices on an H100. No number of pairs
        averages that out; other processes do. (On CPU it is less than 1 %, since every run's
        memory lies elsewhere.) An unchanged program is ahead in every second launch, whatever the
        noise, and in all of them in one of 64 runs at most; when it is not, nothing has to be
        launched any more (`timing.launch_interval`). So what the first had no time to decide may be
        launched again as well: on busy cores one launch often did not tell a program 1.1 times as
        fast from an unchanged one.
        """
        protocol = self.room.protocol
        if not (protocol.relaunches and session.narrow()):
            return
        for number in range(protocol.relaunches):
            referee.ask("wipe")
            with ExitStack() as stack:
                candidate, twin = self._launch(source, task, referee, number, stack)
                again = Session(
                    referee, candidate, protocol.again, self.room.limits, self._give_way
                )
                candidate.thaw()
                again.check_values(few=True)  # or it could tell that it is not the first
                candidate.set_aside()
                self._measure(again, twin)
            session.take_in(again)
            if session.concluded():
                return

    def _launch(
        self, source: str, task: Task, referee: RefereeHandle, number: int, stack: ExitStack
    ) -> tuple[Side, Side]:
        """Fresh processes of the candidate and of the reference, loaded and set aside.

        Each comes first every other time; on CUDA, where a start takes a third of a second, they
        come side by side.
        """

        def start(trusted: bool) -> Side:
            if trusted and referee.twin is not None:
                side = self._keep_twin(task, referee)
            elif trusted:
                side = stack.enter_context(self._twin(task, referee))
            else:
                side = stack.enter_context(self._side(source, task, trusted=False))
                side.load(referee.info, referee.fds[False])
            side.set_aside()
            return side

        if referee.twin is not None:
            with ThreadPoolExecutor(2) as pool:
                twin, candidate = pool.map(start, (True, False))
        elif number % 2 == 0:
            twin, candidate = start(True), start(False)
        else:
            candidate, twin = start(False), start(True)
        return candidate, twin

    @contextlib.contextmanager
    def _side(self, source: str, task: Task, trusted: bool) -> Iterator[Side]:
        """A fresh process for one implementation, with its scratch directory, until the end."""
        directory = self._directory({"task.py": task.code, "candidate.py": normalised(source)})
        worker = None
        try:
            compiles = re.search(COMPILERS, source) is not None
            worker = self._spawn("candidate", directory, compiles)
            yield Side(worker, trusted, self.room.device, self.room.limits, compiles)
        finally:
            if worker is not None:
                worker.end()
            shutil.rmtree(directory, ignore_errors=True)

    @contextlib.contextmanager
    def _twin(self, task: Task, referee: RefereeHandle) -> Iterator[Side]:
        """The reference in a process exactly like a candidate's."""
        source = f"{task.code}\n\n\nclass ModelNew(Model):\n    pass\n"
        with self._side(source, task, trusted=True) as side:
            side.load(referee.info, referee.fds[True])
            yield side

    def _keep_twin(self, task: Task, referee: RefereeHandle) -> Side:
        """A new twin in the place of the one that the referee keeps, if it has one."""
        referee.stack.close()
        referee.twin = referee.stack.enter_context(self._twin(task, referee))
        referee.twin.shared = True
        return referee.twin

    def _referee(self, task: Task) -> RefereeHandle:
        known = self.referees.get(task.sha256)
        if known is not None:
            self.referees.move_to_end(task.sha256)
            return known
        keep = WARM_REFEREES if self.room.device == "cpu" else 1
        while len(self.referees) >= keep:
            self._drop(next(iter(self.referees)))
        directory = self._directory({"task.py": task.code})
        worker = self._spawn("referee", directory)
        try:
            if self.room.ceiling is None:
                self._hold(EXCLUSIVE)
                self.room.measure_ceiling(worker)
                self._hold(self._checking)
            load = {
                "op": "load",
                "flush_bytes": self.room.protocol.flush_bytes,
                "ceiling": self.room.ceiling,
            }
            info, fds = ask_referee(worker, load)
            if info["unusable"]:
                raise InfraError(info["unusable"])
            half = len(fds) // 2
            handle = RefereeHandle(worker, info, {False: fds[:half], True: fds[half:]})
            if self.room.device != "cpu":
                self._keep_twin(task, handle)
            self.referees[task.sha256] = handle
        except BaseException:
            worker.end()
            self.referees.pop(task.sha256, None)
            raise
        finally:
            shutil.rmtree(directory, ignore_errors=True)
        return handle

    def _drop(self, key: str) -> None:
        handle = self.referees.pop(key, None)
        if handle is not None:
            handle.stack.close()
            handle.worker.end()
            for fd in itertools.chain(*handle.fds.values()):
                os.close(fd)

    def _directory(self, files: dict[str, str]) -> str:
        directory = tempfile.mkdtemp(dir=self.room.scratch_root())
        for name, text in files.items():
            Path(directory, name).write_text(text, encoding="utf-8", errors="surrogatepass")
        return directory

    def _spawn(self, role: str, directory: str, compiles: bool = False) -> Worker:
        v = self.room
        launcher, limits, cpu = v.launcher, v.limits, v.device == "cpu"
        launcher.prepare()
        # The driver's IPC between processes of different users or pid namespaces is not something
        # to rely on, so a candidate on CUDA keeps the user id, without any capability.
        uid = next(_user_ids) if role == "candidate" and cpu and launcher.uid_usable else None
        if uid is not None:
            for path in (Path(directory), *Path(directory).iterdir()):
                os.chown(path, uid, uid)
        caches = ("HOME", "TMPDIR", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
        environment = {name: directory for name in (*caches, "TORCH_EXTENSIONS_DIR")}
        # A pool of compiling processes would outlive the compilation.
        environment["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
        if role == "referee":
            # Small tensors that are kept shall not lie in the memory of large ones, and hold it.
            environment["PYTORCH_ALLOC_CONF"] = "max_split_size_mb:256"
        spec = {
            "role": role,
            # torch.cuda.set_device wants a number.
            "device": "cuda:0" if v.device == "cuda" else v.device,
            "directory": directory,
            "cores": self.cores,
            "environment": environment,
            "gpu_memory_fraction": limits.gpu_memory_fraction,
            "pid_namespace": role == "candidate" and cpu,
            "limits": {
                "uid": uid,
                "cpu_only": cpu,
                "cpu_seconds": limits.cpu_time(v.device, compiles),
                "memory_bytes": limits.memory_bytes if cpu else 0,
                "processes": limits.processes,
                "open_files": limits.open_files,
                "file_bytes": limits.file_bytes if cpu else limits.file_bytes_cuda,
                "scratch_bytes": 2 * (limits.file_bytes if cpu else limits.file_bytes_cuda),
            },
        }
        with open(os.path.join(directory, OUTPUT_NAME), "wb") as output:
            return launcher.spawn(spec, output.fileno())

    def close(self) -> None:
        for key in list(self.referees):
            self._drop(key)
        if self._lock is not None:
            self._lock.close()


class Candidate:
    """One candidate's process; a context manager. What loading failed with is kept until asked."""

    def __init__(self, desk: Desk, task: Task, source: str, referee: RefereeHandle):
        self.source = source
        self._desk, self._task, self._referee = desk, task, referee
        self._stack = ExitStack()
        self._side: Side | None = None
        self._failure: Exception | None = None
        self.guards: dict[str, Any] = {}  # known once its process has started

    def __enter__(self) -> Candidate:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._stack.close()

    def load(self) -> None:
        """Start the process, let it load, freeze it. Never raises."""
        try:
            open_side = self._desk._side(self.source, self._task, trusted=False)
            side = self._stack.enter_context(open_side)
            try:
                side.load(self._referee.info, self._referee.fds[False])
            finally:
                self.guards = side.guards
            side.set_aside()
            self._side = side
        except (Outcome, InfraError, OSError) as error:
            self._failure = error

    def side(self) -> Side:
        """The loaded side, ready to run. Raises what loading failed with."""
        if self._side is None and self._failure is None:
            self.load()
        if self._failure is not None:
            raise self._failure
        assert self._side is not None
        self._side.thaw()
        return self._side


def _why(error: Exception) -> str:
    return str(error) if isinstance(error, InfraError) else f"the system refused: {error}"


def _describe(record: dict[str, Any]) -> str:
    low, high = record.get("speedup_lo"), record.get("speedup_hi")
    figure = f"correct, {record['speedup']:.3f}x"
    if low is None or high is None:
        return f"{figure} by {record['n_pairs']} runs of each (no interval under this protocol)"
    return f"{figure} (95 % interval {low:.3f} to {high:.3f}, {record['n_pairs']} pairs)"
