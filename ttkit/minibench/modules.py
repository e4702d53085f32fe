"""Idioms with parameters: the constructor takes sizes, the forms read `self`."""

from __future__ import annotations

from ttkit.minibench.grammar import Idiom

SQUARE = (4096, 4096)

IDIOMS = (
    Idiom(
        "linear",
        "a linear layer, times $c",
        "x = $c * self.linear(x)",
        common=(
            "x = self.linear(x) * $c",
            "y = self.linear(x)\nx = $c * y",
            "x = $c * F.linear(x, self.linear.weight, self.linear.bias)",
        ),
        slow=("x = $c * torch.stack([self.linear(row) for row in x])",),
        wrong=(
            "x = $c * (x @ self.linear.weight.T)",
            "x = $c * (x @ self.linear.weight + self.linear.bias)",
            "x = $c * self.layer(x)",
        ),
        variants=({"c": 0.5}, {"c": 2}, {"c": 3}),
        out=("$N", "$M"),
        sizes={"M": (192, 4096)},
        init=(("in_features", "$D"), ("out_features", "$M")),
        setup=("self.linear = nn.Linear(in_features, out_features)",),
        cpu=(256, 256),
        gpu=SQUARE,
    ),
    Idiom(
        "weighted_norm",
        "layer normalisation with weights, eps $eps",
        "m = x.mean(dim=-1, keepdim=True)\nv = ((x - m) ** 2).mean(dim=-1, keepdim=True)\n"
        "x = (x - m) / torch.sqrt(v + $eps) * self.gain + self.bias",
        common=(
            "x = x - x.mean(dim=-1, keepdim=True)\nv = (x ** 2).mean(dim=-1, keepdim=True)\n"
            "x = x / torch.sqrt(v + $eps) * self.gain + self.bias",
        ),
        wrong=(
            "x = F.layer_norm(x, x.shape[-1:], eps=$eps)",
            "x = F.layer_norm(x, x.shape[-1:], self.bias, self.gain, $eps)",
            "x = F.layer_norm(x, x.shape, self.gain, self.bias, $eps)",
        ),
        expert=("x = F.layer_norm(x, x.shape[-1:], self.gain, self.bias, $eps)",),
        variants=({"eps": 1e-5}, {"eps": 1e-6}, {"eps": 1e-3}),
        init=(("norm_features", "$D"),),
        setup=(
            "self.gain = nn.Parameter(torch.rand(norm_features) + 0.5)",
            "self.bias = nn.Parameter(torch.randn(norm_features))",
        ),
    ),
    Idiom(
        "scale_columns",
        "columns scaled by a parameter, by a diagonal matrix, times $c",
        "x = $c * (x @ torch.diag(self.scale))",
        common=(
            "x = x @ torch.diag(self.scale) * $c",
            "y = torch.diag(self.scale)\nx = $c * (x @ y)",
        ),
        wrong=(
            "x = $c * (torch.diag(self.scale) @ x)",
            "x = $c * (x + self.scale)",
            "x = x * self.scale",
        ),
        expert=("x = x * ($c * self.scale)", "x = $c * x * self.scale"),
        variants=({"c": 2}, {"c": 3}, {"c": 0.5}),
        init=(("scale_features", "$D"),),
        setup=("self.scale = nn.Parameter(torch.rand(scale_features) + 0.5)",),
        cpu=(256, 256),
        gpu=SQUARE,
    ),
    Idiom(
        "adapter",
        "x plus a low-rank update of x, times $c",
        "x = x + $c * (x @ (self.down @ self.up))",
        common=(
            "y = self.down @ self.up\nx = x + $c * (x @ y)",
            "x = $c * (x @ (self.down @ self.up)) + x",
        ),
        wrong=(
            "x = $c * (x @ self.down @ self.up)",
            "x = x + $c * (x @ (self.up @ self.down))",
            "x = x - $c * (x @ self.down @ self.up)",
        ),
        expert=(
            "x = torch.addmm(x, x @ self.down, self.up, alpha=$c)",
            "x = x + $c * (x @ self.down @ self.up)",
        ),
        variants=({"c": 0.5}, {"c": 2}, {"c": 0.1}),
        sizes={"R": (8, 64)},
        init=(("features", "$D"), ("rank", "$R")),
        setup=(
            "self.down = nn.Parameter(torch.randn(features, rank))",
            "self.up = nn.Parameter(torch.randn(rank, features) / features**0.5)",
        ),
        cpu=(256, 256),
        gpu=SQUARE,
    ),
    Idiom(
        "prelu",
        "PReLU with a slope for every column, plus $c",
        "x = torch.where(x > 0, x, self.slope * x) + $c",
        common=(
            "x = torch.where(x < 0, self.slope * x, x) + $c",
            "y = self.slope * x\nx = torch.where(x > 0, x, y) + $c",
        ),
        wrong=(
            "x = torch.where(x > 0, self.slope * x, x) + $c",
            "x = self.slope * F.relu(x) + $c",
            "x = F.relu(x) - self.slope * F.relu(-x)",
        ),
        expert=(
            "x = F.prelu(x, self.slope).add_($c)",
            "x = F.prelu(x, self.slope) + $c",
            "x = torch.maximum(x, self.slope * x) + $c",
        ),
        variants=({"c": 1}, {"c": 0.5}, {"c": 2}),
        init=(("slopes", "$D"),),
        setup=("self.slope = nn.Parameter(torch.rand(slopes) / 2)",),
    ),
    Idiom(
        "standard_norm",
        "layer normalisation by a module, times $c",
        "x = $c * self.norm(x)",
        common=("x = self.norm(x) * $c", "y = self.norm(x)\nx = $c * y"),
        slow=("x = $c * torch.stack([self.norm(row) for row in x])",),
        wrong=(
            "x = $c * self.norm(x.T).T",
            "x = $c * F.layer_norm(x, x.shape)",
            "x = $c * self.layer_norm(x)",
        ),
        variants=({"c": 2}, {"c": 3}, {"c": 0.5}),
        init=(("width", "$D"),),
        setup=("self.norm = nn.LayerNorm(width)",),
    ),
)
