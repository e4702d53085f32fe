"""The evaluator's share: the same samples judged twice, and how far every number moves.

A difference between two protocols on the same programs is not the model's and not the method's.
What each protocol says of programs that did not change (A/A) stands beside it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import pandas as pd

from ttkit import select, stats
from ttkit.best_of_n import VERDICT_COLUMNS

STRATEGIES = {"oracle": (1,), "surprisal": (1, 3), "random": (1, 3), "confidence": (1, 3)}


def judged_by(samples: pd.DataFrame, verdicts: pd.DataFrame, paired: bool) -> pd.DataFrame:
    """`samples` with the verdicts of another evaluator (of `best_of_n.judge`) in place of theirs.

    An unpaired protocol gives no interval: its point estimate decides then, as in the paper. Rows
    whose verdict is an infra_error count as not correct, as they do in every table.
    """
    bare = samples.drop(columns=[name for name in VERDICT_COLUMNS if name in samples])
    table = bare.merge(verdicts, on=["task", "code_sha256"], how="left", validate="many_to_one")
    if not paired:
        table["speedup_lo"] = table["speedup"]
    table["correct"] = table["correct"].astype(bool)
    return table


def numbers(samples: pd.DataFrame, key: str = "nll_sum", seed: int = 0) -> pd.DataFrame:
    """The numbers of the paper's tables that these samples reach: Best-of-N at K = 1, 2, 4, ...,
    the picks of each strategy, the quartiles by `key` and the Spearman correlations.

    Columns number, metric ("fast_1", "speedup_gmean", "speedup_mean" or "rho"), value, lo, hi and
    n, which counts tasks: all of them for the Best-of-N rows, those with a correct sample for the
    picks, those of the quarter for the quartiles. Quartiles and correlations need four correct
    samples and, these, speedups that vary: they are left out otherwise.
    """
    rates = stats.sample_rates(samples.assign(arm=""), ["arm"], seed=seed).iloc[0]
    curve = stats.scaling_curve(samples, "task_success", seed=seed).table
    rows = [
        {
            "number": "sample fast_1",
            "metric": "fast_1",
            "value": rates["sample_fast_1"],
            "lo": rates["sample_fast_1_lo"],
            "hi": rates["sample_fast_1_hi"],
            "n": rates["tasks"],
        }
    ]
    largest = int(curve["k"].max())
    for k in sorted({2**i for i in range(largest.bit_length())} | {largest}):
        row = {"number": f"task success at K = {k}", "metric": "fast_1", "n": rates["tasks"]}
        rows.append(row | curve[curve["k"] == k].iloc[0][["value", "lo", "hi"]].to_dict())
    if samples["correct"].any():
        summary = select.summarise(select.select(samples, [1, 3], [key]), seed=seed)
        most = samples["correct"].astype(bool).groupby(samples["task"]).sum().max()
        for strategy, ks in STRATEGIES.items():
            for top in (k for k in ks if k == 1 or k < most):
                part = summary[(summary["strategy"] == strategy) & (summary["k"] == top)].iloc[0]
                name = f"{strategy}, top {top}" if top > 1 else strategy
                rows += _ends(part, name)
    if samples["correct"].sum() >= 4:
        for _, part in select.quartiles(samples, key, seed=seed).iterrows():
            rows += _ends(part, f"quartile {part['quartile']}")
        rows += _correlations(samples[samples["correct"].astype(bool)], key, seed)
    return pd.DataFrame(rows)


def _ends(part: pd.Series, name: str) -> list[dict[str, object]]:
    """A row for each metric of a row of a summary; nan ends where it has no interval."""
    return [
        {
            "number": name,
            "metric": metric,
            "value": part[metric],
            "lo": part.get(f"{metric}_lo", math.nan),
            "hi": part.get(f"{metric}_hi", math.nan),
            "n": part["tasks"],
        }
        for metric in ("fast_1", "speedup_gmean", "speedup_mean")
    ]


def _correlations(right: pd.DataFrame, key: str, seed: int) -> list[dict[str, object]]:
    """Spearman of log-probability and speedup over the correct samples, and with length fixed."""
    measures = {
        "Spearman(log-prob, speedup)": lambda t: stats.spearman(-t[key], t["speedup"])["rho"],
        "the same, length held fixed": lambda t: stats.partial_spearman(
            -t[key], t["speedup"], t["n_tokens"]
        )["rho"],
    }
    found = {
        name: stats.clustered_bootstrap(right, measure, 200, seed)
        for name, measure in measures.items()
    }
    return [
        {"number": name, "metric": "rho", "n": rho["tasks"]}
        | {end: rho[end] for end in ("value", "lo", "hi")}
        for name, rho in found.items()
        if not math.isnan(rho["value"])
    ]


def compare(judged: Mapping[str, pd.DataFrame], seed: int = 0) -> pd.DataFrame:
    """`numbers` under each evaluator: its column `evaluator` first, one row a number."""
    tables = [numbers(table, seed=seed).assign(evaluator=name) for name, table in judged.items()]
    table = pd.concat(tables, ignore_index=True)
    return table[["evaluator", *table.columns.drop("evaluator")]]


def moved(table: pd.DataFrame, first: str, second: str) -> pd.DataFrame:
    """`compare` with two evaluators side by side: number, metric, one column each, moved.

    `moved` is the difference of shares, the ratio of speedups.
    """
    wide = table.pivot_table(
        index=["number", "metric"], columns="evaluator", values="value", sort=False
    )
    wide = wide[[first, second]].reset_index()
    ratio = wide["metric"].str.startswith("speedup")
    change = (wide[second] - wide[first]).where(~ratio, wide[second] / wide[first])
    return wide.assign(moved=change).rename_axis(columns=None)
