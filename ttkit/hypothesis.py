"""Effect sizes, tests, their power, and correlations.

Never a p-value without its n and what one unit is: here one pair is one task. Tests are two-sided
unless a name says otherwise.
"""

from __future__ import annotations

from bisect import bisect_left

import numpy as np
from scipy import stats

from ttkit.errors import UsageError
from ttkit.resample import NOISE, Result, Values, bootstrap_mean


def cohens_h(p1: float, p2: float, n1: int | None = None, n2: int | None = None) -> Result:
    """Cohen's h = 2 asin(sqrt p1) - 2 asin(sqrt p2), with its interval when n1, n2 are given.

    The arcsine transform's variance is 1/n for independent binomial shares (Cohen 1988, chapter
    6). 0.2 is small, 0.5 medium, 0.8 large. Raises UsageError for a share outside 0..1.
    """
    for p in (p1, p2):
        if not 0 <= p <= 1:
            raise UsageError(f"Cohen's h compares shares between 0 and 1, got {p}")
    h = float(2 * np.arcsin(np.sqrt(p1)) - 2 * np.arcsin(np.sqrt(p2)))
    half = stats.norm.ppf(0.975) * np.sqrt(1 / n1 + 1 / n2) if n1 and n2 else np.nan
    return {"h": h, "lo": float(h - half), "hi": float(h + half)}


def sign_test(wins: int, losses: int) -> Result:
    """Exact sign test of `wins` against `losses`, ties left out: n, p_one_sided, p_two_sided."""
    if wins + losses == 0:
        return {"n": 0, "p_one_sided": 1.0, "p_two_sided": 1.0}
    one, two = (
        float(stats.binomtest(wins, wins + losses, alternative=side).pvalue)
        for side in ("greater", "two-sided")
    )
    return {"n": wins + losses, "p_one_sided": one, "p_two_sided": two}


def chance_test(hits: Values, chances: Values) -> Result:
    """Exact test of whether picks hit more often than chance: one pick and one chance a task.

    By chance each task's pick hits with its own probability, independently of the others, so the
    number of hits is Poisson binomial. p_one_sided: of as many hits or more; p_two_sided: of a
    number at least as far from the mean. A hit may be a share (ties resolved by expectation), which
    makes the test conservative. n counts the tasks where chance decides. Raises UsageError for
    unequal lengths or a probability outside 0..1.
    """
    found, given = np.asarray(hits, dtype=float), np.asarray(chances, dtype=float)
    if found.shape != given.shape:
        raise UsageError(f"one chance a pick: got {len(found)} picks and {len(given)} chances")
    if not (
        (found >= -NOISE) & (found <= 1 + NOISE) & (given >= -NOISE) & (given <= 1 + NOISE)
    ).all():
        raise UsageError("hits and chances are shares between 0 and 1")
    pmf = np.ones(1)
    for chance in np.clip(given, 0, 1):
        pmf = np.convolve(pmf, [1 - chance, chance])
    count, total, mean = np.arange(len(pmf)), found.sum(), given.sum()
    more = pmf[count >= total - NOISE].sum()
    far = pmf[np.abs(count - mean) >= abs(total - mean) - NOISE].sum()
    undecided = int(((given > NOISE) & (given < 1 - NOISE)).sum())
    return {"n": undecided, "p_one_sided": min(1.0, more), "p_two_sided": min(1.0, far)}


def sign_test_power(n: int, p_win: float, p_loss: float, alpha: float = 0.05) -> float:
    """Probability that the two-sided sign test on n tasks comes out below `alpha`, exactly.

    Each task is a win, a loss or a tie with the given probabilities, independently of the others.
    """
    if n < 1 or min(p_win, p_loss) < 0 or not 0 < p_win + p_loss <= 1:
        raise UsageError(f"no such sign test: n={n}, p_win={p_win}, p_loss={p_loss}")
    moved, untied = np.arange(1, n + 1), p_win + p_loss
    edge = stats.binom.ppf(alpha / 2, moved, 0.5)
    edge -= stats.binom.cdf(edge, moved, 0.5) > alpha / 2  # the largest count that is rejected
    share = p_win / untied
    rejected = stats.binom.cdf(edge, moved, share) + stats.binom.sf(moved - edge - 1, moved, share)
    return float(stats.binom.pmf(moved, n, untied) @ rejected)


def tasks_needed(p_win: float, p_loss: float, power: float = 0.8, alpha: float = 0.05) -> float:
    """The fewest tasks with which the two-sided sign test has `power`; inf above 1000.

    Power rises with n in small saw teeth: the next few n may fall just below it again.
    """
    sizes = range(1, 1001 if p_win != p_loss else 1)  # equal chances are never settled
    at = bisect_left(sizes, power, key=lambda n: sign_test_power(n, p_win, p_loss, alpha))
    return sizes[at] if at < len(sizes) else np.inf


def mean_test_power(n: int, effect: float, alpha: float = 0.05) -> float:
    """Power of the two-sided paired t test on n tasks, exactly (noncentral t).

    `effect` is Cohen's d of the differences: their mean over their standard deviation.
    """
    if n < 2 or not np.isfinite(effect):
        raise UsageError(f"no such t test: n={n}, effect={effect}")
    edge, shift = stats.t.isf(alpha / 2, n - 1), abs(effect) * np.sqrt(n)
    tails = stats.nct.sf(edge, n - 1, shift), stats.nct.cdf(-edge, n - 1, shift)
    # scipy returns nan for a tail that is nothing or all
    return float(min(1.0, np.nan_to_num(tails[0], nan=1.0) + np.nan_to_num(tails[1])))


def tasks_needed_mean(differences: Values, power: float = 0.8, alpha: float = 0.05) -> float:
    """The fewest tasks with which the paired t test has `power`, were these differences typical.

    One difference a task; inf above 1000 or for a mean of 0. The effect seen is taken for the true
    one, which favours effects that came out large: a lower bound, not a promise.
    """
    values = np.asarray(differences, dtype=float)
    if len(values) < 2 or abs(values.mean()) < NOISE:
        return np.inf
    if (spread := values.std(ddof=1)) < NOISE:
        return 2
    effect, sizes = values.mean() / spread, range(2, 1001)
    at = bisect_left(sizes, power, key=lambda n: mean_test_power(n, effect, alpha))
    return sizes[at] if at < len(sizes) else np.inf


def compare_paired(a: Values, b: Values, seed: int = 0) -> Result:
    """Paired speedups of two strategies, one pair a task, compared on the log ratio.

    Returns n, n_different, ratio (geometric mean of a / b) with lo, hi (tasks resampled), and p of
    the exact sign test, Wilcoxon's signed-rank test (zeros dropped) and the sign-flip test, two-
    sided unless the name says otherwise. Wilcoxon cannot go below `p_wilcoxon_floor`, 2 / 2**n.
    Raises UsageError for unequal lengths or a speedup that is not positive.
    """
    first, second = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if first.shape != second.shape:
        raise UsageError(f"a paired comparison needs pairs, got {len(first)} and {len(second)}")
    if (wrong := ~((first > 0) & (second > 0) & np.isfinite(first + second))).any():
        i = int(wrong.argmax())
        raise UsageError(f"pair {i} is {first[i]} and {second[i]}: speedups are positive numbers")
    logs = np.round(np.log(first / second), 9)  # a ratio and its inverse have to tie
    moved = logs[logs != 0]
    mean = bootstrap_mean(logs, seed=seed)
    sign = sign_test(int((moved > 0).sum()), int((moved < 0).sum()))
    return {
        "n": len(logs),
        "n_different": len(moved),
        "ratio": float(np.exp(mean["value"])),
        "lo": float(np.exp(mean["lo"])),
        "hi": float(np.exp(mean["hi"])),
        "p_sign": sign["p_two_sided"],
        "p_sign_one_sided": sign["p_one_sided"],
        "p_wilcoxon": float(stats.wilcoxon(moved).pvalue) if len(moved) else 1.0,
        "p_wilcoxon_floor": min(1.0, 2.0 ** (1 - len(moved))),
        "p_permutation": sign_flip_test(logs, seed),
    }


def sign_flip_test(differences: Values, seed: int = 0) -> float:
    """Two-sided permutation p of a zero mean of paired differences: each may change its sign.

    Exact up to 13 pairs, else from 9999 seeded draws.
    """
    values = np.asarray(differences, dtype=float)
    if len(values) < 2 or not (np.abs(values) > NOISE).any():
        return 1.0
    result = stats.permutation_test(
        (values,),
        lambda d, axis: d.mean(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=9999,
        rng=np.random.default_rng(seed),
    )
    return float(result.pvalue)


def correlation_p(rho: float, n: int, controls: int = 0) -> float:
    """Two-sided p of a correlation by Student's t, n - 2 - `controls` degrees of freedom."""
    free = n - 2 - controls
    if free < 1 or not np.isfinite(rho):
        return np.nan
    return float(2 * stats.t.sf(abs(rho) * np.sqrt(free / max(1 - rho**2, 1e-300)), free))


def spearman(x: Values, y: Values) -> Result:
    """Spearman's rho with its two-sided p and n; nan where one side does not vary.

    The p takes each pair as one unit, which samples of a task are not: see `clustered_bootstrap`.
    """
    a, b = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return {"rho": np.nan, "p": np.nan, "n": len(a)}
    rho = float(stats.spearmanr(a, b).statistic)
    return {"rho": rho, "p": correlation_p(rho, len(a)), "n": len(a)}


def partial_spearman(x: Values, y: Values, control: Values) -> Result:
    """Spearman's rho of x and y with `control` held fixed: the partial correlation of the ranks.

    nan where `control` decides the ranks of x or y; a control that does not vary controls nothing.
    """
    if np.ptp(np.asarray(control, dtype=float)) == 0:
        return spearman(x, y)
    xy, xz, yz = (spearman(*pair)["rho"] for pair in ((x, y), (x, control), (y, control)))
    left = np.array([1 - xz**2, 1 - yz**2])  # of rank variance; rounding leaves some 1e-16
    rho = float((xy - xz * yz) / np.sqrt(left.prod())) if (left > 1e-14).all() else np.nan
    return {"rho": rho, "p": correlation_p(rho, len(x), 1), "n": len(x)}
