"""Ranking *before* any sample is run (paper section 5): can a score replace the verifier?

Selection ranks the correct samples; here the first m of all samples are run, and the others never.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from ttkit import stats
from ttkit.errors import UsageError
from ttkit.select import check_samples, pick_weights


def by_task(
    samples: pd.DataFrame, budgets: Sequence[int] | None = None, key: str = "nll_sum"
) -> pd.DataFrame:
    """Ranking *before* any sample is run: does a fast one lie among the first m (section 5)?

    For each task, strategy (random, confidence, surprisal) and budget m: success, the probability
    that the m highest-ranked samples, correct or not, hold a fast one; ties by expectation. Columns
    task, strategy, m, success. Budgets are 1..K unless given. Raises UsageError as `select` does,
    and for a budget above the number of samples of a task.
    """
    check_samples(samples, [key], [1] if budgets is None else budgets)
    smallest = int(samples.groupby("task").size().min())
    budgets = list(range(1, smallest + 1) if budgets is None else budgets)
    if max(budgets) > smallest:
        raise UsageError(f"a budget of {max(budgets)} is above K: some task has {smallest} samples")
    rows = []
    for task, part in samples.groupby("task", sort=True):
        hit, score = stats.fast(part).to_numpy(dtype=float), part[key].to_numpy(dtype=float)
        for strategy, sign in (("random", 0.0), ("confidence", -1.0), ("surprisal", 1.0)):
            for m in budgets:
                success = float(pick_weights(sign * score, hit, m) @ hit)
                rows.append({"task": task, "strategy": strategy, "m": m, "success": success})
    return pd.DataFrame(rows)


def curve(
    samples: pd.DataFrame,
    budgets: Sequence[int] | None = None,
    key: str = "nll_sum",
    bootstrap: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """`by_task` over tasks: columns strategy, m, task_success, lo, hi, tasks."""
    table = by_task(samples, budgets, key)
    rows = []
    for (strategy, m), part in table.groupby(["strategy", "m"], sort=False):
        mean = stats.bootstrap_mean(part["success"], bootstrap, seed)
        rows.append(
            {
                "strategy": strategy,
                "m": m,
                "task_success": mean["value"],
                "lo": mean["lo"],
                "hi": mean["hi"],
                "tasks": mean["n"],
            }
        )
    return pd.DataFrame(rows)


def crossover(
    table: pd.DataFrame,
    first: str = "surprisal",
    second: str = "random",
    bootstrap: int = 1000,
    seed: int = 0,
) -> dict[str, float]:
    """The budget m from which `first` is ahead of `second` for good (of `by_task`).

    The first m with a higher task success after the last m with a lower one; nan when there is
    none. At m = K every ranking has the same. Keys m, lo, hi (tasks resampled) and never: the share
    of draws, left out of the interval, without a crossover.
    """
    wide = table.pivot(index=["strategy", "task"], columns="m", values="success")
    gaps = (wide.loc[first] - wide.loc[second]).to_numpy()
    ms = wide.columns.to_numpy()

    def ahead(gap: np.ndarray) -> float:
        behind = np.flatnonzero(gap < -stats.NOISE)
        lead = np.flatnonzero(gap > stats.NOISE)
        lead = lead[lead > (behind[-1] if len(behind) else -1)]
        return float(ms[lead[0]]) if len(lead) else np.nan

    draws = gaps[stats.task_draws(len(gaps), bootstrap, seed)].mean(axis=1)
    interval = stats.interval(np.array([ahead(gap) for gap in draws]))
    never = interval.pop("undefined")
    return {"m": ahead(gaps.mean(axis=0)), **interval, "never": never}
