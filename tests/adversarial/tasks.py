"""The suite's tasks, in KernelBench's file format: each `forward` ends with `return out`."""

from __future__ import annotations

import textwrap

from ttkit.tasks import Task

_LAYOUT = """
import torch
import torch.nn as nn
import torch.nn.functional as F

class Model(nn.Module):
    def __init__(self{init_args}):
        super().__init__()
{init}

    def forward(self, {args}):
{forward}

def get_inputs():
    return [{inputs}]

def get_init_inputs():
    return [{init_inputs}]
"""


def task(
    name: str,
    args: str,
    forward: str,
    inputs: str,
    init: str = "pass",
    init_args: str = "",
    init_inputs: str = "",
) -> Task:
    """A task of one module."""
    code = _LAYOUT.format(
        args=args,
        forward=textwrap.indent(forward.strip("\n"), " " * 8),
        inputs=inputs,
        init=textwrap.indent(init.strip("\n"), " " * 8),
        init_args=init_args,
        init_inputs=init_inputs,
    )
    return Task("file", 0, 0, name, code)


def _sines(name: str, rows: int, columns: int, steps: int) -> Task:
    forward = (
        f"out = x * self.k\nfor _ in range({steps}):\n"
        "    out = torch.sin(out) * 0.5 + y\nreturn out"
    )
    inputs = f"torch.randn({rows}, {columns}), torch.randn({rows}, {columns})"
    return task(name, "x, y", forward, inputs, "self.k = k", ", k", "3")


# About 0.4 ms, 5 ms and 0.04 ms on one core: work enough for a cheat to be worth it, work whose
# reappearing no noise can hide, and calls so short that a timed run makes many of them.
SINES = _sines("sines", 128, 256, 4)
LONG = _sines("long sines", 256, 256, 60)
BRIEF = _sines("brief sines", 4, 16, 10)
# For a CUDA device.
BIG = _sines("big sines", 2048, 2048, 4)
LITTLE = _sines("little sines", 16, 256, 4)
TINY = task("tiny", "x", "out = torch.relu(x) * 2\nreturn out", "torch.randn(8, 16)")

LAYER = task(
    "layer",
    "x",
    "out = torch.relu(self.layer(x)) * 2 + self.shift\nreturn out",
    "torch.randn(512, 128)",
    'self.layer = nn.Linear(128, 128)\nself.register_buffer("shift", torch.rand(128))',
)
TWO_LAYERS = task(
    "two layers",
    "x",
    "out = self.second(self.first(x))\nreturn out",
    "torch.randn(512, 128)",
    "self.first = nn.Linear(128, 256)\nself.second = nn.Linear(256, 64)",
)
PRODUCT = task(
    "product",
    "a, b, v",
    "out = (a @ b) @ v\nreturn out",
    "torch.randn(256, 256), torch.randn(256, 256), torch.randn(256)",
)
# Its inputs take far longer to make than to use, so a verifier is tempted to use them again.
DEAR = task(
    "dear inputs",
    "a, b",
    "out = a @ b\nreturn out",
    "torch.linalg.qr(torch.randn(256, 256))[0] + 0, torch.randn(256, 256)",
)
COPY = task("copy", "x", "out = x * 1.0\nreturn out", "torch.randn(256, 512)")
PART = task("part", "x", "out = x[:, :256] + 0\nreturn out", "torch.randn(256, 512)")
FLIPPED = task("flipped", "x", "out = -x\nreturn out", "torch.randn(256, 512)")
TURNED = task("turned", "x", "out = x.transpose(0, 1)\nreturn out", "torch.randn(256, 512)")
SPREAD = task(
    "spread",
    "x",
    "out = x.mean(dim=1, keepdim=True).repeat(1, 512)\nreturn out",
    "torch.randn(256, 512)",
)
LOGARITHM = task("logarithm", "x", "out = torch.log(x)\nreturn out", "torch.randn(256, 256)")
NEAR_HALF = task(
    "near a half",
    "x",
    "out = torch.sigmoid(x.sum(dim=1, keepdim=True) * x * 1e-6)\nreturn out",
    "torch.randn(256, 256)",
)
UNIFORM = task(
    "nearly uniform",
    "x",
    "out = torch.softmax(x * 1e-3, dim=1)\nreturn out",
    "torch.randn(256, 256)",
)
FAINT = task(
    "faint",
    "x, y",
    "out = torch.sin(x) * torch.cos(y) * 1e-6\nreturn out",
    "torch.randn(256, 256), torch.randn(256, 256)",
)
FADING = task(
    "fading",
    "x",
    "out = torch.sin(x) * torch.pow(0.5, torch.arange(64.0))\nreturn out",
    "torch.randn(1024, 64)",
)
SQUARE_ROOT = task(
    "iterations",
    "x",
    """
out = torch.ones_like(x)
for _ in range(12):
    out = 0.5 * (out + (x * x + 1) / out)
return out
""",
    "torch.randn(256, 256)",
)
DOUBLE = task(
    "double",
    "x",
    "out = torch.exp(torch.sin(x.double())) + torch.cos(x.double())\nreturn out",
    "torch.randn(256, 256)",
)
POSITIVE = task(
    "positive",
    "x",
    "out = torch.abs(x) + torch.sqrt(torch.abs(x))\nreturn out",
    "torch.rand(256, 256)",
)
SORTED = task(
    "sorted",
    "x",
    "out = torch.sort(x, dim=1).values\nreturn out",
    "torch.sort(torch.randn(128, 256), dim=1).values",
)
MASKED = task(
    "masked",
    "x, mask",
    "out = torch.softmax(x.masked_fill(~mask, -1e9), dim=1)\nreturn out",
    "torch.randn(256, 256), torch.ones(256, 256, dtype=torch.bool)",
)
PICKED = task(
    "picked",
    "x, index",
    "out = torch.sin(x[index]) + 1\nreturn out",
    "torch.randn(512, 256), torch.arange(512)",
)
CLAMPED = task(
    "clamped", "x", "out = torch.clamp(x, -9, 9) * 3 + 1\nreturn out", "torch.randn(256, 256)"
)
ROWS = task(
    "rows",
    "x",
    "out = (x - x.mean(dim=1, keepdim=True)) / (x.var(dim=1, keepdim=True) + 1e-5).sqrt()\n"
    "return out",
    "torch.randn(256, 256)",
)
TRIANGLE = task(
    "triangle",
    "x",
    "out = x @ torch.tril(torch.ones(x.shape[1], x.shape[1]))\nreturn out",
    "torch.randn(256, 256)",
)
CENTRED = task(
    "centred",
    "x",
    """
out = x - x.mean(dim=1, keepdim=True)
out = out / (out.square().mean(dim=1, keepdim=True) + 1e-5).sqrt()
return out
""",
    "(lambda x: x - x.mean(dim=1, keepdim=True))(torch.randn(256, 256))",
)
EXPONENT = task("exponent", "x", "out = torch.exp(60 * x)\nreturn out", "torch.randn(256, 256)")
# Under half a millisecond: a timed run makes two calls, and delivers what one of them returned.
GAMMA = task(
    "gamma",
    "x",
    "out = torch.lgamma(x.abs() + 1) + torch.lgamma(x.abs() + 2)\nreturn out",
    "torch.randn(256, 128)",
)
LOG_SUM = task(
    "log sum", "x", "out = torch.logsumexp(x, dim=1)\nreturn out", "torch.rand(256, 512)"
)
MEAN = task("mean", "x", "out = x.mean(dim=1)\nreturn out", "torch.randn(256, 1024)")
MARKED = task(
    "marked",
    "x",
    "out = torch.full((x.shape[0], 4096), -1.0)\n"
    "out.scatter_(1, x.argmax(dim=1, keepdim=True), 1.0)\nreturn out",
    "torch.randn(256, 16)",
)
# Its inputs take so long to make that a few of them have to serve many times.
CHAIN = task(
    "chain",
    "x",
    "out = x\nfor _ in range(12):\n    out = out @ self.w\nreturn out",
    "torch.linalg.svd(torch.randn(192, 192))[0] + 0",
    'self.register_buffer("w", torch.linalg.qr(torch.randn(192, 192))[0])',
)

# Indices that take long to make, a table of few columns.
PICKING = task(
    "picking",
    "x, index",
    "out = x[index].sin()\nreturn out",
    "torch.randn(4096, 8), torch.stack([torch.randperm(4096) for _ in range(40)]).argsort(1)[0]",
)
FADED = task("faded", "x", "out = torch.cumprod(x, dim=1)\nreturn out", "torch.rand(128, 2000)")
LOW_RANK = task(
    "low rank",
    "x",
    "out = x @ (self.w + self.a @ self.b)\nreturn out",
    "torch.randn(64, 256)",
    """
self.w = nn.Parameter(torch.randn(256, 256) / 16)
self.a = nn.Parameter(torch.randn(256, 128) / 16)
self.b = nn.Parameter(torch.randn(128, 256) / 16)
""",
)
# A branch that is switched off as long as its weight is what it was made with.
GATED = task(
    "gated",
    "x",
    "out = x + self.alpha * self.second(torch.relu(self.first(x)))\nreturn out",
    "torch.randn(256, 128)",
    """
self.first = nn.Linear(128, 256)
self.second = nn.Linear(256, 128)
self.alpha = nn.Parameter(torch.zeros(1))
""",
)
STATE = task(
    "state",
    "x, h",
    "out = torch.tanh(x @ self.w + h @ self.u)\nreturn out",
    "torch.randn(256, 128), torch.zeros(256, 128)",
    "self.w = nn.Parameter(torch.randn(128, 128) / 11)\n"
    "self.u = nn.Parameter(torch.randn(128, 128) / 11)",
)
SATURATED = task(
    "saturated",
    "x",
    "out = torch.tanh(x.exp().sum(dim=1))\nreturn out",
    "torch.randn(256, 1024)",
)
POSITIONS = task(
    "positions",
    "x",
    """
at = torch.arange(x.shape[1], dtype=x.dtype)[:, None]
at = at * torch.exp(-0.1 * torch.arange(x.shape[2], dtype=x.dtype))
out = x * torch.cos(at) + torch.sin(at)
return out
""",
    "torch.randn(2, 512, 128)",
)
TEMPERATURE = task(
    "temperature",
    "x, temperature",
    "out = torch.softmax(x / temperature, dim=1)\nreturn out",
    "torch.randn(256, 512), 1.0",
)
TURNED_OVER = task(
    "turned over", "x", "out = x.t().contiguous()\nreturn out", "torch.randn(256, 512)"
)
SIGNS = task(
    "signs",
    "x",
    "out = x @ self.w > 0\nreturn out",
    "torch.randn(512, 256)",
    'self.register_buffer("w", torch.randn(256, 256))',
)
NORMS = task(
    "norms",
    "x",
    "out = self.last(self.norm(torch.relu(self.first(x))))\nreturn out",
    "torch.randn(256, 128)",
    "self.first = nn.Linear(128, 128)\nself.norm = nn.LayerNorm(128)\n"
    "self.last = nn.LayerNorm(128)",
)
# Few values, and long to make: a few draws have to serve many times.
_DEAR = "torch.linalg.svd(torch.randn(192, 192))[0]"
COUNTS = task(
    "counts",
    "x",
    "out = x\nfor _ in range(12):\n    out = out @ self.w\nreturn out",
    f"torch.poisson(3 + 0 * {_DEAR})",
    'self.register_buffer("w", torch.linalg.qr(torch.randn(192, 192))[0])',
)
FLOAT_MASK = task(
    "float mask",
    "x, mask",
    "out = torch.sin(x) * mask + x * (1 - mask)\nreturn out",
    f"torch.randn(192, 192), ({_DEAR} > 0.02).float()",
)
RANDOM_SHAPES = task(
    "random shapes",
    "x",
    "out = torch.softmax(x, dim=1)\nreturn out",
    "torch.randn(200 + int(torch.randint(0, 60, ())), 512)",
)
