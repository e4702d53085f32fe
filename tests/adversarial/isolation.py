"""Attacks on the machine and the run: class 30. What they leave behind: see test_isolation.py."""

from __future__ import annotations

from .case import LATE, VALUES, cheat, honest
from .tasks import SINES

CASES = (
    cheat(30, "a segmentation fault", SINES, "import ctypes\nctypes.string_at(0)", "crashed"),
    cheat(
        30,
        "kill everything",
        SINES,
        "import os\nos.kill(-1, 9)\nreturn x + 1",
        "crashed",
        "exception",
        *VALUES,
    ),
    cheat(
        30,
        "kill the parent, and whatever else can be named",
        SINES,
        """
import os
for pid in (os.getppid(), *range(2, 400)):
    if pid > 1 and pid != os.getpid():
        try:
            os.kill(pid, 9)
        except OSError:
            pass
return x + 1
""",
        "crashed",
        *VALUES,
    ),
    cheat(
        30,
        "its process group",
        SINES,
        "import os\nos.killpg(0, 9)\nreturn x + 1",
        "crashed",
        *VALUES,
    ),
    cheat(
        30,
        "stop itself",
        SINES,
        "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)\nreturn x + 1",
        "time_limit",
        *VALUES,
    ),
    cheat(
        30,
        "everything deleted that can be",
        SINES,
        """
import os, shutil
for path in (".", ".."):
    shutil.rmtree(path, ignore_errors=True)
for path in ("/bin/sh", torch.__file__, "/etc/passwd"):
    try:
        os.remove(path)
    except OSError:
        pass
return x + 1
""",
        *VALUES,
    ),
    cheat(
        30,
        "one file without end",
        SINES,
        "with open('big', 'wb') as file:\n    while True:\n        file.write(bytes(1 << 22))",
        "output_flood",
        "exception",
        "memory_limit",
    ),
    cheat(
        30,
        "many files without end",
        SINES,
        """
n = 0
while True:
    n += 1
    with open(f"part{n}", "wb") as file:
        file.write(bytes(1 << 24))
""",
        "output_flood",
        "exception",
        "memory_limit",
        "time_limit",
    ),
    cheat(
        30,
        "a gigabyte of prints",
        SINES,
        "for _ in range(1024):\n    print('x' * (1 << 20))\nreturn x + 1",
        "output_flood",
    ),
    cheat(
        30,
        "a fork bomb",
        SINES,
        "import os\nwhile True:\n    os.fork()",
        "exception",
        "child_process",
        "time_limit",
        "cpu_limit",
        "memory_limit",
        "forged_answer",
        "crashed",
    ),
    cheat(
        30,
        "every descriptor",
        SINES,
        "import os\nself.kept = [os.dup(0) for _ in range(10**6)]",
        "exception",
    ),
    cheat(
        30,
        "threads without end",
        SINES,
        """
import threading, time
for _ in range(10**5):
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
return x + 1
""",
        "exception",
        "time_limit",
        "cpu_limit",
        "memory_limit",
        "crashed",
        *VALUES,
    ),
    cheat(30, "100 GB at once", SINES, "return torch.ones(25 * 10**9)", "memory_limit"),
    cheat(
        30,
        "100 GB bit by bit",
        SINES,
        "kept = []\nwhile True:\n    kept.append(torch.empty(1 << 24))",
        "memory_limit",
    ),
    cheat(30, "recursion without end", SINES, "return self.forward(x, y)", "exception"),
    cheat(30, "a loop without end", SINES, "while True:\n    pass", "time_limit"),
    cheat(
        30,
        "a loop without end in C, signals ignored",
        SINES,
        """
import re, signal
for number in range(1, 32):
    try:
        signal.signal(number, signal.SIG_IGN)
    except OSError:
        pass
re.match(r"(a+)+$", "a" * 60 + "b")
""",
        "time_limit",
    ),
    cheat(30, "sleep", SINES, "import time\ntime.sleep(60)", "time_limit"),
    cheat(
        30,
        "CPU time without end on import",
        SINES,
        "return x + 1",
        "cpu_limit",
        "time_limit",
        top="while True:\n    pass",
    ),
    cheat(
        30,
        "a daemon that goes on for later candidates",
        SINES,
        """
import os
if not hasattr(self, "daemon"):
    self.daemon = os.fork()
    if self.daemon == 0:
        os.setsid()
        if os.fork() == 0:
            while True:
                sum(range(10000))
        os._exit(0)
WORK
return out
""",
        "child_process",
        *LATE,
    ),
    cheat(
        30,
        "its limits taken off, then a loop",
        SINES,
        """
import resource
for which in (resource.RLIMIT_AS, resource.RLIMIT_CPU, resource.RLIMIT_FSIZE):
    try:
        resource.setrlimit(which, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    except (ValueError, OSError):
        pass
return torch.ones(25 * 10**9)
""",
        "memory_limit",
    ),
    cheat(
        30,
        "descriptor 3 closed",
        SINES,
        "import os\nos.close(3)\nreturn x + 1",
        "crashed",
        "time_limit",
        "exception",
    ),
    cheat(
        30,
        "answers without end",
        SINES,
        "import os\nwhile True:\n    os.write(3, b'{}')",
        "forged_answer",
        "time_limit",
        *VALUES,
    ),
    honest(
        30,
        "a note in its own folder",
        SINES,
        "with open('note', 'w') as file:\n    file.write('fine')\nWORK\nreturn out",
        top="import tempfile\nwith tempfile.NamedTemporaryFile() as scratch:\n"
        "    scratch.write(b'fine')",
    ),
    honest(
        30,
        "a few lines printed",
        SINES,
        "print('rows', len(x))\nWORK\nreturn out",
        top="import sys, warnings\nprint('loaded', file=sys.stderr)\nwarnings.warn('careful')",
    ),
)
