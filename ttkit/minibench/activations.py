"""Activations written out by hand, which PyTorch has as one fused operation."""

from __future__ import annotations

from ttkit.minibench.grammar import Idiom

IDIOMS = (
    Idiom(
        "gelu",
        "GELU, $mode approximation",
        "x = 0.5 * x * (1 + $inner)",
        common=("x = x * 0.5 * (1 + $inner)", "x = x * (1 + $inner) / 2"),
        wrong=("x = 0.5 * x * (1 - $inner)", "x = x * (1 + $inner)", "x = F.gelu(x, '$mode')"),
        expert=("x = F.gelu(x, approximate='$mode')",),
        variants=(
            {"mode": "none", "inner": "torch.erf(x / 2 ** 0.5)"},
            {"mode": "none", "inner": "torch.erf(x * 0.70710678)"},
            {"mode": "tanh", "inner": "torch.tanh(0.79788456 * (x + 0.044715 * x ** 3))"},
        ),
    ),
    Idiom(
        "swish",
        "swish with slope $beta",
        "x = x / (1 + torch.exp(-$beta * x))",
        common=("x = x / (torch.exp(x * -$beta) + 1)", "y = 1 + torch.exp(-$beta * x)\nx = x / y"),
        slow=("x = x * (1 / (1 + torch.exp(-$beta * x)))",),
        wrong=("x = x / (1 + torch.exp($beta * x))", "x = x / (1 - torch.exp(-$beta * x))"),
        expert=(
            "x = torch.sigmoid($beta * x).mul_(x)",
            "x = x * torch.sigmoid($beta * x)",
            "x = F.silu($beta * x) / $beta",
        ),
        variants=({"beta": 1.5}, {"beta": 1.702}, {"beta": 2.0}, {"beta": 3.0}),
    ),
    Idiom(
        "silu",
        "SiLU",
        "$line",
        common=("x = x / (torch.exp(-x) + 1)", "y = 1 + torch.exp(-x)\nx = x / y"),
        slow=("x = x * (1 / (1 + torch.exp(-x)))",),
        wrong=("x = x / (1 + torch.exp(x))", "x = torch.sigmoid(x)", "x = F.relu(x)"),
        expert=("x = F.silu(x)", "x = x * torch.sigmoid(x)"),
        variants=(
            {"line": "x = x / (1 + torch.exp(-x))"},
            {"line": "y = torch.exp(-x)\nx = x / (1 + y)"},
        ),
    ),
    Idiom(
        "softplus",
        "softplus with slope $beta",
        "x = torch.log1p(torch.exp(-(x * $beta).abs())) / $beta + x.clamp(min=0)",
        common=(
            "x = torch.log(1 + torch.exp(-torch.abs(x * $beta))) / $beta + x.clamp(min=0)",
            "y = torch.exp(-(x * $beta).abs())\nx = torch.log1p(y) / $beta + x.clamp(min=0)",
        ),
        wrong=(
            "x = torch.log1p(torch.exp(-(x * $beta).abs())) / $beta",
            "x = torch.log1p(torch.exp((x * $beta).abs())) * $beta",
        ),
        expert=("x = F.softplus(x, beta=$beta)",),
        variants=({"beta": 0.5}, {"beta": 2}, {"beta": 3}),
    ),
    Idiom(
        "mish",
        "Mish",
        "$line",
        common=("x = x * torch.tanh(torch.log1p(torch.exp(x)))",),
        wrong=("x = torch.tanh(torch.log(1 + torch.exp(x)))", "x = x * torch.tanh(torch.exp(x))"),
        expert=("x = F.mish(x)", "x = x * torch.tanh(F.softplus(x))"),
        variants=(
            {"line": "x = x * torch.tanh(torch.log(1 + torch.exp(x)))"},
            {"line": "y = torch.log(1 + torch.exp(x))\nx = x * torch.tanh(y)"},
        ),
    ),
    Idiom(
        "leaky_relu",
        "leaky ReLU with slope $slope",
        "x = torch.where(x > 0, x, $slope * x)",
        common=(
            "x = torch.where(x < 0, $slope * x, x)",
            "y = $slope * x\nx = torch.where(x > 0, x, y)",
        ),
        wrong=("x = torch.where(x > 0, x, -$slope * x)", "x = torch.minimum(x, $slope * x)"),
        expert=(
            "x = F.leaky_relu(x, $slope)",
            "x = torch.maximum(x, $slope * x)",
            "x = F.relu(x) - $slope * F.relu(-x)",
        ),
        variants=({"slope": 0.01}, {"slope": 0.1}, {"slope": 0.2}, {"slope": 0.3}),
    ),
    Idiom(
        "elu",
        "ELU with scale $alpha",
        "x = torch.where(x > 0, x, $alpha * (torch.exp(x) - 1))",
        common=(
            "x = torch.where(x < 0, $alpha * (torch.exp(x) - 1), x)",
            "y = $alpha * (torch.exp(x) - 1)\nx = torch.where(x > 0, x, y)",
        ),
        wrong=("x = torch.where(x > 0, x, $alpha * torch.exp(x))", "x = F.elu(x, -$alpha)"),
        expert=("x = F.elu(x, $alpha)", "x = F.relu(x) + $alpha * (torch.exp(x.clamp(max=0)) - 1)"),
        variants=({"alpha": 0.5}, {"alpha": 1.0}, {"alpha": 1.5}, {"alpha": 2.0}),
    ),
    Idiom(
        "hard",
        "$name",
        "x = $line",
        common=("y = $line\nx = y", "x = ($line)"),
        slow=("x = $slow",),
        wrong=("x = $wrong", "x = F.$name(x) + 1"),
        expert=("x = F.$name(x)",),
        variants=(
            {
                "name": "hardswish",
                "line": "x * torch.clamp(x + 3, 0, 6) / 6",
                "slow": "x * torch.minimum(F.relu(x + 3), torch.full_like(x, 6)) / 6",
                "wrong": "x * torch.clamp(x + 3, 0, 6)",
            },
            {
                "name": "hardsigmoid",
                "line": "torch.clamp(x + 3, 0, 6) / 6",
                "slow": "torch.minimum(F.relu(x + 3), torch.full_like(x, 6)) / 6",
                "wrong": "torch.clamp(x, 0, 6) / 6",
            },
            {
                "name": "relu6",
                "line": "torch.minimum(F.relu(x), torch.full_like(x, 6))",
                "slow": "torch.where(x > 6, torch.full_like(x, 6), torch.where(x < 0, 0 * x, x))",
                "wrong": "torch.maximum(F.relu(x), torch.full_like(x, 6))",
            },
        ),
    ),
    Idiom(
        "shrink",
        "soft shrinkage by $t",
        "x = torch.sign(x) * torch.clamp(x.abs() - $t, min=0)",
        common=(
            "x = F.relu(x - $t) - F.relu(-x - $t)",
            "x = torch.sign(x) * F.relu(x.abs() - $t)",
            "y = x.abs() - $t\nx = torch.sign(x) * y.clamp(min=0)",
        ),
        slow=("x = torch.where(x > $t, x - $t, torch.where(x < -$t, x + $t, 0 * x))",),
        wrong=("x = torch.clamp(x.abs() - $t, min=0)", "x = torch.sign(x) * (x.abs() - $t)"),
        expert=("x = F.softshrink(x, $t)", "x = x - x.clamp(-$t, $t)"),
        variants=({"t": 0.1}, {"t": 0.25}, {"t": 0.5}),
    ),
    Idiom(
        "glu",
        "gated linear unit over the two halves of the columns, times $c",
        "h = x.shape[1] // 2\nx = $c * x[:, :h] / (1 + torch.exp(-x[:, h:]))",
        common=(
            "y, z = x.chunk(2, dim=1)\nx = $c * y / (1 + torch.exp(-z))",
            "y, z = x.chunk(2, dim=-1)\nx = $c * y / (torch.exp(-z) + 1)",
        ),
        slow=("h = x.shape[1] // 2\nx = $c * (x[:, :h] * (1 / (1 + torch.exp(-x[:, h:]))))",),
        wrong=(
            "h = x.shape[1] // 2\nx = $c * x[:, h:] / (1 + torch.exp(-x[:, :h]))",
            "x = $c * F.glu(x, dim=0)",
        ),
        expert=(
            "x = $c * F.glu(x, dim=-1)",
            "y, z = x.chunk(2, dim=1)\nx = $c * y * torch.sigmoid(z)",
        ),
        variants=({"c": 2, "half": 2}, {"c": 3, "half": 2}, {"c": 0.5, "half": 2}),
        divides="half",
        out=("$N", "$D // 2"),
    ),
    Idiom(
        "unary",
        "elementwise $f",
        "x = torch.$f(x)",
        common=("x = x.$f()", "y = torch.$f(x)\nx = y", "x = torch.$f(input=x)"),
        slow=("x = torch.stack([torch.$f(row) for row in x])",),
        wrong=("x = torch.$f(-x)", "x = torch.$f(x, dim=-1)", "x = torch.$f(y)"),
        variants=({"f": "tanh"}, {"f": "sigmoid"}, {"f": "exp"}, {"f": "atan"}, {"f": "sin"}),
    ),
    Idiom(
        "relu",
        "ReLU above $t",
        "x = torch.relu(x - $t)",
        common=(
            "x = F.relu(x - $t)",
            "x = (x - $t).clamp(min=0)",
            "x = torch.clamp(x - $t, min=0)",
        ),
        slow=("x = torch.where(x > $t, x - $t, torch.zeros_like(x))",),
        wrong=(
            "x = torch.relu(x + $t)",
            "x = torch.relu(-x - $t)",
            "x = torch.clamp(x - $t, max=0)",
        ),
        expert=("x = (x - $t).relu_()",),
        variants=({"t": 0.1}, {"t": 0.5}, {"t": 1.0}),
    ),
)
