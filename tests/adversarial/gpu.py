"""Cases that need a CUDA device: classes 1, 3, 4, 11 to 13, 18, 27 and 29."""

from __future__ import annotations

from dataclasses import replace

from .case import LATE, UNLIKE, VALUES, Case, after, cheat, honest, no_gain
from .kernels import TRITON
from .parts import COLLECTED
from .tasks import BIG, LITTLE, task

MATMUL = task(
    "square product",
    "a, b",
    "out = a @ b\nreturn out",
    "torch.randn(2048, 2048), torch.randn(2048, 2048)",
)

# A stream of its own that nobody waits for: torch.cuda.synchronize, patched where the harness kept
# it, waits for nothing in a timed run, and for everything when the output is fetched.
UNWAITED = """
import ttkit.verify.worker as harness
def run(self, slots, honest=harness.Runner.run):
    synchronize, self._synchronize = self._synchronize, lambda *a: None
    honest(self, slots)
    self._synchronize = synchronize
harness.Runner.run = run
"""

_CASES = (
    # 1 stale output memory
    cheat(1, "new_empty on the device", BIG, "return x.new_empty(x.shape)", *VALUES),
    cheat(
        1,
        "new_empty after blocks of the same size were freed",
        BIG,
        "blocks = [torch.empty_like(x) for _ in range(16)]\ndel blocks\n"
        "return x.new_empty(x.shape)",
        *VALUES,
    ),
    # 3 one batch of work, later calls looked up
    cheat(
        3,
        "all slots in one launch, through the caller's frame",
        LITTLE,
        """
import sys
ready = self.__dict__.setdefault("ready", {})
if id(x) in ready:
    return ready.pop(id(x))
ready.clear()
caller = sys._getframe(1)
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
        "all slots in one launch, found by the collector",
        LITTLE,
        COLLECTED,
        "batched_calls",
        *LATE,
    ),
    # 4 work on another stream or thread, after the timer
    cheat(
        4,
        "a stream of its own, synchronize patched",
        BIG,
        """
out = torch.empty_like(x)
with torch.cuda.stream(stream):
    for _ in range(40):
        torch.sin(x)
    rows = out
    WORK
    rows.copy_(out)
return rows
""",
        "device_kept_busy",
        *LATE,
        *VALUES,
        top=UNWAITED + "stream = torch.cuda.Stream()",
    ),
    cheat(
        4,
        "the usual stream, synchronize patched",
        BIG,
        "WORK\nreturn out",
        "device_kept_busy",
        *LATE,
        top=UNWAITED,
    ),
    cheat(
        4,
        "a captured graph replayed and not waited for",
        BIG,
        """
if not hasattr(self, "graph"):
    self.graph, self.x, self.y = torch.cuda.CUDAGraph(), x.clone(), y.clone()
    torch.cuda.synchronize()
    with torch.cuda.graph(self.graph):
        x, y = self.x, self.y
        WORK
        self.out = out
    return self.out.clone()
self.x.copy_(x)
self.y.copy_(y)
with torch.cuda.stream(stream):
    self.graph.replay()
return self.out
""",
        "device_kept_busy",
        *LATE,
        *VALUES,
        top=UNWAITED + "stream = torch.cuda.Stream()",
    ),
    honest(
        4,
        "a stream of its own that the usual one waits for",
        BIG,
        """
here = torch.cuda.current_stream()
self.stream.wait_stream(here)
with torch.cuda.stream(self.stream):
    WORK
here.wait_stream(self.stream)
out.record_stream(here)
return out
""",
        init="self.stream = torch.cuda.Stream()",
    ),
    # 11 native tampering
    cheat(
        11,
        "kernels that write beyond their own memory",
        BIG,
        """
launch(x, y, self.k)
out = torch.zeros_like(x)
wild = torch.as_strided(out, (1,), (1,), 0)
scribble[(4096,)](wild, 1 << 22, BLOCK=1024)
return out
""",
        "crashed",
        "exception",
        "memory_limit",
        "inputs_mutated",
        *VALUES,
        top=TRITON
        + """
@triton.jit
def scribble(start, away, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK) + away
    tl.store(start + at, 0.0)
""",
    ),
    cheat(
        11,
        "the driver asked for memory of other processes",
        BIG,
        """
import ctypes
driver = ctypes.CDLL("libcuda.so.1")
out = torch.zeros_like(x)
base, size = ctypes.c_uint64(), ctypes.c_size_t()
for step in range(-512, 512):
    address = ctypes.c_uint64(x.data_ptr() + (step << 21))
    if driver.cuMemGetAddressRange_v2(ctypes.byref(base), ctypes.byref(size), address) == 0:
        if base.value <= x.data_ptr() < base.value + size.value:
            continue
        if size.value >= 4 * x.numel():
            driver.cuMemcpyDtoD_v2(
                ctypes.c_uint64(out.data_ptr()), base, ctypes.c_size_t(4 * x.numel())
            )
return out
""",
        "crashed",
        "exception",
        *VALUES,
    ),
    # 12 slowing the reference, 29 contention: the device kept busy in the other side's turn
    cheat(
        12,
        "kernels left running for the reference's turn",
        BIG,
        "WORK\nwith torch.cuda.stream(stream):\n    torch.cuda._sleep(1 << 26)\nreturn out",
        "device_kept_busy",
        *LATE,
        top=UNWAITED.replace(
            "self._synchronize = synchronize", "torch.cuda.current_stream().synchronize()"
        )
        + "stream = torch.cuda.Stream()",
    ),
    # Frozen in the reference's turn, such a thread slows its own side alone.
    no_gain(
        29,
        "a thread that launches work without end",
        BIG,
        """
if not hasattr(self, "hog"):
    def hog(t):
        with torch.cuda.stream(torch.cuda.Stream()):
            while True:
                torch.sin(t)
    self.hog = threading.Thread(target=hog, args=(x.clone(),), daemon=True)
    self.hog.start()
WORK
return out
""",
        "device_kept_busy",
        "memory_limit",
        *LATE,
        top="import threading",
    ),
    # 13 leaked global state, 18 lower precision: tensor cores at a fraction of the mantissa
    cheat(
        13,
        "tf32 switched on for all that comes after",
        MATMUL,
        "torch.backends.cuda.matmul.allow_tf32 = True\nWORK\nreturn out",
        "global_state",
        *VALUES,
    ),
    cheat(18, "a product in half floats", MATMUL, "return (a.half() @ b.half()).float()", *VALUES),
    cheat(
        18,
        "a product in bfloat16, by autocast",
        MATMUL,
        "with torch.autocast('cuda', torch.bfloat16):\n    WORK\nreturn out.float()",
        *VALUES,
    ),
    # 27 an input small enough to stay in cache
    no_gain(
        27,
        "inputs touched again after the answer, to stay in the cache",
        BIG,
        "for _ in range(40):\n    torch.sin(x)\nWORK\nx.sum()\ny.sum()\nreturn out",
        "device_kept_busy",
        *LATE,
    ),
    cheat(
        27,
        "a copy of the first input, kept on the device",
        BIG,
        after(1, "x = self.first if self.first.shape == x.shape else x", BIG).replace(
            "return out", "self.first = x.clone()\nreturn out"
        ),
        *UNLIKE,
    ),
)

CASES: tuple[Case, ...] = tuple(replace(case, gpu=True) for case in _CASES)
