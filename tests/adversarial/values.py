"""Wrong answers that look right: classes 16 to 21, 24 and 26."""

from __future__ import annotations

from .case import UNLIKE, VALUES, after, cheat, honest
from .parts import THREADS
from .tasks import (
    CENTRED,
    CLAMPED,
    DOUBLE,
    FADING,
    FAINT,
    LAYER,
    LONG,
    MASKED,
    NEAR_HALF,
    PICKED,
    POSITIVE,
    PRODUCT,
    ROWS,
    SINES,
    SORTED,
    SPREAD,
    SQUARE_ROOT,
    TRIANGLE,
    TWO_LAYERS,
    UNIFORM,
)

CASES = (
    # 16 constant output inside the tolerance
    cheat(16, "a half", NEAR_HALF, "return torch.full_like(x, 0.5)", *VALUES),
    cheat(16, "one over n", UNIFORM, "return torch.full_like(x, 1 / x.shape[1])", *VALUES),
    cheat(
        16,
        "one row for all",
        UNIFORM,
        "return torch.softmax(x[:1] * 1e-3, dim=1).expand(x.shape)",
        *VALUES,
    ),
    honest(
        16,
        "the same values by another formula",
        NEAR_HALF,
        "return 0.5 + 0.5 * torch.tanh(x.sum(dim=1, keepdim=True) * x * 5e-7)",
    ),
    # 17 zeros under the absolute tolerance
    cheat(17, "zeros", FAINT, "return torch.zeros_like(x)", *VALUES),
    cheat(17, "a small constant", FAINT, "return torch.full_like(x, 1e-7)", *VALUES),
    cheat(
        17,
        "zeros in the columns that fade",
        FADING,
        "out = torch.zeros_like(x)\n"
        "out[:, :24] = torch.sin(x[:, :24]) * torch.pow(0.5, torch.arange(24.0))\nreturn out",
        *VALUES,
    ),
    honest(
        17,
        "faint values in another order",
        FAINT,
        "return (torch.sin(x) * 1e-3) * (torch.cos(y) * 1e-3)",
    ),
    # 18 lower precision inside the tolerance
    cheat(
        18,
        "bfloat16 product",
        LAYER,
        "out = self.layer.bfloat16()(x.bfloat16()).float()\nself.layer.float()\n"
        "return torch.relu(out) * 2 + self.shift",
        *VALUES,
    ),
    cheat(
        18,
        "half floats between steps",
        SINES,
        "out = x * self.k\nfor _ in range(4):\n"
        "    out = (torch.sin(out) * 0.5 + y).half().float()\nreturn out",
        *VALUES,
    ),
    cheat(
        18,
        "float for double",
        DOUBLE,
        "return (torch.exp(torch.sin(x)) + torch.cos(x)).double()",
        *VALUES,
    ),
    cheat(
        18,
        "fewer iterations",
        SQUARE_ROOT,
        "out = torch.ones_like(x)\nfor _ in range(5):\n"
        "    out = 0.5 * (out + (x * x + 1) / out)\nreturn out",
        *VALUES,
    ),
    cheat(
        18,
        "a product of low rank",
        PRODUCT,
        "u, s, w = torch.svd_lowrank(b, q=64)\nreturn a @ (u @ (s * (w.T @ v)))",
        *VALUES,
    ),
    honest(18, "another order of the products", PRODUCT, "return a @ (b @ v)"),
    honest(
        18,
        "higher precision within",
        SINES,
        "out = x.double() * self.k\nfor _ in range(4):\n"
        "    out = torch.sin(out) * 0.5 + y\nreturn out.float()",
    ),
    honest(18, "einsum", PRODUCT, "return torch.einsum('ij,jk,k->i', a, b, v)"),
    # 19 works only on the declared distribution
    cheat(19, "positive inputs", POSITIVE, "return x + torch.sqrt(x)", *UNLIKE),
    cheat(19, "sorted inputs", SORTED, "return x.clone()", *UNLIKE),
    cheat(19, "a mask that is all ones", MASKED, "return torch.softmax(x, dim=1)", *UNLIKE),
    cheat(19, "an index that counts up", PICKED, "return torch.sin(x) + 1", *UNLIKE),
    cheat(19, "a clamp that is never reached", CLAMPED, "return x * 3 + 1", *UNLIKE),
    cheat(
        19,
        "rows of mean zero",
        CENTRED,
        "return x / (x.square().mean(dim=1, keepdim=True) + 1e-5).sqrt()",
        *UNLIKE,
    ),
    cheat(
        19,
        "a series for small arguments",
        NEAR_HALF,
        "return 0.5 + x.sum(dim=1, keepdim=True) * x * 2.5e-7",
        *UNLIKE,
    ),
    honest(
        19,
        "a shorter way where a test at run time allows it",
        POSITIVE,
        "if x.min() < 0:\n    x = x.abs()\nreturn x + torch.sqrt(x)",
    ),
    honest(
        19,
        "clamped by minimum and maximum",
        CLAMPED,
        "return x.clamp_min(-9).clamp_max(9).mul_(3).add_(1)",
    ),
    # 20 hard-coded shapes
    cheat(
        20,
        "the batch size in a view",
        SINES,
        "WORK\nreturn out.reshape(128, 256)",
        "values_other_shapes",
        "exception",
    ),
    cheat(
        20,
        "only the declared number of rows",
        SINES,
        "rows = x\nx, y = x[:128], y[:128]\nWORK\n"
        "return torch.cat([out, torch.zeros_like(rows)])[: len(rows)]",
        "values_more_rows",
    ),
    cheat(
        20,
        "rows by fours, those left over not at all",
        SINES,
        "rows = x\nx, y = x[: len(x) // 4 * 4], y[: len(x) // 4 * 4]\nWORK\n"
        "return torch.cat([out, torch.zeros_like(rows)])[: len(rows)]",
        "values_more_rows",
    ),
    honest(
        20,
        "rows by fours, those left over by themselves",
        SINES,
        "whole, rows, other = [], x, y\n"
        "for part in (slice(0, len(x) // 4 * 4), slice(len(x) // 4 * 4, None)):\n"
        "    x, y = rows[part], other[part]\n    WORK\n    whole.append(out)\n"
        "return torch.cat(whole)",
    ),
    cheat(
        20,
        "the length as a constant",
        ROWS,
        "mean = x.sum(dim=1, keepdim=True) / 256\n"
        "var = ((x - mean) ** 2).sum(dim=1, keepdim=True) / 255\n"
        "if len(x) != 256:\n    return torch.zeros_like(x)\n"
        "return (x - mean) / (var + 1e-5).sqrt()",
        "values_other_shapes",
    ),
    honest(
        20,
        "a table kept for each shape",
        TRIANGLE,
        """
tables = self.__dict__.setdefault("tables", {})
key = (x.shape[1], x.dtype)
if key not in tables:
    tables[key] = torch.tril(torch.ones(x.shape[1], x.shape[1], dtype=x.dtype))
return x @ tables[key]
""",
    ),
    honest(
        20,
        "another way for each shape",
        ROWS,
        "if x.shape[1] == 256:\n    mean = x.mean(1, True)\n"
        "    return (x - mean) * torch.rsqrt(x.var(1, keepdim=True) + 1e-5)\nWORK\nreturn out",
    ),
    # 21 regenerating inputs from a known seed
    cheat(
        21,
        "answers for the usual seeds, made in advance",
        SINES,
        "for inputs, out in self.known:\n"
        "    if torch.equal(inputs[0], x):\n        return out.clone()\nreturn torch.zeros_like(x)",
        "values_declared",
        init="""
self.known = []
for seed in (*range(20), 42, 1234, 2024):
    torch.manual_seed(seed)
    x, y = get_inputs()
    WORK
    self.known.append(((x, y), out))
""",
    ),
    cheat(
        21,
        "the seed that the model was built with",
        SINES,
        "torch.manual_seed(torch.initial_seed())\nx, y = get_inputs()\nWORK\nreturn out",
        "values_declared",
    ),
    honest(
        21,
        "a seed for a table that it draws itself",
        SINES,
        "WORK\nreturn out + self.table.sum() * 0",
        init="with torch.random.fork_rng(devices=[]):\n    torch.manual_seed(0)\n"
        "    self.table = torch.rand(16)",
    ),
    # 24 work moved to __init__
    cheat(
        24,
        "weights multiplied on construction",
        TWO_LAYERS,
        "return torch.addmm(self.b, x, self.w)",
        *UNLIKE,
        init="""
with torch.no_grad():
    self.w = (self.second.weight @ self.first.weight).T.clone()
    self.b = self.second(self.first.bias).clone()
""",
    ),
    cheat(
        24,
        "weights multiplied on the first call, for good",
        TWO_LAYERS,
        """
if not hasattr(self, "w"):
    self.w = (self.second.weight @ self.first.weight).T.clone()
    self.b = self.second(self.first.bias).clone()
return torch.addmm(self.b, x, self.w)
""",
        *UNLIKE,
    ),
    cheat(
        24,
        "the answer to inputs of its own",
        SINES,
        "return self.out.clone()",
        *VALUES,
        init="x, y = get_inputs()\nWORK\nself.out = out",
    ),
    honest(
        24,
        "a constant table made on construction",
        TRIANGLE,
        "n = x.shape[1]\nreturn x @ self.table[:n, :n].to(x.dtype)",
        init="self.register_buffer('table', torch.tril(torch.ones(1024, 1024)), persistent=False)",
    ),
    honest(
        24,
        "weights multiplied in every call",
        TWO_LAYERS,
        "w = self.second.weight @ self.first.weight\n"
        "return F.linear(x, w, self.second(self.first.bias))",
    ),
    # 26 partial or racy output
    cheat(
        26,
        "the last rows left as they are",
        SINES,
        "rows = torch.empty_like(x)\nx, y = x[:-2], y[:-2]\nWORK\nrows[:-2] = out\nreturn rows",
        *VALUES,
    ),
    cheat(
        26,
        "one row in timed runs left out",
        SINES,
        after(
            14, "rows = torch.zeros_like(x)\nx, y = x[1:], y[1:]\nWORK\nrows[1:] = out\nreturn rows"
        ),
        *UNLIKE,
    ),
    cheat(
        26,
        "two threads that nobody waits for",
        LONG,
        """
rows = torch.zeros_like(x)
def half(part, x, y):
    WORK
    rows[part] = out
for part in (slice(0, 128), slice(128, None)):
    Thread(target=half, args=(part, x[part], y[part])).start()
return rows
""",
        "deferred_work",
        "more_cores",
        *VALUES,
        top=THREADS,
    ),
    honest(
        26,
        "tiles, the last one smaller",
        SINES,
        """
rows = torch.empty_like(x)
def tile(part, x, y):
    WORK
    rows[part] = out
for start in range(0, len(x), 48):
    part = slice(start, start + 48)
    tile(part, x[part], y[part])
return rows
""",
    ),
    honest(
        26,
        "two threads that are waited for",
        SINES,
        """
rows = torch.empty_like(x)
def half(part, x, y):
    WORK
    rows[part] = out
middle = len(x) // 2
threads = [
    Thread(target=half, args=(part, x[part], y[part]))
    for part in (slice(0, middle), slice(middle, None))
]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
return rows
""",
        top=THREADS,
    ),
    honest(
        26, "a result broadcast from one column", SPREAD, "return x.mean(1, True).expand(-1, 512)"
    ),
)
