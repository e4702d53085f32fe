"""Selection (paper section 4.3): which correct sample to keep, judged by what the model said of it.

A strategy ranks the correct samples of a task by a score and keeps the fastest of the first k:
`surprisal` ranks by a high negative log-likelihood, `confidence` by a low one, `random` by nothing
and `oracle` by the measured speedup itself. Ties, and the random strategy, are resolved by exact
expectation over all orders, never by chance, so that equal samples give equal results.

Pure functions of the samples table; no model and no further sample is needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd

from ttkit import stats
from ttkit.errors import UsageError

# How the four conventions of "log-probability" are named in the table; the paper's article says
# the sum, its report the mean (see notebook 04).
CONVENTIONS = ("nll_sum", "nll_mean", "nll_sum_temp", "nll_mean_temp")
# Scores that selection should be compared with; the last is made by `ttkit.clusters`.
OTHERS = ("nll_max", "entropy_mean", "n_tokens", "cluster_nll")
STRATEGIES = ("oracle", "random", "confidence", "surprisal")
UNITS = ("sample", "distinct")
SAMPLE_KEY = ("arm", "step", "task", "temperature", "index")


def available_keys(samples: pd.DataFrame) -> tuple[str, ...]:
    """The scores of `CONVENTIONS` and `OTHERS` that the table has, with a value in some row."""
    return tuple(k for k in (*CONVENTIONS, *OTHERS) if k in samples and samples[k].notna().any())


def pick_weights(score: np.ndarray, value: np.ndarray, k: int) -> np.ndarray:
    """Probability that each sample is the one kept: the highest `value` of the k highest `score`s.

    Samples that share the score at the boundary are equally likely to be among the k: with m
    samples above the boundary and g at it, k - m of the g are drawn without replacement. Of picks
    of equal value the one with the higher score is kept, of equal scores each as likely. A k above
    the number of samples means all of them.
    """
    k = min(k, len(score))
    boundary = np.sort(score)[::-1][k - 1]
    above, tied = np.flatnonzero(score > boundary), np.flatnonzero(score == boundary)
    tied = tied[np.argsort(value[tied], kind="stable")]
    chance = stats.best_of_k_weights(len(tied), [k - len(above)])[0]
    weights = np.zeros(len(score))
    if len(above):  # they are picked for sure, so the best of them beats what is slower at the edge
        best = above[value[above] == value[above].max()]
        best = best[score[best] == score[best].max()]
        beaten = value[tied] <= value[best[0]]
        weights[best] = chance[beaten].sum() / len(best)
        chance = np.where(beaten, 0.0, chance)
    _, group = np.unique(value[tied], return_inverse=True)
    weights[tied] = (np.bincount(group, chance) / np.bincount(group))[group]
    return weights


def select(
    samples: pd.DataFrame,
    ks: Sequence[int] = (1,),
    keys: Sequence[str] = CONVENTIONS,
    unit: str = "sample",
) -> pd.DataFrame:
    """Every strategy on every task: one row for each task, strategy, key and k.

    Columns: task, strategy, key ("" for oracle and random), k, n (samples of the task), n_correct,
    fast_1 (probability that the sample kept is fast, interval rule), fast_1_point, speedup
    (expectation over what is kept), log_speedup (of its logarithm). A task without a correct sample
    has n_correct 0 and nan: it is counted, not dropped.

    `unit="sample"` is the paper's: a body drawn twice counts twice. `unit="distinct"` first keeps
    one row for each different body of a task, the lowest in the first of `keys`. Raises UsageError
    for missing columns, a repeated sample, a budget below 1, or no number, naming the row.
    """
    check_samples(samples, keys, ks)
    if unit not in UNITS:
        raise UsageError(f"unknown unit {unit!r}: it is one of {', '.join(UNITS)}")
    if unit == "distinct":
        order = [*keys[:1], "index"]
        samples = samples.sort_values(order).drop_duplicates(["task", "code_sha256"])
    rows = []
    for task, part in samples.groupby("task", sort=True):
        right = part[part["correct"].astype(bool)]
        speedup = right["speedup"].to_numpy(dtype=float)
        kept = {
            "fast_1": stats.fast(right).to_numpy(dtype=float),
            "fast_1_point": stats.fast(right, "point").to_numpy(dtype=float),
            "speedup": speedup,
            "log_speedup": np.log(speedup),
        }
        for strategy, key, score in _scores(right, keys):
            for k in ks:
                expected = dict.fromkeys(kept, np.nan)
                if len(right):
                    weights = pick_weights(score, speedup, k)
                    expected = {name: weights @ values for name, values in kept.items()}
                rows.append(
                    {
                        "task": task,
                        "strategy": strategy,
                        "key": key,
                        "k": k,
                        "n": len(part),
                        "n_correct": len(right),
                        **expected,
                    }
                )
    return pd.DataFrame(rows)


def _scores(right: pd.DataFrame, keys: Sequence[str]) -> Iterable[tuple[str, str, np.ndarray]]:
    yield "oracle", "", right["speedup"].to_numpy(dtype=float)
    yield "random", "", np.zeros(len(right))
    for key in keys:
        values = right[key].to_numpy(dtype=float)
        yield "confidence", key, -values
        yield "surprisal", key, values


def check_samples(samples: pd.DataFrame, keys: Sequence[str], budgets: Sequence[int]) -> None:
    """Refuse what cannot be ranked: `stats.check`, a repeated sample, a budget below 1."""
    stats.check(samples, keys, ["index", "code_sha256"])
    if not len(budgets) or any(k < 1 or k != int(k) for k in budgets):
        raise UsageError(f"a budget is a whole number from 1 on, got {list(budgets)}")
    twice = samples.duplicated(["task", "index"], keep="first")
    if twice.any():
        row = samples[twice].iloc[0]
        apart = [c for c in SAMPLE_KEY if c in samples and samples[c].nunique() > 1]
        mixed = [c for c in apart if c not in ("task", "index")]
        todo = f"select one {' and '.join(mixed)} at a time" if mixed else "remove the repeats"
        raise UsageError(
            f"row {samples.index[twice][0]}: sample {row['index']} of {row['task']} occurs twice, "
            f"{todo}; {int(twice.sum())} of {len(samples)} rows are like it"
        )


def summarise(picks: pd.DataFrame, bootstrap: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Over tasks, for each strategy, key and k: what `select` found.

    Columns: strategy, key, k, tasks (with a correct sample), without (tasks that have none),
    fast_1 with fast_1_lo and _hi (tasks resampled), fast_1_point, speedup_gmean with _lo and _hi,
    speedup_median, speedup_mean with _lo and _hi (the paper's figure; one large value decides it).
    """
    rows = []
    for (strategy, key, k), part in picks.groupby(["strategy", "key", "k"], sort=False):
        known = part[part["n_correct"] > 0]
        rate, log, mean = (
            stats.bootstrap_mean(known[column], bootstrap, seed)
            for column in ("fast_1", "log_speedup", "speedup")
        )
        rows.append(
            {
                "strategy": strategy,
                "key": key,
                "k": k,
                "tasks": len(known),
                "without": len(part) - len(known),
                "fast_1": rate["value"],
                "fast_1_lo": rate["lo"],
                "fast_1_hi": rate["hi"],
                "fast_1_point": known["fast_1_point"].mean(),
                "speedup_gmean": np.exp(log["value"]),
                "speedup_gmean_lo": np.exp(log["lo"]),
                "speedup_gmean_hi": np.exp(log["hi"]),
                "speedup_median": known["speedup"].median(),
                "speedup_mean": mean["value"],
                "speedup_mean_lo": mean["lo"],
                "speedup_mean_hi": mean["hi"],
            }
        )
    return pd.DataFrame(rows)


def matches_oracle(
    picks: pd.DataFrame,
    column: str = "fast_1",
    within: float = 0.01,
    bootstrap: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """The smallest k at which each strategy comes `within` the oracle, as a share of it.

    `column` of `select`: "fast_1", or "log_speedup" for the geometric-mean speedup. One row for
    each strategy and key: k, lo, hi (tasks resampled) and never, the share of draws, left out of
    the interval, in which no k of the table is enough; k is nan where none is.
    """
    known = picks[picks["n_correct"] > 0]
    if known.empty:
        raise UsageError("no task has a correct sample: there is no oracle to match")
    wide = known.pivot(index=["strategy", "key", "task"], columns="k", values=column)
    ks, best = wide.columns.to_numpy(), wide.loc["oracle", ""].to_numpy()
    draws = stats.task_draws(len(best), bootstrap, seed)
    rows = []
    for strategy, key in wide.index.droplevel("task").unique():
        values = wide.loc[strategy, key].to_numpy()

        def smallest(curve: np.ndarray, goal: np.ndarray) -> float:
            short = np.log(1 - within) if column == "log_speedup" else -within * goal
            enough = np.flatnonzero(curve >= goal + short - stats.NOISE)
            return float(ks[enough[0]]) if len(enough) else np.nan

        found = np.array([smallest(values[d].mean(axis=0), best[d].mean(axis=0)) for d in draws])
        interval = stats.interval(found)
        never = interval.pop("undefined")
        k = smallest(values.mean(axis=0), best.mean(axis=0))
        rows.append({"strategy": strategy, "key": key, "k": k, **interval, "never": never})
    return pd.DataFrame(rows)


def compare(
    picks: pd.DataFrame,
    first: str = "surprisal",
    second: str = "confidence",
    key: str = "nll_sum",
    k: int = 1,
    seed: int = 0,
) -> dict[str, float | str]:
    """Two strategies on the same tasks; one pair a task, which is the unit of every p-value.

    Returns the fast_1 of both, their difference and Cohen's h with intervals, wins and losses by
    task with the exact sign test, and `stats.compare_paired` on the speedups. Three numbers of
    tasks would give a power of 80 %, were this run typical: `tasks_needed` to the sign test,
    `tasks_needed_t` to the paired t test of fast_1, `tasks_needed_speedup` to that of the log
    speedups. n counts the tasks, `without` those that have no correct sample.

    `random` is an expectation, which a single pick lies above or below even if it is as good: the
    sign, Wilcoxon and sign-flip tests do not hold against it and are nan. `p_chance`, two-sided, is
    the exact `stats.chance_test` of fast_1 instead; between two picks it is nan.

    Raises UsageError when no task has a correct sample.
    """
    one, two = _of(picks, first, key, k), _of(picks, second, key, k)
    pairs = one.add_suffix("_1").join(two.add_suffix("_2"), how="inner")
    both = pairs.dropna()
    if both.empty:
        raise UsageError(f"no task has a correct sample: {first} and {second} cannot be compared")
    p1, p2 = both["fast_1_1"].mean(), both["fast_1_2"].mean()
    gap = both["fast_1_1"] - both["fast_1_2"]
    difference = stats.bootstrap_mean(gap, seed=seed)
    wins, losses = int((gap > stats.NOISE).sum()), int((gap < -stats.NOISE).sum())
    sign = stats.sign_test(wins, losses)
    needed = stats.tasks_needed(wins / len(both), losses / len(both)) if wins + losses else np.inf
    speed = stats.compare_paired(np.exp(both["log_speedup_1"]), np.exp(both["log_speedup_2"]), seed)
    h = stats.cohens_h(min(p1, 1.0), min(p2, 1.0), len(both), len(both))
    logs = both["log_speedup_1"] - both["log_speedup_2"]
    p_chance = np.nan
    if "random" in (first, second):
        ends = ("_1", "_2") if second == "random" else ("_2", "_1")
        p_chance = stats.chance_test(*(both[f"fast_1{end}"] for end in ends))["p_two_sided"]
        sign, needed = dict.fromkeys(sign, np.nan), np.nan
        speed |= {name: np.nan for name in speed if name.startswith("p_")}
    return {
        "first": first,
        "second": second,
        "key": key,
        "k": k,
        "unit": "task",
        "n": len(both),
        "without": len(pairs) - len(both),
        "fast_1_first": p1,
        "fast_1_second": p2,
        "difference": difference["value"],
        "difference_lo": difference["lo"],
        "difference_hi": difference["hi"],
        **{f"cohens_{name}": value for name, value in h.items()},
        "wins": wins,
        "losses": losses,
        "p_sign": sign["p_two_sided"],
        "p_sign_one_sided": sign["p_one_sided"],
        "p_chance": p_chance,
        "tasks_needed": needed,
        "tasks_needed_t": stats.tasks_needed_mean(gap),
        "tasks_needed_speedup": stats.tasks_needed_mean(logs),
        **{f"speedup_{name}": value for name, value in speed.items() if name != "n"},
    }


def comparisons(picks: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """`compare` for surprisal, confidence and random in pairs, at every key and k of `picks`."""
    pairs = (("surprisal", "confidence"), ("surprisal", "random"), ("confidence", "random"))
    keys = [key for key in picks["key"].unique() if key]
    return pd.DataFrame(
        [
            compare(picks, first, second, key, k, seed)
            for key in keys
            for k in picks["k"].unique()
            for first, second in pairs
        ]
    )


def _of(picks: pd.DataFrame, strategy: str, key: str, k: int) -> pd.DataFrame:
    wanted = "" if strategy in ("oracle", "random") else key
    part = picks[(picks.strategy == strategy) & (picks.key == wanted) & (picks.k == k)]
    if part.empty:
        raise UsageError(f"there are no picks of {strategy} by {wanted or 'nothing'} at k={k}")
    return part.set_index("task")[["fast_1", "log_speedup"]]


def variance_gate(
    samples: pd.DataFrame, key: str = "nll_sum", threshold: float = 1.0
) -> pd.DataFrame:
    """Per task, whether selection has anything to go by (paper: std of the log-prob above 1).

    Over all samples of a task: columns task, n, n_correct, distinct (bodies), std (of `key`, n - 1
    in the denominator), std_correct (correct samples only), open (std above `threshold`).
    """
    stats.check(samples, [key], ["code_sha256"])
    rows = []
    for task, part in samples.groupby("task", sort=False):
        right = part[part["correct"].astype(bool)]
        rows.append(
            {
                "task": task,
                "n": len(part),
                "n_correct": len(right),
                "distinct": part["code_sha256"].nunique(),
                "std": part[key].std(),
                "std_correct": right[key].std(),
                "open": bool(part[key].std() > threshold),
            }
        )
    return pd.DataFrame(rows)


def quartiles(
    samples: pd.DataFrame, key: str = "nll_sum", bootstrap: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """Correct samples in four groups by `key`, the highest first (paper: the quartile table).

    Q1 is the quarter with the most surprisal. Ranks are over all tasks, ties split by row order as
    in the paper; columns quartile, n, tasks, fast_1 with fast_1_lo and _hi (tasks resampled, the
    groups kept), fast_1_point, speedup_gmean with _lo and _hi, speedup_mean, tokens, lowest and
    highest `key`.
    """
    stats.check(samples, [key, "n_tokens"])
    right, group = _quarters(samples, key)
    shares, means = _quartile_draws(right, group, "interval", bootstrap, seed)
    rate = [stats.interval(column) for column in shares.T]
    log = [stats.interval(column) for column in means.T]
    rows = [
        {
            "quartile": f"Q{number}",
            "n": len(part),
            "tasks": part["task"].nunique(),
            "fast_1": stats.fast(part).mean(),
            "fast_1_lo": rate[number - 1]["lo"],
            "fast_1_hi": rate[number - 1]["hi"],
            "fast_1_point": stats.fast(part, "point").mean(),
            "speedup_gmean": stats.geometric_mean(part["speedup"]),
            "speedup_gmean_lo": np.exp(log[number - 1]["lo"]),
            "speedup_gmean_hi": np.exp(log[number - 1]["hi"]),
            "speedup_mean": part["speedup"].mean(),
            "tokens": part["n_tokens"].mean(),
            "lowest": part[key].min(),
            "highest": part[key].max(),
        }
        for number, part in right.groupby(group)
    ]
    return pd.DataFrame(rows)


def quartile_shape(
    samples: pd.DataFrame,
    key: str = "nll_sum",
    rule: str = "interval",
    bootstrap: int = 1000,
    seed: int = 0,
) -> float:
    """Share of bootstrap draws (tasks resampled) with the published shape of the quartile table:
    the second quarter by surprisal has the highest fast_1 and the last has the lowest, ties not
    counted. Raises UsageError as `quartiles` does."""
    stats.check(samples, [key])
    right, group = _quarters(samples, key)
    shares, _ = _quartile_draws(right, group, rule, bootstrap, seed)
    first, second, third, last = shares.T
    best = second > np.fmax(np.fmax(first, third), last)
    worst = last < np.fmin(np.fmin(first, second), third)
    return float((best & worst).mean())


def _quarters(samples: pd.DataFrame, key: str) -> tuple[pd.DataFrame, pd.Series]:
    """The correct samples and the quarter of each, 1 to 4 from the most surprisal down."""
    right = samples[samples["correct"].astype(bool)]
    if len(right) < 4:
        raise UsageError(f"quartiles need at least 4 correct samples, the table has {len(right)}")
    ranks = right[key].rank(method="first", ascending=False)
    return right, np.ceil(ranks * 4 / len(right)).astype(int)


def _quartile_draws(
    right: pd.DataFrame, group: pd.Series, rule: str, bootstrap: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Share fast and mean log speedup of each quarter in each draw of tasks: [bootstrap, 4]."""
    tasks, draws = right["task"], stats.task_draws(right["task"].nunique(), bootstrap, seed)
    hits, logs, sizes = (
        values.groupby([tasks, group]).sum().unstack(fill_value=0).to_numpy(dtype=float)[draws]
        for values in (stats.fast(right, rule), np.log(right["speedup"]), pd.Series(1, right.index))
    )
    with np.errstate(invalid="ignore"):  # a draw of tasks may leave a group without samples
        return hits.sum(axis=1) / sizes.sum(axis=1), logs.sum(axis=1) / sizes.sum(axis=1)
