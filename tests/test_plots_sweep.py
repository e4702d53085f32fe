"""The figures of sweeps: what they show of gathered tables, and what they refuse."""

import numpy as np
import pandas as pd
import pytest
from test_dial import two_temperatures
from test_select import random_table

from ttkit import dial, plots_sweep, select, stats
from ttkit.errors import UsageError


def turned():
    """Three settings of the dial, two temperatures."""
    tables = []
    for seed, share in enumerate((0.02, 0.1, 0.6)):
        hot = random_table(seed, 6, 8, ties=False)
        both = pd.concat([hot, hot.assign(temperature=0.25)], ignore_index=True)
        tables.append(dial.effects(both, seed=seed).assign(expert_share=share))
    return pd.concat(tables, ignore_index=True)


def test_the_dial_draws_a_line_for_each_temperature_in_each_panel():
    table = turned()
    figure = plots_sweep.dial(table)
    assert len(figure.axes) == 4
    part = table.query("`first` == 'surprisal' and second == 'confidence' and k == 1")
    for ax in figure.axes:
        lines = [line for line in ax.get_lines() if len(line.get_xdata()) == 3]
        assert [line.get_label() for line in lines] == ["0.25", "1.0"]
    drawn = [line for line in figure.axes[0].get_lines() if line.get_label() == "1.0"][0]
    truth = part[part["temperature"] == 1.0].sort_values("expert_share")["difference"]
    np.testing.assert_allclose(drawn.get_ydata(), truth)


def test_a_point_without_a_correct_sample_is_left_out_of_the_lines():
    cold = dial.effects(two_temperatures({n: [(2, 0), (2, 0)] for n in "abc"}))
    figure = plots_sweep.dial(cold.assign(expert_share=0.1))
    labels = [line.get_label() for line in figure.axes[0].get_lines()]
    assert "1.0" in labels and "0.25" not in labels


def test_the_dial_needs_its_columns():
    with pytest.raises(UsageError, match="the figure dial needs the columns expert_share"):
        plots_sweep.dial(turned().drop(columns="expert_share"))


def test_histories_have_a_line_for_each_point():
    rows = [(f"lr={r}", s, 0.1 * s, 0.5, 0.3) for r in range(9) for s in range(3)]
    columns = ["point", "step", "sample_fast_1", "correct_rate", "entropy"]
    figure = plots_sweep.histories(pd.DataFrame(rows, columns=columns))
    assert len(figure.legends[0].get_texts()) == 9


def test_peaks_show_the_best_step_of_each_point_with_its_interval():
    rows = [("dense", s, rate, 2000) for s, rate in enumerate([0.1, 0.6, 0.2])]
    rows += [("sparse", s, rate, 2000) for s, rate in enumerate([0.1, 0.2, 0.6])]
    table = pd.DataFrame(rows, columns=["point", "step", "sample_fast_1", "n"])
    left, right = plots_sweep.peaks(table).axes
    assert [line.get_xdata()[0] for line in right.get_lines()] == [1.0, 2.0]
    assert [text.get_text() for text in right.get_yticklabels()] == ["dense", "sparse"]
    assert list(left.get_lines()[1].get_ydata()) == [0.1, 0.2, 0.6]
    left.set_ylim(0.1, 0.2)
    left.set_yticks([0.125, 0.15])
    assert [text.get_text() for text in left.get_yticklabels()] == ["12.5%", "15%"]
    with pytest.raises(UsageError, match="the figure peaks needs the columns n"):
        plots_sweep.peaks(table.drop(columns="n"))


def test_isolated_adaptation_rings_the_best_step_of_each_task():
    rows = [("subset=1", "t0", s, rate) for s, rate in enumerate([0.0, 0.5, 0.5])]
    rows += [("subset=1", "t1", s, 0.0) for s in range(3)]
    rows += [("subset=2", "t2", s, 0.2) for s in range(3)]
    table = pd.DataFrame(rows, columns=["point", "task", "step", "sample_fast_1"])
    first, second = plots_sweep.isolated(table).axes
    rings = [line for line in first.get_lines() if line.get_markersize() == 13]
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in rings] == [(1, 0.5)]
    assert (first.get_title("left") or first.get_title(), len(second.get_lines())) == (
        "subset=1",
        2,
    )
    with pytest.raises(UsageError, match="the figure isolated needs rows"):
        plots_sweep.isolated(table.iloc[:0])


def test_temperatures_set_task_success_beside_the_picks():
    curves, summaries = [], []
    for seed, level in enumerate(("0.25", "1.0")):
        samples = random_table(seed, 6, 8, ties=False)
        curve = stats.scaling_curve(samples).table.assign(metric="task_success")
        summary = select.summarise(select.select(samples, [1, 3], ["nll_sum"]), 50)
        curves.append(curve.assign(temperatures=level))
        summaries.append(summary.assign(temperatures=level))
    curves, summary = pd.concat(curves), pd.concat(summaries)
    left, right = plots_sweep.temperatures(curves, summary).axes
    assert [text.get_text() for text in left.get_xticklabels()] == ["0.25", "1.0"]
    drawn = {line.get_label(): line.get_ydata() for line in left.get_lines()}
    np.testing.assert_allclose(drawn["K = 8"], curves[curves["k"] == 8]["value"])
    drawn = {line.get_label(): line.get_ydata() for line in right.get_lines()}
    one = summary[(summary["k"] == 1) & (summary["strategy"] == "surprisal")]
    np.testing.assert_allclose(drawn["surprisal"], one["fast_1"])
    with pytest.raises(UsageError, match="the figure temperatures needs the columns fast_1_hi"):
        plots_sweep.temperatures(curves, summary.drop(columns="fast_1_hi"))


def test_claims_have_a_panel_each_and_an_arrow_for_an_open_interval():
    names = ["sel_gap", "b", "c", "d"]
    found = pd.DataFrame(
        [(f"seed={s}", c, 0.1 * s, 0.0, 0.5) for s in range(2) for c in names],
        columns=["point", "claim", "value", "lo", "hi"],
    )
    found.loc[found["claim"] == "b", "hi"] = np.inf
    other = pd.DataFrame({"point": ["seed=0"], "k": [1]})  # of no claim, and left out
    figure = plots_sweep.claims(found, other)
    shown = [ax for ax in figure.axes if ax.axison]
    titles = [ax.get_title("left").split("\n") for ax in shown]
    assert [title[0] for title in titles] == names
    assert titles[0][1].startswith("fast_1 of the surprisal pick minus")  # what it measures
    arrows = [
        sum(len(line.get_xdata()) * (line.get_marker() == "^") for line in ax.get_lines())
        for ax in shown
    ]
    assert arrows == [0, 2, 0, 0]
    with pytest.raises(UsageError, match="the figure claims needs the columns claim"):
        plots_sweep.claims(other)
