"""The figures: one function each, from tables to a matplotlib Figure.

Each can be read alone: the lines under it give n and what the intervals are. Colours are those of
Okabe and Ito (2008), which colour-blind readers can tell apart. A figure comes back closed in
pyplot, so a notebook cell that ends with it displays it once. All raise UsageError for an empty
table and for missing columns, naming them.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator
from scipy.stats import binomtest

from ttkit.errors import UsageError
from ttkit.stats import METRICS, Curve

BLACK, ORANGE, SKY, GREEN, YELLOW = "#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442"
BLUE, VERMILION, PURPLE, GREY, DARK = "#0072B2", "#D55E00", "#CC79A7", "#808080", "#444444"
LINES = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY, BLACK)
MARKS = "osD^vPX"  # one for each of LINES
STRATEGIES = {"oracle": BLACK, "surprisal": VERMILION, "random": GREY, "confidence": BLUE}
MARKERS = {"oracle": "D", "surprisal": "o", "random": "^", "confidence": "s"}
STATUSES = {"correct": BLUE, "incorrect": ORANGE, "compile_error": SKY, "runtime_error": PURPLE}
STATUSES |= {"timeout": YELLOW, "rejected": VERMILION, "infra_error": GREY}
VALUES = {"fast_1": "fast_1 (interval rule)", "speedup_gmean": "geometric-mean speedup"}
ENDS = [f"{value}{end}" for value in VALUES for end in ("_lo", "_hi")]
SUMMARY = ["strategy", "key", "k", "tasks", *VALUES, *ENDS]
SPEEDUPS = ["speedup", "speedup_lo", "speedup_hi"]
RESAMPLED = "Intervals: 95 %, tasks resampled."
STYLE: Any = sns.axes_style("whitegrid") | {
    "figure.dpi": 100,
    "figure.constrained_layout.use": True,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "grid.color": "#E4E4E4",
}
Curves = Mapping[str, Curve]
Marks = Mapping[str, Mapping[str, float]]


def percent(share: float, _place: object = None) -> str:
    """A tick's label: a share in percent, where ticks lie at halves with a decimal."""
    return f"{100 * share:.3g}%"


def percent_more(share: float, _place: object = None) -> str:
    """As `percent`, of a difference: with its sign."""
    return f"{100 * share:+.3g}%"


def _check(figure: str, table: pd.DataFrame, *columns: str) -> None:
    if missing := [column for column in columns if column not in table]:
        raise UsageError(f"the figure {figure} needs the columns {', '.join(missing)} in its table")
    if table.empty:
        raise UsageError(f"the figure {figure} needs rows, and its table has none")


def _start(title: str, caption: str, height: float, rows: int = 1, cols: int = 1, **kw: Any) -> Any:
    """A figure 8 inches (800 pixels) wide and the list of its axes."""
    # pyplot, since a kernel learns to display figures only when pyplot starts its backend
    fig, axes = plt.subplots(rows, cols, figsize=(8, height), squeeze=False, **kw)
    plt.close(fig)
    sns.despine(fig)
    fig.suptitle(title, x=0.012, ha="left", fontsize=12, fontweight="bold")
    return produced_by(fig, caption), list(axes.flat)


def produced_by(fig: Figure, command: str) -> Figure:
    """The figure with a further line in its caption: the command that made its numbers."""
    text = textwrap.fill(" ".join(command.split()), 128)
    fig.supxlabel(f"{fig.get_supxlabel()}\n{text}".strip(), x=0.012, ha="left", fontsize=8)
    return fig


def _axis(ax: Axes, which: str, label: str, speedups: Any = None) -> None:
    """An axis of shares or, given what is to be drawn, a logarithmic one of speedups, with 1."""
    axis = ax.xaxis if which == "x" else ax.yaxis
    if speedups is None:
        limits = (min(-0.03, axis.get_data_interval()[0] - 0.05), 1.03)
        axis.set(ticks=[0, 0.25, 0.5, 0.75, 1], major_formatter=percent)
        ax.set(**{f"{which}lim": limits, f"{which}label": label})
        return
    known = np.append(np.asarray(speedups, dtype=float), 1.0)
    low, high = np.nanmin(known), np.nanmax(known)
    margin = max((high / low) ** 0.05, 1.01)
    low, high = low / margin, high * margin
    ticks = np.asarray(MaxNLocator(6, steps=[1, 2, 5, 10]).tick_values(low, high))
    if high / low > 3.5:
        ticks = (2.0 if high / low < 200 else 10.0) ** np.arange(-20, 21)
    ax.set(**{f"{which}scale": "log", f"{which}lim": (low, high), f"{which}label": label})
    inside = ticks[(ticks >= low) & (ticks <= high)]
    axis.set(major_locator=FixedLocator(inside), minor_locator=NullLocator())
    axis.set_major_formatter("{x:.3g}×")
    (ax.axvline if which == "x" else ax.axhline)(1, color=DARK, lw=1, ls=":", zorder=1)


def _label_ends(ax: Axes, ends: Iterable[tuple[float, float, str, str]], gap: float) -> None:
    """Names right of the axes for points (y, x, name, colour), pushed `gap` apart."""
    to_axes, rows = ax.transData + ax.transAxes.inverted(), sorted(ends)
    steps = gap * np.arange(len(rows))
    places = np.array([to_axes.transform((x, y))[1] for y, x, _, _ in rows]) - steps
    up, down = np.maximum.accumulate(places), np.minimum.accumulate(places[::-1])[::-1]
    places = (up + down) / 2 + steps
    for place, (y, x, name, colour) in zip(places - max(places[-1] - 1, 0), rows, strict=True):
        line = {"arrowstyle": "-", "lw": 0.6, "relpos": (0, 0.5), "color": colour}
        look: Any = {"color": colour, "va": "center", "fontsize": 9}
        ax.annotate(name, (x, y), (1.04, place), "data", "axes fraction", line, **look)


def _curves(ax: Axes, tables: Mapping[str, Any], columns: Sequence[str], colours: Any) -> None:
    """Lines with bands: `columns` are the budget, the value, and the ends of its interval."""
    k, value, lo, hi = columns
    for name, table in tables.items():
        if name != "oracle":
            ax.fill_between(table[k], table[lo], table[hi], color=colours[name], alpha=0.18, lw=0)
        marker = MARKERS.get(name, "o") if len(table) <= 12 else None
        ax.plot(table[k], table[value], color=colours[name], lw=2, marker=marker, ms=5, label=name)
    every = pd.concat(tables.values())
    ticks = np.unique(every[k])
    if len(ticks) > 8 or ticks.max() > 16:
        ax.set_xscale("log", base=2)
        ticks = 2 ** np.arange(np.log2(ticks.max()) + 1, dtype=int)
    ax.set_xticks(ticks, [str(tick) for tick in ticks])
    ax.xaxis.set_minor_locator(NullLocator())
    _axis(ax, "y", ax.get_ylabel(), every[[lo, hi]] if "speedup" in ax.get_ylabel() else None)
    ends = [(t[value].iloc[-1], t[k].iloc[-1], name, colours[name]) for name, t in tables.items()]
    _label_ends(ax, ends, 0.07)


def _rows(ax: Axes, names: Iterable[object], right: Iterable[str] = (), size: float = 8) -> None:
    """Named rows from the top down, with the texts `right` at their right ends."""
    labels = [str(name) for name in names]
    ax.set_yticks(range(len(labels)), labels, fontsize=size)
    ax.set_ylim(len(labels) - 0.4, -0.6)
    for y, text in enumerate(right):
        ax.text(1.01, y, text, transform=ax.get_yaxis_transform(), va="center", fontsize=size)
    if ax.get_legend_handles_labels()[1]:
        ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, fontsize=9, frameon=False)


def _two_panels(title: str, caption: str, dots: pd.DataFrame, names: Iterable[str]) -> Figure:
    """VALUES side by side: a dot for each row (y, colour, face, marker), an interval if known."""
    fig, axes = _start(title, caption, 3.6, 1, 2, sharey=True)
    for ax, (value, label) in zip(axes, VALUES.items(), strict=True):
        drawn = dots[[c for c in (value, f"{value}_lo", f"{value}_hi") if c in dots]]
        _axis(ax, "x", label, None if value == "fast_1" else drawn)
        for dot, numbers in zip(dots.itertuples(), drawn.to_numpy(dtype=float), strict=True):
            ax.plot(numbers[1:], [dot.y] * len(numbers[1:]), color=dot.colour, lw=2)
            ax.plot(numbers[0], dot.y, dot.marker, color=dot.colour, mfc=dot.face, ms=7, mew=1.6)
            text = f"{numbers[0]:.0%}" if value == "fast_1" else f"{numbers[0]:.2f}×"
            at = ax.get_yaxis_transform()
            ax.text(1.02, dot.y, text, transform=at, color=dot.colour, va="center", fontsize=9)
    _rows(axes[0], names, size=9)
    return fig


def _picks(summary: pd.DataFrame, strategy: str, key: str, k: int | None = None) -> pd.DataFrame:
    wanted = "" if strategy in ("oracle", "random") else key
    part = summary[(summary["strategy"] == strategy) & (summary["key"] == wanted)]
    part = part[part["k"] == k] if k else part
    if part.empty:
        raise UsageError(f"the summary has no {strategy} by {wanted or 'nothing'} at k={k}")
    return part.sort_values("k")


@mpl.rc_context(STYLE)
def training(history: pd.DataFrame, window: int = 5) -> Figure:
    """GRPO by step, each with a running mean; entropy in nats a token."""
    columns = ("reward_mean", "correct_rate", "entropy", "speedup_gmean")
    labels = ("mean reward", "share correct", "entropy (nats a token)", "geometric-mean speedup")
    _check("training", history, "step", *columns)
    caption = f"""n = {len(history)} steps of one run. Dots: each step; lines: running mean of
        {window} steps. No interval: each step is one batch of rollouts."""
    fig, axes = _start("GRPO training, by step", caption, 4.8, 2, 2, sharex=True)
    history = history.sort_values("step")
    for ax, column, label, colour in zip(axes, columns, labels, LINES, strict=False):
        mean = history[column].rolling(window, center=True, min_periods=1).mean()
        ax.plot(history["step"], history[column], ".", color=colour, alpha=0.4, ms=6)
        ax.plot(history["step"], mean, color=colour, lw=2)
        ax.set(title=label, xlabel="training step" if ax in axes[2:] else "")
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes[1].yaxis.set_major_formatter(percent)
    axes[3].yaxis.set_major_formatter("{x:.3g}×")
    return fig


@mpl.rc_context(STYLE)
def scaling(success: Curves, speedup: Curves | None = None, saturation: Marks | None = None) -> Any:
    """Best-of-N by budget (paper section 4.1): task success and expected best speedup.

    `success` and `speedup` map labels ("T = 1.0") to `stats.scaling_curve` of a rate and of a
    speedup; `saturation` maps labels of `success` to `Curve.saturation()`. Returns a Figure.
    """
    groups, marks = [group for group in (success, speedup) if group], saturation or {}
    mixed = any(("speedup" in c.metric) == (g is success) for g in groups for c in g.values())
    if not success or mixed or set(marks) - set(success):
        raise UsageError("scaling takes curves of a rate, of a speedup, saturations of the rate")
    colours = dict(zip(dict.fromkeys(k for g in groups for k in g), LINES * 9, strict=False))
    caption = f"n = {len(next(iter(success.values())).per_task)} tasks. {RESAMPLED}"
    caption += " Diamonds: k that reaches 99 % of the gain to the largest k." * bool(marks)
    fig, axes = _start("Best-of-N, by samples a task", caption, 4.2, 1, len(groups))
    for row, (name, found) in enumerate(marks.items(), start=1):  # below 0, where no share is
        axes[0].hlines(-0.06 * row, found["lo"], found["hi"], color=colours[name], lw=2)
        axes[0].plot(found["k"], -0.06 * row, "D", color=colours[name], ms=6)
    for ax, group in zip(axes, groups, strict=True):
        what = METRICS[next(iter(group.values())).metric]
        ax.set(xlabel="samples k", ylabel=what.replace(", ", ",\n").replace(" (", "\n("))
        tables = {name: curve.table for name, curve in group.items()}
        _curves(ax, tables, ("k", "value", "lo", "hi"), colours)
    return fig


@mpl.rc_context(STYLE)
def selection(summary: pd.DataFrame, k: int = 1, key: str = "nll_sum") -> Figure:
    """The strategies by what they keep at `k` and, hollow, at 3, from `select.summarise`."""
    _check("selection", summary, *SUMMARY)
    ks = [k, 3] if k != 3 and (summary["k"] == 3).any() else [k]
    parts = []
    for row, (name, colour) in enumerate(STRATEGIES.items()):
        for top, y in zip(ks, [row - 0.18, row + 0.18] if len(ks) > 1 else [row], strict=True):
            look = {"y": y, "colour": colour, "face": colour if top == k else "white"}
            parts.append(_picks(summary, name, key, top).assign(**look, marker=MARKERS[name]))
    hollow = "; hollow: top 3" * (len(ks) > 1)
    caption = f"""n = {parts[0]["tasks"].iloc[0]} tasks with a correct sample. Score: {key}.
        Filled: top {k}{hollow}. {RESAMPLED}"""
    title = "Correct samples that each strategy keeps"
    return _two_panels(title, caption, pd.concat(parts), STRATEGIES)


@mpl.rc_context(STYLE)
def conventions(table: pd.DataFrame) -> Figure:
    """fast_1 of surprisal minus confidence at k = 1, by score: the log-prob conventions and others.

    From `select.comparisons`, with intervals of the paired differences, or from
    `select.summarise`, which has no pairs: no interval then.
    """
    paired, ends = "first" in table, ["difference_lo", "difference_hi"]
    pairs = ["second", "key", "k", "n", "difference", *ends]
    _check("conventions", table, *(pairs if paired else SUMMARY))
    if paired:
        rows = table.query("first == 'surprisal' and second == 'confidence' and k == 1")
    else:
        ours, theirs = (table[table["strategy"] == s] for s in ("surprisal", "confidence"))
        rows = ours[ours["k"] == 1].merge(theirs[theirs["k"] == 1], on="key")
        rows = rows.assign(n=rows["tasks_x"], difference=rows["fast_1_x"] - rows["fast_1_y"])
    _check("conventions", rows)
    caption = f"""n = {rows["n"].max()} tasks. {RESAMPLED if paired else "No interval."}
        Right of 0: surprisal is ahead."""
    fig, (ax,) = _start("Surprisal minus confidence, by score", caption, 1.6 + 0.3 * len(rows))
    gap, y = 100 * rows["difference"], range(len(rows))
    if paired:
        ax.hlines(y, *(100 * rows[ends]).to_numpy().T, color=BLUE, lw=2)
    ax.plot(gap, y, "o", color=BLUE, ms=7)
    ax.axvline(0, color=DARK, lw=1, ls=":")
    ax.set_xlabel("difference in fast_1 (percentage points)")
    _rows(ax, rows["key"], [f"{value:+.0f}" for value in gap], 9)
    return fig


@mpl.rc_context(STYLE)
def top_k(summary: pd.DataFrame, key: str = "nll_sum") -> Figure:
    """fast_1 and speedup of the best of the first k by each strategy, from `select.summarise`."""
    _check("top_k", summary, *SUMMARY)
    parts = {strategy: _picks(summary, strategy, key) for strategy in STRATEGIES}
    n = parts["random"]["tasks"].iloc[0]
    caption = f"n = {n} tasks with a correct sample. Score: {key}. {RESAMPLED}"
    fig, axes = _start("Best of the first k correct samples, by strategy", caption, 3.8, 1, 2)
    for ax, (value, label) in zip(axes, VALUES.items(), strict=True):
        ax.set(xlabel="correct samples kept, k", ylabel=label)
        _curves(ax, parts, ("k", value, f"{value}_lo", f"{value}_hi"), STRATEGIES)
    return fig


@mpl.rc_context(STYLE)
def tasks(samples: pd.DataFrame) -> Figure:
    """Every distinct correct candidate of each task with its interval; the share correct."""
    _check("tasks", samples, "task", "code_sha256", "correct", *SPEEDUPS)
    right = samples[samples["correct"].astype(bool)].drop_duplicates(["task", "code_sha256"])
    share, speeds = samples.groupby("task")["correct"].mean(), right.groupby("task")["speedup"]
    order = list(speeds.max().reindex(share.index).sort_values(ascending=False).index)
    caption = f"""n = {len(order)} tasks, {len(samples)} samples, {len(right)} distinct correct
        candidates. Lines: 95 % interval of a speedup. At the right: share correct."""
    title = "Speedup of every distinct correct candidate, by task"
    fig, (ax,) = _start(title, caption, 1.7 + 0.24 * len(order))
    size, rank = speeds.transform("size"), speeds.rank(method="first")
    y = right["task"].map(order.index).astype(float) + 0.7 * ((size + 1) / 2 - rank) / size
    sure, slow = right["speedup_lo"] > 1, right["speedup_hi"] < 1
    kinds = {"faster": (sure, BLUE), "not settled": (~sure & ~slow, GREY), "slower": (slow, ORANGE)}
    for name, (which, colour) in kinds.items():
        part = right[which]
        ax.hlines(y[which], part["speedup_lo"], part["speedup_hi"], color=colour, lw=1, alpha=0.6)
        ax.plot(part["speedup"], y[which], "o", color=colour, ms=4, mew=0, label=name)
    _axis(ax, "x", "speedup over the reference", right[SPEEDUPS])
    _rows(ax, order, [f"{share[task]:.0%}" for task in order])
    return fig


@mpl.rc_context(STYLE)
def variance_gate(gate: pd.DataFrame, threshold: float = 1.0) -> Figure:
    """The spread of nll_sum over each task's samples, from `stats.variance_gate`."""
    _check("variance_gate", gate, "task", "std")
    gate = gate.sort_values("std", ascending=False, ignore_index=True)
    is_open = gate["std"] > threshold
    caption = f"""{is_open.sum()} of n = {len(gate)} tasks are open: their standard deviation is
        above {threshold:g}. No interval: one value a task, over all its samples."""
    fig, (ax,) = _start("Variance gate, by task", caption, 1.7 + 0.2 * len(gate))
    for name, part, colour in (("open", gate[is_open], BLUE), ("closed", gate[~is_open], ORANGE)):
        if len(part):
            ax.barh(part.index, part["std"], 0.7, color=colour, label=name)
    ax.axvline(threshold, color=BLACK, lw=1.2, ls="--")
    ax.set_xlabel("standard deviation of nll_sum (nats)")
    _rows(ax, gate["task"])
    return fig


@mpl.rc_context(STYLE)
def outcomes(samples: pd.DataFrame, by: str = "temperature") -> Figure:
    """Shares of the verifier's statuses, by "temperature", "task" or another column."""
    _check("outcomes", samples, "status", by)
    counts = pd.crosstab(samples[by], samples["status"])
    shares = counts.div(counts.sum(axis=1), axis=0)
    shares = shares[sorted(shares, key=[*STATUSES, *shares].index)]
    shares = shares.sort_values(shares.columns[0], ascending=False) if by == "task" else shares
    caption = f"n = {len(samples)} samples; at the right, those of the row. Counted, no interval."
    fig, (ax,) = _start(f"Outcomes of the samples, by {by}", caption, 1.9 + 0.28 * len(shares))
    left = np.zeros(len(shares))
    for status, values in shares.items():
        colour = STATUSES.get(str(status), BLACK)
        texts = [f"{v:.0%}" if v >= 0.05 else "" for v in values]
        bars = ax.barh(range(len(shares)), values, 0.75, left, color=colour, label=status)
        ink = "white" if colour in (BLUE, VERMILION, BLACK) else "black"
        ax.bar_label(bars, texts, label_type="center", color=ink, fontsize=8)
        left += values.to_numpy()
    _axis(ax, "x", "share of samples")
    ax.set(xlim=(0, 1), ylabel=by)
    _rows(ax, shares.index, counts.sum(axis=1)[shares.index].astype(str))
    return fig


@mpl.rc_context(STYLE)
def quartiles(table: pd.DataFrame) -> Figure:
    """Correct samples in quarters by surprisal, from `stats.quartiles`."""
    _check("quartiles", table, "quartile", "n", "lowest", "highest", *VALUES)
    caption = f"n = {table['n'].sum()} correct samples. Lines, where drawn: 95 %, tasks resampled."
    look = {"y": range(len(table)), "colour": VERMILION, "face": VERMILION, "marker": "o"}
    ranges = table[["quartile", "lowest", "highest"]].itertuples(index=False)
    names = [f"{quartile}: nll_sum\n{low:.1f} to {high:.1f}" for quartile, low, high in ranges]
    title = "Correct samples in quarters by surprisal (Q1: the most)"
    return _two_panels(title, caption, table.assign(**look), names)


@mpl.rc_context(STYLE)
def prefilter(table: pd.DataFrame) -> Figure:
    """Task success when only the m samples ranked first are run, from `select.prefilter`."""
    _check("prefilter", table, "strategy", "m", "task_success", "lo", "hi", "tasks")
    caption = f"n = {table['tasks'].max()} tasks. Samples are ranked before any is run. {RESAMPLED}"
    fig, (ax,) = _start("Ranking before running: task success by samples run", caption, 4)
    parts = {str(name): part.sort_values("m") for name, part in table.groupby("strategy")}
    ax.set(xlabel="samples run a task, m", ylabel="share of tasks with a fast sample")
    _curves(ax, parts, ("m", "task_success", "lo", "hi"), STRATEGIES)
    return fig


@mpl.rc_context(STYLE)
def headroom(best: pd.DataFrame, faster: float = 1.2, none: float = 1.05) -> Figure:
    """The best measured form of each task: one row a task; `task` tells the level."""
    _check("headroom", best, "task", "reference_ms", "form", *SPEEDUPS)
    best = best.sort_values("speedup", ignore_index=True)
    level = ", ".join(sorted(set(best["task"].str.extract(r":(\d+)/")[0].dropna()))) or "unknown"
    speedup, ms = best["speedup"], best["reference_ms"]
    caption = f"""n = {len(best)} tasks: {(speedup >= faster).mean():.0%} have a form of {faster:g}×
        or more, {(speedup <= none).mean():.0%} none above {none:g}×. Lines: 95 % interval of the
        measured speedup. Reference: {ms.min():.2g} to {ms.max():.2g} ms. Named: the top 8."""
    fig, (ax,) = _start(f"Best measured form of each task, level {level}", caption, 4.6)
    colours = np.select([speedup >= faster, speedup > none], [BLUE, SKY], GREY)
    ax.vlines(best.index, best["speedup_lo"], best["speedup_hi"], colors=colours, lw=1.5)
    ax.scatter(best.index, speedup, s=22, c=colours, zorder=3)
    _axis(ax, "y", "speedup over the reference", [*best[SPEEDUPS].to_numpy().ravel(), faster])
    ax.axhline(faster, color=BLACK, lw=1, ls="--")
    ax.text(0, faster, f"{faster:g}×", va="bottom", fontsize=9)
    ax.set(xlabel="tasks, sorted by speedup", xticks=[])
    top = [(r.speedup, r.Index, f"{r.task}  {r.form}", DARK) for r in best.tail(8).itertuples()]
    _label_ends(ax, top, 0.06)
    return fig


@mpl.rc_context(STYLE)
def aa(runs: pd.DataFrame) -> Figure:
    """Unchanged programs against themselves: the speedup that each protocol reports."""
    _check("aa", runs, "protocol", "task", "fast", *SPEEDUPS)
    _check("aa", runs := runs.dropna(subset="speedup"))
    caption = f"""n = {len(runs)} measured runs of {runs["task"].nunique()} tasks; the truth is 1.
        Lines: 95 % interval of a run, if any. Brackets: exact binomial 95 %."""
    parts = dict(list(runs.groupby("protocol", sort=False)))
    title = "A/A: reported speedup of unchanged programs, by protocol"
    fig, axes = _start(title, caption, 1.5 + 1.4 * len(parts), len(parts), sharex=True)
    for ax, (name, part) in zip(axes, parts.items(), strict=True):
        part = part.sort_values("speedup")
        y, called = range(len(part)), part["fast"].astype(bool).to_numpy()
        lo, hi = binomtest(int(called.sum()), len(part)).proportion_ci(0.95)
        share = f"{called.mean():.1%} ({lo:.1%} to {hi:.1%})"
        ax.set_title(f"{name}: {called.sum()} of {len(part)} runs called faster, {share}")
        colours = np.where(called, VERMILION, DARK)
        lows, highs = part["speedup_lo"], part["speedup_hi"]
        ax.hlines(y, lows, highs, colors=colours, lw=0.8, alpha=0.35, snap=False)
        ax.scatter(part["speedup"], y, s=12, c=colours, linewidths=0, zorder=3)
        _axis(ax, "x", "reported speedup" if ax is axes[-1] else "", runs[SPEEDUPS])
        ax.set(yticks=[], ylabel="runs, sorted")
    return fig


@mpl.rc_context(STYLE)
def dual_loop() -> Figure:
    """The paper's two loops and what they share, drawn without data (its architecture figure)."""
    caption = "After the paper's architecture figure. Each strategy gets the same rollout budget."
    fig, (ax,) = _start("Dual loop: training and test-time compute", caption, 4.4)
    ax.set(xlim=(-0.5, 100.5), ylim=(-0.5, 60))
    ax.set_axis_off()
    boxes = [
        (0, 16, 34, 43, "Outer loop: training", BLUE, "#EEF5FA"),
        (38, 16, 62, 43, "Inner loop: test time", VERMILION, "#FCF2EC"),
        (3, 43, 28, 8, "80 training tasks", BLUE, "white"),
        (3, 26, 28, 11, "RLVR (GRPO with LoRA)\nsample, score, update", BLUE, "white"),
        (40, 43, 58, 8, "base policy on 20 held-out tasks", VERMILION, "white"),
        (40, 26, 18, 11, "more samples\nBest-of-N", VERMILION, "white"),
        (60, 26, 18, 11, "more training\nTTT, SDPO", VERMILION, "white"),
        (80, 26, 18, 11, "smarter selection\nsurprisal", VERMILION, "white"),
        (0, 0, 100, 10, "One evaluator: compile, check, run and time", GREEN, "#EAF6F2"),
    ]
    for x, y, w, h, text, colour, face in boxes:
        shape = "round,pad=0,rounding_size=1.5"
        ax.add_patch(FancyBboxPatch((x, y), w, h, shape, ec=colour, fc=face, lw=1.5))
        look: Any = {"weight": "bold", "color": colour} if h > 20 else {"fontsize": 9}
        ax.text(x + w / 2, y + (h - 4 if h > 20 else h / 2), text, ha="center", va="center", **look)
    arrows = [(17, 43, 17, 37), (8, 26, 8, 10), (25, 10, 25, 26), (31, 34, 40, 45)]
    for x in (40, 60, 80):
        arrows += [(x + 9, 43, x + 9, 37), (x + 4, 26, x + 4, 10), (x + 14, 10, x + 14, 26)]
    for x, y, to_x, to_y in arrows:
        ax.annotate("", (to_x, to_y), (x, y), arrowprops={"arrowstyle": "-|>", "color": DARK})
    for x, text in ((9, "candidates"), (26, "reward"), (45, "candidates"), (75, "verdicts")):
        ax.text(x, 21, text, va="center", fontsize=8, color=DARK)
    return fig
