"""Transfer (paper: adapted on one subset of tasks, evaluated on another): pure functions.

Three comparisons that must not be mixed: sample fast_1 of the adapted and of the unadapted policy;
task success of both with equally many samples a task; and task success of the adapted policy
against Best-of-N that spends the adaptation's rollouts on samples instead.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from ttkit import stats
from ttkit.errors import UsageError

KEYS = ["policy", "evaluated"]


def matrix(samples: pd.DataFrame, bootstrap: int = 1000, seed: int = 0) -> pd.DataFrame:
    """One row for each policy and set of tasks that it was evaluated on, in their first order.

    `samples` has the columns policy and evaluated beside those of a samples table. Columns: policy,
    evaluated, sample_fast_1 with lo and hi, sample_fast_1_point, correct_rate, task_success (with
    all samples of a task), n (samples), tasks.
    """
    table = stats.sample_rates(samples, KEYS, bootstrap, seed)
    table = table.rename(columns={"sample_fast_1_lo": "lo", "sample_fast_1_hi": "hi"})
    hits = stats.fast(samples).groupby([samples[k] for k in (*KEYS, "task")], sort=False).any()
    success = hits.groupby(level=KEYS, sort=False).mean()
    table["task_success"] = [success[policy, where] for policy, where in table[KEYS].to_numpy()]
    columns = [*KEYS, "sample_fast_1", "lo", "hi", "sample_fast_1_point", "correct_rate"]
    return table.rename(columns={"samples": "n"})[[*columns, "task_success", "n", "tasks"]]


def paired(
    adapted: pd.DataFrame,
    unadapted: pd.DataFrame,
    spent: int,
    bootstrap: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Adapted minus unadapted policy on one set of tasks, paired by task.

    `adapted` has n samples of each task. Three rows: sample fast_1; task success with n samples of
    either; and task success with n samples of the adapted against n + `spent` of the unadapted
    policy, `spent` being the rollouts that the adaptation cost for each evaluated task. Task
    success of the unadapted policy is the unbiased estimate (pass@k) from its samples; where these
    are fewer than n + `spent`, k is their number, which favours the adapted policy: see `k`.

    Columns metric, against, adapted, unadapted (values), difference, lo, hi (tasks resampled), p
    (sign-flip test, two-sided), tasks, n (samples a task of the adapted policy), k (of the other).
    Raises UsageError when the tasks are not the same.
    """
    ours, theirs = (_counts(table) for table in (adapted, unadapted))
    if list(ours.index) != list(theirs.index):
        raise UsageError("a paired comparison needs the same tasks under both policies")
    n, most = int(ours["n"].min()), int(theirs["n"].min())
    rates = ours["fast"] / ours["n"], theirs["fast"] / theirs["n"]
    rows = [_row("sample fast_1", "unadapted", *rates, n, most, bootstrap, seed)]
    success = _success(ours, n)
    for against, k in (("unadapted, as many samples", n), ("Best-of-N, equal budget", n + spent)):
        k = min(k, most)
        rows.append(
            _row("task success", against, success, _success(theirs, k), n, k, bootstrap, seed)
        )
    return pd.DataFrame(rows)


def _counts(table: pd.DataFrame) -> pd.DataFrame:
    stats.check(table)
    fast = stats.fast(table).groupby(table["task"])
    return pd.DataFrame({"fast": fast.sum(), "n": fast.size()})


def _success(counts: pd.DataFrame, k: int) -> pd.Series:
    """For each task the chance that k of its samples hold a fast one."""
    found = [
        float(stats.pass_at_k(int(n), int(c), [min(k, int(n))])[0])
        for c, n in counts.itertuples(index=False)
    ]
    return pd.Series(found, counts.index)


def _row(
    metric: str,
    against: str,
    ours: pd.Series,
    theirs: pd.Series,
    n: int,
    k: int,
    bootstrap: int,
    seed: int,
) -> dict[str, object]:
    differences = np.asarray(ours - theirs, dtype=float)
    mean = stats.bootstrap_mean(differences, bootstrap, seed)
    return {
        "metric": metric,
        "against": against,
        "adapted": float(ours.mean()),
        "unadapted": float(theirs.mean()),
        "difference": mean["value"],
        "lo": mean["lo"],
        "hi": mean["hi"],
        "p": stats.sign_flip_test(differences, seed),
        "tasks": len(differences),
        "n": n,
        "k": k,
    }
