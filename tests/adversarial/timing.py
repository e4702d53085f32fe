"""Work saved by memory or done at another time: classes 2 to 5, 12, 25 and 27 to 29."""

from __future__ import annotations

from .case import LATE, UNLIKE, VALUES, after, cheat, honest, no_gain
from .tasks import BRIEF, DEAR, LAYER, LONG, SINES, TINY
from .values import ARENAS, THREADS, WEIGHTLESS

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
    # 2 result cache keyed by pointer, version or content
    cheat(
        2,
        "kept by pointer",
        SINES,
        """
kept = self.__dict__.setdefault("kept", {})
key = (x.data_ptr(), y.data_ptr())
if key not in kept:
    WORK
    kept[key] = out
return kept[key].clone()
""",
        *UNLIKE,
    ),
    cheat(
        2,
        "kept by pointer, shape and version",
        SINES,
        """
kept = self.__dict__.setdefault("kept", {})
key = (x.data_ptr(), x.shape, x.stride(), x._version, y._version)
if key not in kept:
    WORK
    kept[key] = out
return kept[key].clone()
""",
        *UNLIKE,
    ),
    cheat(
        2,
        "kept by a hash with a tolerance",
        SINES,
        """
kept = self.__dict__.setdefault("kept", {})
key = (x.shape, round(float(x.mean())), round(float(y.mean())))
if key not in kept:
    WORK
    kept[key] = out
return kept[key].clone()
""",
        *UNLIKE,
    ),
    no_gain(
        2,
        "kept by content up to a factor, inputs that are dear to make",
        DEAR,
        """
kept = self.__dict__.setdefault("kept", {})
key = tuple((a[0, :16] / a[0, 0]).mul(1000).round().int().tolist())
scale = (a[0, 0] * b[0, 0]).item()
if key not in kept:
    for _ in range(4):
        WORK
    kept[key] = out / scale
return kept[key] * scale
""",
        *UNLIKE,
    ),
    no_gain(
        2,
        "kept by all of the content",
        SINES,
        """
kept = self.__dict__.setdefault("kept", {})
key = (x.numpy().tobytes(), y.numpy().tobytes())
if key not in kept:
    WORK
    kept[key] = out
for _ in range(40):
    torch.sin(x)
return kept[key].clone()
""",
    ),
    honest(
        2,
        "a constant kept by shape",
        SINES,
        """
kept = self.__dict__.setdefault("kept", {})
half = kept.setdefault((x.shape, x.dtype), torch.tensor(0.5, dtype=x.dtype))
out = x * self.k
for _ in range(4):
    out = torch.addcmul(y, torch.sin(out), half)
return out
""",
    ),
    # 3 one batch of work, later calls looked up (on a CPU: where calls are much shorter than a run)
    cheat(
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
    cheat(
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
    cheat(
        3,
        "all slots found by the collector",
        BRIEF,
        """
import gc
ready = self.__dict__.setdefault("ready", {})
if id(x) in ready:
    return ready.pop(id(x))
ready.clear()
runner = next((o for o in gc.get_objects() if type(o).__name__ == "Runner"), None)
first, rest = (x, y), [s for s in (runner.inputs if runner else []) if s[0] is not x]
x, y = (torch.stack([first[i], *(s[i] for s in rest)]) for i in (0, 1))
WORK
ready.update((id(s[0]), out[i + 1]) for i, s in enumerate(rest))
return out[0]
""",
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
    cheat(
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
        "def later(x=x, y=y):\n    WORK\n    return out\nreturn later",
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
        "def later(x=x, y=y):\n    WORK\n    return out\nreturn later",
        "output_type",
        "forged_answer",
        *LATE,
        top="""
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
if self.calls == 14:
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
if self.calls > 14:
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
    cheat(
        12,
        "a thread that spins in the reference's turn",
        LONG,
        "if not hasattr(self, 'hog'):\n    self.hog = Thread(target=spin, daemon=True)\n"
        "    self.hog.start()\nWORK\nreturn out",
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
    # 25 detecting the phase
    cheat(25, "honest for 8 calls", SINES, after(8, "return torch.zeros_like(x)"), *UNLIKE),
    cheat(25, "honest for 40 calls", BRIEF, after(40, "return y * 0.5"), "values_timed"),
    cheat(
        25,
        "honest while a run has one call",
        BRIEF,
        """
import sys
caller = sys._getframe(1)
while caller and "slots" not in caller.f_locals:
    caller = caller.f_back
if caller and len(caller.f_locals["slots"]) > 1:
    return torch.zeros_like(x)
WORK
return out
""",
        "values_timed",
    ),
    cheat(
        25,
        "wrong in every second call of a timed run",
        BRIEF,
        """
self.calls = getattr(self, "calls", 0) + 1
if self.calls > 20 and self.calls % 2:
    return torch.zeros_like(x)
WORK
return out
""",
        "values_timed",
    ),
    cheat(
        25,
        "honest when it is asked whether its output is an alias",
        SINES,
        "WORK\nself.last = out\nreturn out if runner.honest else torch.zeros_like(x)",
        "tampered_runtime",
        *VALUES,
        top="""
import ttkit.verify.worker as harness
class runner: honest = True
def recv(self, *args, honest=harness.Channel.recv):
    message, fds = honest(self, *args)
    if message.get("op") == "run":
        runner.honest = runner.finish
    if message.get("op") == "finish":
        runner.finish = bool(message.get("aliases"))
    return message, fds
runner.finish = True
harness.Channel.recv = recv
""",
    ),
    honest(
        25,
        "a plan made on the first call",
        SINES,
        "if not hasattr(self, 'plan'):\n    self.plan = [0.5] * 4\n"
        "out = x * self.k\nfor factor in self.plan:\n"
        "    out = torch.sin(out) * factor + y\nreturn out",
    ),
    # 27 an input small enough to stay in cache
    cheat(
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
    # 28 aggregate under-flow: times so small that their ratio is anything
    cheat(
        28,
        "an answer that waits before the question is asked",
        LONG,
        "def later(x=x, y=y):\n    WORK\n    return out\nreturn later",
        "forged_answer",
        "impossible_speed",
        *LATE,
        top="""
import ttkit.verify.worker as harness
honest_send, honest_deliver = harness.Channel.send, harness.Runner.deliver
def recv(self, *args, honest=harness.Channel.recv):
    message, fds = honest(self, *args)
    state["op"] = message.get("op")
    return message, fds
state = {"op": "", "ahead": 0, "calls": 0}
def send(self, message, *args):
    if state["op"] == "run" and state["ahead"]:
        state["ahead"] -= 1
        return
    honest_send(self, message, *args)
    if state["op"] == "finish":
        state["calls"] += 1
        if state["calls"] > 16:
            honest_send(self, {})
            state["ahead"] += 1
def deliver(self, *args):
    self.outputs = [o() if callable(o) else o for o in self.outputs]
    return honest_deliver(self, *args)
harness.Channel.recv, harness.Channel.send = recv, send
harness.Runner.deliver, harness.Runner.aliases = deliver, lambda *a: False
""",
    ),
    no_gain(
        28,
        "empty runs made long, so that more is taken off",
        SINES,
        "for _ in range(40):\n    torch.sin(x)\nWORK\nreturn out",
        "tampered_runtime",
        top="""
import time
import ttkit.verify.worker as harness
def run(self, slots, honest=harness.Runner.run):
    if not slots:
        time.sleep(0.01)
    honest(self, slots)
harness.Runner.run = run
""",
    ),
    honest(28, "a call of a few microseconds", TINY, "WORK\nreturn out"),
    # 29 contention and best-of-K inflation
    cheat(
        29,
        "another core, and threads on all of them",
        LONG,
        """
import os
os.sched_setaffinity(0, range(os.cpu_count()))
torch.set_num_threads(4)
WORK
return out
""",
        "more_cores",
        "tampered_runtime",
    ),
    cheat(
        29,
        "another core, of its own",
        LONG,
        """
import os
mine = os.sched_getaffinity(0)
others = set(range(os.cpu_count())) - mine
if others and not hasattr(self, "left"):
    self.left = True
    os.sched_setaffinity(0, others)
WORK
return out
""",
        "more_cores",
        "tampered_runtime",
    ),
    no_gain(
        29,
        "slow, and noisy enough to be lucky",
        SINES,
        "import random\nfor _ in range(random.choice((10, 20, 200))):\n"
        "    torch.sin(x)\nWORK\nreturn out",
    ),
    honest(
        29,
        "a number of threads asked for",
        SINES,
        "WORK\nreturn out",
        top="import os\ntorch.set_num_threads(os.cpu_count() or 1)",
    ),
)
