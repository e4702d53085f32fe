"""The over-sharpening probe (paper: NLL and speedup of fixed samples by step): pure functions.

Every checkpoint of an adaptation scores the *same* samples. A negative Spearman(NLL, speedup) means
that low NLL goes with high speedup: the model then gives its fast samples the higher probability.

Intervals are 95 % and resample tasks, then samples within them, all draws at once: a resample is a
row of weights, and the correlation of weighted ranks is a matrix expression.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from ttkit import stats
from ttkit.errors import UsageError
from ttkit.stats import Result, Values

QUARTERS = ("Q1", "Q2", "Q3", "Q4")
SUBSETS = ("all", "correct", "within task", "within task, correct", *QUARTERS)


def checkpoints(folder: str | Path) -> dict[int, Path]:
    """The PEFT directories step_00, step_01, ... in `folder`, by step.

    Raises UsageError for a folder that is missing or has none, and for a gap in the steps.
    """
    folder = Path(folder)
    found = {int(p.name[5:]): p for p in sorted(folder.glob("step_*")) if p.name[5:].isdigit()}
    if not found:
        raise UsageError(
            f"there is no checkpoint (step_00, step_01, ...) in {folder}: run notebook 03 first"
        )
    if missing := sorted(set(range(max(found) + 1)) - set(found)):
        raise UsageError(f"{folder} lacks step_{missing[0]:02}: run notebook 03 again")
    return found


def cluster_weights(tasks: Values, bootstrap: int = 1000, seed: int = 0) -> np.ndarray:
    """How often each sample occurs in each resample of tasks, then of samples: [bootstrap, n]."""
    codes, names = pd.factorize(np.asarray(tasks))
    rng, weights = np.random.default_rng(seed), np.zeros((bootstrap, len(codes)), dtype=np.int64)
    picked = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), bootstrap)
    for task in range(len(names)):
        mine = codes == task
        n = int(mine.sum())
        weights[:, mine] = rng.multinomial(picked[:, task] * n, np.full(n, 1 / n))
    return weights


def weighted_spearman(x: Values, y: Values, weights: np.ndarray) -> np.ndarray:
    """Spearman's rho in each resample (row of `weights`, [draws, n]); nan where a side is flat.

    The same as `scipy.stats.spearmanr` on the samples repeated as often as their weights say.
    """
    a, b = (_weighted_ranks(np.asarray(v, dtype=float), weights) for v in (x, y))
    total = np.maximum(weights.sum(axis=1, keepdims=True), 1)
    a, b = (v - (weights * v).sum(axis=1, keepdims=True) / total for v in (a, b))
    products = (weights * a * b).sum(axis=1)
    squares = (weights * a * a).sum(axis=1) * (weights * b * b).sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(squares > stats.NOISE, products / np.sqrt(squares), np.nan)


def _weighted_ranks(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mid-ranks [draws, n] of the values repeated by their weights."""
    distinct, inverse = np.unique(values, return_inverse=True)
    order = np.argsort(inverse, kind="stable")
    starts = np.searchsorted(inverse[order], np.arange(len(distinct)))
    held = np.add.reduceat(weights[:, order], starts, axis=1)
    return (held.cumsum(axis=1) - held + (held + 1) / 2)[:, inverse]


def rho(
    x: Values, y: Values, tasks: Values, bootstrap: int = 1000, seed: int = 0
) -> tuple[Result, np.ndarray]:
    """Spearman's rho of x and y over all samples, and its draws.

    Keys value, lo, hi, undefined (the share of draws without a value), n, tasks. value is nan for
    fewer than 3 samples and where one side does not vary.
    """
    value = stats.spearman(x, y)["rho"]
    if not np.isfinite(value):
        draws = np.full(bootstrap, np.nan)
    else:
        draws = weighted_spearman(x, y, cluster_weights(tasks, bootstrap, seed))
    count = len(np.unique(np.asarray(tasks).astype(str)))
    found = {"value": value, **stats.interval(draws), "n": len(np.asarray(x)), "tasks": count}
    return found, draws


def within_task_rho(
    x: Values, y: Values, tasks: Values, bootstrap: int = 1000, seed: int = 0
) -> tuple[Result, np.ndarray]:
    """The mean over tasks of Spearman's rho within the task, and its draws (tasks resampled).

    Tasks where it is undefined (all-equal speedups) are left out; `tasks` counts the others, `n`
    their samples.
    """
    table = pd.DataFrame({"x": np.asarray(x), "y": np.asarray(y), "task": np.asarray(tasks)})
    parts = [part for _, part in table.groupby("task")]
    values = np.array([stats.spearman(part["x"], part["y"])["rho"] for part in parts], dtype=float)
    known = np.isfinite(values)
    n = sum(len(part) for part, ok in zip(parts, known, strict=True) if ok)
    values = values[known]
    if not len(values):
        nothing = {"value": np.nan, "lo": np.nan, "hi": np.nan, "undefined": 1.0}
        return {**nothing, "n": n, "tasks": 0}, np.full(bootstrap, np.nan)
    draws = values[stats.task_draws(len(values), bootstrap, seed)].mean(axis=1)
    found = {"value": float(values.mean()), **stats.interval(draws)}
    return {**found, "n": n, "tasks": len(values)}, draws


def by_step(
    scored: pd.DataFrame, key: str = "nll_sum", bootstrap: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """Spearman(`key`, speedup) under each checkpoint, for each of SUBSETS.

    `scored` has one row a sample and step: step, task, index, correct, speedup, `key`. "all" has
    incorrect samples with speedup 0. The quarters are cut once, by `key` at the first step over all
    samples, Q1 the least likely (the paper's bottom quartile, where surprisal selects): each holds
    a quarter of n. Columns: step, subset, value, lo, hi, undefined, n, tasks, and the change since
    the first step, `change` with change_lo and change_hi, paired: the same resamples under both.
    Raises UsageError when the steps do not hold the same samples.
    """
    lacking = {"step", "task", "index", "correct", "speedup", key} - set(scored.columns)
    if lacking or scored.empty:
        raise UsageError(f"the probe needs rows with {', '.join(sorted(lacking)) or 'samples'}")
    scored = scored.sort_values(["step", "task", "index"], ignore_index=True)
    parts = {step: part.reset_index(drop=True) for step, part in scored.groupby("step")}
    first = next(iter(parts.values()))
    same = ["task", "index", "correct", "speedup"]
    if any(not part[same].equals(first[same]) for part in parts.values()):
        raise UsageError("the probe follows fixed samples: every step must score the same ones")
    right = first["correct"].to_numpy(dtype=bool)
    speed = first["speedup"].where(first["correct"].astype(bool), 0.0).to_numpy(dtype=float)
    quarter = np.ceil(first[key].rank(method="first", ascending=False) * 4 / len(first))
    masks = {"all": np.full(len(first), True), "correct": right}
    masks |= {"within task": masks["all"], "within task, correct": right}
    masks |= {q: (quarter == i).to_numpy() for i, q in enumerate(QUARTERS, start=1)}
    rows = []
    for subset, mask in masks.items():
        estimate = within_task_rho if subset.startswith("within") else rho
        begun: tuple[float, np.ndarray] | None = None
        for step, part in parts.items():
            columns = part[key].to_numpy()[mask], speed[mask], first["task"].to_numpy()[mask]
            found, draws = estimate(*columns, bootstrap=bootstrap, seed=seed)
            begun = begun or (found["value"], draws)
            moved = stats.interval(draws - begun[1])
            change = {"change": found["value"] - begun[0]}
            change |= {"change_lo": moved["lo"], "change_hi": moved["hi"]}
            rows.append({"step": step, "subset": subset, **found, **change})
    return pd.DataFrame(rows)


GROUPS = ("all", "fast", "correct, not fast", "incorrect")


def likelihood(
    scored: pd.DataFrame,
    keys: Sequence[str] = ("nll_mean", "entropy_mean"),
    bootstrap: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Means of `keys` (nats a token) by step, over all samples and over fast and other ones.

    Columns step, group, measure, value, lo, hi, n, tasks. The mean is over samples, its interval
    resamples tasks. `fast` is by the interval rule.
    """
    fast = stats.fast(scored)
    right = scored["correct"].astype(bool)
    masks = {"all": right | True, "fast": fast, "correct, not fast": right & ~fast}
    masks["incorrect"] = ~right
    rows = []
    for group, mask in masks.items():
        for step, part in scored[mask].groupby("step"):
            sums = part.groupby("task")[list(keys)].sum().to_numpy()
            sizes = part.groupby("task").size().to_numpy()
            draws = stats.task_draws(len(sizes), bootstrap, seed)
            means = sums[draws].sum(axis=1) / sizes[draws].sum(axis=1)[:, None]
            for place, name in enumerate(keys):
                ends = stats.interval(means[:, place])
                found = {"value": part[name].mean(), "lo": ends["lo"], "hi": ends["hi"]}
                counts = {"n": len(part), "tasks": len(sizes)}
                rows.append({"step": step, "group": group, "measure": name, **found, **counts})
    return pd.DataFrame(rows)
