"""What sweeps measure of the published claims: from the tables that `ttkit sweep` gathers, in the
order of `collect`, to `Finding` rows.

A claim that speaks of several settings (learning rates, rewards, subsets) needs several runs.
"""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from ttkit.claims import FINDING_COLUMNS, Finding
from ttkit.errors import UsageError
from ttkit.trajectory import after_peak, peak_draws, peak_step

CHANCE = 0.025  # on each side: a change rarer than this without any learning is no chance
DRAWS = 4000


def learning_rates(history: pd.DataFrame, *_: pd.DataFrame) -> list[Finding]:
    """The claim ttt_lr: at how many learning rates sample fast_1 falls after its peak.

    `history` has one row a step and point. A rate counts where the last step differs from the best
    earlier one by more than `trajectory.after_peak` gives to chance; n are those that count.
    """
    _need(history, "ttt_lr", "step", "sample_fast_1", "n")
    said: dict[str, list[str]] = {"falls": [], "rises": [], "not settled": []}
    for rate, part in history.groupby("ttt_lr"):
        found = after_peak(part, DRAWS)
        down, up = found["p_fall"] <= CHANCE, found["p_rise"] <= CHANCE
        verdict = "falls" if down else "rises" if up else "not settled"
        said[verdict].append(f"{rate:g} ({found['change']:+.1%})")
    note = "; ".join(f"{verdict}: {', '.join(rates) or 'none'}" for verdict, rates in said.items())
    fell, rose = len(said["falls"]), len(said["rises"])
    note += "; last step minus best earlier step, against chance without learning"
    return [Finding("ttt_lr", float(fell), n=fell + rose, unit="learning rate", note=note)]


def reward_density(history: pd.DataFrame, *_: pd.DataFrame) -> list[Finding]:
    """The claim density: mean step of the best checkpoint, dense minus sparse rewards.

    The interval is that of the rollouts (`trajectory.peak_draws`), the unit a sample: each reward
    is one run, and how far runs of equal settings lie apart is not in it.
    """
    _need(history, "ttt_reward", "ttt_threshold", "step", "sample_fast_1", "n")
    best: dict[str, list[float]] = {"speedup": [], "threshold": []}
    draws: dict[str, list[np.ndarray]] = {"speedup": [], "threshold": []}
    thresholds = []
    for seed, ((reward, p), part) in enumerate(history.groupby(["ttt_reward", "ttt_threshold"])):
        best[reward].append(peak_step(part, DRAWS, seed)["value"])
        draws[reward].append(peak_draws(part, DRAWS, seed))
        thresholds += [f"{p:g}"] if reward == "threshold" else []
    if not (best["speedup"] and best["threshold"]):
        return [Finding("density", math.nan, note="one of the two rewards has no complete run")]
    dense, sparse = (np.mean(draws[reward], axis=0) for reward in ("speedup", "threshold"))
    lo, hi = np.quantile(dense - sparse, [0.025, 0.975])
    value = float(np.mean(best["speedup"]) - np.mean(best["threshold"]))
    # An estimate from the seen rates may lie outside what the drawn ones give.
    lo, hi = min(float(lo), value), max(float(hi), value)
    steps = {reward: ", ".join(f"{step:.0f}" for step in found) for reward, found in best.items()}
    note = f"best step, dense: {steps['speedup']}; sparse, p = {', '.join(thresholds)}: "
    note += f"{steps['threshold']}; one run each, n is of one step"
    return [Finding("density", value, lo, hi, int(history["n"].min()), "sample", note)]


def isolated(_: pd.DataFrame, findings: pd.DataFrame) -> list[Finding]:
    """The claim ttt_vs_bon_s2, as notebook 03 measured it at the point of subset 2."""
    _need(findings, "point", *FINDING_COLUMNS)
    rows = findings[findings["claim"] == "ttt_vs_bon_s2"]
    if rows.empty:
        return [Finding("ttt_vs_bon_s2", math.nan, note="the point of subset 2 is not complete")]
    row = rows.iloc[-1]
    fields = row[list(FINDING_COLUMNS)].to_dict()
    return [Finding(**fields | {"note": f"{row['note']}; point {row['point']}"})]


def _need(table: pd.DataFrame, *columns: str) -> None:
    if missing := [column for column in columns if column not in table]:
        raise UsageError(f"the findings of a sweep need the columns {', '.join(missing)}")
