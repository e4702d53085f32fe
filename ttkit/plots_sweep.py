"""The figures of sweeps, from the tables that `ttkit sweep` gathers, in the order of `collect`."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ttkit.plots import DARK, LINES, STYLE, _check, _start

MARKS = "osD^vPX"
CURVES = {
    "sample_fast_1": "sample fast_1 (interval rule)",
    "correct_rate": "share correct",
    "entropy": "entropy (nats a token)",
}


@mpl.rc_context(STYLE)
def histories(history: pd.DataFrame, *_: pd.DataFrame) -> Figure:
    """Test-time training by step, a line for each point of the sweep, from the table `history`."""
    _check("histories", history, "point", "step", *CURVES)
    points = list(dict.fromkeys(history["point"]))
    caption = f"""{len(points)} runs of notebook 03, one a point. Each dot is what one step's
        rollouts show: no interval is drawn, so compare whole lines, not single steps."""
    fig, axes = _start("Test-time training by step, over a sweep", caption, 4.4, 1, 3)
    for ax, (column, label) in zip(axes, CURVES.items(), strict=True):
        for place, point in enumerate(points):
            part = history[history["point"] == point].sort_values("step")
            look = {"color": LINES[place % 7], "marker": MARKS[place % 7], "ms": 5}
            dashes = "-" if place < 7 else "--"
            ax.plot(part["step"], part[column], ls=dashes, lw=1.6, label=point, **look)
        ax.set(xlabel="step (updates made)", title=label)
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        if column != "entropy":
            ax.yaxis.set_major_formatter("{x:.0%}")
    handles, labels = axes[0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside right upper", fontsize=8, frameon=False)
    return fig


@mpl.rc_context(STYLE)
def claims(findings: pd.DataFrame, *others: pd.DataFrame) -> Figure:
    """Each claim as every point measured it, with its interval, from the tables `findings`."""
    tables = [t for t in (findings, *others) if {"claim", "value"} <= set(t)]
    every = pd.concat(tables or [findings], ignore_index=True)
    _check("claims", every, "point", "claim", "value", "lo", "hi")
    names, points = (list(dict.fromkeys(every[name])) for name in ("claim", "point"))
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    caption = f"""{len(points)} points of a sweep. Bars: the 95 % interval that each run gives for
        itself; where points lie further apart than their bars, the bars leave something out."""
    title = "What each run of a sweep found"
    fig, axes = _start(title, caption, 1.4 + 1.7 * rows, rows, columns)
    for ax, name in zip(axes, names, strict=False):
        part = every[every["claim"] == name].set_index("point").reindex(points)
        x = np.arange(len(points))
        ax.vlines(x, part["lo"].astype(float), part["hi"].astype(float), color=DARK, lw=1.2)
        ax.plot(x, part["value"].astype(float), "o", color=LINES[0], ms=6)
        ax.set_title(name)
        ax.set_xticks(x, points, fontsize=8, rotation=30 if len(points) > 3 else 0)
    for ax in axes[len(names) :]:
        ax.set_axis_off()
    return fig
