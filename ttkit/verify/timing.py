"""The sequential rule of protocol `rigorous`: when to stop adding pairs, and which interval holds.

The figure is the factor by which the reference is slower, as the ranks of the times of both have it
(`ttkit.verify.ranks.Leads`), and its interval that of the test of these ranks. Two equal programs
that run in random order may change places in every pair, so that the error rate of calling one of
them faster is exact, whatever the noise. What others on the machine do can only add to a time, and
the least times count most. (Measured with runs that were interrupted now and then: 85 % of the
intervals of 100 pairs told 1.1 from 1, and 35 % of those of Wilcoxon's test of the single ratios;
of 22 pairs on a quiet machine 88 % and 75 %. Near the normal distribution it tells a little less.)

At each of a fixed list of looks (numbers of pairs) the interval is computed at that look's share of
the error rate. The shares add up to `alpha` on each side (Bonferroni), so the interval at whichever
look the rule stops covers with at least 1 - 2 alpha, however the stopping was decided (repeated
confidence intervals; Jennison and Turnbull, Group Sequential Methods, chapter 9).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ttkit.verify import ranks
from ttkit.verify.protocol import Protocol
from ttkit.verify.ranks import Pairs

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


def interval(pairs: Pairs, alpha: float, protocol: Protocol) -> Interval:
    """The speedup that `pairs` show and its interval at one-sided error rate `alpha`.

    Programs that differ in more than a factor may lead by their least times and be behind by the
    ratios of most pairs. Where the intervals of both exclude each other, this one spans both.
    `protocol.process_spread` widens both ends by that share: two processes that run the same code
    differ by a constant factor (memory layout), which no number of pairs averages out.
    """
    middle, low, high = ranks.factor(pairs, protocol.block, alpha)
    _, least, most = ranks.centre([math.log(r / c) for r, c in pairs], alpha)
    if most < low or high < least:
        low, high = min(low, least), max(high, most)
    spread = 1 + protocol.process_spread
    return Interval(math.exp(middle), math.exp(low) / spread, math.exp(high) * spread, len(pairs))


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


def futile(pairs: Pairs, found: Interval, protocol: Protocol) -> bool:
    """Whether a candidate that the last look found neither faster nor slower (`found`) is at best
    `protocol.futile` times as fast: "the same", for all that matters.

    To give up on a candidate calls nothing faster, so that this may be asked after every pair, at
    the whole error rate (a boundary for futility that is not binding; Jennison and Turnbull,
    chapter 10). The interval stays that of the last look. Only where pairs agree: interruptions of
    whole pairs made programs 1.1 times as fast look slower for a dozen of them.
    """
    if found.lo > 1 or found.hi < 1 or not protocol.futile:
        return False
    most = math.log(protocol.futile / (1 + protocol.process_spread))
    # The one question first: an interval asks dozens.
    if ranks.Leads(pairs, protocol.block).chance(most, -1) > protocol.alpha:
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
