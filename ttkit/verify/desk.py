"""One thread's place at the verifier: its warm referees, and one candidate at a time."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from ttkit.errors import InfraError
from ttkit.tasks import Task
from ttkit.verify.device import contention_record, device_lock, pinned, share_cores
from ttkit.verify.launcher import Launcher, Worker
from ttkit.verify.limits import FIRST_UID, OUTPUT_NAME
from ttkit.verify.protocol import Limits, Protocol
from ttkit.verify.session import Session
from ttkit.verify.sides import Outcome, RefereeHandle, Side, ask_referee
from ttkit.verify.verdict import Verdict

WARM_REFEREES = 4
FDS = ("inputs", "output", "twin_output", "weights")
CANDIDATE_FDS = ("inputs", "output", "weights")
TWIN_FDS = ("inputs", "twin_output", "weights")
_user_ids = itertools.count(FIRST_UID + int.from_bytes(os.urandom(3), "little"))


class Room:
    """What all desks of a verifier share: settings, fork server, scratch folder, ceilings."""

    def __init__(self, protocol: Protocol, device: str, limits: Limits):
        self.protocol, self.device, self.limits = protocol, device, limits
        self.launcher = Launcher()
        self._lock = threading.Lock()
        self._scratch: str | None = None
        self._ceiling: dict[str, float] | None = None

    def scratch_root(self) -> str:
        """The folder of all scratch directories, made when first needed."""
        with self._lock:
            if self._scratch is None:
                self._scratch = tempfile.mkdtemp(prefix="ttkit-verify-")
                # Others may pass through but not list: each worker's own folder is closed.
                os.chmod(self._scratch, 0o711)
            return self._scratch

    def ceiling(self, referee: Worker) -> dict[str, float]:
        """The device's read rates, measured once by the first referee."""
        with self._lock:
            if self._ceiling is None:
                self._ceiling = ask_referee(referee, {"op": "ceiling"})[0]["ceiling"]
            return self._ceiling

    def close(self) -> None:
        """End the fork server with all its workers and remove the scratch folder."""
        self.launcher.close()
        with self._lock:
            if self._scratch is not None:
                shutil.rmtree(self._scratch, ignore_errors=True)
                self._scratch = None


class Desk:
    """Verifies one candidate after another for one thread."""

    def __init__(self, room: Room):
        self.room = room
        self.referees: OrderedDict[str, RefereeHandle] = OrderedDict()
        # Candidates that are contended on purpose spread over all cores.
        alone = room.protocol.exclusive
        self.cores, self.judge_cores = share_cores(room.device) if alone else ([], set())

    def verify(self, task: Task, source: str) -> Verdict:
        started = time.monotonic()
        v = self.room
        session: Session | None = None
        record: dict[str, Any] = {}
        try:
            with contextlib.ExitStack() as stack:
                if v.protocol.exclusive:
                    stack.enter_context(device_lock(v.device))
                    stack.enter_context(pinned(self.judge_cores))
                referee = self._referee(task)
                record["contention"] = contention_record(v.device)
                referee.ask("renew")
                candidate = stack.enter_context(self._side(source, task, trusted=False))
                candidate.load(referee.info, _pick(referee.fds, CANDIDATE_FDS))
                record["guards"] = candidate.guards
                session = Session(referee, candidate, v.protocol, v.limits)
                session.check_values()
                twin = referee.twin or stack.enter_context(self._twin(task, referee))
                session.measure(twin)
                if referee.twin is None:  # on CUDA it takes seconds to start another process
                    self._relaunch(source, task, referee, session)
            verdict = Verdict("correct", _describe(session.record))
        except Outcome as outcome:
            verdict = Verdict(outcome.status, outcome.reason, flags=outcome.flags)
        except InfraError as error:
            self._drop(task.sha256)
            verdict = Verdict("infra_error", str(error))
        except OSError as error:
            self._drop(task.sha256)
            verdict = Verdict("infra_error", f"the system refused: {error}")
        if session is not None:
            record.update(session.record, checks=tuple(session.checks))
        return replace(
            verdict,
            **record,
            protocol=v.protocol.name,
            device=v.device,
            seconds=time.monotonic() - started,
        )

    def _relaunch(self, source: str, task: Task, referee: RefereeHandle, session: Session) -> None:
        """Measure a narrow winner again, both sides in fresh processes, while it stays one.

        Two processes that run the same code differ by a factor that lasts as long as they live: a
        standard deviation of 5 % where a body allocates several temporaries of some megabytes. No
        number of pairs averages that out; other processes do.
        """
        protocol = self.room.protocol
        for number in range(protocol.relaunches):
            if not 1 < session.record["speedup_lo"] <= protocol.relaunch_below:
                return
            with contextlib.ExitStack() as stack:
                if number % 2 == 0:
                    twin = stack.enter_context(self._twin(task, referee))
                candidate = stack.enter_context(self._side(source, task, trusted=False))
                candidate.load(referee.info, _pick(referee.fds, CANDIDATE_FDS))
                if number % 2:
                    twin = stack.enter_context(self._twin(task, referee))
                again = Session(referee, candidate, protocol, self.room.limits)
                again.measure(twin)
            session.take_in(again)

    @contextlib.contextmanager
    def _side(self, source: str, task: Task, trusted: bool) -> Iterator[Side]:
        """A fresh process for one implementation, with its scratch directory, until the end."""
        directory = self._directory({"task.py": task.code, "candidate.py": source})
        worker = None
        try:
            worker = self._spawn("candidate", directory)
            yield Side(worker, trusted, self.room.device, self.room.limits)
        finally:
            if worker is not None:
                worker.end()
            shutil.rmtree(directory, ignore_errors=True)

    @contextlib.contextmanager
    def _twin(self, task: Task, referee: RefereeHandle) -> Iterator[Side]:
        """The reference in a process exactly like a candidate's."""
        source = f"{task.code}\n\n\nclass ModelNew(Model):\n    pass\n"
        with self._side(source, task, trusted=True) as side:
            info = {**referee.info, "output_handle": referee.info["twin_output_handle"]}
            side.load(info, _pick(referee.fds, TWIN_FDS))
            yield side

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
            ceiling = self.room.ceiling(worker)
            load = {
                "op": "load",
                "flush_bytes": self.room.protocol.flush_bytes,
                "ceiling": ceiling,
            }
            info, fds = ask_referee(worker, load)
            if info["unusable"]:
                raise InfraError(info["unusable"])
            named = dict(zip(FDS if self.room.device == "cpu" else FDS[-1:], fds, strict=True))
            handle = RefereeHandle(worker, info, named)
            if self.room.device != "cpu":
                handle.twin = handle.stack.enter_context(self._twin(task, handle))
                handle.twin.shared = True
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
            for fd in handle.fds.values():
                os.close(fd)

    def _directory(self, files: dict[str, str]) -> str:
        directory = tempfile.mkdtemp(dir=self.room.scratch_root())
        for name, text in files.items():
            Path(directory, name).write_text(text, encoding="utf-8", errors="surrogatepass")
        return directory

    def _spawn(self, role: str, directory: str) -> Worker:
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
        spec = {
            "role": role,
            # torch.cuda.set_device wants a number.
            "device": "cuda:0" if v.device == "cuda" else v.device,
            "directory": directory,
            "cores": self.cores,
            "environment": {k: directory for k in (*caches, "TORCH_EXTENSIONS_DIR")},
            "gpu_memory_fraction": limits.gpu_memory_fraction,
            "pid_namespace": role == "candidate" and cpu,
            "limits": {
                "uid": uid,
                "cpu_seconds": limits.cpu_seconds if cpu else limits.cpu_seconds_cuda,
                "memory_bytes": limits.memory_bytes if cpu else 0,
                "processes": limits.processes,
                "open_files": limits.open_files,
                "file_bytes": limits.file_bytes if cpu else limits.file_bytes_cuda,
                "scratch_bytes": 4 * (limits.file_bytes if cpu else limits.file_bytes_cuda),
            },
        }
        with open(os.path.join(directory, OUTPUT_NAME), "wb") as output:
            return launcher.spawn(spec, output.fileno())

    def close(self) -> None:
        for key in list(self.referees):
            self._drop(key)


def _pick(fds: dict[str, int], names: tuple[str, ...]) -> list[int]:
    return [fds[name] for name in names if name in fds]


def _describe(record: dict[str, Any]) -> str:
    low, high = record.get("speedup_lo"), record.get("speedup_hi")
    figure = f"correct, {record['speedup']:.3f}x"
    if low is None or high is None:
        return f"{figure} by {record['n_pairs']} runs of each (no interval under this protocol)"
    return f"{figure} (95 % interval {low:.3f} to {high:.3f}, {record['n_pairs']} pairs)"
