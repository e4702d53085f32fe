"""What a run of test-time training says: pure functions of its history and samples; no torch."""

from __future__ import annotations

import pandas as pd


def choose(history: pd.DataFrame, patience: int = 0, metric: str = "sample_fast_1") -> int:
    """Best-of-Adaptation: the step with the highest in-batch `metric`, of equals the earliest.

    With `patience`, later steps are not looked at once `metric` has not risen for so many steps.
    """
    best, at = float("-inf"), 0
    for row in history.sort_values("step").itertuples():
        value, step = getattr(row, metric), int(row.step)
        if value > best:
            best, at = value, step
        elif patience and step - at >= patience:
            break
    return at


def stopped(history: pd.DataFrame, patience: int, metric: str = "sample_fast_1") -> bool:
    """Whether `metric` has not risen in the last `patience` steps (never with patience 0)."""
    if not patience or history.empty:
        return False
    return int(history["step"].max()) - choose(history, 0, metric) >= patience
