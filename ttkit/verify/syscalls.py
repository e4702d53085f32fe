"""System calls that no candidate has a use for, refused by the kernel (seccomp, filter mode).

They would let it leave its core, read other processes' memory, leave something behind, have the
kernel work for it while it is frozen, or undo the other guards. Each gives EPERM, as if the user
lacked the right. The filter cannot be taken off again and children inherit it.
"""

from __future__ import annotations

import ctypes
import errno
import platform
import struct
from collections.abc import Collection

PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 22, 2
ALLOW, REFUSE, KILL = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x80000000
# AUDIT_ARCH_* of linux/audit.h, and the numbers of asm/unistd.h.
ARCHITECTURES: dict[str, tuple[int, dict[str, int]]] = {
    "x86_64": (
        0xC000003E,
        {
            "shmget": 29,
            "semget": 64,
            "msgget": 68,
            "ptrace": 101,
            "mount": 165,
            "umount2": 166,
            "sched_setaffinity": 203,
            "timer_create": 222,
            "mq_open": 240,
            "keyctl": 250,
            "unshare": 272,
            "timerfd_create": 283,
            "perf_event_open": 298,
            "setns": 308,
            "process_vm_readv": 310,
            "process_vm_writev": 311,
            "bpf": 321,
            "memfd_create": 319,
            "userfaultfd": 323,
            "io_uring_setup": 425,
            "open_tree": 428,
            "move_mount": 429,
            "fsopen": 430,
            "fsmount": 432,
            "fspick": 433,
            "pidfd_getfd": 438,
            "mount_setattr": 442,
        },
    ),
    "aarch64": (
        0xC00000B7,
        {
            "umount2": 39,
            "mount": 40,
            "timerfd_create": 85,
            "unshare": 97,
            "timer_create": 107,
            "ptrace": 117,
            "sched_setaffinity": 122,
            "mq_open": 180,
            "msgget": 186,
            "semget": 190,
            "shmget": 194,
            "keyctl": 219,
            "perf_event_open": 241,
            "setns": 268,
            "process_vm_readv": 270,
            "process_vm_writev": 271,
            "bpf": 280,
            "memfd_create": 279,
            "userfaultfd": 282,
            "io_uring_setup": 425,
            "open_tree": 428,
            "move_mount": 429,
            "fsopen": 430,
            "fsmount": 432,
            "fspick": 433,
            "pidfd_getfd": 438,
            "mount_setattr": 442,
        },
    ),
}
# A process of its own is allowed, in namespaces of its own (CLONE_NEW*) it is not. What clone3 is
# asked for lies in memory, where no filter looks; the C library then falls back to clone.
CLONE = {"x86_64": 56, "aarch64": 220}
CLONE3, CLONE_NEW = 435, 0x7E020000
# Sockets with a path lie in no network namespace: whoever listens there could be talked to.
SOCKET, AF_UNIX = {"x86_64": 41, "aarch64": 198}, 1
MISSING = 0x00050000 | errno.ENOSYS
# The other calling convention of x86-64 (x32) has this bit set in its numbers.
X32 = 0x40000000


def _program(arch: int, clone: int, socket: int, numbers: list[int]) -> bytes:
    """Classic BPF: the architecture must match; a listed number is refused, others allowed."""
    load, jump_equal, jump_greater, jump_set, ret = 0x20, 0x15, 0x35, 0x45, 0x06
    steps = [
        (load, 0, 0, 4),  # seccomp_data.arch
        (jump_equal, 1, 0, arch),
        (ret, 0, 0, KILL),
        (load, 0, 0, 0),  # seccomp_data.nr
        (jump_equal, 0, 1, CLONE3),
        (ret, 0, 0, MISSING),
        (jump_equal, 0, 2, clone),
        (load, 0, 0, 16),  # the lower half of its first argument, the flags
        (jump_set, len(numbers) + 5, len(numbers) + 4, CLONE_NEW),
        (jump_equal, 0, 2, socket),
        (load, 0, 0, 16),  # the address family
        (jump_equal, len(numbers) + 2, len(numbers) + 1, AF_UNIX),
        (jump_greater, len(numbers) + 1, 0, X32),
        *((jump_equal, len(numbers) - i, 0, n) for i, n in enumerate(numbers)),
        (ret, 0, 0, ALLOW),
        (ret, 0, 0, REFUSE),
    ]
    return b"".join(struct.pack("=HBBI", *step) for step in steps)


# Files in memory count against no limit; CUDA's driver may need them all the same, and sockets.
CUDA = ("memfd_create", "unix_sockets")
NO_NUMBER = 0xFFFFFFFF


def refuse(but: Collection[str] = ()) -> bool:
    """Install the filter in the calling process, `but` those allowed; False where the system does
    not offer it.

    Needs PR_SET_NO_NEW_PRIVS to be set.
    """
    known = ARCHITECTURES.get(platform.machine())
    if known is None:
        return False
    code = _program(
        known[0],
        CLONE[platform.machine()],
        NO_NUMBER if "unix_sockets" in but else SOCKET[platform.machine()],
        sorted(n for name, n in known[1].items() if name not in but),
    )
    buffer = ctypes.create_string_buffer(code, len(code))
    length = struct.pack("=H", len(code) // 8)
    # struct sock_fprog: a 16-bit count, padding, a pointer.
    program = ctypes.create_string_buffer(
        length + bytes(6) + struct.pack("=Q", ctypes.addressof(buffer)), 16
    )
    libc = ctypes.CDLL(None, use_errno=True)
    zero = ctypes.c_ulong(0)
    mode, pointer = ctypes.c_ulong(SECCOMP_MODE_FILTER), ctypes.c_ulong(ctypes.addressof(program))
    return libc.prctl(PR_SET_SECCOMP, mode, pointer, zero, zero) == 0
