"""Intervals by resampling tasks, the unit of nearly every number here.

Samples of one task are not independent, so what is resampled first is always the task.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
import pandas as pd

Result = dict[str, float]
Values: TypeAlias = Sequence[float] | np.ndarray | pd.Series
NOISE = 1e-9  # differences of expectations below this are rounding, not effects


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
