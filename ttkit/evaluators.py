"""The evaluator's share: the same samples judged twice, and how far every number moves.

A difference between two protocols on the same programs is not the model's and not the method's.
What each protocol says of programs that did not change (A/A) stands beside it.
"""

from __future__ import annotations

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
    """The numbers of the selection and Best-of-N tables: columns number, metric, value, lo, hi, n.

    n counts tasks: all of them for the Best-of-N rows, those with a correct sample for the picks.
    """
    k = int(samples.groupby("task").size().min())
    rates = stats.sample_rates(samples.assign(arm=""), ["arm"], seed=seed).iloc[0]
    end = stats.scaling_curve(samples, "task_success", seed=seed).table.iloc[-1]
    rows = [
        {
            "number": "sample fast_1",
            "metric": "fast_1",
            "value": rates["sample_fast_1"],
            "lo": rates["sample_fast_1_lo"],
            "hi": rates["sample_fast_1_hi"],
            "n": rates["tasks"],
        },
        {"number": f"task success at K = {k}", "metric": "fast_1", "n": rates["tasks"]}
        | end[["value", "lo", "hi"]].to_dict(),
    ]
    if samples["correct"].any():
        summary = select.summarise(select.select(samples, [1, 3], [key]), seed=seed)
        for strategy, ks in STRATEGIES.items():
            for top in ks:
                part = summary[(summary["strategy"] == strategy) & (summary["k"] == top)].iloc[0]
                name = f"{strategy}, top {top}" if top > 1 else strategy
                for metric in ("fast_1", "speedup_gmean", "speedup_mean"):
                    ends = {"value": part[metric], "lo": part[f"{metric}_lo"]}
                    ends |= {"hi": part[f"{metric}_hi"], "n": part["tasks"]}
                    rows.append({"number": name, "metric": metric, **ends})
    return pd.DataFrame(rows)


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
