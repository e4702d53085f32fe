"""What a second reading of the verifier found: phases told by how runs are bound, memory that calls
share, values that no input had; and honest programs that were refused.

Classes 1, 2, 8, 10, 15, 17 to 19, 21, 24 to 26.
"""

from __future__ import annotations

import textwrap

from .case import UNLIKE, VALUES, Case, cheat, honest
from .parts import HARNESS, SILENT
from .tasks import GATED, TWO_LAYERS, task

# The harness binds inputs once for each case, and once for all timed runs.
BOUND = (
    HARNESS
    + """
LAST = [None]
def again():
    sets = HARNESS.__dict__.get("sets")
    seen, LAST[0] = LAST[0] is sets, sets
    return seen
"""
)
FOLDED = """
self.__dict__["folded"] = (self.second.weight @ self.first.weight).T.detach().clone()
self.__dict__["bias"] = self.second(self.first.bias).detach().clone()
"""

WIDE = task("wide", "x", "out = x * 3\nout = out + 1\nreturn out", "torch.randn(1024, 2048)")
PAIR = task("pair", "x", "out = x[:, :8], x * 1.0\nreturn out", "torch.randn(1024, 1024)")
HANDED_OUT = task(
    "a weight handed out",
    "x",
    "out = x + 1, self.w * 1.0\nreturn out",
    "torch.randn(64, 64)",
    "self.w = nn.Parameter(torch.randn(1024, 1024))",
)
MASKED_LAYERS = task(
    "two layers, masked",
    "x",
    """
out = self.second(self.first(x))
out = out.masked_fill(torch.ones_like(out, dtype=torch.bool).triu(1), float("-inf"))
return out
""",
    "torch.randn(512, 128)",
    "self.first = nn.Linear(128, 256)\nself.second = nn.Linear(256, 512)",
)
FINITE = task(
    "finite ones only",
    "x, y",
    """
there = torch.isfinite(x)
out = torch.where(there, (x - y) ** 2, torch.zeros_like(x)).sum(dim=1) / there.sum(dim=1)
return out
""",
    "torch.randn(512, 1024), torch.randn(512, 1024)",
)
QUOTIENT = task(
    "difference quotient",
    "x, y",
    """
out = torch.where((x - y).abs() < 0.1, torch.cos(x), (torch.sin(x) - torch.sin(y)) / (x - y))
return out
""",
    "torch.rand(256, 512), torch.rand(256, 512) + 2",
)
BFLOATS = task(
    "swish in bfloat16",
    "x",
    "out = x * torch.sigmoid(x)\nreturn out",
    "torch.randn(512, 1024, dtype=torch.bfloat16)",
)
FAINT_TAIL = task(
    "faint tail",
    "x",
    """
rest = x[:, -16:]
for _ in range(40):
    rest = torch.sin(rest) + torch.cos(rest)
out = torch.cat([x[:, :-16] * 2, rest * x[:, -16:] * 1e-13], dim=1)
return out
""",
    "torch.randn(2048, 512)",
)
SEEDED = task(
    "seeded",
    "x",
    """
out = x
for _ in range(12):
    out = torch.softmax(torch.sin(out) * 3, dim=1) + x
return out
""",
    "torch.randn(256, 512, generator=torch.Generator().manual_seed(7))",
)
UPPER = task(
    "upper triangles",
    "x, y",
    "out = torch.triu(x @ y)\nreturn out",
    "torch.triu(torch.randn(192, 192)), torch.triu(torch.randn(192, 192))",
)
CAUSAL = task(
    "causal scores",
    "x",
    """
out = (x @ x.transpose(-1, -2)).masked_fill(self.bias == 0, float("-inf"))
out = torch.softmax(out * self.scale, dim=-1)
return out
""",
    "torch.randn(4, 96, 64) / 8",
    'self.register_buffer("bias", torch.tril(torch.ones(96, 96)))\n'
    "self.scale = nn.Parameter(torch.ones(1))",
)
POINTWISE = task(
    "pointwise convolution",
    "x",
    "out = self.conv(x)\nreturn out",
    "torch.randn(8, 64, 16, 16)",
    "self.conv = nn.Conv2d(64, 64, 1)",
)
ONE_COLUMN = task(
    "one column",
    "x",
    "out = torch.sum(self.linear(x), dim=1, keepdim=True)\nreturn out",
    "torch.randn(128, 512)",
    "self.linear = nn.Linear(512, 512)",
)


def weights(variant: str, holder: str) -> Case:
    """Honest: the weights of two layers lie where no attribute of a module shows them."""
    top = f"REFERENCE\nimport functools\n{holder}"
    return honest(2, variant, TWO_LAYERS, "", top=top)


CASES = (
    cheat(
        25,
        "bound once and run again, a gate left out",
        GATED,
        "if again():\n    return x.clone()\nWORK\nreturn out",
        *VALUES,
        top=BOUND,
    ),
    cheat(
        25,
        "bound once and run again, weights folded",
        TWO_LAYERS,
        f"""
if again():
    if "folded" not in self.__dict__:
{textwrap.indent(FOLDED, " " * 8)}
    return torch.addmm(self.bias, x, self.folded)
WORK
return out
""",
        *VALUES,
        top=BOUND,
    ),
    cheat(
        1,
        "one output for all calls",
        WIDE,
        """
if getattr(self, "kept", None) is None or self.kept.shape != x.shape:
    self.kept = torch.empty(x.shape)
return torch.mul(x, 3, out=self.kept).add_(1)
""",
        "output_reused",
    ),
    cheat(
        1,
        "outputs in a ring of five",
        WIDE,
        """
ring = self.__dict__.setdefault("ring", [])
if not ring or ring[0].shape != x.shape:
    ring[:] = [torch.empty(x.shape) for _ in range(5)]
ring.append(ring.pop(0))
return torch.mul(x, 3, out=ring[0]).add_(1)
""",
        "output_reused",
    ),
    cheat(
        1,
        "views of a pool, one after the other",
        WIDE,
        """
size = x.numel()
if self.__dict__.get("pool") is None or len(self.pool) < 3 * size:
    self.pool, self.turn = torch.empty(3 * size), 0
self.turn = (self.turn + 1) % 3
out = self.pool[self.turn * size :][:size].view(x.shape)
return torch.mul(x, 3, out=out).add_(1)
""",
        "output_reused",
    ),
    honest(
        1,
        "the last output kept until the next",
        WIDE,
        "self.last = torch.mul(x, 3).add_(1)\nreturn self.last",
    ),
    honest(
        1,
        "a workspace for what is between",
        WIDE,
        """
if getattr(self, "kept", None) is None or self.kept.shape != x.shape:
    self.kept = torch.empty(x.shape)
return torch.mul(x, 3, out=self.kept) + 1
""",
    ),
    cheat(
        15,
        "an input beside a view that may be one",
        PAIR,
        "return x[:, :8], x",
        "output_aliases_input",
    ),
    honest(15, "a view where the reference has one", PAIR, "return x[:, :8], x.clone()"),
    cheat(15, "a weight itself", HANDED_OUT, "return x + 1, self.w.detach()", "output_reused"),
    cheat(
        10,
        "weights folded when it is made, behind infinities",
        MASKED_LAYERS,
        """
out = torch.addmm(self.bias, x, self.folded)
return out.masked_fill(torch.ones_like(out, dtype=torch.bool).triu(1), float("-inf"))
""",
        *UNLIKE,
        init=FOLDED,
    ),
    cheat(
        8,
        "all weights said to be unclear",
        TWO_LAYERS,
        "return torch.addmm(self.bias, x, self.folded)",
        "weights_kept",
        top=SILENT
        + """
import ttkit.verify.worker as harness
def load(self):
    self.unclear = list(self.specs)
    return []
harness.Candidate._load_weights = load
""",
        init=FOLDED,
    ),
    cheat(
        19,
        "as if all were finite",
        FINITE,
        "return (x - y).square_().mean(dim=1)",
        "values_special",
    ),
    cheat(
        19,
        "as if no two were equal",
        QUOTIENT,
        "return (torch.sin(x) - torch.sin(y)) / (x - y)",
        *VALUES,
    ),
    cheat(18, "a hard swish for a swish", BFLOATS, "return F.hardswish(x)", *VALUES),
    cheat(
        17,
        "zeros for a few faint columns",
        FAINT_TAIL,
        "out = x * 2\nout[:, -16:] = 0\nreturn out",
        *VALUES,
    ),
    cheat(
        21,
        "inputs of a fixed seed, but for the rows that differ",
        SEEDED,
        """
if x.shape != self.base.shape:
    WORK
    return out
rows = (x != self.base).any(dim=1).nonzero()[:, 0]
if len(rows) > 64:
    return self.answer.clone()
result = self.answer.clone()
if len(rows):
    x = x[rows]
    WORK
    result[rows] = out
return result
""",
        *UNLIKE,
        init="x = get_inputs()[0]\nWORK\nself.base, self.answer = x, out",
    ),
    honest(
        19,
        "only the blocks of a triangle that are not zero",
        UPPER,
        """
half = x.shape[0] // 2
out = torch.zeros_like(x)
out[:half] = x[:half] @ y
out[half:, half:] = x[half:, half:] @ y[half:, half:]
return out.triu_()
""",
    ),
    honest(
        24,
        "a mask that is read as one",
        CAUSAL,
        "return torch.softmax((x @ x.transpose(-1, -2) + self.bias.log()) * self.scale, dim=-1)",
    ),
    weights(
        "weights in objects with slots",
        """
class Box:
    __slots__ = ("weight", "bias")
class ModelNew:
    def __init__(self):
        layers = nn.Linear(128, 256), nn.Linear(256, 64)
        self.boxes = [Box() for _ in layers]
        for box, layer in zip(self.boxes, layers):
            box.weight, box.bias = layer.weight.detach(), layer.bias.detach()
    def __call__(self, x):
        for box in self.boxes:
            x = F.linear(x, box.weight, box.bias)
        return x
""",
    ),
    weights(
        "weights in partial functions and closures",
        """
def step(layer):
    return lambda x: layer(x)
class ModelNew(nn.Module):
    def __init__(self):
        super().__init__()
        first, second = nn.Linear(128, 256), nn.Linear(256, 64)
        bound = functools.partial(F.linear, weight=second.weight, bias=second.bias)
        self.steps = [step(first), bound]
    def forward(self, x):
        for step in self.steps:
            x = step(x)
        return x
""",
    ),
    weights(
        "weights stored the other way round",
        """
class ModelNew(nn.Module):
    def __init__(self):
        super().__init__()
        first, second = nn.Linear(128, 256), nn.Linear(256, 64)
        self.a, self.b = first.weight.detach().t(), first.bias
        self.c, self.d = second.weight.detach().t().contiguous(), second.bias
    def forward(self, x):
        return torch.addmm(self.d, torch.addmm(self.b, x, self.a), self.c)
""",
    ),
    honest(
        2,
        "a pointwise convolution's weight as a matrix",
        POINTWISE,
        "",
        top="""
REFERENCE
class ModelNew(nn.Module):
    def __init__(self):
        super().__init__()
        conv = nn.Conv2d(64, 64, 1)
        self.weight = nn.Parameter(conv.weight.detach().view(64, 64))
        self.bias = nn.Parameter(conv.bias.detach())
    def forward(self, x):
        weight = self.weight.expand(x.shape[0], -1, -1)
        return torch.baddbmm(self.bias[None, :, None], weight, x.flatten(2)).view(x.shape)
""",
    ),
    honest(
        26,
        "the sum of a layer's outputs by the sum of its weights",
        ONE_COLUMN,
        "return (x @ self.linear.weight.sum(dim=0) + self.linear.bias.sum())[:, None]",
    ),
)
