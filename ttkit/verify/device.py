"""The machine that measures: its name, its lock, its cores, and what else it is busy with."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from typing import Any

# A load average above this many times the number of cores is called busy in the record.
BUSY_LOAD = 1.5


def share_cores(device: str) -> tuple[list[int], set[int]]:
    """One core for both sides of a pair, the others for the judge; none if there is no choice."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2 or device != "cpu":
        return [], set()
    return [cores[0]], set(cores[1:])


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


@contextlib.contextmanager
def device_lock(device: str) -> Iterator[None]:
    """Held by whoever measures on `device`, across processes and users of this machine."""
    path = os.path.join(tempfile.gettempdir(), f"ttkit-{device.replace(':', '-')}.lock")
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


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
