"""A fork server of our own: torch is imported once, and a worker is one fork away.

Python's multiprocessing forkserver is not used: in 3.11 its children import the caller's main
module again, it inherits the caller's environment (with its secrets), and it passes pickles. This
one is started as a program of its own with a scrubbed environment, so that no ancestor of a
candidate ever held a secret, and it takes JSON only.

The judge sends one packet a worker, with three descriptors: the worker's end of its channel, the
file for its standard output, and this process's end of a status socket. The status socket carries
the process id, then the exit status; when the judge closes it, the worker is killed. So a judge
that is killed takes everything with it.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import shutil
import signal
import socket
import sys
import tempfile
import traceback

from ttkit.verify import limits
from ttkit.verify.channel import Channel, ChannelClosed


def main() -> None:
    """Serve on the socket whose descriptor is the first argument until it closes."""
    control = Channel(socket.socket(fileno=int(sys.argv[1])))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    limits.become_reaper()
    in_namespace = limits.own_user_namespace()
    _preload()
    import torch

    uid_usable = limits.user_id_usable(torch.__file__, __file__, sys.executable)
    gc.collect()
    gc.freeze()
    control.send({"ready": True, "uid_usable": uid_usable, "user_namespace": in_namespace})
    _Server(control).serve()


def _preload() -> None:
    """Import and touch what every worker needs, but not CUDA: it does not survive a fork."""
    import torch

    torch.set_num_threads(1)
    import ttkit.verify.referee
    import ttkit.verify.worker  # noqa: F401

    with torch.no_grad():
        x = torch.randn(64, 64)
        torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU())(x).softmax(-1).sum()


class _Server:
    def __init__(self, control: Channel):
        self.control = control
        self.workers: dict[int, tuple[int, socket.socket]] = {}
        self.namespaces = limits.PidNamespaces()
        self.wake, wake_end = os.pipe()
        os.set_blocking(self.wake, False)
        os.set_blocking(wake_end, False)
        signal.set_wakeup_fd(wake_end)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))

    def serve(self) -> None:
        poll = select.poll()
        poll.register(self.control.sock, select.POLLIN)
        poll.register(self.wake, select.POLLIN)
        try:
            while True:
                for fd, _ in poll.poll():
                    if fd == self.wake:
                        with contextlib.suppress(BlockingIOError):
                            os.read(self.wake, 4096)
                        self._reap(poll)
                    elif fd == self.control.sock.fileno():
                        self._spawn(poll)
                    elif fd in self.workers:
                        # The judge sends nothing here: readable means closed.
                        _kill(self.workers[fd][0])
                        poll.unregister(fd)
        except (ChannelClosed, SystemExit):
            pass
        finally:
            for pid, _ in self.workers.values():
                _kill(pid)
            _end_orphans(set())
            # A judge that was killed cannot do it.
            if "ttkit-verify-" in (home := os.environ["HOME"]):
                shutil.rmtree(home, ignore_errors=True)
            os._exit(0)

    def _spawn(self, poll: select.poll) -> None:
        spec, (channel_fd, output_fd, status_fd) = self.control.recv()
        status = socket.socket(fileno=status_fd)
        pid, separate = self.namespaces.fork(spec["pid_namespace"])
        if pid == 0:
            self._become_worker(spec, channel_fd, output_fd, separate)
        os.close(channel_fd)
        os.close(output_fd)
        self.workers[status_fd] = (pid, status)
        poll.register(status_fd, select.POLLIN)
        with contextlib.suppress(OSError):
            status.send(json.dumps({"pid": pid}).encode())

    def _become_worker(self, spec: dict, channel_fd: int, output_fd: int, separate: bool) -> None:
        code = 70
        try:
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_DFL)
            os.setsid()
            os.dup2(output_fd, 1)
            os.dup2(output_fd, 2)
            os.dup2(channel_fd, 3)
            os.closerange(4, 4096)
            channel = Channel(socket.socket(fileno=3))
            if spec["cores"]:
                os.sched_setaffinity(0, spec["cores"])
            os.environ.update(spec["environment"])
            tempfile.tempdir = None
            os.chdir(spec["directory"])
            if spec["role"] == "referee":
                from ttkit.verify.referee import main as run

                limits.protect()
            else:
                from ttkit.verify.worker import main as run

                spec["guards"] = limits.apply(spec["limits"])
                spec["guards"]["pid_namespace"] = separate
            run(channel, spec)
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(OSError, ValueError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)

    def _reap(self, poll: select.poll) -> None:
        known = {pid: fd for fd, (pid, _) in self.workers.items()}
        while True:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if pid == 0:
                break
            if pid in known:
                # Whatever the worker left in its process group or orphaned goes with it.
                with contextlib.suppress(OSError):
                    os.killpg(pid, signal.SIGKILL)
                fd = known[pid]
                _, sock = self.workers.pop(fd)
                with contextlib.suppress(KeyError, OSError):
                    poll.unregister(fd)
                with contextlib.suppress(OSError):
                    cpu = usage.ru_utime + usage.ru_stime
                    sock.send(json.dumps({"status": status, "cpu_seconds": cpu}).encode())
                sock.close()
        _end_orphans({pid for pid, _ in self.workers.values()})


def _kill(pid: int) -> None:
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(OSError):
            kill(pid, signal.SIGKILL)


def _end_orphans(workers: set[int]) -> None:
    """Kill children that no request asked for: what a worker detached before it ended."""
    try:
        with open(f"/proc/self/task/{os.getpid()}/children") as file:
            children = {int(pid) for pid in file.read().split()}
    except OSError:
        return
    for pid in children - workers:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
