"""The figures of sweeps, from the tables that `ttkit sweep` gathers, in the order of `collect`."""

from __future__ import annotations

import textwrap

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ttkit.claims import load_claims
from ttkit.plots import (
    DARK,
    LINES,
    MARKS,
    RESAMPLED,
    STRATEGIES,
    STYLE,
    _axis,
    _check,
    _start,
    percent,
    percent_more,
)
from ttkit.trajectory import peak_step

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
            ax.yaxis.set_major_formatter(percent)
    handles, labels = axes[0].get_legend_handles_labels()
    # What all points have in their names stands once above them.
    names = {label.partition("=")[0] for label in labels}
    title = None
    if len(names) == 1 and not any("," in label for label in labels):
        title, labels = names.pop(), [label.partition("=")[2] for label in labels]
    look = {"fontsize": 8, "title_fontsize": 8, "frameon": False}
    fig.legend(handles, labels, title=title, loc="outside right upper", **look)
    return fig


@mpl.rc_context(STYLE)
def peaks(history: pd.DataFrame, *_: pd.DataFrame) -> Figure:
    """Where test-time training is at its best, by point of the sweep, from the table `history`."""
    _check("peaks", history, "point", "step", "sample_fast_1", "n")
    points = list(dict.fromkeys(history["point"]))
    caption = f"""{len(points)} runs of notebook 03, one a point, {history["n"].min():.0f} rollouts
        a step. Left: no interval is drawn. Right: the step of the best checkpoint with its 95 %
        interval, the rate of each step drawn from what its rollouts leave possible; of one run, so
        how far runs of equal settings lie apart is not in it."""
    title = "The step of the best checkpoint, over a sweep"
    fig, (left, right) = _start(title, caption, 2.6 + 0.28 * len(points), 1, 2)
    for place, point in enumerate(points):
        part = history[history["point"] == point].sort_values("step")
        look = {"color": LINES[place % 7], "marker": MARKS[place % 7], "ms": 6}
        dashes = "-" if place < 7 else "--"
        left.plot(part["step"], part["sample_fast_1"], ls=dashes, lw=1.6, **look)
        best = peak_step(part)
        right.hlines(place, best["lo"], best["hi"], color=look["color"], lw=2, ls=dashes)
        right.plot(best["value"], place, **look)
    for ax in (left, right):
        ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        ax.set_xlabel("step (updates made)")
    left.set_title("sample fast_1 (interval rule)")
    left.yaxis.set_major_formatter(percent)
    right.set_title("best step")
    right.set_xlim(history["step"].min() - 0.3, history["step"].max() + 0.3)
    right.set_yticks(range(len(points)), [point.replace(",", "\n") for point in points], fontsize=8)
    right.set_ylim(len(points) - 0.4, -0.6)
    return fig


@mpl.rc_context(STYLE)
def isolated(alone: pd.DataFrame, *_: pd.DataFrame) -> Figure:
    """Adaptation to one task at a time, by step, from the table `isolated`: a panel for each point,
    a line for each task, its best step ringed."""
    _check("isolated", alone, "point", "task", "step", "sample_fast_1")
    points = list(dict.fromkeys(alone["point"]))
    caption = """Each line is one task with a policy of its own; ringed: its best step, of equal
        steps the earliest; none where no sample is fast. No interval is drawn: a step is one batch
        of rollouts of one task."""
    title = "Isolated test-time training, by task"
    fig, axes = _start(title, caption, 4.2, 1, len(points), sharey=True)
    for ax, point in zip(axes, points, strict=True):
        part = alone[alone["point"] == point]
        for place, (task, line) in enumerate(part.groupby("task")):
            line = line.sort_values("step")
            look = {"color": LINES[place % 7], "marker": MARKS[place % 7], "ms": 5}
            ax.plot(line["step"], line["sample_fast_1"], lw=1.6, label=task, **look)
            best = line.loc[line["sample_fast_1"].idxmax()]
            if best["sample_fast_1"] > 0:
                ring = {"mfc": "none", "mec": look["color"], "ms": 13, "mew": 1.5}
                ax.plot(best["step"], best["sample_fast_1"], "o", **ring)
        ax.set(title=point, xlabel="step (updates made)")
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        ax.legend(loc="upper left", bbox_to_anchor=(0, -0.2), fontsize=8, frameon=False, ncols=2)
    axes[0].set_ylabel("sample fast_1 (interval rule)")
    _axis(axes[0], "y", axes[0].get_ylabel())
    return fig


@mpl.rc_context(STYLE)
def temperatures(curves: pd.DataFrame, summary: pd.DataFrame, *_: pd.DataFrame) -> Figure:
    """Task success, and what selection keeps, by temperature: from the tables `curves` (notebook
    02) and `summary` (04) of points that differ in `temperatures`."""
    _check("temperatures", curves, "temperatures", "metric", "k", "value", "lo", "hi")
    columns = ["strategy", "key", "k", "tasks", "fast_1", "fast_1_lo", "fast_1_hi"]
    _check("temperatures", summary, "temperatures", *columns)
    levels = list(dict.fromkeys(curves["temperatures"].astype(str)))
    success = curves[curves["metric"] == "task_success"]
    largest = int(success["k"].max())
    one = summary[(summary["k"] == 1) & summary["key"].isin(["", "nll_sum"])]
    tasks = " to ".join(map(str, sorted({one["tasks"].min(), one["tasks"].max()})))
    caption = f"""One policy, sampled at each temperature. At the right n = {tasks} tasks with a
        correct sample. {RESAMPLED} Score: nll_sum, one pick."""
    fig, axes = _start("More samples and selection, by temperature", caption, 4.0, 1, 2)
    ends = ["value", "lo", "hi"]
    lines = [(f"K = {k}", success[success["k"] == k], ends) for k in (1, largest)]
    picks = [(name, one[one["strategy"] == name], columns[-3:]) for name in STRATEGIES]
    titles = ("share of tasks with a fast sample", "share of fast picks")
    for ax, parts, title in zip(axes, (lines, picks), titles, strict=True):
        for place, (name, part, names) in enumerate(parts):
            at = [levels.index(str(level)) for level in part["temperatures"]]
            x = np.array(at) + 0.08 * (place - (len(parts) - 1) / 2)
            value, lo, hi = part[names].to_numpy(dtype=float).T
            colour = STRATEGIES.get(name, LINES[place])
            ax.vlines(x, lo, hi, color=colour, lw=1.4, alpha=0.7)
            ax.plot(x, value, MARKS[place] + "-", color=colour, ms=6, lw=1.4, label=name)
        ax.set_xticks(range(len(levels)), levels)
        ax.set(xlabel="temperature", title=title)
        _axis(ax, "y", "")
        ax.legend(loc="upper left", bbox_to_anchor=(0, -0.18), ncols=2, fontsize=8, frameon=False)
    return fig


@mpl.rc_context(STYLE)
def claims(findings: pd.DataFrame, *others: pd.DataFrame) -> Figure:
    """Each claim as every point measured it, with its interval, from the tables `findings`."""
    tables = [t for t in (findings, *others) if {"claim", "value"} <= set(t)]
    every = pd.concat(tables or [findings], ignore_index=True)
    _check("claims", every, "point", "claim", "value", "lo", "hi")
    points = list(dict.fromkeys(every["point"]))
    names = list(dict.fromkeys(every["claim"][np.isfinite(every["value"])]))
    silent = [name for name in dict.fromkeys(every["claim"]) if name not in names]
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    caption = f"""{len(points)} points of a sweep. Bars: the 95 % interval that each run gives for
        itself, an arrow where it has no end; where points lie further apart than their bars, the
        bars leave something out.{f" Without a value: {', '.join(silent)}." if silent else ""}"""
    title = "What each run of a sweep found"
    fig, axes = _start(title, caption, 1.4 + 2.0 * rows, rows, columns)
    measured = load_claims().set_index("id")["measured"]
    for ax, name in zip(axes, names, strict=False):
        part = every[every["claim"] == name].set_index("point").reindex(points)
        x = np.arange(len(points))
        value, lo, hi = (part[end].to_numpy(dtype=float) for end in ("value", "lo", "hi"))
        known = np.concatenate([value, lo, hi])
        known = known[np.isfinite(known)]
        top = 2 * known.max() - known.min() if len(known) else 1.0
        ax.vlines(x, lo, np.minimum(hi, top), color=DARK, lw=1.2)
        ax.plot(x[np.isposinf(hi)], np.full(np.isposinf(hi).sum(), top), "^", color=DARK, ms=6)
        ax.plot(x, value, "o", color=LINES[0], ms=6)
        said = textwrap.shorten(measured.get(name, ""), 120, placeholder=" ...")
        ax.set_title(f"{name}\n{textwrap.fill(said, 36)}", fontsize=8)
        ax.set_xticks(x, points, fontsize=8, rotation=30 if len(points) > 3 else 0)
    for ax in axes[len(names) :]:
        ax.set_axis_off()
    return fig


@mpl.rc_context(STYLE)
def dial(table: pd.DataFrame, *_: pd.DataFrame, by: str = "expert_share") -> Figure:
    """What surprisal gains against the dial: rows by k, columns fast_1 and speedup.

    From the table `effects` (`dial.effects`) of every point, with the column `by`. Each line is a
    temperature; in the first row one pick is set against confidence, in the second three picks
    against three at random.
    """
    ends = ["difference", "difference_lo", "difference_hi"]
    speeds = ["speedup_ratio", "speedup_lo", "speedup_hi"]
    _check("dial", table, by, "temperature", "first", "second", "k", "n", *ends, *speeds)
    known = table[(table["first"] == "surprisal") & (table["n"] > 0)]
    _check("dial", known)
    tasks = f"{known['n'].min():.0f} to {known['n'].max():.0f}"
    caption = f"""n = {tasks} tasks with a correct sample at each point. {RESAMPLED} Above 0, or
        above 1×: surprisal is ahead. Settings: experts rare (left) to common; points of one setting
        are drawn side by side."""
    fig, axes = _start("What surprisal gains, against the dial", caption, 6.4, 2, 2, sharex=True)
    rows = [(1, "confidence", "1 pick against confidence")]
    rows += [(3, "random", "best of 3 picks against 3 at random")]
    levels = sorted(known["temperature"].unique())
    for (k, second, title), pair in zip(rows, (axes[:2], axes[2:]), strict=True):
        part = known[(known["second"] == second) & (known["k"] == k)]
        for ax, columns in zip(pair, (ends, speeds), strict=True):
            for i, (level, colour) in enumerate(zip(levels, LINES, strict=False)):
                line = part[part["temperature"] == level].sort_values(by)
                value, lo, hi = line[columns].to_numpy(dtype=float).T
                x = line[by].to_numpy(dtype=float) * 1.06 ** (i - (len(levels) - 1) / 2)
                ax.vlines(x, lo, hi, color=colour, lw=1.5, alpha=0.6)
                ax.plot(x, value, "osD^v"[i % 5] + "-", color=colour, ms=5, lw=1.2, label=level)
            ax.set_xscale("log")
            ticks = sorted(known[by].unique())
            ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            ax.minorticks_off()
            ax.set_title(title)
        pair[0].axhline(0, color=DARK, lw=1, ls=":", zorder=1)
        pair[0].set_ylabel("difference in fast_1")
        pair[0].yaxis.set_major_formatter(percent_more)
        _axis(pair[1], "y", "ratio of geometric-mean speedups", part[speeds])
    for ax in axes[2:]:
        ax.set_xlabel(f"{by} (log scale)")
    axes[1].legend(title="temperature", loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    return fig
