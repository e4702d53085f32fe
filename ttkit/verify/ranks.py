"""Rank tests of timings, turned into intervals; exact for any noise, at any number of values.

`centre` is about one list of differences: the Hodges-Lehmann estimate and the interval of
Wilcoxon's signed-rank test (Lehmann, Nonparametrics, chapter 4). `factor` is about pairs of times:
by which factor one side of them is the slower one.
"""

from __future__ import annotations

import bisect
import functools
import math
import statistics
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

# Scores are whole numbers, so that their sums can be counted: so many for the score 1.
SCALE = 5

Pairs = Sequence[tuple[float, float]]


@functools.cache
def _rank_sums(n: int) -> list[int]:
    """How many subsets of the ranks 1..n have the sum 0, 1 and so on."""
    if n == 0:
        return [1]
    fewer, none = _rank_sums(n - 1), [0] * n
    # Whole numbers, so nothing is rounded.
    return [without + with_n for without, with_n in zip(fewer + none, none + fewer, strict=True)]


@functools.cache
def signed_rank_quantile(n: int, alpha: float) -> int:
    """The largest k with P(W < k) <= alpha for the signed-rank statistic W of n values, or 0.

    The k-th smallest of their n (n + 1) / 2 Walsh averages is then a lower confidence bound for
    the centre of symmetry.
    """
    ways = _rank_sums(n)
    total = 0
    for k, count in enumerate(ways):
        total += count
        if total > alpha * 2**n:
            return k
    return len(ways)


def centre(values: Sequence[float], alpha: float) -> tuple[float, float, float]:
    """Estimate, lower and upper bound of the values' centre, each bound with error rate `alpha`.

    The bounds are infinite where so few values can bound nothing at that rate.
    """
    averages = sorted((a + b) / 2 for i, a in enumerate(values) for b in values[i:])
    if not averages:
        return math.nan, -math.inf, math.inf
    middle = statistics.median(averages)
    k = signed_rank_quantile(len(values), alpha)
    if k == 0:
        return middle, -math.inf, math.inf
    return middle, averages[k - 1], averages[-k]


@functools.cache
def _harmonic(n: int) -> NDArray[np.int64]:
    """SCALE (1 + 1/2 + ... + 1/i) for i from 0 to n, rounded."""
    steps = np.concatenate([[0.0], 1 / np.arange(1, n + 1)])
    return np.rint(SCALE * np.cumsum(steps)).astype(np.int64)


class Leads:
    """Who leads in each of the `pairs` of times, and by how much, once the second of each is made
    longer by a factor.

    Times are ranked in blocks of about `block` pairs that follow each other and scored as in
    Savage's test (Hajek and Sidak, Theory of Rank Tests, III.1): from the i-th least to the next
    the score falls by 1/i. What others on a machine do can only add to a time, so that the least
    times say most of two programs; and in a block there are more of them than in a pair. Two equal
    programs that run in random order may change places in every pair, whatever the noise, common to
    a pair or not. So all signs of the leads are equally likely, which makes the test exact
    (a permutation test), and says of every factor whether it can be that of the two.
    """

    def __init__(self, pairs: Pairs, block: int):
        logs = np.log(np.asarray(pairs, dtype=float).reshape(-1, 2))
        parts = np.array_split(logs, max(1, round(len(logs) / block)))
        # One row a block; nan, which is neither less nor more than anything, fills the shorter.
        self.logs = np.full((len(parts), max(map(len, parts)), 2), np.nan)
        for row, part in zip(self.logs, parts, strict=True):
            row[: len(part)] = part

    def at(self, log_factor: float) -> NDArray[np.int64]:
        """The lead of the second of each pair if its times are longer by that factor."""
        block = self.logs.shape[1]
        times = np.concatenate([self.logs[..., 0], self.logs[..., 1] + log_factor], axis=1)
        others, own = times[:, None, :], times[:, :, None]
        # The ranks of equal times are the first and the last of theirs, with the sum of two scores.
        falls = _harmonic(2 * block)
        fallen = falls[(others < own).sum(axis=2)] + falls[(others <= own).sum(axis=2) - 1]
        leads: NDArray[np.int64] = fallen[:, :block] - fallen[:, block:]
        return leads.ravel()

    def turns(self) -> NDArray[np.float64]:
        """The logarithms of the factors at which two times change places: between two that follow
        each other all leads stay as they are."""
        steps = self.logs[:, :, None, 0] - self.logs[:, None, :, 1]
        return np.unique(steps[~np.isnan(steps)])

    def chance(self, log_factor: float, sign: int = 1) -> float:
        """The chance that the second would lead (with `sign` -1: be led) as clearly as it does."""
        leads = [sign * lead for lead in self.at(log_factor).tolist() if lead]
        # In one whole number, in places of so many bits: how many sets of leads have each sum.
        bits = len(leads) + 2
        ways = 1
        for lead in leads:
            ways += ways << abs(lead) * bits
        clearly = ways >> sum(lead for lead in leads if lead > 0) * bits
        # The remainder by a number one short of a place is the sum of all places.
        return int(clearly % ((1 << bits) - 1)) / 2 ** len(leads)


def factor(pairs: Pairs, block: int, alpha: float) -> tuple[float, float, float]:
    """By which factor the first of each pair is slower: the logarithms of the estimate and of the
    bounds, each with error rate `alpha`; infinite where so few pairs can bound nothing."""
    if not pairs:
        return math.nan, -math.inf, math.inf
    leads = Leads(pairs, block)
    turns = leads.turns().tolist()
    # As the factor grows, the second leads ever less.
    low = _turning(lambda f: leads.chance(f) <= alpha, turns)
    high = _turning(lambda f: leads.chance(f, -1) > alpha, turns)
    middle = (
        _turning(lambda f: int(leads.at(f).sum()) > 0, turns)
        + _turning(lambda f: int(leads.at(f).sum()) >= 0, turns)
    ) / 2
    return middle, low, high


def _turning(holds: Callable[[float], bool], turns: Sequence[float]) -> float:
    """At which of the ascending `turns` what holds for less ceases to hold, or infinite; it holds
    for all between two of them or for none.

    Asked first at 0, so that on which side of it the answer lies is as exact as what is asked, even
    were that to turn more than once.
    """
    if not holds(turns[0] - 1):
        return -math.inf
    if holds(turns[-1] + 1):
        return math.inf
    # It holds just before turn number `low`, and not just before `high` (nor after the last).
    low, high = 0, len(turns)
    if turns[0] < 0 < turns[-1]:
        if holds(0.0):
            low = bisect.bisect_left(turns, 0.0)
        else:
            high = bisect.bisect_right(turns, 0.0)
    while high - low > 1:
        at = (low + high) // 2
        if holds((turns[at - 1] + turns[at]) / 2):
            low = at
        else:
            high = at
    return turns[high - 1]
