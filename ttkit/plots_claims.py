"""Figures that compare: uses of compute, two evaluators, the claims (see `ttkit.plots`)."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ttkit.claims import DIFFERS, HOLDS, NOT_RUN, SHARES, UNDERPOWERED
from ttkit.plots import (
    BLACK,
    BLUE,
    DARK,
    GREEN,
    GREY,
    RESAMPLED,
    STYLE,
    VERMILION,
    _axis,
    _check,
    _rows,
    _start,
)

VERDICT_LOOKS = {HOLDS: (GREEN, "o"), DIFFERS: (VERMILION, "s"), UNDERPOWERED: (GREY, "^")}
ON_ONE_AXIS = (*SHARES, "difference", "threshold", "rho", "count")
EVALUATOR_LOOKS = ((BLUE, "o"), (GREEN, "^"), (VERMILION, "s"))
FAMILY_LOOKS = ((BLACK, "o"), (BLUE, "s"), (VERMILION, "D"))


@mpl.rc_context(STYLE)
def strategies(table: pd.DataFrame) -> Figure:
    """More samples, more training and smarter selection side by side, from `strategies.compare`."""
    _check("strategies", table, "family", "strategy", "drawn", "timed", "value", "lo", "hi", "n")
    caption = f"""n = {table["n"].min()} tasks, the same in every row. {RESAMPLED} At the right:
        samples drawn and programs timed, a task. All programs that are drawn are checked."""
    fig, (ax,) = _start("What each use of the compute keeps", caption, 2 + 0.3 * len(table))
    for (family, part), (colour, marker) in zip(
        table.reset_index(drop=True).groupby("family", sort=False), FAMILY_LOOKS, strict=False
    ):
        ax.hlines(part.index, part["lo"], part["hi"], color=colour, lw=2, alpha=0.7)
        ax.plot(part["value"], part.index, marker, color=colour, ms=7, ls="", label=family)
    _axis(ax, "x", "share of tasks whose kept program is fast (interval rule)")
    _rows(ax, table["strategy"], [f"{r.drawn} drawn, {r.timed} timed" for r in table.itertuples()])
    return fig


@mpl.rc_context(STYLE)
def evaluators(table: pd.DataFrame, unchanged: pd.DataFrame) -> Figure:
    """The same samples under each evaluator: shares at the left, mean speedups at the right.

    `table` is `evaluators.compare`. `unchanged` has evaluator, fast and runs: of programs that did
    not change, how many each evaluator calls faster (A/A); the truth is 0.
    """
    _check("evaluators", table, "evaluator", "number", "metric", "value", "lo", "hi", "n")
    _check("evaluators", unchanged, "evaluator", "fast", "runs")
    table = table[table["metric"] != "rho"]  # on another scale
    names = list(dict.fromkeys(table["evaluator"]))
    numbers = list(dict.fromkeys(table["number"]))
    top = "unchanged programs (A/A)"
    sizes = " to ".join(f"{n:.0f}" for n in sorted({table["n"].min(), table["n"].max()}))
    caption = f"""n = {sizes} tasks, those that a number can be had of. {RESAMPLED} First row:
        programs that did not change, the truth is 0. Right: arithmetic mean as published, of the
        same picks."""
    height = 2.2 + 0.42 * (len(numbers) + 1)
    fig, (left, right) = _start("One set of samples, two evaluators", caption, height, 1, 2)
    for (i, name), (colour, marker) in zip(enumerate(names), EVALUATOR_LOOKS, strict=False):
        shift = 0.22 * (i - (len(names) - 1) / 2)
        aa = unchanged[unchanged["evaluator"] == name]
        share = aa["fast"].sum() / max(aa["runs"].sum(), 1)
        left.plot(share, shift, marker, color=colour, ms=6, label=name)
        for ax, metric in ((left, "fast_1"), (right, "speedup_mean")):
            part = table[(table["evaluator"] == name) & (table["metric"] == metric)]
            y = np.array([numbers.index(number) + 1 + shift for number in part["number"]])
            ax.hlines(y, part["lo"], part["hi"], color=colour, lw=1.5, alpha=0.6)
            ax.plot(part["value"], y, marker, color=colour, ms=6)
    _axis(left, "x", "share called fast")
    drawn = table[table["metric"] == "speedup_mean"][["value", "lo", "hi"]]
    _axis(right, "x", "mean speedup of what is kept", drawn)
    _rows(left, [top, *numbers])
    right.set(yticks=[], ylim=left.get_ylim())
    return fig


@mpl.rc_context(STYLE)
def ledger(table: pd.DataFrame) -> Figure:
    """Every claim whose measure is a share, a difference of shares or a correlation, on one axis:
    the values that would agree (grey band), and the run's value with its interval. The verdicts of
    all claims, these and the others, are counted in the caption. From `claims.ledger`."""
    columns = ("claim", "metric", "rule", "region_lo", "region_hi", "value", "lo", "hi", "verdict")
    _check("ledger", table, *columns)
    counts = table["verdict"].value_counts()
    total = ", ".join(f"{counts.get(v, 0)} {v}" for v in (HOLDS, DIFFERS, UNDERPOWERED, NOT_RUN))
    drawn = table[
        table["rule"].isin(["level", "sign", "count"]) & table["metric"].isin(ON_ONE_AXIS)
    ]
    measured = drawn[drawn["verdict"] != NOT_RUN].reset_index(drop=True)
    others = len(table) - len(measured)
    caption = f"""n = {len(table)} published claims: {total}. Band: values that would agree with
        the claim; line: 95 % interval of this run. {others} claims are not drawn: not run, or
        measured on another scale; the table has them all."""
    height = 1.9 + 0.27 * max(len(measured), 3)
    fig, (ax,) = _start("The ledger of claims", caption, height)
    for row in measured.itertuples():
        low, high = np.clip([row.region_lo, row.region_hi], -1.0, 1.05)
        ax.barh(row.Index, high - low, 0.72, low, color="#E8E8E8", zorder=0)
        colour, _ = VERDICT_LOOKS[row.verdict]
        ax.hlines(row.Index, row.lo, row.hi, color=colour, lw=2)
    for verdict, (colour, marker) in VERDICT_LOOKS.items():
        part = measured[measured["verdict"] == verdict]
        shares = part["value"].where(part["rule"] != "count", part["value"] / part["n"])
        ax.plot(shares, part.index, marker, color=colour, ms=6, ls="", label=verdict)
    ax.axvline(0, color=DARK, lw=1, ls=":")
    ax.set(xlim=(-1.02, 1.07), xlabel="share, difference of shares, or correlation")
    _rows(ax, measured["claim"])
    return fig
