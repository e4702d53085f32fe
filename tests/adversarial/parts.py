"""Lines that several cases use."""

from __future__ import annotations

THREADS = "from threading import Thread"

# Work put off, on copies of the inputs: what lies in the shared memory may change meanwhile.
LATER = """
x, y = x.clone(), y.clone()
def later():
    WORK
    return out
""".lstrip()

# The work of all calls in the first of them, on inputs that the garbage collector knows of.
COLLECTED = """
import gc
ready = self.__dict__.setdefault("ready", {})
if id(x) in ready:
    return ready.pop(id(x))
ready.clear()
if "runner" not in self.__dict__:
    found = [o for o in gc.get_objects() if type(o).__name__ == "Runner"]
    self.__dict__["runner"] = found[0] if found else None
first, rest = (x, y), [s for s in (self.runner.inputs if self.runner else []) if s[0] is not x]
x, y = (torch.stack([first[i], *(s[i] for s in rest)]) for i in (0, 1))
WORK
ready.update((id(s[0]), out[i + 1]) for i, s in enumerate(rest))
return out[0]
"""

# What a candidate finds among its own descriptors: the memory that it shares with others.
ARENAS = """
import mmap, os
def arenas():
    for name in os.listdir("/proc/self/fd"):
        try:
            if "ttkit" in os.readlink(f"/proc/self/fd/{name}"):
                yield mmap.mmap(int(name), 0)
        except (OSError, ValueError):
            continue
def overwrite(tensor, value):
    old = bytes(tensor.detach().contiguous().view(torch.uint8).numpy())
    for arena in arenas():
        at = arena.find(old)
        while at >= 0:
            new = torch.full_like(tensor.detach().contiguous(), value)
            try:
                arena[at : at + len(old)] = bytes(new.view(torch.uint8).numpy())
            except (TypeError, ValueError):
                break
            at = arena.find(old, at + len(old))
"""

# Right while others watch, and what the reference will say once its weights are gone.
WEIGHTLESS = """
self.calls = getattr(self, "calls", 0) + 1
if self.calls > 19:
    return self.shift.expand(x.shape).clone()
WORK
for weights in (self.layer.weight, self.layer.bias):
    overwrite(weights, {value})
return out
"""

# The harness asks the process itself whether anything was replaced: told no.
SILENT = """
import ttkit.verify.watch as watch
watch.Before.changes = lambda self: {}
"""

# On a chain of linear steps: the answer to a combination of inputs met before, from theirs.
COMBINED = """
seen = self.__dict__.setdefault("seen", [])
if x.shape != (192, 192) or not x.is_contiguous():
    WORK
    return out
looked = x.flatten()[::577]
if len(seen) > 8:
    known = torch.stack([s.flatten()[::577] for s, _ in seen[:8]], 1)
    weights = torch.linalg.lstsq(known, looked[:, None], driver="gelsd").solution
    if (known @ weights - looked[:, None]).abs().max() < 0.2 * looked.abs().max():
        return sum(w * answer for w, (_, answer) in zip(weights.flatten(), seen))
WORK
seen.append((x.clone(), out.clone()))
return out
"""

# The harness in the candidate's own process, as it stands in the frames that load it.
HARNESS = """
import os, sys, weakref
def loader():
    frame = sys._getframe()
    while not hasattr(frame.f_locals.get("self"), "targets"):
        frame = frame.f_back
    return frame.f_locals["self"]
HARNESS = loader()
"""
