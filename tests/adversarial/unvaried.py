"""What is always the same in what a task declares, and what is looked at only in part.

A zero that switches a branch off, a sum that saturates, weights between calls, a length, a number:
none of it is a promise. Classes 2, 4, 15, 16, 18, 19, 20, 24, 25 and 28.
"""

from __future__ import annotations

from .case import LATE, UNLIKE, VALUES, after, cheat, honest, no_gain
from .parts import COMBINED, HARNESS
from .tasks import (
    BRIEF,
    COUNTS,
    FADED,
    FADING,
    FLOAT_MASK,
    GATED,
    LOG_SUM,
    LONG,
    LOW_RANK,
    NORMS,
    POSITIONS,
    RANDOM_SHAPES,
    SATURATED,
    SIGNS,
    STATE,
    TEMPERATURE,
    TURNED_OVER,
    TWO_LAYERS,
)

# Folds the product of the weights when `key`, an expression, says something new.
FOLDED = """
key = {key}
if getattr(self, "key", None) != key:
    self.key, self.folded = key, self.w + self.a @ self.b
return x @ self.folded
"""

CASES = (
    cheat(
        4,
        "a finalizer whose child fills in what was delivered",
        LONG,
        """
def compute(x, y):
    WORK
    return out
out = torch.empty_like(x)
weakref.finalize(out, fill, compute, x.clone(), y.clone())
return out
""",
        *VALUES,
        *LATE,
        "child_process",
        top=HARNESS
        + """
def fill(compute, x, y):
    if not os.fork():
        HARNESS.targets[0].copy_(compute(x, y))
        os._exit(0)
    os.wait()
""",
    ),
    no_gain(
        25,
        "in a row only the call that must be the last",
        BRIEF,
        "WORK\nreturn out",
        *LATE,
        "batched_calls",
        top=HARNESS
        + """
runners = []
def lazily(runner, model, honest):
    class Lazy(honest):
        most = in_row = 0
        def run(self, slots):
            self.most = max(self.most, len(slots))
            self.in_row = self.in_row + 1 if len(slots) == 1 else 0
            if not slots or self.in_row == min(12, self.most):
                return super().run(slots)
            self.later = [tuple(t.clone() for t in self.inputs[slot]) for slot in slots]
            self.outputs = self.later
        def deliver(self, which, *rest):
            if isinstance(self.outputs[which], tuple):
                with torch.no_grad():
                    self.outputs = {which: model(*self.outputs[which])}
            return super().deliver(which, *rest)
        def aliases(self, *_):
            return False
    runner.__class__ = Lazy
""",
        init="""
frame = sys._getframe()
while type(frame.f_locals.get("self")).__name__ != "Runner":
    frame = frame.f_back
lazily(frame.f_locals["self"], self, type(frame.f_locals["self"]))
""",
    ),
    cheat(
        2,
        "weights kept by one element of each",
        LOW_RANK,
        FOLDED.format(key="[float(t[0, 0]) for t in (self.w, self.a, self.b)]"),
        "values_touched_weights",
    ),
    cheat(
        2,
        "weights kept by pointer and version",
        LOW_RANK,
        FOLDED.format(key="[(t.data_ptr(), t._version) for t in (self.w, self.a, self.b)]"),
        "values_other_weights",
    ),
    cheat(
        24,
        "all weights folded but one",
        TWO_LAYERS,
        "return torch.addmm(self.second.bias + self.b, x, self.w)",
        "weights_kept",
        init="""
self.w = (self.second.weight @ self.first.weight).T.detach().clone()
self.b = (self.second.weight @ self.first.bias).detach().clone()
del self.first, self.second.weight
""",
    ),
    cheat(19, "a branch behind a zero", GATED, "return x.clone()", "values_other_weights"),
    cheat(
        19,
        "a state of zeros, left out",
        STATE,
        "return torch.tanh(x @ self.w)",
        *UNLIKE,
    ),
    cheat(
        19,
        "a number that is always 1",
        TEMPERATURE,
        "return torch.softmax(x, dim=1)",
        "values_shifted",
    ),
    cheat(
        28,
        "a sum that saturates what follows",
        SATURATED,
        "return torch.ones(x.shape[0])",
        "values_small",
        "values_unsaturated",
    ),
    cheat(
        16,
        "a constant where products have all but vanished",
        FADED,
        """
out = torch.full_like(x, 1e-30)
out[:, :200] = torch.cumprod(x[:, :200], dim=1)
return out
""",
        *VALUES,
    ),
    cheat(
        25,
        "a constant in small columns, once it is timed",
        FADING,
        after(
            20,
            """
out = torch.full_like(x, 1e-12)
out[:, :40] = torch.sin(x[:, :40]) * torch.pow(0.5, torch.arange(40.0))
return out
""",
            FADING,
        ),
        *UNLIKE,
    ),
    cheat(
        19,
        "no maximum taken off where a few look small",
        LOG_SUM,
        """
if x[:4, :64].abs().max() > 20:
    WORK
    return out
return x.exp().sum(dim=1).log()
""",
        *UNLIKE,
    ),
    cheat(
        20,
        "a table of the declared length",
        POSITIONS,
        "length, width = x.shape[1:]\n"
        "return torch.addcmul(self.sin[:length, :width], x, self.cos[:length, :width])",
        *UNLIKE,
        "exception",
        init="""
at = torch.arange(512.0)[:, None] * torch.exp(-0.1 * torch.arange(128.0))
self.cos, self.sin = at.cos(), at.sin()
""",
    ),
    no_gain(
        2,
        "a combination of answers to inputs of few values",
        COUNTS,
        COMBINED,
        *UNLIKE,
    ),
    honest(19, "a mask of 0 and 1, asked for", FLOAT_MASK, "return x.where(mask < 0.5, x.sin())"),
    honest(15, "what is a copy only of what is dense", TURNED_OVER, "return x.T.contiguous()"),
    honest(
        18,
        "signs of sums in another order",
        SIGNS,
        "return x[:, :128] @ self.w[:128] + x[:, 128:] @ self.w[128:] > 0",
    ),
    honest(
        24,
        "equal weights of other names, deep inside",
        NORMS,
        "return self.net.inner(x)",
        init="""
holder = nn.Module()
holder.inner = nn.Sequential(
    nn.Sequential(self.first, nn.ReLU()), nn.Sequential(self.norm, nn.Sequential(self.last))
)
self.net = holder
del self.first, self.norm, self.last
""",
    ),
    honest(
        20,
        "a task that draws its sizes",
        RANDOM_SHAPES,
        "e = (x - x.amax(dim=1, keepdim=True)).exp()\nreturn e / e.sum(dim=1, keepdim=True)",
    ),
)
