"""The training corpus of the scratch policy: reference bodies and rewritings of them.

A chain is drawn at random, then one form for every link. How often an expert form is drawn is the
dial `expert_share`: the corpus says what is frequent, not what is good.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

from ttkit.errors import UsageError
from ttkit.minibench.bank import chain_of
from ttkit.minibench.grammar import Link, args, body, fits, idioms, render
from ttkit.prompts import compact_text

# By number of links. Long chains teach where in the prompt the answer has got to; with many short
# ones instead, a small model ends early or repeats a link.
LENGTHS = {1: 0.10, 2: 0.45, 3: 0.45}
SLOW_SHARE = 0.06
WRONG_SHARE = 0.08
REFERENCE_SHARE = 0.5  # of what is neither expert nor slow nor wrong; common forms share the rest

Chain = tuple[Link, ...]


@dataclass(frozen=True)
class Example:
    """One training pair. `kinds` names the kind of form drawn for every link of `chain`."""

    prompt: str
    completion: str
    chain: Chain
    kinds: tuple[str, ...]


def corpus(
    n: int,
    *,
    expert_share: float = 0.05,
    exclude: Collection[Chain] = (),
    seed: int = 0,
    max_links: int = 3,
    only: Collection[str] | None = None,
) -> Iterator[Example]:
    """Draw `n` examples of chains of 1 to `max_links` links, of the idioms in `only` (default all).

    `expert_share` is the chance that a link which has expert forms shows one of them. No chain
    contains an excluded chain as a contiguous part (see `contains_excluded`). Deterministic for
    the arguments. Raises UsageError when a share is not in [0, 1], for a length that no task has,
    or when nothing is left to draw.
    """
    if max_links not in LENGTHS:
        raise UsageError(f"max_links is 1 to {max(LENGTHS)}: got {max_links}")
    if not 0 <= expert_share <= 1:
        raise UsageError(f"expert_share is a probability, from 0 to 1: got {expert_share}")
    singles, tuples = _excluded(exclude)
    rng = random.Random(seed)
    links = [
        link
        for name, idiom in idioms().items()
        if only is None or name in only
        for variant in range(len(idiom.variants))
        if _known(link := Link(name, variant)) not in singles
    ]
    if not any(idioms()[link.idiom].place == "any" for link in links):
        raise UsageError("the excluded chains leave no idiom for the corpus")
    for _ in range(n):
        chain = _draw_chain(rng, links, tuples, max_links)
        picks = [_draw_form(rng, link, expert_share) for link in chain]
        yield Example(
            prompt=compact_text(args(chain), body(chain)),
            completion=body(chain, picks),
            chain=chain,
            kinds=tuple(kind for kind, _ in picks),
        )


def evaluation_chains(level: int, ids: Iterable[int]) -> set[Chain]:
    """The chains of some tasks, to be excluded from the corpus."""
    return {chain_of(level, number) for number in ids}


def idioms_of(level: int, ids: Iterable[int]) -> set[str]:
    """The names of the idioms that some tasks are made of: what their corpus has to show."""
    return {link.idiom for number in ids for link in chain_of(level, number)}


def contains_excluded(chain: Chain, exclude: Collection[Chain]) -> bool:
    """Whether a contiguous part of `chain` is an excluded chain.

    A chain of two or more links is known by its idioms, whatever the variants (the stricter
    reading); a single link by idiom and variant, since its idiom must be learnt from somewhere.
    Idioms that read the same, and differ in the shapes of their inputs only, count as one.
    """
    singles, tuples = _excluded(exclude)
    return any(_known(link) in singles for link in chain) or _contains(chain, tuples)


def _excluded(exclude: Collection[Chain]) -> tuple[set[Link], set[tuple[str, ...]]]:
    singles = {_known(chain[0]) for chain in exclude if len(chain) == 1}
    tuples = {tuple(_known(link).idiom for link in chain) for chain in exclude if len(chain) > 1}
    return singles, tuples


def _known(link: Link) -> Link:
    """The first link whose reference reads like this one's: a prompt cannot tell them apart."""
    return _first_readings()[render(link, "reference", 0, 0)]


@functools.cache
def _first_readings() -> dict[str, Link]:
    first: dict[str, Link] = {}
    for name, idiom in idioms().items():
        for variant in range(len(idiom.variants)):
            link = Link(name, variant)
            first.setdefault(render(link, "reference", 0, 0), link)
    return first


def _contains(chain: Sequence[Link], tuples: set[tuple[str, ...]]) -> bool:
    names = tuple(_known(link).idiom for link in chain)
    return any(
        names[i:j] in tuples for i in range(len(names)) for j in range(i + 2, len(names) + 1)
    )


def _draw_chain(
    rng: random.Random, links: list[Link], tuples: set[tuple[str, ...]], max_links: int
) -> Chain:
    length = rng.choices(list(LENGTHS)[:max_links], list(LENGTHS.values())[:max_links])[0]
    while True:
        chain = tuple(rng.choices(links, k=length))
        if fits(chain) and not _contains(chain, tuples):
            return chain


def _draw_form(rng: random.Random, link: Link, expert_share: float) -> tuple[str, int]:
    idiom = idioms()[link.idiom]
    kind = "reference"
    if idiom.expert and rng.random() < expert_share:
        kind = "expert"
    else:
        roll = rng.random()
        if roll < WRONG_SHARE:
            kind = "wrong"
        elif roll < WRONG_SHARE + SLOW_SHARE and idiom.slow:
            kind = "slow"
        elif rng.random() >= REFERENCE_SHARE and idiom.common:
            kind = "common"
    return kind, rng.randrange(len(idiom.forms(kind)))
