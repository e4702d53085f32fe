"""What a worker process is not allowed to do, switched on in the child right after the fork.

Every guard is best effort: `apply` reports which ones the system granted, and the verdict keeps
that record. Root gives up its user id for one nobody else has; without root, a user namespace of
its own separates the worker from the caller's processes.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import struct
import sys
from pathlib import Path
from typing import Any

from ttkit.verify import syscalls

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_CAPBSET_DROP = 1, 4, 24
PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 36, 38
CLONE_NEWUSER, CLONE_NEWNET, CLONE_NEWPID = 0x10000000, 0x40000000, 0x20000000
CLONE_NEWNS, CLONE_NEWIPC = 0x20000, 0x08000000
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 0x1000, 0x4000, 1 << 18
SYS_MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY = 442, -100, 0x8000, 1
SIGKILL = 9
FIRST_UID = 1_879_000_000
OUTPUT_NAME = "output.txt"

_libc = ctypes.CDLL(None, use_errno=True)


def _prctl(option: int, value: int) -> bool:
    zero = ctypes.c_ulong(0)
    return _libc.prctl(option, ctypes.c_ulong(value), zero, zero, zero) == 0


def _unshare(flag: int) -> bool:
    return _libc.unshare(flag) == 0


def become_reaper() -> None:
    """Orphans of the workers become children of the caller, which can then end them."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)


def own_user_namespace() -> bool:
    """Enter a user namespace, so that a caller who is not root may still make the others.

    Only a process of one thread may do this: call it before torch is imported.
    """
    uid, gid = os.getuid(), os.getgid()
    if uid == 0 or not _unshare(CLONE_NEWUSER):
        return False
    with contextlib.suppress(OSError):
        _write("/proc/self/setgroups", "deny")
        _write("/proc/self/gid_map", f"{gid} {gid} 1")
        _write("/proc/self/uid_map", f"{uid} {uid} 1")
    return True


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


class PidNamespaces:
    """Forks each worker as the first process of its own pid namespace where the system allows.

    When that process ends the kernel ends everything in the namespace, daemons included, and from
    inside it no other process of the machine can be named, so none can be signalled.
    """

    def __init__(self) -> None:
        self._own = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)

    def fork(self, separate: bool) -> tuple[int, bool]:
        """As os.fork, with the flag whether the child is alone in a namespace."""
        separate = separate and _unshare(CLONE_NEWPID)
        try:
            pid = os.fork()
        finally:
            if separate:
                _libc.setns(self._own, CLONE_NEWPID)
        return pid, separate


def user_id_usable(*paths: str) -> bool:
    """Whether a user id without any rights could still read the installed packages."""
    if os.getuid() != 0:
        return False
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            if _unshare(CLONE_NEWNS) and _mount(None, "/", None, MS_REC | MS_PRIVATE, None):
                _reveal()
            os.setgroups([])
            os.setresgid(FIRST_UID, FIRST_UID, FIRST_UID)
            os.setresuid(FIRST_UID, FIRST_UID, FIRST_UID)
            os.write(writing, b"1" if all(os.access(p, os.R_OK) for p in paths) else b"0")
        finally:
            os._exit(0)
    os.close(writing)
    answer = os.read(reading, 1)
    os.close(reading)
    os.waitpid(pid, 0)
    return answer == b"1"


def apply(spec: dict[str, Any]) -> dict[str, bool]:
    """Switch on the guards `spec` asks for, in the calling process; which ones are active.

    Called once, before anything of the candidate is read, in its scratch directory. Keys of
    `spec`: `uid` (or None), and the numbers of `Limits` as `cpu_seconds`, `memory_bytes`
    (0: none), `processes`, `open_files`, `file_bytes`, `scratch_bytes`; and `cpu_only`,
    whether no CUDA device is used.
    """
    active = {"parent_death_signal": _prctl(PR_SET_PDEATHSIG, SIGKILL)}
    active["network_namespace"] = _unshare(CLONE_NEWNET)
    # CUDA's processes share memory through what these two take away.
    active["ipc_namespace"] = spec["cpu_only"] and _unshare(CLONE_NEWIPC)
    active["read_only_files"] = _read_only_files(spec["scratch_bytes"], spec["uid"])
    for name, which, amount in (
        ("cpu_limit", resource.RLIMIT_CPU, spec["cpu_seconds"]),
        ("memory_limit", resource.RLIMIT_AS, spec["memory_bytes"]),
        ("open_files_limit", resource.RLIMIT_NOFILE, spec["open_files"]),
        ("file_size_limit", resource.RLIMIT_FSIZE, spec["file_bytes"]),
        ("no_core_files", resource.RLIMIT_CORE, 0),
        ("pending_signals_limit", resource.RLIMIT_SIGPENDING, 64),
    ):
        if name == "memory_limit":
            if not amount:
                active[name] = False
                continue
            amount += _virtual_bytes()
        active[name] = _limit(which, amount)
    active["capabilities_dropped"] = _drop_capabilities(spec["uid"])
    # A user id that is shared with the caller's other processes makes a count of processes
    # meaningless: theirs would count against the candidate.
    private = active["own_user_id"] = spec["uid"] is not None and os.getuid() == spec["uid"]
    active["process_limit"] = private and _limit(resource.RLIMIT_NPROC, spec["processes"])
    active["no_new_privileges"] = _prctl(PR_SET_NO_NEW_PRIVS, 1)
    active["system_call_filter"] = active["no_new_privileges"] and syscalls.refuse(
        () if spec["cpu_only"] else syscalls.CUDA
    )
    active["not_dumpable"] = _prctl(PR_SET_DUMPABLE, 0)
    # The signal is forgotten when the user id changes, so it is asked for again.
    _prctl(PR_SET_PDEATHSIG, SIGKILL)
    return active


def protect() -> None:
    """Keep other processes of the same user out of the calling process's memory."""
    _prctl(PR_SET_PDEATHSIG, SIGKILL)
    _prctl(PR_SET_DUMPABLE, 0)


def _read_only_files(size: int, uid: int | None) -> bool:
    """Make every mounted file system read-only for this process and the working directory a
    file system in memory of at most `size` bytes, which vanishes with the process.

    /proc is mounted anew, so that in a pid namespace it shows no other processes.
    """
    directory = os.getcwd()
    if not _unshare(CLONE_NEWNS) or not _mount(None, "/", None, MS_REC | MS_PRIVATE, None):
        return False
    if uid is not None:
        _reveal()
    files = {name: Path(name).read_bytes() for name in os.listdir() if name != OUTPUT_NAME}
    attributes = struct.pack("=QQQQ", MOUNT_ATTR_RDONLY, 0, 0, 0)
    done = _libc.syscall(
        SYS_MOUNT_SETATTR,
        AT_FDCWD,
        b"/",
        AT_RECURSIVE,
        attributes,
        ctypes.c_size_t(len(attributes)),
    )
    flags = MS_NOSUID | MS_NODEV
    if done != 0 or not _mount("tmpfs", directory, "tmpfs", flags, f"size={size},mode=0700"):
        return False
    _mount("proc", "/proc", "proc", flags, None)
    os.chdir(directory)
    for name, content in files.items():
        Path(name).write_bytes(content)
    if uid is not None:
        for path in (".", *files):
            os.chown(path, uid, uid)
    return True


def _reveal() -> None:
    """Let other user ids reach the installation where it lies below a closed folder.

    Python below /root is common. The closed folder is covered by an empty one that holds nothing
    but the way to the installation; whatever else lies there is hidden as well.
    """
    folders = [sys.prefix, sys.base_prefix, str(Path(__file__).parents[2]), os.getcwd()]
    needed = {Path(p).resolve() for p in (*folders, *sys.path) if p and os.path.isdir(p)}
    for path in sorted(needed):
        for parent in reversed(path.parents):
            if parent.stat().st_mode & 0o001:
                continue
            inside = [p for p in needed if p.is_relative_to(parent)]
            held = [(p, os.open(p, os.O_PATH)) for p in inside]
            if _mount("tmpfs", str(parent), "tmpfs", MS_NOSUID | MS_NODEV, "mode=0755"):
                for place, fd in held:
                    place.mkdir(parents=True, exist_ok=True)
                    _mount(f"/proc/self/fd/{fd}", str(place), None, MS_BIND | MS_REC, None)
            for _, fd in held:
                os.close(fd)
            break


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None) -> bool:
    text = [None if t is None else t.encode() for t in (source, target, kind, data)]
    return _libc.mount(text[0], text[1], text[2], ctypes.c_ulong(flags), text[3]) == 0


def _limit(which: int, amount: int) -> bool:
    _, hard = resource.getrlimit(which)
    amount = amount if hard == resource.RLIM_INFINITY else min(amount, hard)
    # At the soft limit of CPU time the kernel sends SIGXCPU, which names the cause; at the hard
    # one SIGKILL, which does not.
    grace = 5 if which == resource.RLIMIT_CPU and hard == resource.RLIM_INFINITY else 0
    try:
        resource.setrlimit(which, (amount, amount + grace))
    except (OSError, ValueError):
        return False
    return True


def _virtual_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def _drop_capabilities(uid: int | None) -> bool:
    with contextlib.suppress(OSError, ValueError):
        for capability in range(64):
            if not _prctl(PR_CAPBSET_DROP, capability):
                break
    if uid is not None:
        with contextlib.suppress(OSError):
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
    # capset(2) by hand: version 3, this process, all three sets empty.
    header = struct.pack("=Ii", 0x20080522, 0)
    return _libc.capset(header, bytes(24)) == 0
