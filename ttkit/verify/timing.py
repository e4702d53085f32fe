"""The sequential rule of protocol `rigorous`: when to stop adding pairs, and which interval holds.

The figure is the Hodges-Lehmann estimate of the logarithms of the pair ratios reference/candidate,
and its interval that of Wilcoxon's signed-rank test (Lehmann, Nonparametrics, chapter 4). Two equal
programs that run in random order are exchangeable, so that the logarithm of their ratio is
symmetric around zero whatever the noise: the error rate of calling one of them faster is exact. For
noise near the normal distribution it needs two thirds of the pairs that the sign test needs.

Once there are enough of them, pairs are also taken `protocol.block` at a time, and the ratio is
that of the least times of each side: symmetric for the same reason, and most of what others on the
machine do, which can only add to a time, is gone with it. Each way has half of the error rate, and
both intervals hold. (Measured with two runs in three interrupted: of 60 pairs 27 % of the intervals
of single pairs told 1.1 from 1, of blocks 71 %, of both 60 %; near the normal distribution blocks
alone would need two thirds more pairs, both need hardly any.)

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

FIRST_LAUNCHES = 3


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


def least(pairs: Sequence[tuple[float, float]], block: int) -> list[tuple[float, float]]:
    """The least times of each side in every `block` pairs that follow each other."""
    parts = [pairs[i : i + block] for i in range(0, len(pairs), block)]
    return [(min(r for r, _ in part), min(c for _, c in part)) for part in parts]


def interval(pairs: Sequence[tuple[float, float]], alpha: float, protocol: Protocol) -> Interval:
    """The speedup that `pairs` show and its interval at one-sided error rate `alpha`.

    As soon as there are as many blocks as pairs at the first look, they are looked at as well.
    `protocol.process_spread` widens both ends by that share: two processes that run the same code
    differ by a constant factor (memory layout), which no number of pairs averages out.
    """
    ways = [pairs]
    if protocol.block > 1 and len(pairs) // protocol.block >= protocol.looks[0]:
        ways.append(least(pairs, protocol.block))
    found = [centre([math.log(r / c) for r, c in way], alpha / len(ways)) for way in ways]
    low, high = max(low for _, low, _ in found), min(high for *_, high in found)
    if low > high:  # of different programs the least times may differ by another factor
        low, high = min(low for _, low, _ in found), max(high for *_, high in found)
    middle = min(found, key=lambda bounds: bounds[2] - bounds[1])[0]
    spread = 1 + protocol.process_spread
    speedup = math.exp(min(max(middle, low), high))
    return Interval(speedup, math.exp(low) / spread, math.exp(high) * spread, len(pairs))


def launch_interval(speedups: Sequence[float], protocol: Protocol) -> Interval | None:
    """The speedup that the launches of a candidate show, one figure each, and its interval; None
    where so many launches have none. `n` counts launches.

    What a process of its own adds to a launch, a factor that lasts as long as it lives, varies
    between them like any other noise. Of all launches that there may be, the median lies below the
    least, or above the largest, with a chance of 1 in 2 ** n (the sign test's interval, whatever
    the noise). What that leaves of `alpha` is spent on Student's t of the logarithms of the first
    three, which ends the matter where launches agree.
    """
    n, most = len(speedups), protocol.relaunches + 1
    if n == most:
        return Interval(statistics.median(speedups), min(speedups), max(speedups), n)
    left = protocol.alpha - 0.5**most
    if n != FIRST_LAUNCHES or left <= 0:
        return None
    logs = [math.log(s) for s in speedups]
    p = 1 - left
    t = (2 * p - 1) / math.sqrt(2 * p * (1 - p))  # with two degrees of freedom
    middle, half = statistics.fmean(logs), t * statistics.stdev(logs) / math.sqrt(n)
    return Interval(math.exp(middle), math.exp(middle - half), math.exp(middle + half), n)


def settled(found: Interval, protocol: Protocol) -> bool:
    """Whether the interval lies on one side of 1 and is narrow enough to be a figure, or so narrow
    that no more is to be learnt."""
    enough = protocol.settled_width if found.lo > 1 or found.hi < 1 else protocol.precise
    return found.hi <= enough * found.lo


def futile(pairs: Sequence[tuple[float, float]], found: Interval, protocol: Protocol) -> bool:
    """Whether a candidate that the last look found neither faster nor slower (`found`) is at best
    `protocol.futile` times as fast: "the same", for all that matters.

    To give up on a candidate calls nothing faster, so that this may be asked after every pair, at
    the whole error rate (a boundary for futility that is not binding; Jennison and Turnbull,
    chapter 10). The interval stays that of the last look. Only where pairs agree: interruptions of
    whole pairs made programs 1.1 times as fast look slower for a dozen of them.
    """
    if found.lo > 1 or found.hi < 1:
        return False
    now = interval(pairs, protocol.alpha, protocol)
    return now.hi < protocol.futile and now.hi <= protocol.futile_width * now.lo


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
    found = Interval(math.nan, math.nan, math.nan, 0)
    for look, share in zip(protocol.looks, shares, strict=True):
        while len(pairs) < look:
            if found.n and futile(pairs, found, protocol):
                return found, pairs
            if found.n and clock() - start > protocol.seconds:
                break
            pairs.append(trial())
        if len(pairs) > found.n:
            found = interval(pairs, share, protocol)
        if len(pairs) < look or settled(found, protocol):
            break
    return found, pairs
