"""What somebody tried who had not read the verifier: honest programs that sum in another order or
call torch where the reference loops, and cheats that look like them.

Classes 16, 18 and 20.
"""

from __future__ import annotations

from .case import VALUES, Case, cheat, honest
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

CASES: tuple[Case, ...] = (
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
