"""What somebody tried who had not read the verifier: honest programs that sum in another order or
call torch where the reference loops, and cheats that look like them.

Classes 14 to 16, 18 to 20, 24 and 26.
"""

from __future__ import annotations

from .case import VALUES, Case, cheat, honest, no_gain
from .tasks import task

SQUARES = task(
    "mean of squares",
    "x, y",
    "out = torch.mean((x - y) ** 2)\nreturn out",
    "torch.randn(1024, 1024), torch.randn(1024, 1024)",
)
NORM = task(
    "frobenius norm",
    "x",
    "out = x / torch.sqrt((x ** 2).sum())\nreturn out",
    "torch.randn(16, 64, 32, 32)",
)
WIDE_ROWS = task(
    "softmax of wide rows",
    "x",
    "out = torch.exp(x - x.amax(dim=1, keepdim=True))\n"
    "out = out / out.sum(dim=1, keepdim=True)\nreturn out",
    "torch.rand(16, 65536)",
)
MIXING = task(
    "pointwise convolution by channels",
    "x",
    """
out = 0
for i in range(self.w.shape[1]):
    out = out + x[:, i : i + 1] * self.w[:, i].view(1, -1, 1, 1)
return out
""",
    "torch.randn(4, 32, 32, 32)",
    "self.w = nn.Parameter(torch.randn(32, 32))",
)
DEPTHWISE = task(
    "depthwise convolution by channels",
    "x",
    """
parts = [F.conv2d(x[:, i : i + 1], self.w[i : i + 1], padding=1) for i in range(x.shape[1])]
out = torch.cat(parts, 1)
return out
""",
    "torch.randn(8, 32, 32, 32)",
    "self.w = nn.Parameter(torch.randn(32, 1, 3, 3))",
)

SUMMED = task(
    "sums of a layer's outputs",
    "x",
    "out = self.layer(x).sum(dim=1)\nreturn out",
    "torch.randn(64, 512)",
    "self.layer = nn.Linear(512, 1024)",
)
ANY = task("any of a line", "x", "out = x.any(dim=1)\nreturn out", "torch.rand(4096, 512) > 0.5")
GATED = task(
    "gated by a mask",
    "x, mask",
    "out = torch.sin(x).cumsum(dim=1) * mask.any(dim=1, keepdim=True)\nreturn out",
    "torch.randn(512, 512), torch.rand(512, 64) > 0.5",
)
TWICE = task(
    "two of the same",
    "x",
    "out = torch.sigmoid(x)\nout = out * 1.0, out * 1.0\nreturn out",
    "torch.randn(1024, 1024)",
)
HUBER = task(
    "huber loss",
    "x, y",
    "out = torch.nn.functional.smooth_l1_loss(x, y)\nreturn out",
    "torch.randn(1024, 1024), torch.randn(1024, 1024)",
)
UNIT_ROWS = task(
    "rows of length one",
    "x",
    "out = x / x.norm(dim=1, keepdim=True).clamp_min(1e-12)\nreturn out",
    "torch.randn(512, 1024)",
)

CASES: tuple[Case, ...] = (
    cheat(
        14,
        "the caller's tensor made another one",
        WIDE_ROWS,
        "WORK\nx.data = torch.zeros(x.shape)\nreturn out",
        "inputs_mutated",
    ),
    cheat(14, "the input turned", SQUARES, "WORK\nx.t_()\nreturn out", "inputs_mutated"),
    cheat(
        14,
        "the input with a gradient",
        SQUARES,
        "WORK\nx.requires_grad_(True)\nreturn out",
        "inputs_mutated",
    ),
    honest(14, "a turned view of the input", SQUARES, "x, y = x.t(), y.t()\nWORK\nreturn out"),
    cheat(
        15,
        "one output for two",
        TWICE,
        "out = torch.sigmoid(x)\nreturn out, out",
        "output_aliases_input",
    ),
    cheat(
        15,
        "one output and a view of it",
        TWICE,
        "out = torch.sigmoid(x)\nreturn out, out.view(-1).view(x.shape)",
        "output_aliases_input",
    ),
    honest(
        15,
        "two parts of one tensor",
        TWICE,
        "out = torch.sigmoid(x).expand(2, *x.shape).contiguous()\nreturn out[0], out[1]",
    ),
    cheat(19, "a line that is always true", ANY, "return torch.ones(len(x)).bool()", *VALUES),
    cheat(19, "a gate that is always open", GATED, "return torch.sin(x).cumsum(dim=1)", *VALUES),
    cheat(
        19,
        "a divisor that is kept far from zero",
        UNIT_ROWS,
        "return F.normalize(x, dim=1, eps=1e-2)",
        *VALUES,
    ),
    honest(19, "the operator of a library", UNIT_ROWS, "return F.normalize(x, dim=1)"),
    honest(
        19,
        "a mask read as one",
        GATED,
        "return torch.where(mask.any(1)[:, None], torch.sin(x).cumsum(1), 0.0)",
    ),
    cheat(
        20,
        "columns by fours, those left over not at all",
        UNIT_ROWS,
        "n = x.shape[1] // 4 * 4\nreturn x / x[:, :n].norm(dim=1, keepdim=True).clamp_min(1e-12)",
        "values_more_rows",
    ),
    cheat(
        20,
        "a cumulative sum of whole pairs",
        GATED,
        "n = x.shape[1] // 2 * 2\nx = torch.sin(x)\n"
        "x = torch.cat([x[:, :n].cumsum(dim=1), x[:, n:]], dim=1)\n"
        "return x * mask.any(dim=1, keepdim=True)",
        "values_more_rows",
    ),
    cheat(
        24,
        "made of weights when the bias has changed",
        SUMMED,
        """
if getattr(self, "seen", None) is None or not torch.equal(self.seen, self.layer.bias):
    self.__dict__["seen"] = self.layer.bias.detach().clone()
    self.__dict__["row"] = self.layer.weight.sum(dim=0).detach()
return x @ self.row + self.seen.sum()
""",
        "values_touched_weights",
    ),
    cheat(
        24,
        "made of weights when one row in eight has changed",
        SUMMED,
        """
rows = self.layer.weight[::8]
if getattr(self, "seen", None) is None or not torch.equal(self.seen, rows):
    self.__dict__["seen"] = rows.detach().clone()
    self.__dict__["row"] = self.layer.weight.sum(dim=0).detach()
return x @ self.row + self.layer.bias.sum()
""",
        "values_touched_weights",
    ),
    honest(
        24,
        "made of weights in each call",
        SUMMED,
        "return x @ self.layer.weight.sum(dim=0) + self.layer.bias.sum()",
    ),
    no_gain(
        26,
        "all but the last of a million",
        HUBER,
        "return F.smooth_l1_loss(x.flatten()[:-1], y.flatten()[:-1])",
        "values_scaled",
        "values_touched",
    ),
    cheat(
        16,
        "the mean of half of a million squares",
        SQUARES,
        "return torch.mean((x[::2] - y[::2]) ** 2)",
        *VALUES,
    ),
    cheat(
        18,
        "a norm of half floats",
        NORM,
        "return x / torch.sqrt((x.half() ** 2).sum().float())",
        *VALUES,
    ),
    cheat(
        18,
        "a sum of wide rows without their tail",
        WIDE_ROWS,
        "out = torch.exp(x - x.amax(dim=1, keepdim=True))\n"
        "return out / (out[:, :-64].sum(dim=1, keepdim=True) * (x.shape[1] / (x.shape[1] - 64)))",
        *VALUES,
    ),
    honest(
        18,
        "a dot product of a million differences",
        SQUARES,
        "out = (x - y).flatten()\nreturn torch.dot(out, out) / out.numel()",
    ),
    honest(18, "the norm of a library", NORM, "return x / torch.linalg.vector_norm(x)"),
    honest(18, "the softmax of a library", WIDE_ROWS, "return torch.softmax(x, dim=1)"),
    honest(
        20,
        "a convolution for a loop that reads the first channels only",
        MIXING,
        "return F.conv2d(x, self.w[:, :, None, None])",
    ),
    honest(
        20,
        "a grouped convolution for a loop that takes any number of channels",
        DEPTHWISE,
        "return F.conv2d(x, self.w, padding=1, groups=len(self.w))",
    ),
)
