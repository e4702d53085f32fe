"""More samples, more training, smarter selection: one number for all three, on the same tasks."""

from __future__ import annotations

import pandas as pd

from ttkit import select, stats
from ttkit.errors import UsageError

FAMILIES = ("more samples", "more training", "smarter selection")
PICKS = (("random", 1), ("confidence", 1), ("surprisal", 1), ("random", 3), ("surprisal", 3))


def compare(
    samples: pd.DataFrame,
    adapted: pd.DataFrame,
    key: str = "nll_sum",
    bootstrap: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """The share of tasks whose kept program is fast (interval rule), by use of the compute.

    `samples` are the base policy's at one temperature, `adapted` the rollouts of test-time training
    by column `arm`; the tasks are those of `adapted`, or all if it is empty. Best-of-N and the arms
    of training keep any fast program that they drew; selection keeps the fastest of k correct ones,
    ranked by `key`, and has none where no sample is correct. Columns family, strategy, drawn
    (samples a task), timed (programs a task that have to be timed, at most), value, lo, hi (tasks
    resampled) and n (tasks). Raises UsageError where `samples` lacks a task of `adapted`.
    """
    if len(adapted):
        if missing := set(adapted["task"]) - set(samples["task"]):
            raise UsageError(f"the base policy has no samples of {', '.join(sorted(missing))}")
        samples = samples[samples["task"].isin(adapted["task"])]
    curve = stats.scaling_curve(samples, "task_success", bootstrap, seed)
    largest = int(curve.table["k"].max())
    arms = dict(list(adapted.groupby("arm", sort=False))) if len(adapted) else {}
    spent = {name: int(part.groupby("task").size().max()) for name, part in arms.items()}
    budgets = sorted({1, largest, *(k for k in spent.values() if k <= largest)})
    found = [
        ("more samples", f"Best-of-N, K = {k}", k, k, curve.per_task[:, k - 1]) for k in budgets
    ]
    for name, part in arms.items():
        solved = stats.fast(part).groupby(part["task"]).any()
        found.append(("more training", name, spent[name], spent[name], solved))
    picks = select.select(samples, [1, 3], [key]).fillna({"fast_1": 0.0})
    for strategy, k in PICKS:
        kept = picks[(picks["strategy"] == strategy) & (picks["k"] == k)]["fast_1"]
        name = strategy if k == 1 else f"{strategy}, top {k}"
        found.append(("smarter selection", name, largest, k, kept))
    rows = []
    for family, name, drawn, timed, values in found:
        mean = stats.bootstrap_mean(values, bootstrap, seed)
        row = {"family": family, "strategy": name, "drawn": drawn, "timed": timed}
        rows.append(row | {end: mean[end] for end in ("value", "lo", "hi", "n")})
    return pd.DataFrame(rows)
