"""Estimators and tests on the samples table: pure functions of columns.

Two success rates that must never be mixed have separate functions here. `sample_rates` is about
*samples*: the share that is correct, or fast; it does not depend on the budget. `scaling_curve`
is about *tasks*: the share for which at least one of k samples is fast; it grows with k. A method
measured by one cannot be set beside a method measured by the other.

*Fast* has two rules everywhere: `interval` (the lower end of the speedup's interval exceeds p; the
default) and `point` (the estimate exceeds p; the paper's fast_p).

One unit is one task unless a function says otherwise: samples of one task are not independent.
Every interval is a 95 % interval of a seeded bootstrap that resamples tasks.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import pandas as pd
from scipy import special, stats

from ttkit.errors import UsageError

Result = dict[str, float]
Values: TypeAlias = Sequence[float] | np.ndarray | pd.Series
RULES = {"interval": "speedup_lo", "point": "speedup"}
NOISE = 1e-9  # differences of expectations below this are rounding, not effects


def check(samples: pd.DataFrame, numbers: Sequence[str] = (), others: Sequence[str] = ()) -> None:
    """Refuse a samples table that would give a wrong number, naming the first row at fault.

    Needs task, correct, speedup, speedup_lo (without intervals: a copy of speedup) and the named
    columns; a correct sample needs speedups, every sample finite `numbers`. Raises UsageError.
    """
    numbers = ["speedup", "speedup_lo", *numbers]
    missing = [c for c in ["task", "correct", *numbers, *others] if c not in samples.columns]
    if missing:
        raise UsageError(f"the samples table lacks the columns {', '.join(missing)}")
    if samples.empty:
        raise UsageError("the samples table has no rows")

    def refuse(bad: pd.Series, name: str, wanted: str) -> None:
        if bad.any():
            row = samples[bad].iloc[0]
            where = f"row {samples.index[bad][0]} (task {row['task']}, index {row.get('index')})"
            value = samples.loc[bad, name].tolist()[0]  # not numpy's: it prints its type
            said = f"has {name} = {value!r}, not {wanted}"
            raise UsageError(f"{where} {said}; {int(bad.sum())} of {len(samples)} rows are like it")

    refuse(samples["task"].isna(), "task", "a name")
    refuse(~samples["correct"].isin([True, False]), "correct", "true or false")
    right = samples["correct"].astype(bool)
    for name in numbers:
        if not pd.api.types.is_numeric_dtype(samples[name]):
            number = samples[name].map(lambda v: isinstance(v, int | float | np.number))
            refuse(~number, name, "a number")
        needed = right if name.startswith("speedup") else True
        refuse(~np.isfinite(samples[name].astype(float)) & needed, name, "a finite number")
    refuse(right & (samples["speedup"] <= 0), "speedup", "positive for a correct sample")


def fast(samples: pd.DataFrame, rule: str = "interval", p: float = 1.0) -> pd.Series:
    """For each sample, whether it is correct and faster than `p` times the reference."""
    if rule not in RULES:
        raise UsageError(f"unknown rule {rule!r}: it is one of {', '.join(RULES)}")
    return samples["correct"].astype(bool) & (samples[RULES[rule]] > p)


def pass_at_k(n: int, c: int, k: Values) -> np.ndarray:
    """Probability that k of n samples, drawn without replacement, hold one of the c good ones.

    Unbiased (Chen et al. 2021, arXiv 2107.03374, equation 1). Raises UsageError unless
    0 <= c <= n and 1 <= k <= n.
    """
    k = np.atleast_1d(k)
    if not 0 <= c <= n or (k < 1).any() or (k > n).any():
        raise UsageError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, got n={n}, c={c}, k={k}")
    return np.where(n - c < k, 1.0, 1.0 - np.exp(_log_choose(n - c, k) - _log_choose(n, k)))


def best_of_k_weights(n: int, k: Values) -> np.ndarray:
    """Of n values in ascending order, the probability that each is the largest of k drawn.

    Shape [len(k), n]: C(i-1, k-1) / C(n, k) for the i-th. Raises UsageError for k outside 1..n.
    """
    k = np.atleast_1d(k)
    if n < 1 or (k < 1).any() or (k > n).any():
        raise UsageError(f"the best of k needs 1 <= k <= n, got n={n}, k={k}")
    rank = np.arange(1, n + 1)[None]
    logs = _log_choose(rank - 1, k[:, None] - 1) - _log_choose(n, k)[:, None]
    return np.where(rank < k[:, None], 0.0, np.exp(logs))


def expected_best_of_k(values: Values, k: Values) -> np.ndarray:
    """Expected maximum of k of the `values`, drawn without replacement, for each k.

    What an incorrect sample counts as is decided in `values`: see `worth`. Raises UsageError for a
    value that is not finite or a k outside 1..n.
    """
    ordered = np.sort(np.asarray(values, dtype=float))
    if not np.isfinite(ordered).all():
        raise UsageError("the expected best of k needs finite values")
    return best_of_k_weights(len(ordered), k) @ ordered


def worth(samples: pd.DataFrame, fallback: float = 1.0) -> np.ndarray:
    """The speedup that each sample is worth to who holds a program of speedup `fallback` already.

    Incorrect and slower samples count as `fallback`: 1 keeps the reference, 0 has nothing to keep.
    """
    right = samples["correct"].astype(bool)
    return samples["speedup"].where(right, fallback).clip(lower=fallback).to_numpy(dtype=float)


def _log_choose(n: int | np.ndarray, k: np.ndarray) -> np.ndarray:
    ok = np.maximum(n, k)  # where n < k the caller overrides the value
    return special.gammaln(ok + 1) - special.gammaln(k + 1) - special.gammaln(ok - k + 1)


def geometric_mean(values: Values) -> float:
    """exp of the mean logarithm; nan for no values."""
    values = np.asarray(values, dtype=float)
    return float(np.exp(np.log(values).mean())) if len(values) else float("nan")


def sample_rates(
    samples: pd.DataFrame,
    by: Sequence[str] = ("arm", "temperature"),
    bootstrap: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Of all samples, by group: the share correct and the share fast (sample fast_1).

    Columns: the group, tasks, samples, correct_rate, sample_fast_1 with sample_fast_1_lo and _hi
    (tasks, then samples resampled), sample_fast_1_point, speedup_gmean, speedup_median and
    speedup_mean (of the correct ones), distinct (median number of different bodies a task).
    """
    check(samples, others=[*by, "code_sha256"])
    rows = []
    for group, part in samples.groupby(list(by), sort=False, dropna=False):
        right = part[part["correct"].astype(bool)]["speedup"]
        hits = fast(part).groupby(part["task"]).agg(["sum", "size"]).to_numpy()
        rng = np.random.default_rng(seed)
        picked = hits[rng.integers(0, len(hits), (bootstrap, len(hits)))]
        drawn = rng.binomial(picked[..., 1], picked[..., 0] / picked[..., 1])
        lo, hi = np.quantile(drawn.sum(axis=1) / picked[..., 1].sum(axis=1), [0.025, 0.975])
        rows.append(
            {
                **dict(zip(by, group if isinstance(group, tuple) else (group,), strict=True)),
                "tasks": len(hits),
                "samples": len(part),
                "correct_rate": part["correct"].mean(),
                "sample_fast_1": fast(part).mean(),
                "sample_fast_1_lo": lo,
                "sample_fast_1_hi": hi,
                "sample_fast_1_point": fast(part, "point").mean(),
                "speedup_gmean": geometric_mean(right),
                "speedup_median": right.median(),
                "speedup_mean": right.mean(),
                "distinct": part.groupby("task")["code_sha256"].nunique().median(),
            }
        )
    return pd.DataFrame(rows)


METRICS = {
    "task_success": "share of tasks with a fast sample (interval rule)",
    "task_success_point": "share of tasks with a fast sample (point rule)",
    "task_correct": "share of tasks with a correct sample",
    "speedup_gmean": "expected best speedup, geometric mean over tasks",
    "speedup_median": "expected best speedup, median over tasks",
    "speedup_mean": "expected best speedup, arithmetic mean over tasks",
}


@dataclass(frozen=True)
class Curve:
    """A quantity against the budget k: `table` has k, value, lo, hi; `per_task` is [tasks, k].

    `values` holds what each sample of each task is worth under `metric`, in ascending order.
    """

    metric: str
    table: pd.DataFrame
    per_task: np.ndarray
    values: tuple[np.ndarray, ...]

    def draws(self, bootstrap: int = 1000, seed: int = 0, within: bool = False) -> np.ndarray:
        """Bootstrap curves [bootstrap, k] from resampled tasks.

        Tasks carry the spread of their samples with them. `within` also resamples the samples of
        each drawn task, which repeats some and lowers a maximum near K; coverage is no better.
        """
        picked = task_draws(len(self.values), bootstrap, seed)
        if not within:
            return _over_tasks(self.metric, self.per_task[picked])
        rng, ks = np.random.default_rng([seed, 1]), self.table["k"].to_numpy()
        curves = np.empty((*picked.shape, len(ks)))
        for task, values in enumerate(self.values):
            slots = picked == task
            drawn = rng.choice(values, (int(slots.sum()), len(values)))
            curves[slots] = np.sort(drawn, axis=1) @ best_of_k_weights(len(values), ks).T
        return _over_tasks(self.metric, curves)

    def saturation(
        self, share: float = 0.99, bootstrap: int = 1000, seed: int = 0, floor: float | None = None
    ) -> Result:
        """The smallest k at which the curve has `share` of its value at K, with its interval.

        Both are measured from `floor`, by default 0 for a rate and 1, the reference kept, for a
        speedup. Keys k, lo, hi, and undefined: the share of draws (left out of the interval)
        whose curve never leaves the floor; k is nan where the curve itself does not.
        """
        ks = self.table["k"].to_numpy()
        base = float(self.metric.startswith("speedup")) if floor is None else floor

        def smallest(curve: np.ndarray) -> float:
            gain = curve - base
            reached = gain >= share * gain[-1] - NOISE
            return float(ks[np.argmax(reached)]) if gain[-1] > NOISE else np.nan

        found = np.array([smallest(curve) for curve in self.draws(bootstrap, seed)])
        return {"k": smallest(self.table["value"].to_numpy()), **interval(found)}


def scaling_curve(
    samples: pd.DataFrame,
    metric: str = "task_success",
    bootstrap: int = 1000,
    seed: int = 0,
    fallback: float = 1.0,
) -> Curve:
    """Best-of-N (paper section 4.1): `metric` for every budget k = 1..K from one pass at K.

    K is the smallest number of samples that a task has. For speedups, an incorrect or slower
    sample counts as `fallback` (see `worth`). `speedup_gmean` averages logarithms, over draws and
    over tasks alike. Raises UsageError for an unknown metric or a table that `check` refuses.
    """
    if metric not in METRICS:
        raise UsageError(f"unknown metric {metric!r}: it is one of {', '.join(METRICS)}")
    if metric == "speedup_gmean" and fallback <= 0:
        raise UsageError("a geometric mean needs a fallback above 0")
    check(samples)
    parts = [part for _, part in samples.groupby("task")]
    values = tuple(np.sort(_values(part, metric, fallback)) for part in parts)
    ks = np.arange(1, min(map(len, values)) + 1)
    rows = np.array([expected_best_of_k(v, ks) for v in values])
    table = pd.DataFrame({"k": ks, "value": _over_tasks(metric, rows[None])[0]})
    draws = Curve(metric, table, rows, values).draws(bootstrap, seed)
    lo, hi = np.quantile(draws, [0.025, 0.975], axis=0)
    return Curve(metric, table.assign(lo=lo, hi=hi), rows, values)


def _values(part: pd.DataFrame, metric: str, fallback: float) -> np.ndarray:
    # pass@k is the expected maximum of zeros and ones, so that one estimator serves every metric.
    if metric == "task_correct":
        return part["correct"].to_numpy(dtype=float)
    if metric.startswith("task_success"):
        rule = "point" if metric.endswith("point") else "interval"
        return fast(part, rule).to_numpy(dtype=float)
    best = worth(part, fallback)
    return np.log(best) if metric == "speedup_gmean" else best


def _over_tasks(metric: str, curves: np.ndarray) -> np.ndarray:
    if metric == "speedup_median":
        return np.median(curves, axis=1)
    mean = curves.mean(axis=1)
    return np.exp(mean) if metric == "speedup_gmean" else mean


def task_draws(tasks: int, bootstrap: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, tasks, size=(bootstrap, tasks))


def interval(draws: np.ndarray) -> Result:
    known = draws[np.isfinite(draws)]
    lo, hi = np.quantile(known, [0.025, 0.975]) if len(known) else (np.nan, np.nan)
    return {"lo": float(lo), "hi": float(hi), "undefined": 1 - len(known) / len(draws)}


def clustered_bootstrap(
    samples: pd.DataFrame,
    statistic: Callable[[pd.DataFrame], float],
    bootstrap: int = 1000,
    seed: int = 0,
) -> Result:
    """`statistic` of the table with its interval: tasks are resampled, then their samples.

    For means, rates and correlations, not for maxima (see `Curve.draws`). Keys value, lo, hi,
    tasks, samples, undefined (the share of draws, left out, in which the statistic was nan).
    """
    rng = np.random.default_rng(seed)
    groups = [np.asarray(rows) for rows in samples.groupby("task").indices.values()]
    draws = np.empty(bootstrap)
    for b in range(bootstrap):
        picked = [groups[i] for i in rng.integers(0, len(groups), len(groups))]
        rows = np.concatenate([rng.choice(group, len(group)) for group in picked])
        names = np.repeat(np.arange(len(picked)), [len(group) for group in picked])
        draws[b] = statistic(samples.iloc[rows].assign(task=names))
    counts = {"tasks": len(groups), "samples": len(samples)}
    return {"value": float(statistic(samples)), **interval(draws), **counts}


def bootstrap_mean(values: Values, bootstrap: int = 1000, seed: int = 0) -> Result:
    """Mean of one value a task, with its interval from resampling tasks; keys value, lo, hi, n."""
    data = np.asarray(values, dtype=float)
    if not len(data):
        return {"value": np.nan, "lo": np.nan, "hi": np.nan, "n": 0}
    found = interval(data[task_draws(len(data), bootstrap, seed)].mean(axis=1))
    return {"value": float(data.mean()), "lo": found["lo"], "hi": found["hi"], "n": len(data)}


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
