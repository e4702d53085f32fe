"""More samples, more training, smarter selection on one scale: by hand."""

import pandas as pd
import pytest
from test_select import table

from ttkit import plots_claims, strategies
from ttkit.errors import UsageError

# (nll, speedup): b's fast sample is the least likely one, a's the most likely; c has no correct one
HAND = {
    "a": [(1, 2.0), (2, 1.0), (3, 1.0), (4, 1.0)],
    "b": [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0)],
    "c": [(1, 0), (2, 0), (3, 0), (4, 0)],
    "d": [(1, 2.0), (2, 2.0), (3, 2.0), (4, 2.0)],
}


def arm(name, **tasks):
    return table(tasks).assign(arm=name)


def test_every_use_of_the_compute_by_hand():
    adapted = pd.concat([arm("ttt", a=[(1, 2.0), (1, 1.0)], b=[(1, 1.0)] * 2, c=[(1, 2.0)] * 2)])
    found = strategies.compare(table(HAND), adapted).set_index("strategy")
    assert (found["n"] == 3).all()  # d was not adapted to
    value = found["value"].to_dict()
    assert value["Best-of-N, K = 1"] == pytest.approx((1 / 4 + 1 / 4 + 0) / 3)
    assert value["Best-of-N, K = 2"] == pytest.approx((1 / 2 + 1 / 2 + 0) / 3)  # as TTT spent
    assert value["Best-of-N, K = 4"] == pytest.approx(2 / 3)
    assert value["ttt"] == pytest.approx(2 / 3)
    assert value["surprisal"] == value["confidence"] == pytest.approx(1 / 3)
    assert value["random"] == pytest.approx((1 / 4 + 1 / 4) / 3)
    assert value["random, top 3"] == pytest.approx((3 / 4 + 3 / 4) / 3)
    assert found.loc["surprisal, top 3", ["drawn", "timed"]].tolist() == [4, 3]
    assert found.loc["ttt", ["family", "drawn", "timed"]].tolist() == ["more training", 2, 2]


def test_without_training_all_tasks_are_compared():
    found = strategies.compare(table(HAND), table(HAND).iloc[:0])
    assert (found["n"] == 4).all() and "more training" not in set(found["family"])


def test_an_adapted_task_that_the_base_policy_has_no_samples_of_is_named():
    with pytest.raises(UsageError, match="no samples of x"):
        strategies.compare(table(HAND), arm("ttt", x=[(1, 1.0)]))


def test_the_figure_has_a_row_for_each_and_a_colour_for_each_family():
    found = strategies.compare(table(HAND), arm("ttt", a=[(1, 2.0)], b=[(1, 1.0)]))
    figure = plots_claims.strategies(found)
    (ax,) = figure.axes[:1]
    assert [t.get_text() for t in ax.get_yticklabels()] == list(found["strategy"])
    drawn = {line.get_label(): line.get_xdata() for line in ax.get_lines()}
    assert set(strategies.FAMILIES) <= set(drawn)
    assert list(drawn["more training"]) == [0.5]
    with pytest.raises(UsageError, match="the figure strategies needs"):
        plots_claims.strategies(found.drop(columns="drawn"))
