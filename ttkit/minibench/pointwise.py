"""Elementwise arithmetic: temporaries that can be reused, powers, clamps, masks."""

from __future__ import annotations

from ttkit.minibench.grammar import Idiom

FULL = "torch.randn($N, $D)"
ROW = "torch.randn($D)"

IDIOMS = (
    Idiom(
        "power",
        "elementwise power $k",
        "x = x ** $k",
        common=("x = torch.pow(x, $k)", "x = x.pow($k)"),
        slow=("x = torch.sign(x) ** $k * torch.exp($k * torch.log(x.abs() + 1e-30))",),
        wrong=("x = x.abs() ** $k + 1", "x = $k ** x", "x = x * $k"),
        expert=("$fast",),
        variants=(
            {"k": 4, "fast": "x = x * x\nx = x * x"},
            {"k": 5, "fast": "y = x * x\nx = (y * y).mul_(x)"},
            {"k": 6, "fast": "y = x * x * x\nx = y * y"},
        ),
    ),
    Idiom(
        "polynomial",
        "a cubic polynomial of every element",
        "x = $p + $q * x + $r * x ** 2 + $s * x ** 3",
        common=(
            "y = $p + $q * x\nx = y + $r * x ** 2 + $s * x ** 3",
            "x = $s * x ** 3 + $r * x ** 2 + $q * x + $p",
        ),
        slow=("x = $p + $q * x + $r * x * x + $s * x * x * x",),
        wrong=(
            "x = $p + $q * x + $r * x ** 2 - $s * x ** 3",
            "x = (($s * x + $r) * x + $p) * x + $q",
        ),
        expert=(
            "x = ($s * x).add_($r).mul_(x).add_($q).mul_(x).add_($p)",
            "x = (($s * x + $r) * x + $q) * x + $p",
        ),
        variants=(
            {"p": 1, "q": 0.5, "r": 0.25, "s": 0.125},
            {"p": 2, "q": 0.1, "r": 0.2, "s": 0.3},
            {"p": 0.5, "q": 0.3, "r": 0.1, "s": 0.05},
        ),
    ),
    Idiom(
        "affine",
        "every column scaled by $c $a and shifted by $b",
        "x = x * $a * $c + $b",
        common=("x = $b + $c * x * $a", "y = x * $a * $c\nx = y + $b"),
        slow=("x = x * $a.expand_as(x).clone() * $c + $b.expand_as(x).clone()",),
        wrong=("x = x * $b * $c + $a", "x = (x + $b) * $a * $c", "x = x * $a * $c - $b"),
        expert=("x = torch.addcmul($b, x, $a, value=$c)", "x = x * ($a * $c) + $b"),
        variants=({"c": 0.5}, {"c": 2}, {"c": 3}),
        inputs=(ROW, ROW),
    ),
    Idiom(
        "blend",
        "a weighted mean of x and $a",
        "x = $u * x + $w * $a",
        common=("x = $w * $a + $u * x", "x = x * $u + $a * $w", "y = $u * x\nx = y + $w * $a"),
        slow=("x = torch.stack([$u * x, $w * $a]).sum(0)",),
        wrong=("x = $u * $a + $w * x", "x = $u * x - $w * $a", "x = torch.lerp($a, x, $w)"),
        expert=("x = torch.lerp(x, $a, $w)", "x = torch.add($u * x, $a, alpha=$w)"),
        variants=({"u": 0.9, "w": 0.1}, {"u": 0.75, "w": 0.25}, {"u": 0.7, "w": 0.3}),
        inputs=(FULL,),
    ),
    Idiom(
        "residual",
        "two residuals added, the second weighted",
        "x = x + $a + $c * $b",
        common=("x = $a + x + $c * $b", "y = x + $a\nx = y + $c * $b", "x = x + ($a + $c * $b)"),
        slow=("x = torch.stack([x, $a, $c * $b]).sum(0)",),
        wrong=("x = x + $a - $c * $b", "x = x + $b + $c * $a", "x = x * $a + $c * $b"),
        expert=("x = (x + $a).add_($b, alpha=$c)", "x = torch.add(x + $a, $b, alpha=$c)"),
        variants=({"c": 0.1}, {"c": 0.5}, {"c": 2}),
        inputs=(FULL, FULL),
    ),
    Idiom(
        "gaussian",
        "a Gaussian bump of width $s around $a",
        "x = torch.exp(-(x - $a) ** 2 / (2 * $s ** 2))",
        common=(
            "x = torch.exp(-0.5 * ((x - $a) / $s) ** 2)",
            "y = x - $a\nx = torch.exp(-y * y / (2 * $s ** 2))",
        ),
        wrong=(
            "x = torch.exp(-(x + $a) ** 2 / (2 * $s ** 2))",
            "x = torch.exp(-(x - $a) ** 2 / $s)",
        ),
        expert=("x = (x - $a).square_().mul_(-0.5 / $s ** 2).exp_()",),
        variants=({"s": 1.5}, {"s": 2.0}, {"s": 3.0}),
        inputs=(ROW,),
    ),
    Idiom(
        "clip",
        "elements limited to [$lo, $hi]",
        "x = torch.where(x > $hi, $hi, x)\nx = torch.where(x < $lo, $lo, x)",
        common=(
            "x = torch.where(x < $lo, $lo, x)\nx = torch.where(x > $hi, $hi, x)",
            "x = torch.where(x > $hi, $hi, torch.where(x < $lo, $lo, x))",
        ),
        slow=("x = x * ((x <= $hi) & (x >= $lo)) + $hi * (x > $hi) + $lo * (x < $lo)",),
        wrong=("x = torch.clamp(x, $lo)", "x = torch.clamp(x, -$hi, -$lo)"),
        expert=("x = torch.clamp(x, $lo, $hi)", "x = x.clamp(min=$lo).clamp_(max=$hi)"),
        variants=({"lo": -1.0, "hi": 2.0}, {"lo": -0.5, "hi": 1.5}, {"lo": -2.0, "hi": 1.0}),
    ),
    Idiom(
        "hypot",
        "the length of (x, $c $a) element by element",
        "x = torch.sqrt(x ** 2 + ($c * $a) ** 2)",
        common=(
            "y = $c * $a\nx = torch.sqrt(x * x + y * y)",
            "x = (x ** 2 + ($c * $a) ** 2) ** 0.5",
        ),
        slow=("x = torch.stack([x, $c * $a]).norm(dim=0)",),
        wrong=("x = torch.sqrt(x ** 2 - ($c * $a) ** 2)", "x = x ** 2 + ($c * $a) ** 2"),
        expert=(
            "x = (x * x).addcmul_($a, $a, value=$c ** 2).sqrt_()",
            "x = torch.hypot(x, $c * $a)",
        ),
        variants=({"c": 0.5}, {"c": 2}, {"c": 3}),
        inputs=(FULL,),
    ),
    Idiom(
        "symlog",
        "signed logarithm of 1 + $c |x|",
        "x = torch.sign(x) * torch.log(1 + $c * torch.abs(x))",
        common=(
            "x = x.sign() * (1 + $c * x.abs()).log()",
            "y = torch.log(1 + $c * x.abs())\nx = torch.sign(x) * y",
        ),
        slow=("x = torch.where(x > 0, torch.log1p($c * x.abs()), -torch.log1p($c * x.abs()))",),
        wrong=(
            "x = torch.log(1 + $c * torch.abs(x))",
            "x = torch.sign(x) * torch.log($c * torch.abs(x))",
        ),
        expert=(
            "x = x.abs().mul_($c).log1p_().copysign_(x)",
            "x = torch.copysign(torch.log1p($c * x.abs()), x)",
        ),
        variants=({"c": 0.5}, {"c": 2}, {"c": 10}),
    ),
    Idiom(
        "mask",
        "elements kept where $a is above $t",
        "x = torch.where($a > $t, x, torch.zeros_like(x))",
        common=(
            "x = torch.where($a <= $t, torch.zeros_like(x), x)",
            "x = torch.where($a > $t, x, 0)",
            "x = x.masked_fill($a <= $t, 0)",
        ),
        slow=("y = torch.zeros_like(x)\ny[$a > $t] = x[$a > $t]\nx = y",),
        wrong=("x = x * ($a < $t).float()", "x = x[$a > $t]", "x = x.masked_fill($a > $t, 0)"),
        expert=("x = x * ($a > $t)", "x = x * ($a > $t).float()"),
        variants=({"t": 0.0}, {"t": 0.5}, {"t": -0.5}),
        inputs=(FULL,),
        place="first",
    ),
    Idiom(
        "shift_scale",
        "x minus $c, divided by $s",
        "x = (x - $c) / $s",
        common=("y = x - $c\nx = y / $s", "x = (x + -$c) / $s", "x = torch.sub(x, $c) / $s"),
        slow=("x = torch.stack([(row - $c) / $s for row in x])",),
        wrong=("x = x - $c / $s", "x = (x + $c) / $s", "x = (x - $s) / $c"),
        expert=("x = (x - $c).mul_(1 / $s)", "x = (x - $c).div_($s)"),
        variants=({"c": 0.5, "s": 3}, {"c": 1, "s": 5}, {"c": 0.25, "s": 7}),
    ),
    Idiom(
        "add",
        "$a added to $c x",
        "x = torch.add($a, x, alpha=$c)",
        common=("x = $a.add(x, alpha=$c)", "y = torch.add($a, x, alpha=$c)\nx = y"),
        slow=("x = x * $c + $a", "x = $a + $c * x"),
        wrong=(
            "x = torch.add(x, $a, alpha=$c)",
            "x = torch.add($a, x)",
            "x = torch.sub($a, x, alpha=$c)",
        ),
        variants=({"c": 2}, {"c": 3}, {"c": 0.5}),
        inputs=(FULL,),
    ),
)
