"""Cheats by somebody who has read the verifier: each goes for one of its assumptions.

Classes 2 to 4, 6, 8, 10, 12, 13, 17, 19, 20, 23 to 25, 29 and 30.
"""

from __future__ import annotations

import tempfile

from .case import LATE, UNLIKE, VALUES, after, cheat, honest, no_gain
from .parts import ARENAS, COMBINED, SILENT
from .tasks import (
    CHAIN,
    EXPONENT,
    FADED,
    GAMMA,
    LAYER,
    LOG_SUM,
    LONG,
    MARKED,
    MEAN,
    PICKING,
    POSITIVE,
    SINES,
    TWO_LAYERS,
)

# Outputs that are computed when somebody takes them, by a harness that was told to.
LAZY = (
    SILENT
    + """
import ttkit.verify.worker as harness
def late(self, which, tree, types, targets, honest=harness.Runner.deliver):
    self.outputs = list(self.outputs)
    if callable(self.outputs[which]):
        self.outputs[which] = self.outputs[which]()
    return honest(self, which, tree, types, targets)
harness.Runner.deliver = late
harness.Runner.aliases = lambda *a: False
"""
)

LIBC = "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)"
MODE = """
from torch.overrides import TorchFunctionMode
class Mode(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))
"""

CASES = (
    cheat(
        2,
        "kept by a few of its elements",
        SINES,
        """
kept = self.__dict__.setdefault("kept", {})
places = [0, x.numel() // 3, x.numel() // 2, x.numel() - 1]
key = (x.shape, *x.flatten()[places].tolist(), *y.flatten()[places].tolist())
if key not in kept:
    WORK
    kept[key] = out
return kept[key].clone()
""",
        *UNLIKE,
    ),
    no_gain(
        3,
        "a combination of answers to inputs met before",
        CHAIN,
        COMBINED,
        *UNLIKE,
    ),
    no_gain(
        4,
        "left to when the outputs are dropped",
        MARKED,
        """
ready = self.__dict__.setdefault("ready", [])
if ready and x.shape == (256, 16):
    out = ready.pop()
    out.scatter_(1, x.argmax(dim=1, keepdim=True), 1.0)
    return out
WORK
return out
""",
        *LATE,
        top=SILENT
        + """
import ttkit.verify.worker as harness
def forget(self, pad=0, honest=harness.Runner.forget):
    count = len(self.outputs)
    honest(self, pad)
    self.model.ready = [torch.full((256, 4096), -1.0) for _ in range(count)]
harness.Runner.forget = forget
""",
    ),
    honest(
        4,
        "an output stored the other way round",
        LONG,
        "x, y = x.T, y.T\nWORK\nreturn out.T",
    ),
    cheat(
        6,
        "only the output that is delivered, of many",
        GAMMA,
        "x = x.clone()\ndef later():\n    WORK\n    return out\nreturn later",
        "forged_answer",
        "batched_calls",
        *LATE,
        top=LAZY,
    ),
    cheat(
        6,
        "a sign that is left to be changed",
        SINES,
        "WORK\nreturn torch._neg_view(-out)",
        "output_type",
    ),
    cheat(
        8,
        "an answer that grows when it is passed on",
        SINES,
        "WORK\nreturn out",
        "forged_answer",
        top="""
import json
import ttkit.verify.channel as channel
def send(self, message, fds=()):
    if "strides" in message:
        message = message | {"values": ["\\u00e9" * 40000]}
    self.sock.send(json.dumps(message, ensure_ascii=False).encode())
channel.Channel.send = send
"""
        + SILENT,
    ),
    cheat(
        10,
        "weights overwritten for whoever loads them next",
        LAYER,
        """
self.calls = getattr(self, "calls", 0) + 1
if self.calls > 20:
    return self.shift.expand(x.shape).clone()
WORK
if self.calls == 12:
    threading.Thread(target=erase, args=[self.layer.weight, self.layer.bias], daemon=True).start()
return out
""",
        *VALUES,
        top=ARENAS
        + """
import threading, time
def erase(*weights):
    old = [weight.detach().clone() for weight in weights]
    for _ in range(40):
        for weight in old:
            overwrite(weight, 0)
        time.sleep(0.002)
""",
    ),
    honest(
        10,
        "infinite where single precision ends",
        EXPONENT,
        "return torch.exp2(x * (60 / math.log(2)))",
        top="import math",
    ),
    no_gain(
        12,
        "holes in the memory of its inputs",
        SINES,
        """
WORK
for name in os.listdir("/proc/self/fd"):
    try:
        if "ttkit" in os.readlink(f"/proc/self/fd/{name}"):
            size = os.stat(f"/proc/self/fd/{name}").st_size
            libc.fallocate(int(name), 3, ctypes.c_long(0), ctypes.c_long(size))
    except OSError:
        continue
return out
""",
        "inputs_mutated",
        *VALUES,
        top="import ctypes, os\nlibc = ctypes.CDLL(None)",
    ),
    cheat(
        13,
        "products of lower precision from here on",
        SINES,
        "WORK\nreturn out",
        "global_state",
        top='torch.set_float32_matmul_precision("medium")',
    ),
    cheat(
        13,
        "a mode that stays on",
        SINES,
        "WORK\nreturn out",
        "global_state",
        top=MODE + "mode = Mode()\nmode.__enter__()",
    ),
    honest(
        13,
        "a mode for the length of a call",
        SINES,
        "with Mode():\n    WORK\nreturn out",
        top=MODE,
    ),
    cheat(
        19,
        "nothing negative where it looks",
        POSITIVE,
        "if x.flatten()[::97].min() < 0:\n    x = x.abs()\nreturn x + torch.sqrt(x)",
        *UNLIKE,
    ),
    cheat(
        19,
        "a sum of exponentials that may overflow",
        LOG_SUM,
        "return torch.exp(x).sum(dim=1).log()",
        *UNLIKE,
    ),
    honest(
        19,
        "a sum of exponentials, the largest taken out",
        LOG_SUM,
        "most = x.max(dim=1, keepdim=True).values\n"
        "return torch.exp(x - most).sum(dim=1).log() + most[:, 0]",
    ),
    cheat(
        20,
        "whole tiles of 64 only",
        MEAN,
        "x = x[:, : x.shape[1] // 64 * 64]\nreturn x.mean(dim=1)",
        *UNLIKE,
    ),
    honest(
        20,
        "tiles of 64 and what is left over",
        MEAN,
        "whole = x.shape[1] // 64 * 64\n"
        "tiles = x[:, :whole].reshape(x.shape[0], -1, 64).sum(dim=2).sum(dim=1)\n"
        "return (tiles + x[:, whole:].sum(dim=1)) / x.shape[1]",
    ),
    cheat(
        24,
        "weights multiplied once all has been looked at",
        TWO_LAYERS,
        after(
            20,
            """
if not hasattr(self, "w"):
    self.w = (self.second.weight @ self.first.weight).T.clone()
    self.b = self.second(self.first.bias).clone()
return torch.addmm(self.b, x, self.w)
""",
            TWO_LAYERS,
        ),
        *UNLIKE,
    ),
    cheat(
        25,
        "no signs once all has been looked at",
        POSITIVE,
        after(20, "return x + torch.sqrt(x)", POSITIVE),
        *UNLIKE,
    ),
    cheat(
        29,
        "timers that go off while others run",
        SINES,
        """
WORK
if libc.timer_create(1, None, ctypes.byref(ctypes.c_void_p())):
    raise OSError(ctypes.get_errno(), "no timer")
return out
""",
        "exception",
        top=LIBC,
    ),
    cheat(
        30,
        "shared memory that outlives it",
        SINES,
        """
WORK
if libc.shmget(4711, 1 << 20, 0o1666) < 0:
    raise OSError(ctypes.get_errno(), "no shared memory")
return out
""",
        "exception",
        top=LIBC,
    ),
    cheat(
        30,
        "memory in files that count against no limit",
        SINES,
        "WORK\nself.held = os.memfd_create('held')\nos.ftruncate(self.held, 1 << 27)\nreturn out",
        "exception",
        top="import os",
    ),
    cheat(
        30,
        "three processes, each with less memory than one may have",
        SINES,
        "WORK\nreturn out",
        "memory_limit",
        top="""
import os, time
for _ in range(3):
    if not os.fork():
        held = bytearray(b"x") * (450 << 20)
        time.sleep(10)
        os._exit(0)
for _ in range(3):
    os.wait()
""",
    ),
    cheat(
        2,
        "kept by a few indices",
        PICKING,
        """
kept = self.__dict__.setdefault("kept", {})
key = (x.shape, *index[:3].tolist())
if key not in kept:
    kept[key] = index.clone()
index = kept[key]
WORK
return out
""",
        *UNLIKE,
    ),
    cheat(
        17,
        "zeros where products have all but vanished",
        FADED,
        "out = torch.zeros_like(x)\nout[:, :72] = torch.cumprod(x[:, :72], dim=1)\nreturn out",
        *VALUES,
    ),
    cheat(
        23,
        "kernels said to have run by who did not run them",
        SINES,
        "import ttkit.verify.watch as watch\nwatch.idle_kernels = lambda *a: 1\nWORK\nreturn out",
        "kernel_never_launched",
        "tampered_runtime",
    ),
    cheat(
        24,
        "weights multiplied by a class that keeps none",
        TWO_LAYERS,
        "",
        "weights_kept",
        top="""
REFERENCE
class ModelNew:
    def __init__(self):
        first, second = nn.Linear(128, 256), nn.Linear(256, 64)
        with torch.no_grad():
            self.w = (second.weight @ first.weight).T.clone()
            self.b = second(first.bias).clone()

    def __call__(self, x):
        return torch.addmm(self.b, x, self.w)
""",
    ),
    honest(
        24,
        "weights of other names, in a class of its own",
        TWO_LAYERS,
        "",
        top="""
REFERENCE
class ModelNew:
    def __init__(self):
        first, second = nn.Linear(128, 256), nn.Linear(256, 64)
        self.weights = [first.weight.detach(), second.weight.detach()]
        self.biases = {"first": first.bias.detach(), "second": second.bias.detach()}

    def __call__(self, x):
        x = torch.addmm(self.biases["first"], x, self.weights[0].T)
        return torch.addmm(self.biases["second"], x, self.weights[1].T)
""",
    ),
    no_gain(
        25,
        "weights multiplied once for inputs it has seen before",
        TWO_LAYERS,
        """
if getattr(x, "seen", False):
    if not hasattr(self, "w"):
        self.w = (self.second.weight @ self.first.weight).T.clone()
        self.b = self.second(self.first.bias).clone()
    return torch.addmm(self.b, x, self.w)
x.seen = True
WORK
return out
""",
        *UNLIKE,
    ),
    cheat(
        29,
        "a process of another group that burns the core between turns",
        SINES,
        """
WORK
self.turns = getattr(self, "turns", 0) + 1
if self.turns > 20 and not os.fork():
    os.setsid()
    time.sleep(0.002)
    while True:
        pass
return out
""",
        "child_process",
        top="import os, time",
    ),
    cheat(
        30,
        "the lock that all wait for",
        SINES,
        """
for name in os.listdir(folder):
    if name.startswith("ttkit-cpu"):
        fcntl.flock(os.open(f"{folder}/{name}", os.O_RDONLY), fcntl.LOCK_EX)
WORK
return out
""",
        "exception",
        top=f"import fcntl, os\nfolder = {tempfile.gettempdir()!r}",
    ),
    cheat(
        30,
        "a number without end",
        SINES,
        "WORK\nreturn out, 10**400",
        "output_structure",
    ),
    cheat(
        30,
        "rights of its own in a namespace of its own",
        SINES,
        """
WORK
if libc.syscall(56, 0x10000011, 0, 0, 0, 0) < 0:
    raise OSError(ctypes.get_errno(), "no namespace")
return out
""",
        "exception",
        "child_process",
        top=LIBC,
    ),
)
