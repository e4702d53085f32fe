"""Attacks on what observes: classes 7, 8, 11 and 31."""

from __future__ import annotations

from .case import LATE, UNLIKE, VALUES, cheat, honest, no_gain
from .parts import LATER, SILENT
from .tasks import COPY, LONG, SINES

SLOWLY = "for _ in range(40):\n    torch.sin(x)\nWORK\nreturn out"
# Hand in zeros unless the attack before them has found or changed something.
ZEROS = "return torch.zeros_like(x)"

CASES = (
    # 7 patched timer, synchronize, allclose
    no_gain(
        7,
        "Python's clocks stand still",
        SINES,
        SLOWLY,
        "tampered_runtime",
        top="""
import time
time.perf_counter = time.monotonic = time.time = lambda: 0.0
time.clock_gettime = time.process_time = lambda *a: 0.0
""",
    ),
    no_gain(
        7,
        "the judge's own functions, in the wrong process",
        SINES,
        SLOWLY,
        "tampered_runtime",
        top="""
import ttkit.verify.channel as channel, ttkit.verify.session as session
import ttkit.verify.sides as sides, ttkit.verify.timing as timing
channel.Channel.timed = lambda self, *a: (1e-9, {})
sides.process_cpu_seconds = lambda pid: 0.0
session.Session._check_deferred = lambda *a: None
timing.measure = lambda *a: (timing.Interval(9.0, 9.0, 9.0, 10), [])
""",
    ),
    cheat(
        7,
        "comparisons that always agree",
        SINES,
        "return x + 1",
        "values_declared",
        "tampered_runtime",
        top="""
import ttkit.verify.correctness as correctness
torch.allclose = torch.equal = torch.isclose = lambda *a, **k: True
correctness.compare = lambda *a: correctness.Comparison(True, 0.0, 1.0, True)
correctness.Yardstick.error = lambda *a: 0.0
""",
    ),
    cheat(
        7,
        "the clock of C, overwritten in its library",
        SINES,
        "return x + 1",
        "values_declared",
        "tampered_runtime",
        "crashed",
        top="""
import ctypes
libc = ctypes.CDLL(None)
address = ctypes.cast(libc.clock_gettime, ctypes.c_void_p).value
page = address & ~4095
if libc.mprotect(ctypes.c_void_p(page), 8192, 7) == 0:
    ctypes.memmove(address, b"\\x31\\xc0\\xc3", 3)
""",
    ),
    honest(
        7,
        "a clock read, a comparison made, nothing patched",
        SINES,
        "import time\nstarted = time.perf_counter()\nWORK\n"
        "self.took = time.perf_counter() - started\nreturn out",
        init="assert torch.allclose(torch.ones(3).sum(), torch.tensor(3.0))",
    ),
    # 8 forged result channel
    cheat(
        8,
        "an answer too many",
        SINES,
        'import os\nos.write(3, b\'{"values": [], "strides": [[256, 1]]}\')\nreturn x',
        "forged_answer",
        "values_declared",
    ),
    cheat(
        8,
        "an answer that is no JSON",
        SINES,
        "import os\nos.write(3, b'\\x80no')\nreturn x + 1",
        "forged_answer",
    ),
    cheat(
        8,
        "an answer nested without end",
        SINES,
        "import os\nos.write(3, b'[' * 100000)\nreturn x + 1",
        "forged_answer",
    ),
    cheat(
        8,
        "a verdict written to stdout, and status 0",
        SINES,
        """
import os, sys
print('{"status": "correct", "speedup": 100.0, "speedup_lo": 99.0}', flush=True)
os._exit(0)
""",
        "crashed",
    ),
    cheat(
        8,
        "the answer first, the work after it",
        LONG,
        f"{LATER}return later",
        "forged_answer",
        *LATE,
        top=SILENT
        + """
import ttkit.verify.worker as harness
honest_run, honest_deliver = harness.Runner.run, harness.Runner.deliver
honest_send = harness.Channel.send
state = {"sent": False}
def run(self, slots):
    if slots:
        honest_send(channel(), {})
        state["sent"] = True
    honest_run(self, slots)
    self.outputs = [o() if callable(o) else o for o in self.outputs]
def send(self, message, *args):
    if state.pop("sent", False):
        return
    honest_send(self, message, *args)
def channel():
    import gc
    return next(o for o in gc.get_objects() if type(o).__name__ == "Candidate").channel
harness.Runner.run, harness.Channel.send = run, send
""",
    ),
    cheat(
        8,
        "its own errors turned into values",
        SINES,
        "return None",
        "output_structure",
        "forged_answer",
        "tampered_runtime",
        *VALUES,
        top="""
import ttkit.verify.worker as harness
def deliver(self, which, tree, types, targets):
    return {"strides": [[256, 1]], "values": [], "ok": True, "max_error": 0.0, "mutated": False}
harness.Runner.deliver = deliver
harness.describe = lambda error, path: {}
""",
    ),
    honest(
        8,
        "a line that looks like a verdict, printed",
        SINES,
        'WORK\nprint(\'{"status": "correct", "op": "run"}\')\nreturn out',
    ),
    # 11 native tampering
    cheat(
        11,
        "ptrace on every process in sight",
        SINES,
        f"""
import ctypes, os
libc = ctypes.CDLL(None)
for pid in [os.getppid(), *(int(n) for n in os.listdir("/proc") if n.isdigit())]:
    if pid and pid != os.getpid() and libc.ptrace(16, pid, None, None) == 0:
        libc.waitpid(pid, None, 0)
        libc.ptrace(5, pid, ctypes.c_void_p(id(x)), ctypes.c_void_p(0))
        libc.ptrace(17, pid, None, None)
{ZEROS}
""",
        "values_declared",
    ),
    cheat(
        11,
        "the memory of other processes written through /proc",
        SINES,
        f"""
import glob, os
for path in glob.glob("/proc/[0-9]*/mem"):
    if path.split("/")[2] == str(os.getpid()):
        continue
    try:
        with open(path.replace("mem", "maps")) as maps, open(path, "r+b", buffering=0) as memory:
            for line in maps:
                if "[heap]" in line:
                    memory.seek(int(line.split("-")[0], 16))
                    memory.write(bytes(4096))
    except OSError:
        continue
{ZEROS}
""",
        "values_declared",
    ),
    cheat(
        11,
        "its program replaced by one that says yes to everything",
        SINES,
        """
import os, sys
server = '''
import os, socket
channel = socket.socket(fileno=3)
channel.send(b'{}')
while channel.recv(1 << 17):
    channel.send(b'{"strides": [[256, 1]], "values": [], "aliases": false}')
'''
os.set_inheritable(3, True)
os.environ["LD_PRELOAD"] = os.path.abspath("hook.so")
os.execv(sys.executable, [sys.executable, "-S", "-c", server])
""",
        "forged_answer",
        "crashed",
        "tampered_runtime",
        *VALUES,
    ),
    cheat(
        11,
        "the interpreter's own code overwritten",
        SINES,
        "return torch.zeros_like(x)",
        "values_declared",
        "tampered_runtime",
        "crashed",
        top="""
import ctypes
import ttkit.verify.worker as harness
harness.Runner.deliver.__code__ = (lambda self, which, tree, types_, targets: {
    "strides": [[256, 1]], "values": []}).__code__
ctypes.pythonapi.PyType_Modified(ctypes.py_object(harness.Runner))
""",
    ),
    honest(
        11,
        "memory moved by ctypes, its own",
        COPY,
        "import ctypes\nx, out = x.contiguous(), torch.empty(x.shape)\n"
        "ctypes.memmove(out.data_ptr(), x.data_ptr(), x.numel() * x.element_size())\nreturn out",
    ),
    # 31 filter evasion
    cheat(
        31,
        "names pasted together",
        LONG,
        """
import mmap
system = __import__("o" + "s")
memory = mmap.mmap(-1, 4 * x.numel())
rows = torch.frombuffer(memory, dtype=torch.float32).view(x.shape)
if getattr(system, "fo" + "rk")() == 0:
    WORK
    rows.copy_(out)
    getattr(system, "_ex" + "it")(0)
return rows
""",
        "child_process",
        "deferred_work",
        "more_cores",
        *VALUES,
    ),
    cheat(
        31,
        "super's forward by a name in pieces",
        SINES,
        "name = ''.join(map(chr, (102, 111, 114, 119, 97, 114, 100)))\n"
        "return getattr(super(ModelNew, self), name)(x, y)",
        "calls_reference",
    ),
    cheat(
        31,
        "a cache, packed and executed",
        SINES,
        """
import base64
code = base64.b64decode(
    "aWYgbm90IGhhc2F0dHIoc2VsZiwgImtlcHQiKToKICAgIHNlbGYua2VwdCA9IHNlbGYud29yayh4LCB5KQ=="
)
def work(x, y):
    WORK
    return out
self.work = work
exec(code)
return self.kept.clone()
""",
        *UNLIKE,
    ),
    cheat(
        31,
        "an alias by a marshalled code object",
        COPY,
        """
import marshal, types
code = compile("lambda x: x", "", "eval")
return eval(marshal.loads(marshal.dumps(code)))(x)
""",
        "output_aliases_input",
    ),
    honest(
        31,
        "the words of a cheat in names and comments",
        SINES,
        """
# os.fork(), time.perf_counter = fake, gc.get_objects(): none of it happens here.
cache = "try: super().forward(x) except: pass; exec(base64)"
WORK
return out + 0 * len(cache)
""",
    ),
    honest(
        31,
        "unrolled code that is generated and executed",
        SINES,
        "return unrolled(x, y, self.k)",
        top="""
lines = ["def unrolled(x, y, k):", "    out = x * k"]
lines += ["    out = torch.add(y, torch.sin(out), alpha=0.5)"] * 4 + ["    return out"]
exec("\\n".join(lines))
""",
    ),
)
