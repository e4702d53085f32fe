"""What lies in memory, and what it is taken for: classes 1, 2, 9, 10, 14, 15."""

from __future__ import annotations

from .case import UNLIKE, VALUES, after, cheat, honest, no_gain
from .parts import ARENAS, SILENT, THREADS, WEIGHTLESS
from .tasks import COPY, DEAR, FLIPPED, LAYER, LOGARITHM, MASKED, PART, SINES, TURNED

# Hand in zeros unless the attack before them has found or changed something.
ZEROS = "return torch.zeros_like(x)"

CASES = (
    # 1 stale output memory
    cheat(1, "empty_like", SINES, "return torch.empty_like(x)", "values_declared"),
    cheat(
        1,
        "hunting freed blocks for a finite one",
        SINES,
        """
found = [torch.empty(x.shape) for _ in range(64)]
found = [t for t in found if t.isfinite().all() and t.std() > 0.1] or found
return found[0]
""",
        "values_declared",
    ),
    cheat(
        1,
        "its own last answer, unfilled",
        SINES,
        after(
            14,
            "self.kept = getattr(self, 'kept', None)\nreturn x * 3 if self.kept is None "
            "else self.kept.clone()",
        ).replace("return out", "self.kept = out\nreturn out"),
        *UNLIKE,
    ),
    cheat(
        1,
        "the place of delivery handed back",
        SINES,
        """
import gc
for found in gc.get_objects():
    if type(found).__name__ == "Candidate" and found.targets:
        return found.targets[0]
return torch.empty_like(x)
""",
        "values_declared",
        "output_aliases_input",
        "output_type",
    ),
    honest(
        1,
        "empty_like filled by out=",
        SINES,
        """
out, work = torch.empty_like(x), torch.empty_like(x)
torch.mul(x, self.k, out=out)
for _ in range(4):
    torch.sin(out, out=work)
    torch.add(y, work, alpha=0.5, out=out)
return out
""",
    ),
    honest(
        1,
        "a workspace kept between calls",
        SINES,
        """
if getattr(self, "space", None) is None or self.space.shape != x.shape:
    self.space = torch.empty_like(x)
torch.mul(x, self.k, out=self.space)
for _ in range(4):
    self.space.sin_().mul_(0.5).add_(y)
return self.space.clone()
""",
    ),
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
    # 9 the reference's answer from gc, frames or memory
    cheat(
        9,
        "searched by the collector",
        SINES,
        f"""
import gc
for found in gc.get_objects():
    if isinstance(found, torch.Tensor) and found.shape == x.shape and found.isfinite().all():
        if found.data_ptr() not in (x.data_ptr(), y.data_ptr()) and found.any():
            return found.clone()
{ZEROS}
""",
        "values_declared",
    ),
    cheat(
        9,
        "searched in the callers' frames",
        SINES,
        f"""
import sys
frame = sys._getframe()
while frame:
    for name, value in frame.f_locals.items():
        if name in ("expected", "reference", "exact", "case", "twin", "targets"):
            found = getattr(value, "outputs", value)
            found = found[0] if isinstance(found, (list, tuple)) and found else found
            if isinstance(found, torch.Tensor) and found.shape == x.shape:
                return found.clone()
    frame = frame.f_back
{ZEROS}
""",
        "values_declared",
    ),
    cheat(
        9,
        "searched in every shared mapping of every process",
        SINES,
        f"""
import glob, mmap, os
size = 4 * x.numel()
for path in glob.glob("/proc/[0-9]*/fd/*") + glob.glob("/proc/[0-9]*/map_files/*"):
    try:
        if "memfd" not in os.readlink(path):
            continue
        with open(path, "rb") as file:
            memory = bytearray(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
    except (OSError, ValueError):
        continue
    for at in range(0, len(memory) - size + 1, 256):
        found = torch.frombuffer(memory, dtype=torch.float32, count=x.numel(), offset=at)
        found = found.view(x.shape)
        if found.isfinite().all() and 0.1 < found.std() < 1 and not torch.equal(found, x):
            if not torch.equal(found, y):
                return found.clone()
{ZEROS}
""",
        *VALUES,
        "time_limit",
    ),
    honest(
        9,
        "the collector and a frame used for other ends",
        SINES,
        "import gc, sys\nself.called_from = sys._getframe(1).f_code.co_name\nWORK\nreturn out",
        init="import gc\ngc.collect()\ngc.freeze()",
    ),
    # 10 poisoning the expected tensor, NaN as wildcard
    cheat(10, "all NaN", SINES, "return torch.full_like(x, float('nan'))", "values_declared"),
    cheat(
        10,
        "NaN in one element",
        SINES,
        "WORK\nout[-1, -1] = float('nan')\nreturn out",
        "values_declared",
    ),
    cheat(
        10,
        "infinity where it is large",
        SINES,
        "WORK\nreturn torch.where(out > 1.4, torch.inf, out)",
        *VALUES,
    ),
    cheat(
        10,
        "inputs made NaN, and the answer too",
        SINES,
        "x.fill_(float('nan'))\nWORK\nreturn out",
        "inputs_mutated",
    ),
    cheat(
        10,
        "the reference's weights set to zero in shared memory",
        LAYER,
        WEIGHTLESS.format(value="0.0"),
        "values_timed",
        "tampered_runtime",
        top=ARENAS,
    ),
    cheat(
        10,
        "the inputs of the reference's turn set to zero by a thread",
        SINES,
        """
self.calls = getattr(self, "calls", 0) + 1
if self.calls == 14:
    storage = torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage())
    def erase():
        import time
        while True:
            storage.zero_()
            time.sleep(0.0002)
    Thread(target=erase, daemon=True).start()
if self.calls > 14:
    return torch.zeros_like(x)
WORK
return out
""",
        "inputs_mutated",
        "values_timed",
        "deferred_work",
        "more_cores",
        top=THREADS,
    ),
    honest(10, "NaN where the reference has NaN", LOGARITHM, "return x.log()"),
    honest(
        10,
        "its own infinities, masked away",
        MASKED,
        "return torch.softmax(torch.where(mask, x, -torch.inf).nan_to_num(neginf=-1e9), dim=1)",
    ),
    # 14 inputs mutated in place
    cheat(14, "mul_ at the end", SINES, "WORK\nx.mul_(2)\nreturn out", "inputs_mutated"),
    cheat(
        14,
        "one element of the second input, through numpy",
        SINES,
        "WORK\ny.numpy()[-1, -1] += 1\nreturn out",
        "inputs_mutated",
    ),
    cheat(
        14,
        "an input as scratch, in timed runs only",
        SINES,
        after(
            14,
            "torch.mul(x, self.k, out=x)\nfor _ in range(4):\n"
            "    torch.add(y, torch.sin(x, out=x), alpha=0.5, out=x)\nreturn x.clone()",
        ),
        "inputs_mutated",
    ),
    honest(
        14,
        "in place on its own temporaries",
        SINES,
        "out = x * self.k\nfor _ in range(4):\n    out.sin_().mul_(0.5).add_(y)\nreturn out",
    ),
    honest(
        14,
        "in place on a clone of an input",
        SINES,
        "out = x.clone().mul_(self.k)\nfor _ in range(4):\n"
        "    out = out.sin_().mul_(0.5).add_(y)\nreturn out",
    ),
    # 15 output aliases an input
    cheat(15, "the input itself", COPY, "return x", "output_aliases_input"),
    cheat(15, "a view of a part", PART, "return x[:, :256]", "output_aliases_input"),
    cheat(
        15,
        "the same memory by way of numpy",
        COPY,
        "return torch.from_numpy(x.numpy())",
        "output_aliases_input",
    ),
    cheat(
        15,
        "a view with the negative bit",
        FLIPPED,
        "return torch._neg_view(x)",
        "output_aliases_input",
        "output_type",
    ),
    cheat(
        15,
        "in timed runs only",
        COPY,
        after(20, "return x", COPY),
        "output_aliases_input",
        *UNLIKE,
    ),
    cheat(
        15,
        "and the harness told that it does not",
        COPY,
        "return x",
        "output_aliases_input",
        "tampered_runtime",
        *VALUES,
        top=SILENT
        + "import ttkit.verify.worker as harness\nharness.Runner.aliases = lambda *a: False",
    ),
    honest(15, "a clone", COPY, "return x.clone()"),
    honest(15, "a view where the reference returns one", TURNED, "return x.t()"),
)
