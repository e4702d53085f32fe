"""The judge's side of the zygote: start workers, learn how they ended, end them."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ttkit
from ttkit.errors import InfraError
from ttkit.verify.channel import BadMessage, Channel, ChannelClosed, ChannelTimeout, pair

# What a compiler, a CUDA driver or a locale needs; everything else of the caller's environment
# stays with the caller.
KEPT = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "CUDA_HOME", "CUDA_PATH", "CC", "CXX")
KEPT_PREFIXES = ("CUDA_VISIBLE", "CUDA_DEVICE", "NVIDIA_")
START_SECONDS = 120.0


def scrubbed_environment(home: str, device: str) -> dict[str, str]:
    """The minimal environment in which the zygote, and so every worker, runs.

    Whoever is judged on the CPU finds no GPU.
    """
    kept = {k: v for k, v in os.environ.items() if k in KEPT or k.startswith(KEPT_PREFIXES)}
    package_root = str(Path(ttkit.__file__).resolve().parent.parent)
    path = [package_root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    tunables = "glibc.malloc.hugetlb=1"
    if device == "cpu":
        kept["CUDA_VISIBLE_DEVICES"] = ""
        # Small pieces that malloc keeps for itself, rather than join them with their neighbours,
        # split the memory of large tensors for good. Where the next ones then lie differs from
        # process to process, and so does their speed, by up to a fifth. And many threads, each with
        # memory of its own kept ready, would use up the address space.
        tunables += ":glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0:glibc.malloc.arena_max=4"
    return kept | {
        "HOME": home,
        "TMPDIR": home,
        # A user id that no list of users holds has no name, and compilers name caches by it.
        "USER": "ttkit",
        "PYTHONPATH": os.pathsep.join(path),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": "1",
        # Threads that a candidate adds share its one core: one that spins takes it from the rest.
        "OMP_WAIT_POLICY": "passive",
        "MKL_NUM_THREADS": "1",
        # cudaGetDeviceCount would start the driver in the zygote; NVML does not.
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
        # Outputs of a few MB come from the heap again and again rather than from fresh pages,
        # whose faults are noise in a 1 ms measurement.
        "GLIBC_TUNABLES": tunables,
        "MALLOC_MMAP_THRESHOLD_": str(1 << 25),
        "MALLOC_TRIM_THRESHOLD_": str(1 << 32),
        "MALLOC_TOP_PAD_": str(64 << 20),
    }


@dataclass
class Worker:
    """A running worker as the judge holds it."""

    pid: int
    channel: Channel
    status: Channel
    ended: int | None = None
    cpu_seconds: float = 0.0  # known once it has ended
    lost: bool = False

    def exit_status(self, timeout: float = 2.0) -> int | None:
        """The wait status once it is known, else None; `lost` says that nobody will tell it."""
        if self.ended is None:
            try:
                message, _ = self.status.recv(timeout)
                self.ended = int(message["status"])
                self.cpu_seconds = float(message["cpu_seconds"])
            except ChannelClosed:
                self.lost = True
            except (ChannelTimeout, BadMessage):
                pass
        return self.ended

    def end(self) -> None:
        """Kill it with all its processes and wait until it is gone; may be called again."""
        with contextlib.suppress(OSError):
            self.status.sock.shutdown(socket.SHUT_WR)
        self.exit_status()
        self.channel.close()
        self.status.close()


def describe_exit(status: int | None) -> str:
    """How a process ended, in words."""
    if status is None:
        return "it vanished"
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        with contextlib.suppress(ValueError):
            return f"it was killed by {signal.Signals(number).name}"
        return f"it was killed by signal {number}"
    return f"it ended its process with status {os.WEXITSTATUS(status)}"


class Launcher:
    """Starts the zygote when it is first needed, once more if it dies, and workers through it."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None
        self._control: Channel | None = None
        self._starts = 0
        self._home: tempfile.TemporaryDirectory[str] | None = None
        self._home_lock = threading.Lock()
        self.uid_usable = False
        self.user_namespace = False

    def home(self) -> str:
        """A folder that goes with the zygote, also when the judge is killed; made when needed.

        Others may pass through but not list: each worker's own folder in it is closed.
        """
        with self._home_lock:
            if self._home is None:
                self._home = tempfile.TemporaryDirectory(
                    prefix="ttkit-verify-", ignore_cleanup_errors=True
                )
                os.chmod(self._home.name, 0o711)
            return self._home.name

    def start(self) -> None:
        """Start the zygote and wait until torch is imported. Raises InfraError if that fails."""
        if self._starts >= 2:
            raise InfraError("the verifier's fork server died twice; the machine may lack memory")
        self._starts += 1
        ours, theirs = pair()
        with tempfile.TemporaryFile() as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "ttkit.verify.zygote", str(theirs.fileno())],
                env=scrubbed_environment(self.home(), self.device),
                cwd=self.home(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
            theirs.close()
            control = Channel(ours)
            try:
                hello, _ = control.recv(START_SECONDS)
            except (ChannelClosed, ChannelTimeout, BadMessage):
                self._process.kill()
                log.seek(0)
                tail = log.read().decode(errors="replace").strip().splitlines()[-1:]
                raise InfraError(
                    f"the verifier's fork server did not start: {' '.join(tail) or 'no output'}"
                ) from None
        self._control = control
        self.uid_usable = bool(hello.get("uid_usable"))
        self.user_namespace = bool(hello.get("user_namespace"))

    def prepare(self) -> None:
        """Make sure the zygote runs."""
        with self._lock:
            if self._control is None:
                self.start()

    def spawn(self, spec: dict[str, Any], output_fd: int) -> Worker:
        """Fork one worker. Raises InfraError when no zygote can be had."""
        with self._lock:
            for _ in range(2):
                if self._control is None:
                    self.start()
                worker = self._try_spawn(spec, output_fd)
                if worker is not None:
                    # Only deaths in a row count: each costs one verdict, never the run.
                    self._starts = 1
                    return worker
                self._drop()
        raise InfraError("the verifier's fork server could not start a worker")

    def _try_spawn(self, spec: dict[str, Any], output_fd: int) -> Worker | None:
        assert self._control is not None
        (ours, theirs), (status, status_end) = pair(), pair()
        fds: Sequence[int] = [theirs.fileno(), output_fd, status_end.fileno()]
        try:
            self._control.send(spec, fds)
            theirs.close()
            status_end.close()
            message, _ = (status_channel := Channel(status)).recv(30.0)
            return Worker(int(message["pid"]), Channel(ours), status_channel)
        except (ChannelClosed, ChannelTimeout, KeyError):
            for sock in (ours, theirs, status, status_end):
                sock.close()
            return None

    def _drop(self) -> None:
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._process is not None:
            with contextlib.suppress(OSError):
                self._process.kill()
            self._process.wait()
            self._process = None

    def close(self) -> None:
        """End the zygote and with it every worker; waits until it is gone."""
        with self._lock:
            if self._control is not None:
                self._control.close()
                self._control = None
            if self._process is not None:
                try:
                    self._process.wait(10.0)
                except subprocess.TimeoutExpired:
                    self._process.kill()
                    self._process.wait()
                self._process = None
            self._starts = 0
        with self._home_lock:
            if self._home is not None:
                self._home.cleanup()
                self._home = None
