"""Figures of the evaluators and the ledger: what they show, and what they refuse."""

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from test_select import random_table

from ttkit import claims, evaluators, plots_claims
from ttkit.errors import UsageError


def judged():
    samples = random_table(1, 6, 8, ties=False)
    faster = samples.assign(speedup=samples["speedup"] * 1.5, speedup_lo=samples["speedup"] * 1.4)
    table = evaluators.compare({"rigorous": samples, "fast-proxy": faster})
    names = ["rigorous", "fast-proxy"]
    return table, pd.DataFrame({"evaluator": names, "fast": [0, 3], "runs": [6, 6]})


def book(**values):
    rows = [claims.Finding(name, *row) for name, row in values.items()]
    found = claims.findings(rows).assign(stage="04_selection")
    return claims.ledger("runs/none", found)


def test_the_evaluators_stand_side_by_side_with_the_unchanged_programs_first():
    table, unchanged = judged()
    figure = plots_claims.evaluators(table, unchanged)
    left, right = figure.axes
    names = [label.get_text() for label in left.get_yticklabels()]
    assert names[:2] == ["unchanged programs (A/A)", "sample fast_1"]
    first = [line for line in left.get_lines() if len(line.get_xdata()) == 1]
    assert [line.get_xdata()[0] for line in first] == [0.0, 0.5]
    means = table.query("metric == 'speedup_mean' and evaluator == 'fast-proxy'")["value"]
    drawn = [line for line in right.get_lines() if len(line.get_xdata()) == len(means)]
    np.testing.assert_allclose(drawn[1].get_xdata(), means)


def test_the_ledger_draws_what_shares_an_axis_and_counts_the_rest():
    table = book(
        sel_gap=(0.2, 0.1, 0.4, 20),
        sel_surprisal=(0.3, 0.1, 0.5, 20),
        logprob_std=(9.0, float("nan"), float("nan"), 20),
        rlvr_speedup=(0.9, 0.85, 0.95, 20),
        prefilter_cross=(16.0, 14.0, 20.0, 20),
    )
    (ax,) = plots_claims.ledger(table).axes
    assert {t.get_text() for t in ax.get_yticklabels()} == {
        "sel_surprisal",
        "sel_gap",
        "logprob_std",
    }
    points = {
        (round(float(x), 3), line.get_label())
        for line in ax.get_lines()
        for x in line.get_xdata()
        if line.get_label() in claims.VERDICTS
    }
    assert points == {(0.2, "HOLDS"), (0.3, "DIFFERS"), (0.45, "UNDERPOWERED")}


def test_a_ledger_of_which_nothing_was_run_is_still_a_figure():
    figure = plots_claims.ledger(book())
    assert figure.axes


@pytest.mark.parametrize("name", ["evaluators", "ledger"])
def test_an_empty_table_or_one_without_its_columns_is_refused(name):
    more = (judged()[1],) if name == "evaluators" else ()
    with pytest.raises(UsageError, match=f"the figure {name} needs"):
        getattr(plots_claims, name)(pd.DataFrame({"x": [1]}), *more)


def test_figures_come_back_closed():
    before = plt.get_fignums()
    plots_claims.ledger(book())
    assert plt.get_fignums() == before
