"""The figures of test-time training, in the style of `ttkit.plots` (whose rules hold here too)."""

from __future__ import annotations

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ttkit.plots import (
    BLACK,
    BLUE,
    DARK,
    GREY,
    LINES,
    MARKS,
    RESAMPLED,
    STYLE,
    VERMILION,
    _check,
    _curves,
    _label_ends,
    _start,
    percent,
    percent_more,
)
from ttkit.trajectory import NoLearning

RATES = ("sample_fast_1", "lo", "hi")
EQUIVALENT = ("equivalent_k", "equivalent_lo", "equivalent_hi")


@mpl.rc_context(STYLE)
def trajectory(
    steps: pd.DataFrame,
    band: NoLearning,
    chosen: int,
    fresh: pd.DataFrame,
    best_of_n: pd.DataFrame,
) -> Figure:
    """Sample fast_1 by step beside what no learning would show; task success by rollouts spent.

    `steps` and `fresh` are `ttkit.trajectory.by_step` of the rollouts and of fresh samples;
    `best_of_n` is the table of a `stats.scaling_curve` of task_success on the same tasks.
    """
    _check("trajectory", steps, "step", *RATES, "n", "rollouts", "task_success")
    _check("trajectory", fresh, "step", *RATES)
    _check("trajectory", best_of_n, "k", "value", "lo", "hi")
    caption = f"""n = {steps["n"].iloc[0]} rollouts a step, {fresh["n"].iloc[0]} fresh samples.
        Left: bars are 95 % Wilson intervals, the unit is a sample; grey: 95 % of steps if nothing
        were learned, dashed: the expected best of {len(steps)} such steps. Right: one run, and
        Best-of-N. {RESAMPLED}"""
    fig, (left, right) = _start("Test-time training, by step", caption, 4.0, 1, 2)
    left.axhspan(band.lo, band.hi, color=GREY, alpha=0.2, lw=0, label="no learning, one step")
    left.axhline(
        band.expected_maximum, color=DARK, lw=1.2, ls="--", label="no learning, expected best"
    )
    ends = (steps["sample_fast_1"] - steps["lo"], steps["hi"] - steps["sample_fast_1"])
    left.errorbar(
        steps["step"],
        steps["sample_fast_1"],
        ends,
        fmt="o-",
        color=BLUE,
        lw=2,
        elinewidth=1.2,
        ms=5,
        label="rollouts of the step",
    )
    best = steps[steps["step"] == chosen]
    left.plot(best["step"], best["sample_fast_1"], "D", color=BLUE, ms=10, label="chosen")
    ends = (fresh["sample_fast_1"] - fresh["lo"], fresh["hi"] - fresh["sample_fast_1"])
    left.errorbar(
        fresh["step"] + 0.08,
        fresh["sample_fast_1"],
        ends,
        fmt="s",
        color=VERMILION,
        mfc="white",
        ms=7,
        elinewidth=1.2,
        label="fresh samples",
    )
    left.set(xlabel="step (updates made)", ylabel="sample fast_1 (interval rule)")
    left.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    left.yaxis.set_major_formatter(percent)
    left.set_ylim(0, max(steps["hi"].max(), fresh["hi"].max(), band.hi) * 1.6 + 0.02)
    left.legend(loc="upper left", fontsize=8, frameon=False, ncols=2)
    right.set(xlabel="rollouts a task", ylabel="share of tasks with a fast sample")
    spent = steps.rename(columns={"rollouts": "k", "task_success": "value"})
    spent = spent.assign(lo=spent["value"], hi=spent["value"])
    tables = {"Best-of-N": best_of_n, "TTT": spent[["k", "value", "lo", "hi"]]}
    _curves(right, tables, ("k", "value", "lo", "hi"), {"Best-of-N": BLACK, "TTT": BLUE})
    return fig


@mpl.rc_context(STYLE)
def placement(table: pd.DataFrame, best_of_n: pd.DataFrame) -> Figure:
    """The Best-of-N curve with other methods on it: each at the rollouts that it spent, and a line
    to the place on the curve with its value, the equivalent K.

    `table` is `ttkit.trajectory.placement`; `best_of_n` as in `trajectory`, of the same tasks.
    """
    _check("placement", table, "name", "rollouts", "value", "lo", "hi", "n", *EQUIVALENT)
    _check("placement", best_of_n, "k", "value", "lo", "hi")
    caption = f"""One metric for all: the share of tasks with a fast sample (interval rule), which
        at one sample is sample fast_1. Band: 95 %, tasks resampled. Bars: 95 % Wilson intervals,
        n = {table["n"].min()} to {table["n"].max()}; the interval of K follows from the bar, the
        curve taken as it is. Dotted: to the budget of Best-of-N with the same value."""
    fig, (ax,) = _start("Test-time training on the Best-of-N curve", caption, 4.6)
    ax.set(xlabel="rollouts a task, K", ylabel="share of tasks with a fast sample")
    _curves(ax, {"Best-of-N": best_of_n}, ("k", "value", "lo", "hi"), {"Best-of-N": BLACK})
    for text in list(ax.texts):  # its name goes with those of the points
        text.remove()
    ends = [(best_of_n["value"].iloc[-1], best_of_n["k"].iloc[-1], "Best-of-N", BLACK)]
    for i, row in enumerate(table.itertuples()):
        colour, x = LINES[i % 7], row.rollouts * 1.05 ** (i - (len(table) - 1) / 2)
        ax.vlines(x, row.lo, row.hi, color=colour, lw=1.4, alpha=0.8)
        ax.plot(x, row.value, MARKS[i % 7], color=colour, ms=8, zorder=4)
        if 1 <= row.equivalent_k <= best_of_n["k"].max():
            ax.hlines(row.value, *sorted((row.equivalent_k, x)), color=colour, lw=1.2, ls=":")
            ax.plot(row.equivalent_k, row.value, MARKS[i % 7], color=colour, mfc="white", zorder=4)
        k, lo, hi = (_budget(getattr(row, name), best_of_n["k"].max()) for name in EQUIVALENT)
        ends.append((row.value, x, f"{row.name}\nworth K = {k} [{lo}, {hi}]", colour))
    ax.set_xlim(0.9, 1.1 * max(best_of_n["k"].max(), table["rollouts"].max()))
    _label_ends(ax, ends, 0.13)
    return fig


def _budget(k: float, largest: int) -> str:
    return f"> {largest}" if k > largest else f"{k:.2g}"


@mpl.rc_context(STYLE)
def regime(table: pd.DataFrame, threshold: float = 0.3) -> Figure:
    """The gain of each task against its base coverage, from `ttkit.trajectory.regime`; the line at
    `threshold` is where the paper says that adaptation begins to help."""
    _check("regime", table, "task", "coverage", "gain", "lo", "hi", "n")
    caption = f"""n = {len(table)} tasks, {table["n"].min()} fresh samples on each side. Bars:
        Newcombe's 95 % interval of a difference of shares, the unit is a sample. Dashed: the
        published threshold."""
    fig, (ax,) = _start("Gain of the adapted policy, by base coverage", caption, 4.0)
    ends = (table["gain"] - table["lo"], table["hi"] - table["gain"])
    ax.errorbar(table["coverage"], table["gain"], ends, fmt="o", color=BLUE, ms=7, elinewidth=1.4)
    ax.axhline(0, color=DARK, lw=1, ls=":")
    ax.axvline(threshold, color=BLACK, lw=1, ls="--")
    ax.set_xlabel("base coverage: share of the base policy's samples that are fast")
    ax.xaxis.set_major_formatter(percent)
    ax.set_xlim(-0.02, min(1.02, 1.15 * max(threshold, table["coverage"].max())))
    labels = [  # tasks at one place share a label
        (gain, coverage, ", ".join(part["task"].str.rpartition(":")[2]), BLUE)
        for (coverage, gain), part in table.groupby(["coverage", "gain"])
    ]
    _label_ends(ax, labels, 0.07)
    ax.set_ylabel("gain in sample fast_1 (fresh samples)")
    ax.yaxis.set_major_formatter(percent_more)
    return fig
