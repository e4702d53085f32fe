"""The machine that measures: its name, its lock, its cores, and what else it is busy with."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import math
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from typing import Any

# A load average above this many times the number of cores is called busy in the record.
BUSY_LOAD = 1.5
SHARED, EXCLUSIVE = fcntl.LOCK_SH, fcntl.LOCK_EX


def share_cores(device: str, desk: int) -> tuple[list[int], set[int]]:
    """One core for a desk's referee and both sides, the others for a judge that times them.

    The workers of a desk never run at the same time. Desks take the cores in turn by their number.
    None where there is no choice: on CUDA, or on one core.
    """
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2 or device != "cpu":
        return [], set()
    own = cores[desk % len(cores)]
    return [own], set(cores) - {own}


@contextlib.contextmanager
def pinned(cores: set[int]) -> Iterator[None]:
    """The calling thread on `cores` only, for as long as the context lasts."""
    if not cores:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class DeviceLock:
    """One holder's view of the reader-writer lock of `device`, across threads and processes.

    Held shared (SHARED) by who loads and checks, exclusively (EXCLUSIVE) by who times. Every holder
    makes an instance of its own. All come to it through a turnstile, in which the next one waits:
    or checks that follow each other would keep a timing waiting for as long as there are any.
    """

    def __init__(self, device: str):
        name = os.path.join(tempfile.gettempdir(), f"ttkit-{device.replace(':', '-')}")
        self._turnstile, self._lock = _open(f"{name}.turnstile"), _open(f"{name}.lock")
        self._mode = 0
        self.waited = 0.0  # seconds in all

    def __enter__(self) -> DeviceLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def hold(self, mode: int) -> None:
        """Wait for the lock in `mode`, SHARED or EXCLUSIVE, and hold it from then on.

        What was held in another mode is given back first, so that two holders who want the lock
        for themselves never wait for each other.
        """
        if mode == self._mode:
            return
        started = time.monotonic()
        self.release()
        fcntl.flock(self._turnstile, fcntl.LOCK_EX)
        try:
            fcntl.flock(self._lock, mode)
        finally:
            fcntl.flock(self._turnstile, fcntl.LOCK_UN)
        self._mode = mode
        self.waited += time.monotonic() - started

    def wanted(self) -> bool:
        """Whether somebody waits for it."""
        try:
            fcntl.flock(self._turnstile, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        fcntl.flock(self._turnstile, fcntl.LOCK_UN)
        return False

    def release(self) -> None:
        """Give back what is held, if anything is."""
        self._mode = 0
        fcntl.flock(self._lock, fcntl.LOCK_UN)

    def close(self) -> None:
        """Give back what is held, for good."""
        # Closing alone would leave it with a process that was forked off meanwhile.
        self.release()
        os.close(self._lock)
        os.close(self._turnstile)


def _open(path: str) -> int:
    """A file that this user alone may open: a candidate, which is none, could hold its lock for
    ever. Where another user was first, a file of one's own has to do."""
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
    try:
        opened = os.open(path, flags, 0o600)
    except PermissionError:
        opened = os.open(f"{path}.{os.getuid()}", flags, 0o600)
    with contextlib.suppress(OSError):
        os.fchmod(opened, 0o600)
    return opened


def contention_record(device: str) -> dict[str, Any]:
    """What else is going on: load average per core, and on CUDA other processes and throttling."""
    cores = len(os.sched_getaffinity(0)) or 1
    load = os.getloadavg()[0]
    record: dict[str, Any] = {
        "load_average": round(load, 2),
        "cores": os.cpu_count() or cores,
        "busy": load > BUSY_LOAD * (os.cpu_count() or cores),
    }
    if device != "cpu":
        record.update(_gpu_state(device, int(time.monotonic() // 10)))
    return record


def stolen_seconds() -> float:
    """What the host of a virtual machine has taken from its cores so far, all together; nan where
    the system does not tell."""
    with contextlib.suppress(OSError, ValueError, IndexError), open("/proc/stat") as file:
        return int(file.readline().split()[8]) / os.sysconf("SC_CLK_TCK")
    return math.nan


@functools.lru_cache(maxsize=4)
def _gpu_state(device: str, _ten_seconds: int) -> dict[str, Any]:
    # Looked up once in ten seconds: nvidia-smi takes longer than many a measurement.
    index = device.partition(":")[2] or "0"
    fields = "clocks_event_reasons.active,clocks.sm,temperature.gpu"
    state = _nvidia_smi(index, f"--query-gpu={fields}")
    processes = _nvidia_smi(index, "--query-compute-apps=pid")
    return {"gpu_state": state, "gpu_processes": len(processes.split())}


def _nvidia_smi(index: str, query: str) -> str:
    command = ["nvidia-smi", f"--id={index}", query, "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


@functools.cache
def device_name(device: str) -> str:
    """The hardware's name, so that no verdict is taken for another machine's."""
    if device != "cpu":
        index = device.partition(":")[2] or "0"
        return f"{device} {_nvidia_smi(index, '--query-gpu=name')}"
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("model name"):
                return f"cpu {line.partition(':')[2].strip()} x{os.cpu_count()}"
    return f"cpu {os.uname().machine} x{os.cpu_count()}"
