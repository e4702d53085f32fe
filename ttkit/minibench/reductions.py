"""Reductions and normalisations: softmax, norms, losses, similarities."""

from __future__ import annotations

from ttkit.minibench.grammar import Idiom

FULL = "torch.randn($N, $D)"
DIMS = ({"dim": -1}, {"dim": 1}, {"dim": 0})
EPS = ({"eps": 1e-5}, {"eps": 1e-6}, {"eps": 1e-3})

IDIOMS = (
    Idiom(
        "softmax",
        "softmax over dim $dim",
        "x = torch.exp(x - x.max(dim=$dim, keepdim=True).values)\n"
        "x = x / x.sum(dim=$dim, keepdim=True)",
        common=(
            "y = torch.exp(x - x.max(dim=$dim, keepdim=True)[0])\n"
            "x = y / y.sum(dim=$dim, keepdim=True)",
            "m = x.max(dim=$dim, keepdim=True).values\nx = (x - m).exp()\n"
            "x = x / x.sum($dim, keepdim=True)",
        ),
        slow=(
            "x = torch.exp(x - x.max(dim=$dim, keepdim=True).values)\n"
            "x = (x.log() - x.sum(dim=$dim, keepdim=True).log()).exp()",
        ),
        wrong=(
            "x = torch.exp(x - x.max())\nx = x / x.sum()",
            "x = x / x.sum(dim=$dim, keepdim=True)",
            "x = torch.softmax(x, dim=2)",
        ),
        expert=(
            "x = torch.softmax(x, dim=$dim)",
            "x = F.softmax(x, dim=$dim)",
            "x = torch.exp(x - x.amax(dim=$dim, keepdim=True))\n"
            "x = x / x.sum(dim=$dim, keepdim=True)",
        ),
        variants=DIMS,
    ),
    Idiom(
        "log_softmax",
        "log-softmax over dim $dim",
        "x = x - x.max(dim=$dim, keepdim=True).values\n"
        "x = x - torch.log(torch.exp(x).sum(dim=$dim, keepdim=True))",
        common=(
            "x = x - x.max(dim=$dim, keepdim=True)[0]\n"
            "x = x - x.exp().sum(dim=$dim, keepdim=True).log()",
            "y = x - x.max(dim=$dim, keepdim=True).values\n"
            "x = y - torch.log(y.exp().sum($dim, keepdim=True))",
        ),
        wrong=(
            "x = torch.log(x)",
            "x = F.softmax(x, dim=$dim)",
            "x = x - torch.exp(x).sum(dim=$dim, keepdim=True)",
        ),
        expert=(
            "x = F.log_softmax(x, dim=$dim)",
            "x = torch.log_softmax(x, dim=$dim)",
            "x = x - torch.logsumexp(x, dim=$dim, keepdim=True)",
        ),
        variants=DIMS,
    ),
    Idiom(
        "logsumexp",
        "log-sum-exp over dim $dim",
        "m = x.max(dim=$dim, keepdim=True).values\n"
        "x = torch.log(torch.exp(x - m).sum(dim=$dim)) + m.squeeze($dim)",
        common=(
            "m = x.max(dim=$dim, keepdim=True)[0]\n"
            "x = (x - m).exp().sum(dim=$dim).log() + m.squeeze($dim)",
            "m = x.max(dim=$dim).values\n"
            "x = m + torch.log(torch.exp(x - m[:, None]).sum(dim=$dim))",
        ),
        wrong=(
            "x = torch.log(x.sum(dim=$dim))",
            "x = torch.logsumexp(-x, dim=$dim)",
            "x = torch.logsumexp(x)",
        ),
        expert=(
            "x = torch.logsumexp(x, dim=$dim)",
            "x = x.logsumexp($dim)",
            "m = x.amax(dim=$dim)\nx = m + torch.log(torch.exp(x - m[:, None]).sum(dim=$dim))",
        ),
        variants=({"dim": -1}, {"dim": 1}),
        out=("$N",),
    ),
    Idiom(
        "layer_norm",
        "layer normalisation without weights, eps $eps",
        "m = x.mean(dim=-1, keepdim=True)\n"
        "v = ((x - m) ** 2).mean(dim=-1, keepdim=True)\n"
        "x = (x - m) / torch.sqrt(v + $eps)",
        common=(
            "m = x.mean(-1, keepdim=True)\nv = (x - m).pow(2).mean(-1, keepdim=True)\n"
            "x = (x - m) / (v + $eps).sqrt()",
            "m = x.mean(dim=1, keepdim=True)\nv = ((x - m) ** 2).mean(dim=1, keepdim=True)\n"
            "x = (x - m) / torch.sqrt(v + $eps)",
        ),
        slow=(
            "m = x.mean(dim=-1, keepdim=True)\nv = x.var(dim=-1, unbiased=False, keepdim=True)\n"
            "x = (x - m) / torch.sqrt(v + $eps)",
        ),
        wrong=(
            "m = x.mean(dim=-1, keepdim=True)\n"
            "x = (x - m) / torch.sqrt(x.var(dim=-1, keepdim=True) + $eps)",
            "m = x.mean(dim=-1)\nx = (x - m) / torch.sqrt(x.var(dim=-1) + $eps)",
            "x = F.layer_norm(x, x.shape)",
        ),
        expert=(
            "x = F.layer_norm(x, x.shape[-1:], eps=$eps)",
            "x = x - x.mean(dim=-1, keepdim=True)\n"
            "x = x / torch.sqrt((x ** 2).mean(dim=-1, keepdim=True) + $eps)",
        ),
        variants=EPS,
    ),
    Idiom(
        "rms_norm",
        "root mean square normalisation of the rows, eps $eps",
        "x = x / torch.sqrt((x ** 2).mean(dim=-1, keepdim=True) + $eps)",
        common=(
            "x = x * torch.rsqrt((x * x).mean(dim=-1, keepdim=True) + $eps)",
            "s = x.pow(2).mean(-1, keepdim=True)\nx = x / torch.sqrt(s + $eps)",
            "x = F.rms_norm(x, x.shape[-1:], eps=$eps)",
        ),
        slow=("x = torch.stack([row / torch.sqrt((row ** 2).mean() + $eps) for row in x])",),
        wrong=(
            "x = x / torch.sqrt((x ** 2).sum(dim=-1, keepdim=True) + $eps)",
            "x = x / ((x ** 2).mean(dim=-1, keepdim=True) + $eps)",
            "x = x / torch.sqrt((x ** 2).mean(dim=-1) + $eps)",
        ),
        variants=EPS,
    ),
    Idiom(
        "normalize",
        "rows of unit length, at least $eps",
        "x = x / torch.sqrt((x ** 2).sum(dim=-1, keepdim=True)).clamp(min=$eps)",
        common=(
            "n = (x * x).sum(dim=-1, keepdim=True).sqrt()\nx = x / n.clamp(min=$eps)",
            "n = torch.sqrt((x ** 2).sum(-1, keepdim=True))\nx = x / n.clamp(min=$eps)",
        ),
        slow=("x = torch.stack([row / row.norm().clamp(min=$eps) for row in x])",),
        wrong=(
            "x = x / (x ** 2).sum(dim=-1, keepdim=True).clamp(min=$eps)",
            "x = x / x.abs().sum(dim=-1, keepdim=True).clamp(min=$eps)",
            "x = F.normalize(x, dim=0, eps=$eps)",
        ),
        expert=(
            "x = F.normalize(x, dim=-1, eps=$eps)",
            "x = x / x.norm(dim=-1, keepdim=True).clamp(min=$eps)",
        ),
        variants=({"eps": 1e-12}, {"eps": 1e-8}, {"eps": 1e-6}),
    ),
    Idiom(
        "batch_norm",
        "standardised columns, eps $eps",
        "m = x.mean(dim=0)\nv = ((x - m) ** 2).mean(dim=0)\nx = (x - m) / torch.sqrt(v + $eps)",
        common=(
            "m = x.mean(dim=0)\nv = torch.mean((x - m) ** 2, dim=0)\n"
            "x = (x - m) / torch.sqrt(v + $eps)",
            "m = x.mean(0)\nv = (x - m).pow(2).mean(0)\nx = (x - m) / (v + $eps).sqrt()",
        ),
        slow=("m = x.mean(0)\nx = (x - m) / torch.sqrt(x.var(0, unbiased=False) + $eps)",),
        wrong=(
            "x = (x - x.mean(dim=0)) / torch.sqrt(x.var(dim=0) + $eps)",
            "m = x.mean(dim=0)\nv = ((x - m) ** 2).mean(dim=0)\nx = (x - m) / (v + $eps)",
            "x = (x - x.mean()) / torch.sqrt(x.var() + $eps)",
        ),
        expert=(
            "x = F.batch_norm(x, None, None, training=True, eps=$eps)",
            "x = x - x.mean(dim=0)\nx = x / torch.sqrt((x ** 2).mean(dim=0) + $eps)",
        ),
        variants=EPS,
    ),
    Idiom(
        "minmax",
        "rows rescaled to [0, 1], eps $eps",
        "l = x.min(dim=-1, keepdim=True).values\nh = x.max(dim=-1, keepdim=True).values\n"
        "x = (x - l) / (h - l + $eps)",
        common=(
            "l, h = x.min(-1, keepdim=True)[0], x.max(-1, keepdim=True)[0]\n"
            "x = (x - l) / (h - l + $eps)",
            "l, h = torch.aminmax(x, dim=-1, keepdim=True)\nx = (x - l) / (h - l + $eps)",
        ),
        slow=(
            "s = x.sort(dim=-1).values\nl, h = s[:, :1], s[:, -1:]\nx = (x - l) / (h - l + $eps)",
        ),
        wrong=(
            "l, h = x.min(), x.max()\nx = (x - l) / (h - l + $eps)",
            "l, h = x.amin(-1), x.amax(-1)\nx = (x - l) / (h - l + $eps)",
            "l, h = x.amin(-1, True), x.amax(-1, True)\nx = (x - h) / (h - l + $eps)",
        ),
        expert=("l, h = x.amin(-1, True), x.amax(-1, True)\nx = (x - l) / (h - l + $eps)",),
        variants=EPS,
    ),
    Idiom(
        "loss",
        "$name loss against $a",
        "x = $line.mean()",
        common=("x = torch.mean($line)", "y = $line\nx = y.mean()", "x = $line.sum() / x.numel()"),
        wrong=("x = $line.sum()", "x = $line.mean(dim=-1)", "x = -$line.mean()"),
        expert=("x = $fast", "y = x - $a\nx = $own"),
        variants=(
            {
                "name": "mse_loss",
                "line": "((x - $a) ** 2)",
                "fast": "F.mse_loss(x, $a)",
                "own": "y.square_().mean()",
            },
            {
                "name": "l1_loss",
                "line": "(x - $a).abs()",
                "fast": "(x - $a).abs_().mean()",
                "own": "y.abs_().mean()",
            },
            {
                "name": "smooth_l1_loss",
                "line": "torch.where((x - $a).abs() < 1, (x - $a) ** 2 / 2, (x - $a).abs() - 0.5)",
                "fast": "F.smooth_l1_loss(x, $a)",
                "own": "F.smooth_l1_loss(y, torch.zeros_like(y))",
            },
        ),
        inputs=(FULL,),
        out=(),
    ),
    Idiom(
        "cosine",
        "cosine similarity of the rows of x and $a, times $c",
        "y = torch.sqrt((x ** 2).sum(dim=-1)) * torch.sqrt(($a ** 2).sum(dim=-1))\n"
        "x = $c * (x * $a).sum(dim=-1) / y",
        common=(
            "x = $c * F.cosine_similarity(x, $a, dim=-1)",
            "y = torch.sqrt((x * x).sum(-1)) * torch.sqrt(($a * $a).sum(-1))\n"
            "x = $c * (x * $a).sum(-1) / y",
        ),
        slow=("x = $c * torch.diag(F.normalize(x, dim=1) @ F.normalize($a, dim=1).T)",),
        wrong=("x = $c * (x * $a).sum(dim=-1)", "x = $c * F.cosine_similarity(x, $a, dim=0)"),
        expert=("x = $c * (x * $a).sum(-1) / (x.norm(dim=-1) * $a.norm(dim=-1))",),
        variants=({"c": 2}, {"c": 5}, {"c": 10}),
        inputs=(FULL,),
        out=("$N",),
    ),
    Idiom(
        "row_dot",
        "$c times the dot product of each row of x with the row of $a",
        "x = $c * (x * $a).sum(dim=-1)",
        common=(
            "x = $c * torch.sum(x * $a, dim=-1)",
            "y = x * $a\nx = $c * y.sum(-1)",
            "x = (x * $a).sum(1) * $c",
            "x = $c * torch.linalg.vecdot(x, $a)",
        ),
        slow=(
            "x = $c * torch.stack([row @ other for row, other in zip(x, $a)])",
            "x = $c * torch.diag(x @ $a.T)",
        ),
        wrong=(
            "x = $c * (x * $a).sum(dim=0)",
            "x = $c * (x + $a).sum(dim=-1)",
            "x = $c * (x @ $a)",
        ),
        variants=({"c": 2}, {"c": 3}, {"c": 0.5}),
        inputs=(FULL,),
        out=("$N",),
    ),
    Idiom(
        "variance",
        "variance over dim $dim",
        "x = ((x - x.mean(dim=$dim, keepdim=True)) ** 2).mean(dim=$dim)",
        common=(
            "y = x - x.mean(dim=$dim, keepdim=True)\nx = (y * y).mean(dim=$dim)",
            "m = x.mean(dim=$dim, keepdim=True)\nx = ((x - m) ** 2).sum(dim=$dim) / x.shape[$dim]",
        ),
        slow=("x = torch.var(x, dim=$dim, unbiased=False)", "x = x.var(dim=$dim, correction=0)"),
        wrong=(
            "x = torch.var(x, dim=$dim)",
            "x = torch.std(x, dim=$dim, unbiased=False)",
            "x = ((x - x.mean()) ** 2).mean()",
        ),
        expert=("y = x - x.mean(dim=$dim, keepdim=True)\nx = y.square_().mean(dim=$dim)",),
        variants=({"dim": -1}, {"dim": 1}),
        out=("$N",),
    ),
    Idiom(
        "reduce",
        "row $f",
        "x = x.$f(dim=-1)",
        common=(
            "x = torch.$f(x, dim=-1)",
            "x = x.$f(dim=1)",
            "x = x.$f(-1)",
            "y = x.$f(dim=-1)\nx = y",
        ),
        slow=("x = torch.stack([row.$f(dim=0) for row in x])",),
        wrong=("x = x.$f(dim=0)", "x = x.$f(dim=-1, keepdim=True)", "x = x.$f(dim=2)"),
        variants=({"f": "sum"}, {"f": "mean"}, {"f": "amax"}, {"f": "amin"}),
        out=("$N",),
        cpu=(2048, 2048),
    ),
    Idiom(
        "frobenius",
        "$title",
        "x = $outer(torch.trace(x.T @ x))",
        common=("x = $outer(torch.trace(x.mT @ x))", "y = x.T @ x\nx = $outer(torch.trace(y))"),
        slow=("x = $outer(torch.trace(x.T @ x @ torch.eye(x.shape[1])))",),
        wrong=("x = $outer((x.T @ x).sum())", "x = $outer(x.sum())", "x = $outer(torch.trace(x))"),
        expert=("x = $fast", "x = $outer((x * x).sum())", "x = $outer(x.square().sum())"),
        variants=(
            {"title": "Frobenius norm", "outer": "torch.sqrt", "fast": "torch.linalg.norm(x)"},
            {
                "title": "log of the sum of squares",
                "outer": "torch.log",
                "fast": "torch.log(torch.linalg.norm(x)) * 2",
            },
        ),
        out=(),
        cpu=(256, 256),
        gpu=(4096, 4096),
    ),
)
