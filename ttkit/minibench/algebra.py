"""Linear algebra of special structure: diagonal, rank-one, Kronecker, inverse, distances."""

from __future__ import annotations

from ttkit.minibench.grammar import Idiom

SQUARE = (4096, 4096)

IDIOMS = (
    Idiom(
        "diag_left",
        "row i of x times $c a[i]",
        "x = torch.diag($c * $a) @ x",
        common=(
            "x = torch.diag($a * $c) @ x",
            "y = torch.diag($c * $a)\nx = y @ x",
            "x = torch.diag_embed($c * $a) @ x",
        ),
        slow=("x = torch.stack([$c * s * row for s, row in zip($a, x)])",),
        wrong=("x = $c * $a * x", "x = x @ torch.diag($c * $a)", "x = torch.diag($c * $a) + x"),
        expert=(
            "x = ($c * $a)[:, None] * x",
            "x = x * ($c * $a).unsqueeze(1)",
            "x = $c * $a[:, None] * x",
        ),
        variants=({"c": 0.5}, {"c": 2}, {"c": 3}),
        inputs=("torch.randn($N)",),
        cpu=(256, 256),
        gpu=SQUARE,
    ),
    Idiom(
        "diag_right",
        "column i of x times $c a[i]",
        "x = x @ torch.diag($c * $a)",
        common=(
            "x = x @ torch.diag($a * $c)",
            "y = torch.diag($c * $a)\nx = x @ y",
            "x = torch.mm(x, torch.diag($c * $a))",
        ),
        wrong=("x = x * ($c * $a)[:, None]", "x = torch.diag($c * $a) @ x", "x = x + $c * $a"),
        expert=("x = x * ($c * $a)", "x = $c * $a * x"),
        variants=({"c": 0.5}, {"c": 2}, {"c": 3}),
        inputs=("torch.randn($D)",),
        cpu=(256, 256),
        gpu=SQUARE,
    ),
    Idiom(
        "outer_product",
        "x times the outer product of $a and $b, $c times",
        "x = $c * (x @ torch.outer($a, $b))",
        common=(
            "y = torch.outer($a, $b)\nx = $c * (x @ y)",
            "x = $c * (x @ ($a[:, None] * $b))",
            "x = x @ torch.outer($a, $b) * $c",
        ),
        wrong=(
            "x = $c * (x @ torch.outer($b, $a))",
            "x = $c * (x * torch.outer($a, $b))",
            "x = $c * (x @ $a) * $b",
        ),
        expert=("x = torch.outer($c * (x @ $a), $b)", "x = $c * (x @ $a)[:, None] * $b"),
        variants=({"c": 0.5}, {"c": 2}, {"c": 0.1}),
        inputs=("torch.randn($D)", "torch.randn($M)"),
        out=("$N", "$M"),
        sizes={"M": (320, 4096)},
        cpu=(256, 256),
        gpu=SQUARE,
    ),
    Idiom(
        "rank_one",
        "x times (I + $c $a $a^T)",
        "x = x @ (torch.eye(x.shape[1]) + $c * torch.outer($a, $a))",
        common=(
            "y = torch.eye($a.numel()) + $c * torch.outer($a, $a)\nx = x @ y",
            "x = x + x @ ($c * torch.outer($a, $a))",
        ),
        wrong=(
            "x = x - $c * torch.outer(x @ $a, $a)",
            "x = x + $c * (x @ $a) * $a",
            "x = x + $c * x * $a",
        ),
        expert=(
            "x = torch.addr(x, x @ $a, $a, alpha=$c)",
            "x = x + torch.outer($c * (x @ $a), $a)",
        ),
        variants=({"c": 0.1}, {"c": 0.5}, {"c": 2}),
        inputs=("torch.randn($D)",),
        cpu=(256, 256),
        gpu=SQUARE,
    ),
    Idiom(
        "centre",
        "columns minus their mean, by a centring matrix, times $c",
        "n = x.shape[0]\nx = $c * ((torch.eye(n) - torch.ones(n, n) / n) @ x)",
        common=(
            "n = x.shape[0]\nx = $c * (x - torch.ones(n, n) @ x / n)",
            "n = len(x)\ny = torch.eye(n) - 1 / n\nx = $c * (y @ x)",
        ),
        wrong=(
            "x = $c * (x - x.mean(dim=1, keepdim=True))",
            "x = $c * (x - x.mean())",
            "x = $c * (x - x.sum(dim=0))",
        ),
        expert=(
            "x = (x - x.mean(dim=0)).mul_($c)",
            "x = $c * (x - x.mean(dim=0))",
            "x = $c * (x - x.mean(0, keepdim=True))",
        ),
        variants=({"c": 2}, {"c": 3}, {"c": 0.5}),
        cpu=(256, 256),
        gpu=SQUARE,
    ),
    Idiom(
        "kron",
        "the Kronecker product of $a and $b applied to x laid out as a vector, $c times",
        "x = $c * (torch.kron($a, $b) @ x.flatten())",
        common=(
            "x = $c * (torch.kron($a, $b) @ x.reshape(-1))",
            "y = torch.kron($a, $b)\nx = $c * (y @ x.flatten())",
        ),
        wrong=(
            "x = $c * ($b @ x @ $a.T).flatten()",
            "x = $c * ($a @ x @ $b.T)",
            "x = $c * (torch.kron($b, $a) @ x.flatten())",
        ),
        expert=("x = $c * ($a @ x @ $b.T).flatten()", "y = $a @ x\nx = $c * (y @ $b.T).flatten()"),
        variants=({"c": 0.5}, {"c": 2}, {"c": 0.1}),
        inputs=("torch.randn($M, $N)", "torch.randn($M, $D)"),
        out=("$M * $M",),
        sizes={"M": (28, 128)},
        place="alone",
        cpu=(128, 24),
        gpu=(192, 96),
    ),
    Idiom(
        "inverse",
        "$c times x multiplied by the inverse of $a",
        "x = torch.linalg.inv($a) @ ($c * x)",
        common=(
            "x = torch.inverse($a) @ ($c * x)",
            "y = torch.linalg.inv($a)\nx = y @ ($c * x)",
            "x = $c * ($a.inverse() @ x)",
        ),
        slow=("x = torch.linalg.pinv($a) @ ($c * x)",),
        wrong=(
            "x = $a @ ($c * x)",
            "x = torch.linalg.inv($a.T) @ ($c * x)",
            "x = ($c * x) @ torch.linalg.inv($a)",
        ),
        expert=("x = torch.linalg.solve($a, $c * x)",),
        variants=({"c": 0.5}, {"c": 2}, {"c": 3}),
        inputs=("torch.eye($N) + torch.randn($N, $N) / (2 * $N**0.5)",),
        cpu=(192, 64),
        gpu=(2048, 1024),
    ),
    Idiom(
        "distance",
        "$title between the rows of x and of $a",
        "x = $ref",
        common=(
            "y = x[:, None] - $a\nx = $tail",
            "y = x.unsqueeze(1) - $a.unsqueeze(0)\nx = $tail",
        ),
        slow=("x = torch.stack([$loop for row in x])",),
        wrong=(
            "x = torch.cdist(x, x, p=$p)",
            "y = x[:, None] + $a\nx = $tail",
            "x = torch.cdist($a, x, p=$p)",
        ),
        expert=("x = torch.cdist(x, $a, p=$p)",),
        variants=(
            {
                "title": "Euclidean distances",
                "p": 2,
                "ref": "torch.sqrt(((x[:, None] - $a) ** 2).sum(dim=-1))",
                "tail": "(y * y).sum(-1).sqrt()",
                "loop": "((row - $a) ** 2).sum(-1).sqrt()",
            },
            {
                "title": "Manhattan distances",
                "p": 1,
                "ref": "(x[:, None] - $a).abs().sum(dim=-1)",
                "tail": "y.abs().sum(-1)",
                "loop": "(row - $a).abs().sum(-1)",
            },
        ),
        inputs=("torch.randn($M, $D)",),
        out=("$N", "$M"),
        sizes={"M": (48, 512)},
        cpu=(128, 64),
        gpu=(1024, 128),
    ),
    Idiom(
        "cube",
        "x times $a, by summing a broadcast product, $c times",
        "x = $c * (x[:, :, None] * $a).sum(dim=1)",
        common=(
            "y = x[:, :, None] * $a[None]\nx = $c * y.sum(dim=1)",
            "x = $c * (x.unsqueeze(2) * $a).sum(dim=1)",
        ),
        wrong=(
            "x = $c * (x[:, :, None] * $a).sum(dim=0)",
            "x = $c * (x @ $a.T)",
            "x = $c * (x * $a).sum(dim=1)",
        ),
        expert=(
            "x = $c * (x @ $a)",
            "x = x @ ($c * $a)",
            "x = $c * torch.einsum('nd,dm->nm', x, $a)",
        ),
        variants=({"c": 0.5}, {"c": 2}, {"c": 0.1}),
        inputs=("torch.randn($D, $M)",),
        out=("$N", "$M"),
        sizes={"M": (40, 512)},
        cpu=(128, 64),
        gpu=(1024, 128),
    ),
    Idiom(
        "attention",
        "attention of x over the rows of $a and $b, scale $c",
        "y = x @ $a.T * $c\ny = torch.exp(y - y.max(dim=-1, keepdim=True).values)\n"
        "x = y / y.sum(dim=-1, keepdim=True) @ $b",
        common=(
            "y = $c * (x @ $a.T)\ny = (y - y.max(dim=-1, keepdim=True)[0]).exp()\n"
            "x = y / y.sum(dim=-1, keepdim=True) @ $b",
            "y = x @ $a.T * $c\ny = torch.exp(y - y.max(dim=-1, keepdim=True).values)\n"
            "y = y / y.sum(dim=-1, keepdim=True)\nx = y @ $b",
            "x = F.scaled_dot_product_attention(x[None], $a[None], $b[None], scale=$c)[0]",
        ),
        wrong=(
            "x = torch.softmax(x @ $a.T * $c, dim=0) @ $b",
            "x = torch.softmax(x @ $a.T, dim=-1) @ $b",
            "x = torch.softmax(x @ $b.T * $c, dim=-1) @ $a",
        ),
        expert=(
            "x = torch.softmax(x @ $a.T * $c, dim=-1) @ $b",
            "y = torch.softmax($c * (x @ $a.T), dim=-1)\nx = y @ $b",
        ),
        variants=({"c": 0.05}, {"c": 0.1}, {"c": 0.02}),
        inputs=("torch.randn($M, $D)", "torch.randn($M, $D)"),
        sizes={"M": (256, 4096)},
        cpu=(256, 64),
        gpu=(4096, 128),
    ),
)
