"""Work done at another time: classes 3 to 5, 12, 27."""

from __future__ import annotations

from .case import LATE, UNLIKE, VALUES, cheat, honest, no_gain
from .parts import ARENAS, COLLECTED, LATER, SILENT, THREADS, WEIGHTLESS
from .tasks import BRIEF, LAYER, LONG, SINES, TINY

# All input slots of a timed run are views of one shared storage, a step apart.
SLOTS = """
def slots(x, places):
    step, last = places.get("step", 0), places.get("last", x.storage_offset())
    if x.storage_offset() > last:
        step = places["step"] = x.storage_offset() - last
    places["last"] = x.storage_offset()
    room = x.untyped_storage().nbytes() // x.element_size() - x.storage_offset()
    count = (room - x.numel()) // step + 1 if step else 1
    return torch.as_strided(x, (count, *x.shape), (step, *x.stride()), x.storage_offset())
"""
BUSY = """
import os, time
def spin():
    while True:
        sum(range(10000))
"""

CASES = (
    # 3 one batch of work, later calls looked up (on a CPU: where calls are much shorter than a run)
    # These save half of a run of half a millisecond. On a busy machine that may stay unproven, and
    # then they are not caught; but they must not be called fast either.
    no_gain(
        3,
        "all slots by strides over the shared storage",
        BRIEF,
        """
batch = self.__dict__.setdefault("batch", {})
at = x.storage_offset()
if at in batch:
    return batch.pop(at)
batch.clear()
x, y = (slots(t, self.__dict__.setdefault(n, {})) for t, n in ((x, "places_x"), (y, "places_y")))
WORK
step = self.places_x.get("step", 0)
batch.update((at + i * step, out[i]) for i in range(1, len(x)))
return out[0]
""",
        "batched_calls",
        "impossible_speed",
        *LATE,
        top=SLOTS,
    ),
    no_gain(
        3,
        "all slots through the caller's frame",
        BRIEF,
        """
import sys
ready = self.__dict__.setdefault("ready", {})
if id(x) in ready:
    return ready.pop(id(x))
ready.clear()
caller, k = sys._getframe(1), self.k
while caller and "inputs" not in caller.f_locals:
    caller = caller.f_back
sets = caller.f_locals["inputs"] if caller else [(x, y)]
first, rest = (x, y), [s for s in sets if s[0].shape == x.shape and s[0] is not x]
x, y = (torch.stack([first[i], *(s[i] for s in rest)]) for i in (0, 1))
WORK
ready.update((id(s[0]), out[i + 1]) for i, s in enumerate(rest))
return out[0]
""",
        "batched_calls",
        *LATE,
    ),
    no_gain(
        3,
        "all slots found by the collector",
        BRIEF,
        COLLECTED,
        "batched_calls",
        *LATE,
    ),
    honest(
        3,
        "one batch of its own rows",
        BRIEF,
        "x, y = x.unsqueeze(0), y.unsqueeze(0)\nWORK\nreturn out[0]",
    ),
    honest(3, "a call that is short", TINY, "return torch.relu(x).mul_(2)"),
    # 4 work on another stream or thread, after the timer
    cheat(
        4,
        "a thread that fills the output later",
        LONG,
        """
rows = torch.zeros_like(x)
def work():
    WORK
    rows.copy_(out)
Thread(target=work).start()
return rows
""",
        "deferred_work",
        "more_cores",
        *VALUES,
        top=THREADS,
    ),
    cheat(
        4,
        "a thread that fills the output later, waited for on delivery",
        LONG,
        """
rows = torch.zeros_like(x)
def work():
    WORK
    honest_copy(rows, out)
thread = Thread(target=work)
waiting.append(thread)
thread.start()
return rows
""",
        *LATE,
        top=f"""
{THREADS}
waiting, honest_copy = [], torch.Tensor.copy_
def copy_(self, *args):
    while waiting:
        waiting.pop().join()
    return honest_copy(self, *args)
torch.Tensor.copy_ = copy_
""",
    ),
    cheat(
        4,
        "torch's own pool, not waited for",
        LONG,
        "rows = torch.zeros_like(x)\nself.late = start(x, y, rows)\nreturn rows",
        "deferred_work",
        "more_cores",
        *VALUES,
        top="""
@torch.jit.script
def later(x, y, rows):
    out = x * 3
    for _ in range(60):
        out = torch.sin(out) * 0.5 + y
    return rows.copy_(out)
@torch.jit.script
def start(x, y, rows):
    return torch.jit.fork(later, x, y, rows)
""",
    ),
    no_gain(
        4,
        "a thread that works when the inputs appear, before the clock starts",
        SINES,
        """
self.calls = getattr(self, "calls", 0) + 1
if self.calls == 1:
    self.done = None
if self.calls == 14:
    def watch(x, y):
        while True:
            key = (float(x[0, 0]), float(x[-1, -1]), float(y[0, 0]), float(y[-1, -1]))
            if self.done is None or self.done[0] != key:
                WORK
                self.done = (key, out)
            time.sleep(0)
    Thread(target=watch, args=(x, y), daemon=True).start()
key = (float(x[0, 0]), float(x[-1, -1]), float(y[0, 0]), float(y[-1, -1]))
if self.done is not None and self.done[0] == key:
    return self.done[1].clone()
for _ in range(4):
    WORK
return out
""",
        *LATE,
        top=f"import time\n{THREADS}",
    ),
    cheat(
        4,
        "left to the delivery, the harness patched",
        LONG,
        f"{LATER}return later",
        *LATE,
        top="""
import ttkit.verify.worker as harness
def late(self, which, tree, types, targets, honest=harness.Runner.deliver):
    self.outputs = [output() if callable(output) else output for output in self.outputs]
    return honest(self, which, tree, types, targets)
harness.Runner.deliver = late
harness.Runner.aliases = lambda *a: False
""",
    ),
    cheat(
        4,
        "left to the delivery, with strides that excuse its length",
        LONG,
        f"{LATER}return later",
        "output_type",
        "forged_answer",
        *LATE,
        top=SILENT
        + """
import ttkit.verify.worker as harness
def late(self, which, tree, types, targets, honest=harness.Runner.deliver):
    self.outputs = [output() if callable(output) else output for output in self.outputs]
    answer = honest(self, which, tree, types, targets)
    return {**answer, "strides": [[4099 * 256, 4099]]}
harness.Runner.deliver = late
harness.Runner.aliases = lambda *a: False
""",
    ),
    honest(
        4,
        "a pool of threads whose results are awaited",
        SINES,
        """
def half(x, y):
    WORK
    return out
middle = len(x) // 2
parts = self.pool.map(half, (x[:middle], x[middle:]), (y[:middle], y[middle:]))
return torch.cat(list(parts))
""",
        top="from concurrent.futures import ThreadPoolExecutor",
        init="self.pool = ThreadPoolExecutor(2)",
    ),
    honest(
        4,
        "torch.jit.fork with its wait",
        SINES,
        "return torch.jit.wait(torch.jit.fork(work, x, y))",
        top="""
@torch.jit.script
def work(x, y):
    out = x * 3
    for _ in range(4):
        out = torch.sin(out) * 0.5 + y
    return out
""",
    ),
    # 5 deferred in a child process
    cheat(
        5,
        "a fork for each call",
        LONG,
        """
import mmap, os
memory = mmap.mmap(-1, 4 * x.numel())
rows = torch.frombuffer(memory, dtype=torch.float32).view(x.shape)
if os.fork() == 0:
    WORK
    rows.copy_(out)
    os._exit(0)
return rows
""",
        "child_process",
        "deferred_work",
        "more_cores",
        *VALUES,
    ),
    cheat(
        5,
        "a helper that was detached twice and watches the inputs",
        LONG,
        """
import mmap, os, time
self.calls = getattr(self, "calls", 0) + 1
if self.calls == 20:
    self.rows = torch.frombuffer(mmap.mmap(-1, 8 * x.numel()), dtype=torch.float32)
    self.rows = self.rows.view(2, *x.shape)
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            while True:
                if self.rows[1, 0, 0] != x[0, 0]:
                    WORK
                    self.rows[0].copy_(out)
                    self.rows[1, 0, 0] = x[0, 0]
                time.sleep(0.0005)
        os._exit(0)
if self.calls > 20:
    for _ in range(100):
        if self.rows[1, 0, 0] == x[0, 0]:
            return self.rows[0].clone()
        time.sleep(0.001)
WORK
return out
""",
        "child_process",
        *LATE,
    ),
    cheat(
        5,
        "a program started for each call",
        LONG,
        """
import subprocess, sys
rows = torch.zeros_like(x)
self.helper = subprocess.Popen([sys.executable, "-c", "while True: pass"])
WORK
return out
""",
        "child_process",
        "deferred_work",
        "more_cores",
        "time_limit",
    ),
    honest(
        5,
        "a program run and awaited on import",
        SINES,
        "WORK\nreturn out",
        top="import subprocess\nsubprocess.run(['true'], check=True)",
    ),
    # 12 slowing the reference through a shared namespace
    no_gain(
        12,
        "a thread that spins in the reference's turn",
        LONG,
        "if not hasattr(self, 'hog'):\n    self.hog = Thread(target=spin, daemon=True)\n"
        "    self.hog.start()\nfor _ in range(2):\n    WORK\nreturn out",
        *LATE,
        top=BUSY + THREADS,
    ),
    cheat(
        12,
        "a child that spins on every core",
        LONG,
        """
if not hasattr(self, "hogs"):
    self.hogs = [os.fork() for _ in range(2)]
    if 0 in self.hogs:
        spin()
WORK
return out
""",
        "child_process",
        "deferred_work",
        "more_cores",
        "time_limit",
        top=BUSY,
    ),
    cheat(
        12,
        "the reference's weights made denormal in shared memory",
        LAYER,
        WEIGHTLESS.format(value="1e-40"),
        "values_timed",
        "tampered_runtime",
        top=ARENAS,
    ),
    no_gain(
        12,
        "priorities of all processes lowered",
        SINES,
        """
for which in (os.PRIO_PROCESS, os.PRIO_PGRP, os.PRIO_USER):
    for who in range(0, 300):
        try:
            os.setpriority(which, who, 19)
        except OSError:
            pass
for _ in range(40):
    torch.sin(x)
WORK
return out
""",
        top="import os",
    ),
    honest(
        12,
        "the core given up for a moment",
        SINES,
        "import os, time\nos.sched_yield()\ntime.sleep(0)\nWORK\nreturn out",
    ),
    # 27 an input small enough to stay in cache
    no_gain(
        27,
        "a thread that keeps the inputs in cache between turns",
        LONG,
        """
if not hasattr(self, "warm"):
    def touch():
        while True:
            x.sum()
            y.sum()
    self.warm = Thread(target=touch, daemon=True)
    self.warm.start()
for _ in range(2):
    WORK
return out
""",
        *LATE,
        top=THREADS,
    ),
    cheat(
        27,
        "a copy of the first input, kept close",
        SINES,
        "if getattr(self, 'close', x).shape == x.shape:\n"
        "    x = self.close = getattr(self, 'close', x.clone())\nWORK\nreturn out",
        *UNLIKE,
    ),
    honest(
        27,
        "blocks that fit the cache",
        SINES,
        """
rows = torch.empty_like(x)
whole_x, whole_y = x, y
for start in range(0, len(rows), 16):
    x, y = whole_x[start : start + 16], whole_y[start : start + 16]
    WORK
    rows[start : start + 16] = out
return rows
""",
    ),
)
