"""The figures of the probe and of transfer, in the style of `ttkit.plots` (whose rules hold)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ttkit.plots import (
    BLACK,
    BLUE,
    DARK,
    GREEN,
    GREY,
    ORANGE,
    RESAMPLED,
    SKY,
    STYLE,
    VERMILION,
    _check,
    _start,
    percent,
)

RHO = ("step", "subset", "value", "lo", "hi", "n", "tasks")
OVERALL = {"all": (BLACK, "o"), "correct": (BLUE, "s"), "within task, correct": (ORANGE, "^")}
QUARTERS = {"Q1": (VERMILION, "o"), "Q2": (ORANGE, "s"), "Q3": (SKY, "^"), "Q4": (BLUE, "D")}
GROUPS = {"all": (BLACK, "o"), "fast": (GREEN, "s"), "correct, not fast": (ORANGE, "^")}
GROUPS |= {"incorrect": (VERMILION, "D")}
MEASURES = {"nll_mean": "mean NLL (nats a token)", "entropy_mean": "mean entropy (nats a token)"}


def _by_step(
    ax: Axes, table: pd.DataFrame, by: str, looks: Mapping[str, Any], columns: int
) -> None:
    """A line with 95 % bars for each name in `looks`, side by side at each step."""
    names = [name for name in looks if (table[by] == name).any()]
    for place, name in enumerate(names):
        part = table[table[by] == name].dropna(subset="value").sort_values("step")
        colour, marker = looks[name]
        x = part["step"] + 0.09 * (place - (len(names) - 1) / 2)
        ax.vlines(x, part["lo"], part["hi"], color=colour, lw=1.2, alpha=0.8)
        text = f"{name} (n = {part['n'].iloc[0]})" if len(part) else f"{name}: undefined"
        ax.plot(x, part["value"], marker=marker, color=colour, lw=1.8, ms=5, label=text)
    ax.xaxis.set_major_locator(MaxNLocator(9, integer=True))
    ax.set_xlabel("step (updates made)")
    ax.legend(loc="upper left", bbox_to_anchor=(0, -0.2), fontsize=8, frameon=False, ncols=columns)


@mpl.rc_context(STYLE)
def rho_by_step(table: pd.DataFrame, key: str = "nll_sum") -> Figure:
    """Spearman(NLL, speedup) of the fixed samples under each checkpoint, from `probe.by_step`."""
    _check("rho_by_step", table, *RHO)
    caption = f"""Fixed samples of {table["tasks"].max()} tasks, scored by {key} under every
        checkpoint. In "all" and in the quarters an incorrect one has speedup 0. {RESAMPLED} Below
        0: low NLL goes with high speedup. Quarters by {key} at the first step, Q1 the least
        likely."""
    title = "Spearman(NLL, speedup) by step"
    fig, axes = _start(title, caption, 4.6, 1, 2, sharey=True)
    for ax, looks, label in zip(axes, (OVERALL, QUARTERS), ("overall", "by quarter"), strict=True):
        _by_step(ax, table, "subset", looks, 2)
        ax.axhline(0, color=DARK, lw=1, ls=":")
        ax.set_title(label)
    axes[0].set_ylabel("rho")
    return fig


@mpl.rc_context(STYLE)
def likelihood(table: pd.DataFrame) -> Figure:
    """Mean NLL and entropy of the fixed samples by step, from `probe.likelihood`."""
    _check("likelihood", table, "step", "group", "measure", "value", "lo", "hi", "n", "tasks")
    caption = f"""The same samples at every step, of {table["tasks"].max()} tasks; fast: the lower
        end of the speedup's interval exceeds 1. {RESAMPLED}"""
    fig, axes = _start("What the checkpoints think of the fixed samples", caption, 4.4, 1, 2)
    for ax, (measure, label) in zip(axes, MEASURES.items(), strict=True):
        _by_step(ax, table[table["measure"] == measure], "group", GROUPS, 1)
        ax.set_ylabel(label)
        ax.set_ylim(bottom=0)
    return fig


@mpl.rc_context(STYLE)
def transfer(matrix: pd.DataFrame) -> Figure:
    """Sample fast_1 of each policy on each set of tasks, from `transfer.matrix`; grey: not run."""
    _check("transfer", matrix, "policy", "evaluated", "sample_fast_1", "lo", "hi", "n", "tasks")
    rows, columns = (list(dict.fromkeys(matrix[name])) for name in ("policy", "evaluated"))
    caption = f"""Sample fast_1 (interval rule) with its 95 % interval, tasks resampled;
        n = {matrix["n"].min()} to {matrix["n"].max()} samples of at least {matrix["tasks"].min()}
        tasks in a cell. Compare down a column: the tasks are the same. Grey: not measured."""
    title = "Transfer: where a policy was adapted, and where it is evaluated"
    fig, (ax,) = _start(title, caption, 2.2 + 0.75 * len(rows))
    grid = np.full((len(rows), len(columns)), np.nan)
    for cell in matrix.itertuples():
        grid[rows.index(cell.policy), columns.index(cell.evaluated)] = cell.sample_fast_1
    colours = mpl.colormaps["cividis"].with_extremes(bad="#DDDDDD")
    top = max(float(np.nanmax(grid)), 0.05)
    image = ax.imshow(grid, cmap=colours, vmin=0, vmax=top, aspect="auto")
    for cell in matrix.itertuples():
        y, x = rows.index(cell.policy), columns.index(cell.evaluated)
        text = f"{cell.sample_fast_1:.0%}\n[{cell.lo:.0%}, {cell.hi:.0%}]"
        ink = "white" if cell.sample_fast_1 < 0.5 * top else "black"
        ax.text(x, y, text, ha="center", va="center", color=ink, fontsize=10)
    ax.set_xticks(range(len(columns)), [f"evaluated on\n{name}" for name in columns])
    ax.set_yticks(range(len(rows)), rows)
    ax.grid(False)
    fig.colorbar(image, ax=ax, format=percent, label="sample fast_1")
    return fig


@mpl.rc_context(STYLE)
def transfer_differences(table: pd.DataFrame) -> Figure:
    """Paired differences of adapted and unadapted policy, from `transfer.paired`, in points."""
    columns = ("policy", "evaluated", "against", "metric", "difference", "lo", "hi", "tasks")
    _check("transfer_differences", table, *columns)
    caption = f"""n = {table["tasks"].min()} tasks or more, each paired with itself. {RESAMPLED}
        Left of 0: adaptation lost. Few tasks give rough intervals, and none where all pairs tie."""
    title = "Adapted minus unadapted, paired by task"
    fig, (ax,) = _start(title, caption, 1.8 + 0.42 * len(table))
    looks = {"sample fast_1": (BLUE, "o"), "task success": (VERMILION, "s")}
    for metric, (colour, marker) in looks.items():
        where = np.flatnonzero((table["metric"] == metric).to_numpy())
        part = table.iloc[where]
        ax.hlines(where, 100 * part["lo"], 100 * part["hi"], color=colour, lw=2)
        ax.plot(100 * part["difference"], where, marker, color=colour, ms=7, label=metric)
    names = [f"{r.policy}, on {r.evaluated}:\nminus {r.against}" for r in table.itertuples()]
    ax.set_yticks(range(len(table)), names, fontsize=8)
    ax.set_ylim(len(table) - 0.4, -0.6)
    ax.axvline(0, color=GREY, lw=1, ls=":")
    ax.set_xlabel("difference (percentage points)")
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, fontsize=9, frameon=False)
    return fig
