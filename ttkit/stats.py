"""Estimators on the samples table: pure functions of columns.

Two success rates that must never be mixed have separate functions here. `sample_rates` is about
*samples*: the share that is correct, or fast; it does not depend on the budget. `scaling_curve`
is about *tasks*: the share for which at least one of k samples is fast; it grows with k. A method
measured by one cannot be set beside a method measured by the other.

*Fast* has two rules everywhere: `interval` (the lower end of the speedup's interval exceeds p; the
default) and `point` (the estimate exceeds p; the paper's fast_p).

One unit is one task unless a function says otherwise: samples of one task are not independent.
Every interval is a 95 % interval of a seeded bootstrap that resamples tasks (`ttkit.resample`).
Effect sizes, tests and correlations are in `ttkit.hypothesis`; all of them are also names of this
module, so that a notebook needs one import.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import special

from ttkit.errors import UsageError
from ttkit.hypothesis import (
    chance_test,
    cohens_h,
    compare_paired,
    correlation_p,
    mean_test_power,
    partial_spearman,
    sign_flip_test,
    sign_test,
    sign_test_power,
    spearman,
    tasks_needed,
    tasks_needed_mean,
)
from ttkit.resample import (
    NOISE,
    Result,
    Values,
    bootstrap_mean,
    clustered_bootstrap,
    interval,
    task_draws,
)

__all__ = [
    "Curve",
    "METRICS",
    "NOISE",
    "RULES",
    "Result",
    "Values",
    "best_of_k_weights",
    "bootstrap_mean",
    "chance_test",
    "check",
    "clustered_bootstrap",
    "cohens_h",
    "compare_paired",
    "correlation_p",
    "expected_best_of_k",
    "fast",
    "geometric_mean",
    "interval",
    "mean_test_power",
    "partial_spearman",
    "pass_at_k",
    "sample_rates",
    "scaling_curve",
    "sign_flip_test",
    "sign_test",
    "sign_test_power",
    "spearman",
    "task_draws",
    "tasks_needed",
    "tasks_needed_mean",
    "worth",
]
RULES = {"interval": "speedup_lo", "point": "speedup"}


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
