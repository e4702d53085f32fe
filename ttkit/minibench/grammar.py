"""The grammar: an idiom is one step on the state `x`, written in several forms.

The state is a float32 matrix `x` of shape [N, D]. An idiom takes it and zero or more inputs of its
own, and gives a matrix (the chain may go on), a vector or a scalar (the chain ends). Every form is
a template of Python lines that end with `x` assigned: `$a`, `$b` stand for the idiom's own inputs
in order, `$N` and `$D` (in input and shape templates only) for the sizes of the state, anything
else for a constant of the variant. One regular shape for all code keeps the mapping from reference
to form learnable by a model of two million parameters.

Kinds of form. `reference`: the plain code that people write. `common`: other plain code of about
the same speed, or faster code that was measured and is not faster here. `slow`: measured slower.
`wrong`: a realistic bug, a wrong value or an exception. `expert`: measured faster on one CPU core,
the best one first.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from string import Template
from typing import NamedTuple

KINDS = ("reference", "common", "slow", "wrong", "expert")
INPUT_NAMES = "abcdefgh"
Shape = tuple[str, ...]


class Link(NamedTuple):
    """One step of a chain: the idiom's name and the index of its variant."""

    idiom: str
    variant: int


class Form(NamedTuple):
    """One rendering of a body, of one of KINDS; `name` tells those of a task apart."""

    name: str
    kind: str
    body: str


@dataclass(frozen=True)
class Idiom:
    """One idiom. Forms, `inputs`, `out` and `title` are templates, see the module's docstring."""

    name: str
    title: str  # plain words for the docstring of a task
    reference: str
    common: tuple[str, ...] = ()
    slow: tuple[str, ...] = ()
    wrong: tuple[str, ...] = ()
    expert: tuple[str, ...] = ()
    variants: tuple[Mapping[str, object], ...] = ({},)
    inputs: tuple[str, ...] = ()  # expressions that draw the idiom's own inputs
    start: str = "torch.randn($N, $D)"  # how the state is drawn when the chain begins here
    out: Shape = ("$N", "$D")  # shape after the idiom; shorter than two ends the chain
    sizes: Mapping[str, tuple[int, int]] = field(default_factory=dict)  # own dims: (cpu, gpu)
    cpu: tuple[int, int] = (512, 1024)  # N, D of a task that is this idiom alone
    gpu: tuple[int, int] = (16384, 4096)  # the largest N, D at scale gpu
    place: str = "any"  # "first": only as the first link; "alone": only as the only link
    divides: str = ""  # a constant that must divide D, or ""
    init: tuple[tuple[str, str], ...] = ()  # constructor: (argument, size passed)
    setup: tuple[str, ...] = ()  # lines of __init__ that make the parameters

    def forms(self, kind: str) -> tuple[str, ...]:
        """The templates of one kind."""
        return (self.reference,) if kind == "reference" else getattr(self, kind)


@functools.cache
def idioms() -> dict[str, Idiom]:
    """Every idiom by name, in the order of the thematic files."""
    from ttkit.minibench import (
        activations,
        algebra,
        indexing,
        modules,
        pointwise,
        products,
        reductions,
        rows,
    )

    files = (activations, pointwise, reductions, rows, products, algebra, indexing, modules)
    found = [idiom for file in files for idiom in file.IDIOMS]
    table = {idiom.name: idiom for idiom in found}
    if len(table) != len(found):
        raise ValueError("two idioms share a name")
    return table


@functools.cache
def render(link: Link, kind: str, index: int, offset: int) -> str:
    """The lines of one form; the idiom's inputs are named from the `offset`-th letter on."""
    idiom = idioms()[link.idiom]
    return Template(idiom.forms(kind)[index]).substitute(names_of(link, offset))


def body(chain: Sequence[Link], picks: Sequence[tuple[str, int]] | None = None) -> str:
    """The body of `forward` for a chain. `picks` gives (kind, index) for each link."""
    picks = picks or [("reference", 0)] * len(chain)
    lines, offset = [], 0
    for link, (kind, index) in zip(chain, picks, strict=True):
        lines.append(render(link, kind, index, offset))
        offset += len(idioms()[link.idiom].inputs)
    return "\n".join([*lines, "return x"])


def args(chain: Sequence[Link]) -> tuple[str, ...]:
    """Argument names of `forward`: the state, then the inputs of every link in order."""
    return ("x", *INPUT_NAMES[: sum(len(idioms()[link.idiom].inputs) for link in chain)])


def fits(chain: Sequence[Link], shape: tuple[int, int] = (512, 1024)) -> bool:
    """Whether the links can follow each other, starting from a state of `shape` (N, D)."""
    current: tuple[int, ...] = shape
    for place, link in enumerate(chain):
        if len(current) != 2 or not allowed(link, place, len(chain), current[1]):
            return False
        current = out_shape(link, current[0], current[1])
    return len({link.idiom for link in chain}) == len(chain) and 0 not in current


@functools.cache
def allowed(link: Link, place: int, length: int, columns: int) -> bool:
    """Whether one link may stand at `place` of a chain when the state has `columns` columns."""
    idiom = idioms()[link.idiom]
    if (idiom.place == "first" and place) or (idiom.place == "alone" and length > 1):
        return False
    if not idiom.divides:
        return True
    step = int(str(idiom.variants[link.variant][idiom.divides]))
    return columns >= 2 * step and columns % step == 0


@functools.cache
def out_shape(link: Link, rows: int, columns: int) -> tuple[int, ...]:
    """The shape after a link for a state of [rows, columns], own dims at scale cpu."""
    idiom = idioms()[link.idiom]
    sizes = {name: values[0] for name, values in idiom.sizes.items()}
    names = {**names_of(link, 0), **sizes, "N": rows, "D": columns}
    return tuple(int(eval(Template(dim).substitute(names), {})) for dim in idiom.out)


def names_of(link: Link, offset: int) -> dict[str, object]:
    """What the placeholders of a link stand for: its constants, its inputs' letters."""
    idiom = idioms()[link.idiom]
    inputs = {INPUT_NAMES[i]: INPUT_NAMES[offset + i] for i in range(len(idiom.inputs))}
    constants = {
        name: Template(value).substitute(inputs) if isinstance(value, str) else value
        for name, value in idiom.variants[link.variant].items()
    }
    return {**constants, **inputs}
