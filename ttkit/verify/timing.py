"""The sequential rule of protocol `rigorous`: when to stop adding pairs, and which interval holds.

The figure is the Hodges-Lehmann estimate of the logarithms of the pair ratios reference/candidate,
and its interval that of Wilcoxon's signed-rank test (Lehmann, Nonparametrics, chapter 4). Two equal
programs that run in random order are exchangeable, so that the logarithm of their ratio is
symmetric around zero whatever the noise: the error rate of calling one of them faster is exact. For
noise near the normal distribution it needs two thirds of the pairs that the sign test needs.

At each of a fixed list of looks (numbers of pairs) the interval is computed at that look's share of
the error rate. The shares add up to `alpha` on each side (Bonferroni), so the interval at whichever
look the rule stops covers with at least 1 - 2 alpha, however the stopping was decided (repeated
confidence intervals; Jennison and Turnbull, Group Sequential Methods, chapter 9).
"""

from __future__ import annotations

import functools
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


@functools.cache
def _rank_sums(n: int) -> list[int]:
    """How many subsets of the ranks 1..n have the sum 0, 1 and so on; made of those of one rank
    less, since a rule that looks after every pair asks for each n in turn."""
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


def interval(ratios: Sequence[float], alpha: float, spread: float = 0.0) -> Interval:
    """The speedup that `ratios` show and its interval at one-sided error rate `alpha`.

    `spread` widens both ends by that share: two processes that run the same code differ by a
    constant factor (memory layout), which no number of pairs averages out.
    """
    middle, low, high = centre([math.log(r) for r in ratios], alpha)
    lo, hi = math.exp(low) / (1 + spread), math.exp(high) * (1 + spread)
    return Interval(math.exp(middle), lo, hi, len(ratios))


def launch_interval(speedups: Sequence[float], alpha: float) -> Interval:
    """The speedup that the launches of a candidate show, one figure each, and its interval.

    Student's t of their logarithms: what a process of its own adds to a launch, a factor that lasts
    as long as it lives, varies between them like any other noise. `n` counts launches. Raises
    ValueError for fewer than two.
    """
    from scipy.special import stdtrit  # takes longer to import than most verdicts need

    if len(speedups) < 2:
        raise ValueError("one launch says nothing of how far launches differ")
    logs = [math.log(s) for s in speedups]
    middle, n = statistics.fmean(logs), len(logs)
    half = float(stdtrit(n - 1, 1 - alpha)) * statistics.stdev(logs) / math.sqrt(n)
    return Interval(math.exp(middle), math.exp(middle - half), math.exp(middle + half), n)


def settled(found: Interval, protocol: Protocol) -> bool:
    """Whether the interval lies on one side of 1 and is narrow enough to be a figure."""
    return (found.lo > 1 or found.hi < 1) and found.hi <= protocol.settled_width * found.lo


def futile(ratios: Sequence[float], found: Interval, protocol: Protocol) -> bool:
    """Whether a candidate that the last look found neither faster nor slower (`found`) is at best
    `protocol.futile` times as fast: "the same", for all that matters.

    To give up on a candidate calls nothing faster, so that this may be asked after every pair, at
    the whole error rate (a boundary for futility that is not binding; Jennison and Turnbull,
    chapter 10). The interval stays that of the last look.
    """
    if found.lo > 1 or found.hi < 1:
        return False
    return interval(ratios, protocol.alpha, protocol.process_spread).hi < protocol.futile


def measure(
    trial: Callable[[], tuple[float, float]], protocol: Protocol, clock: Callable[[], float]
) -> tuple[Interval, list[tuple[float, float]]]:
    """Call `trial` (reference seconds, candidate seconds) until the rule stops.

    The rule may stop at any look, and after any pair once it is futile to go on; it must stop when
    the budget `protocol.seconds` by `clock` is spent. The next look then comes early: how long
    pairs take together does not depend on which of the two is called the reference. The first look
    is always reached.
    """
    shares = spend(protocol.looks, protocol.alpha)
    start = clock()
    pairs: list[tuple[float, float]] = []
    ratios: list[float] = []
    found = Interval(math.nan, math.nan, math.nan, 0)
    for look, share in zip(protocol.looks, shares, strict=True):
        while len(pairs) < look:
            if found.n and futile(ratios, found, protocol):
                return found, pairs
            if found.n and clock() - start > protocol.seconds:
                break
            pairs.append(trial())
            ratios.append(pairs[-1][0] / pairs[-1][1])
        if len(pairs) > found.n:
            found = interval(ratios, share, protocol.process_spread)
        if len(pairs) < look or settled(found, protocol):
            break
    return found, pairs
