"""The task bank: which chains are tasks, at which sizes, and the forms worth measuring.

The rows live in `tasklist`: static, so that an id means the same task for ever.
"""

from __future__ import annotations

import functools

from ttkit.errors import UsageError
from ttkit.minibench.grammar import Form, Link, body, idioms
from ttkit.minibench.taskfile import task_code
from ttkit.minibench.tasklist import LEVEL_1, LEVEL_2
from ttkit.tasks import SCALES, Task

LEVELS = {1: LEVEL_1, 2: LEVEL_2}


@functools.cache
def _tasks(level: int, scale: str) -> tuple[Task, ...]:
    if level not in LEVELS:
        raise UsageError(f"minibench has no level {level}: it has 1, 2")
    if scale not in SCALES:
        raise UsageError(f"unknown scale {scale!r}: it is one of {', '.join(SCALES)}")
    found = []
    for number, (text, rows, columns) in enumerate(LEVELS[level], start=1):
        chain = parse(text)
        shape = (rows, columns) if scale == "cpu" else gpu_shape(chain)
        code = task_code(chain, shape, scale)
        name = "_".join(link.idiom for link in chain)
        found.append(Task("minibench", level, number, name, code, scale))
    return tuple(found)


def tasks(level: int, scale: str = "cpu") -> list[Task]:
    """The 100 tasks of a level, by id.

    At scale `cpu` a reference takes 0.5 to 5 ms on one core; at scale `gpu` the state has tens to
    hundreds of MB. Raises UsageError for an unknown level or scale.
    """
    return list(_tasks(level, scale))


@functools.cache
def chain_of(level: int, id: int) -> tuple[Link, ...]:
    """The links of one task. Raises UsageError for an unknown level or id."""
    if level not in LEVELS or not 1 <= id <= len(LEVELS[level]):
        raise UsageError(f"there is no task {id} in minibench level {level}")
    return parse(LEVELS[level][id - 1][0])


def forms(level: int, id: int) -> list[Form]:
    """The bodies worth measuring for headroom, the reference first.

    Level 1: every form that is not wrong. Level 2: the best expert form of each link alone, and of
    all links together.
    """
    chain = chain_of(level, id)
    reference = [("reference", 0)] * len(chain)
    found = [Form("reference", "reference", body(chain))]
    if len(chain) == 1:
        idiom = idioms()[chain[0].idiom]
        for kind in ("common", "slow", "expert"):
            for i in range(len(idiom.forms(kind))):
                found.append(Form(f"{kind} {i + 1}", kind, body(chain, [(kind, i)])))
        return found
    has_expert = [i for i, link in enumerate(chain) if idioms()[link.idiom].expert]
    for i in has_expert:
        picks = reference[:i] + [("expert", 0)] + reference[i + 1 :]
        found.append(Form(f"expert {chain[i].idiom}", "expert", body(chain, picks)))
    if len(has_expert) > 1:
        picks = [("expert", 0) if i in has_expert else ("reference", 0) for i in range(len(chain))]
        found.append(Form("expert all", "expert", body(chain, picks)))
    return found


def parse(text: str) -> tuple[Link, ...]:
    """A row's chain: `softmax:0 linear:1` names idiom and variant of every link."""
    pairs = (part.split(":") for part in text.split())
    return tuple(Link(name, int(variant)) for name, variant in pairs)


def gpu_shape(chain: tuple[Link, ...]) -> tuple[int, int]:
    """N, D at scale gpu: the largest that every idiom of the chain bears."""
    shapes = [idioms()[link.idiom].gpu for link in chain]
    return min(rows for rows, _ in shapes), min(columns for _, columns in shapes)
