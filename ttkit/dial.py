"""When does selection by surprisal work: its effect in numbers that can be laid against a dial.

The dial is `expert_share`, how often the corpus shows an expert form (notebook 01), and as a second
axis the sampling temperature. `notebooks/sweeps/dial.yaml` turns both; one row here is one setting.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from ttkit import select, stats

KEPT = (
    *("first", "second", "key", "k", "n", "fast_1_first", "fast_1_second"),
    *("difference", "difference_lo", "difference_hi", "p_sign", "p_chance"),
    *("speedup_ratio", "speedup_lo", "speedup_hi"),
)


def effects(
    samples: pd.DataFrame, ks: Sequence[int] = (1, 3), key: str = "nll_sum", seed: int = 0
) -> pd.DataFrame:
    """`select.comparisons` at every temperature of the samples: one row for each pair and k.

    Columns: temperature, correct_rate, sample_fast_1, distinct (median number of bodies a task),
    tasks, and of `select.compare` KEPT: difference is in fast_1, speedup_ratio of geometric means,
    each with the ends of its interval. A temperature without a correct sample has one row with
    n = 0 and nan: it is counted, not dropped. Raises UsageError as `select.select` does.
    """
    tables = []
    for temperature, part in samples.groupby("temperature", sort=True):
        common = {
            "temperature": temperature,
            "tasks": part["task"].nunique(),
            "correct_rate": part["correct"].mean(),
            "sample_fast_1": stats.fast(part).mean(),
            "distinct": part.groupby("task")["code_sha256"].nunique().median(),
        }
        if part["correct"].any():
            found = select.comparisons(select.select(part, ks, [key]), seed)[list(KEPT)]
        else:
            found = pd.DataFrame([{**dict.fromkeys(KEPT, np.nan), "n": 0}])
        tables.append(found.assign(**common)[[*common, *KEPT]])
    return pd.concat(tables, ignore_index=True)
