"""From a chain to a task file in KernelBench's format."""

from __future__ import annotations

from collections.abc import Sequence
from string import Template
from textwrap import indent

from ttkit.minibench.grammar import INPUT_NAMES, Link, args, body, idioms, names_of

TINY = 6  # own dims in a file of tiny scale, coprime to the constants in use

HEAD = "import torch\nimport torch.nn as nn\nimport torch.nn.functional as F\n\n"


def task_code(chain: Sequence[Link], shape: tuple[int, int], scale: str = "cpu") -> str:
    """The source of a task: `shape` is N, D of the first state; `scale` picks the other dims.

    Scale `tiny` is for tests. Own dims that two links name alike are told apart by a number.
    """
    sizes = {"N": shape[0], "D": shape[1]}
    rows, columns = "N", "D"
    inputs: list[str] = []
    setup: list[str] = []
    init: list[tuple[str, str]] = []
    state, offset = "", 0
    for link in chain:
        idiom = idioms()[link.idiom]
        names: dict[str, object] = {**idiom.variants[link.variant], "N": rows, "D": columns}
        for dim, values in idiom.sizes.items():
            names[dim] = _fresh(dim, sizes)
            sizes[str(names[dim])] = _own_dim(values, shape, scale)
        state = state or Template(idiom.start).substitute(names)
        for i, expression in enumerate(idiom.inputs):
            drawn = Template(expression).substitute(names)
            inputs.append(f"{INPUT_NAMES[offset + i]} = {drawn}")
        offset += len(idiom.inputs)
        setup += idiom.setup
        init += [(name, Template(value).substitute(names)) for name, value in idiom.init]
        if len(idiom.out) == 2:
            rows, columns = (_wrap(Template(dim).substitute(names)) for dim in idiom.out)
    names_of_args = args(chain)
    lines = [f"{name} = {value}" for name, value in sizes.items()]
    parts = [
        HEAD + "\n".join(lines),
        "",
        "",
        "class Model(nn.Module):",
        f'    """{title(chain)}."""',
        "",
    ]
    if setup:
        parts += [f"    def __init__(self, {', '.join(name for name, _ in init)}):"]
        parts += [indent("\n".join(["super().__init__()", *setup]), " " * 8), ""]
    parts += [
        f"    def forward(self, {', '.join(names_of_args)}):",
        indent(body(chain), " " * 8),
        "",
        "",
    ]
    drawn = "\n".join([f"x = {state}", *inputs, f"return [{', '.join(names_of_args)}]"])
    parts += ["def get_inputs():", indent(drawn, " " * 4), "", ""]
    parts += ["def get_init_inputs():", f"    return [{', '.join(value for _, value in init)}]", ""]
    return "\n".join(parts)


def _own_dim(values: tuple[int, int], shape: tuple[int, int], scale: str) -> int:
    if scale == "gpu":  # a link that needs a small state must not meet a neighbour's full width
        return min(values[1], max(shape))
    return values[0] if scale == "cpu" else TINY


def title(chain: Sequence[Link]) -> str:
    """The chain in plain words."""
    said, offset = [], 0
    for link in chain:
        said.append(Template(idioms()[link.idiom].title).substitute(names_of(link, offset)))
        offset += len(idioms()[link.idiom].inputs)
    text = ", then ".join(said)
    return text if text.startswith(("x ", "a ")) else text[0].upper() + text[1:]


def _fresh(dim: str, sizes: dict[str, int]) -> str:
    count = 1
    while (name := dim if count == 1 else f"{dim}{count}") in sizes:
        count += 1
    return name


def _wrap(dim: str) -> str:
    return dim if dim.isidentifier() or dim.isdigit() else f"({dim})"
