"""The sequential rule of protocol `rigorous`: when to stop adding pairs, and which interval holds.

The figure is the median of the pair ratios reference/candidate. At each of a fixed list of looks
(numbers of pairs) the interval from order statistics is computed at that look's share of the error
rate: distribution-free, since the number of ratios above the median is binomial whatever their
distribution. The shares add up to `alpha` on each side (Bonferroni), so the interval at whichever
look the rule stops covers with at least 1 - 2 alpha, however the stopping was decided (repeated
confidence intervals; Jennison and Turnbull, Group Sequential Methods, chapter 9).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ttkit.verify.protocol import Protocol


@dataclass(frozen=True)
class Interval:
    """A speedup with the ends of its interval; `n` pairs went into it."""

    speedup: float
    lo: float
    hi: float
    n: int


def spend(looks: Sequence[int], alpha: float) -> list[float]:
    """The one-sided error rate given to each look; they add up to `alpha`."""
    return [alpha / len(looks)] * len(looks)


def order_statistic(n: int, alpha: float) -> int:
    """The largest k with P(Binomial(n, 1/2) < k) <= alpha, or 0.

    The k-th smallest of n values is then a lower confidence bound for the median.
    """
    total, k = 0.0, 0
    while True:
        total += math.comb(n, k) / 2.0**n
        if total > alpha:
            return k
        k += 1


def interval(ratios: Sequence[float], alpha: float, spread: float = 0.0) -> Interval:
    """Median of `ratios` and its interval at one-sided error rate `alpha`.

    `spread` widens both ends by that share: two processes that run the same code differ by a
    constant factor (memory layout), which no number of pairs averages out.
    """
    n = len(ratios)
    ordered = sorted(ratios)
    k = order_statistic(n, alpha)
    if k == 0:
        median = statistics.median(ordered) if ordered else math.nan
        return Interval(median, -math.inf, math.inf, n)
    lo, hi = ordered[k - 1] / (1 + spread), ordered[n - k] * (1 + spread)
    return Interval(statistics.median(ordered), lo, hi, n)


def settled(found: Interval, protocol: Protocol) -> bool:
    """Whether more pairs would change nothing that matters.

    Either the interval lies on one side of 1 and is narrow enough to be a figure, or it shows that
    the candidate is at best `protocol.futile` times as fast: "the same", for all that matters.
    """
    if found.lo > 1 or found.hi < 1:
        return found.lo > 0 and found.hi / found.lo <= protocol.settled_width
    return found.hi < protocol.futile


def measure(
    trial: Callable[[], tuple[float, float]], protocol: Protocol, clock: Callable[[], float]
) -> tuple[Interval, list[tuple[float, float]]]:
    """Call `trial` (reference seconds, candidate seconds) until the rule stops.

    The rule may stop at any look; it must stop when the budget `protocol.seconds` by `clock` is
    spent, and then uses the pairs of the last complete look. The first look is always reached.
    """
    shares = spend(protocol.looks, protocol.alpha)
    start = clock()
    pairs: list[tuple[float, float]] = []
    found = Interval(math.nan, math.nan, math.nan, 0)
    for look, share in zip(protocol.looks, shares, strict=True):
        while len(pairs) < look:
            if found.n and clock() - start > protocol.seconds:
                return found, pairs
            pairs.append(trial())
        found = interval([r / c for r, c in pairs], share, protocol.process_spread)
        if settled(found, protocol):
            break
    return found, pairs
