"""What a run of test-time training says, on tables with known answers; advantages; figures."""

import math

import numpy as np
import pandas as pd
import pytest

from ttkit import plots_ttt, trajectory
from ttkit.advantages import OBJECTIVES, entropic
from ttkit.errors import UsageError


def samples(rates, n=40, step=0):
    """n samples a task, of which round(rate * n) are fast."""
    rows = []
    for task, rate in rates.items():
        for i in range(n):
            quick = i < round(rate * n)
            rows.append({"task": task, "step": step, "index": i, "correct": True})
            rows[-1] |= {"speedup": 2.0 if quick else 1.0, "speedup_lo": 1.5 if quick else 0.9}
    return pd.DataFrame(rows)


def history(values):
    return pd.DataFrame({"step": range(len(values)), "sample_fast_1": values})


def test_the_earliest_best_step_is_chosen_and_patience_looks_no_further():
    table = history([0.2, 0.4, 0.3, 0.4, 0.1, 0.9])
    assert trajectory.choose(table) == 5
    assert trajectory.choose(table.head(5)) == 1
    assert trajectory.choose(table, patience=2) == 1 and trajectory.choose(table, patience=4) == 5
    assert [trajectory.stopped(table.head(i), 2) for i in range(7)] == [False] * 4 + [True] * 2 + [
        False
    ]
    assert not trajectory.stopped(table, 0)


def test_no_learning_agrees_with_the_binomial_and_has_no_spread_where_nothing_varies():
    band = trajectory.no_learning_band(samples({"a": 0.5}, 100), 0, draws=20000)
    assert band.base == 0.5 and band.maxima.std() == pytest.approx(0.05, rel=0.05)
    assert band.lo == pytest.approx(0.4, abs=0.02) and band.hi == pytest.approx(0.6, abs=0.02)
    # the expected maximum of six normal draws is 1.267 standard deviations up
    six = trajectory.no_learning_band(samples({"a": 0.5}, 100), 5, draws=20000)
    assert six.expected_maximum == pytest.approx(0.5 + 1.267 * 0.05, abs=0.004)
    assert six.p_at_least(0.5) > band.p_at_least(0.5) and six.p_at_least(1.01) == 0
    sure = trajectory.no_learning_band(samples({"a": 1.0, "b": 0.0}), 7)
    assert (sure.maxima == 0.5).all() and (sure.lo, sure.hi) == (0.5, 0.5)
    small = trajectory.no_learning_band(samples({"a": 0.5}, 100), 0, rollouts=4, draws=20000)
    assert small.maxima.std() == pytest.approx(0.25, rel=0.05)
    with pytest.raises(UsageError, match="step 0"):
        trajectory.no_learning_band(samples({"a": 0.5}).head(0), 3)


def test_steps_keep_the_two_rates_apart():
    table = pd.concat([samples({"a": 0.5, "b": 0.0}, 4, 0), samples({"a": 0.0, "b": 0.25}, 4, 1)])
    steps = trajectory.by_step(table)
    assert steps.sample_fast_1.tolist() == [0.25, 0.125] and steps.n.tolist() == [8, 8]
    assert steps.task_success.tolist() == [0.5, 1.0] and steps.rollouts.tolist() == [4, 8]
    assert ((steps.lo < steps.sample_fast_1) & (steps.sample_fast_1 < steps.hi)).all()


def stepped(rates, n=80):
    return pd.DataFrame({"step": range(len(rates)), "sample_fast_1": rates, "n": n})


def test_the_peak_has_an_interval_that_shrinks_with_evidence():
    few, many = (trajectory.peak_step(stepped([0.4, 0.6], n)) for n in (10, 1000))
    assert few == {"value": 1.0, "lo": 0.0, "hi": 1.0}
    assert many == {"value": 1.0, "lo": 1.0, "hi": 1.0}
    shuffled = stepped([0.1, 0.5, 0.2], 1000).iloc[[2, 0, 1]]
    assert trajectory.peak_step(shuffled)["value"] == 1.0


def test_a_peak_of_nothing_or_of_one_lucky_rollout_could_be_anywhere():
    assert trajectory.peak_step(stepped([0.0] * 4)) == {"value": 0.0, "lo": 0.0, "hi": 3.0}
    lucky = trajectory.peak_step(stepped([1 / 80, 0, 0, 0]))
    assert lucky["value"] == 0.0 and lucky["hi"] == 3.0
    draws = trajectory.peak_draws(stepped([0.0] * 4), 8000)
    assert np.bincount(draws.astype(int)) / 8000 == pytest.approx([0.25] * 4, abs=0.02)


def test_a_fall_after_the_peak_is_set_against_what_chance_gives():
    fell = trajectory.after_peak(stepped([0.1, 0.5, 0.1]))
    assert fell["change"] == pytest.approx(-0.4) and fell["p_fall"] < 0.001 < fell["p_rise"]
    rose = trajectory.after_peak(stepped([0.1, 0.1, 0.5]))
    assert rose["change"] == pytest.approx(0.4) and rose["p_rise"] < 0.001 < rose["p_fall"]
    # the last of six equal steps is below the best of the others nearly always, so it says nothing
    flat = trajectory.after_peak(stepped([0.30, 0.34, 0.28, 0.31, 0.33, 0.29]))
    assert flat["change"] < 0 and flat["p_fall"] > 0.2
    none = trajectory.after_peak(stepped([0.0, 0.0]))
    assert none == {"change": 0.0, "p_fall": 1.0, "p_rise": 1.0}
    with pytest.raises(UsageError, match="at least two steps"):
        trajectory.after_peak(stepped([0.3]))


def test_without_learning_a_fall_is_found_as_rarely_as_it_says():
    rng = np.random.default_rng(3)
    found = [
        trajectory.after_peak(stepped(rng.binomial(80, 0.3, 5) / 80), 500, seed)["p_fall"]
        for seed in range(400)
    ]
    assert np.mean(np.array(found) <= 0.025) < 0.05


def test_equivalent_k_on_a_curve():
    curve = pd.DataFrame({"k": [1, 2, 4], "value": [0.2, 0.4, 0.5]})
    for value, k in ((0.1, 0.5), (0.2, 1.0), (0.3, 1.5), (0.45, 3.0), (0.5, 4.0), (0.0, 0.0)):
        assert trajectory.equivalent_k(value, curve) == pytest.approx(k)
    assert trajectory.equivalent_k(0.51, curve) == math.inf


def test_other_methods_have_a_place_on_the_curve_of_the_same_metric():
    curve = pd.DataFrame({"k": [1, 2, 4], "value": [0.2, 0.4, 0.6]})
    points = [("TTT", 4, 0.4, 5), ("one", 1, 0.1, 80), ("best", 2, 1.0, 5)]
    table = trajectory.placement(points, curve).set_index("name")
    assert table.equivalent_k.to_dict() == {"TTT": 2.0, "one": 0.5, "best": math.inf}
    assert table.rollouts.tolist() == [4, 1, 2]
    # Wilson by hand: 2 of 5 is 0.118 to 0.769, and the curve ends at 0.6
    assert table.lo["TTT"] == pytest.approx(0.1176, abs=1e-4)
    assert table.equivalent_lo["TTT"] == pytest.approx(0.1176 / 0.2, abs=1e-3)
    assert table.equivalent_hi["TTT"] == math.inf


def test_the_budget_counts_every_kind_of_token_and_what_search_would_cost():
    table = pd.DataFrame(
        {
            "step": [0, 1],
            "tokens_prompt": [10, 10],
            "tokens_completion": [5, 7],
            "tokens_teacher": [20, np.nan],
            "seconds_sampling": [1.0, 1.0],
            "seconds_verification": [2.0, 2.0],
            "seconds_update": [0.5, np.nan],
        }
    )
    base = pd.DataFrame({"n_tokens": [2, 4]})
    row = trajectory.budget({"sdpo": table}, {"sdpo": 8}, base).iloc[0]
    assert (row.prompt, row.completion, row.teacher, row.total) == (20, 12, 20, 52)
    assert (row.rollouts, row.best_of_n) == (8, 20 + 8 * 3)
    assert (row.seconds_verification, row.seconds_update, row.steps) == (4.0, 0.5, 1)


def test_the_regime_by_task_and_its_contrast():
    base = samples({"a": 0.1, "b": 0.5})
    before, after = samples({"a": 0.1, "b": 0.5}), samples({"a": 0.1, "b": 0.75})
    table = trajectory.regime(base, before, after).set_index("task")
    assert table.gain.round(6).to_dict() == {"a": 0.0, "b": 0.25} and table.n.eq(40).all()
    assert table.lo["a"] < 0 < table.hi["a"] and 0 < table.lo["b"] < 0.25 < table.hi["b"]
    contrast = trajectory.regime_contrast(table.reset_index())
    assert contrast["value"] == pytest.approx(0.25) and contrast["above"] == 1
    assert math.isnan(trajectory.regime_contrast(table.reset_index(), 0.9)["value"])
    with pytest.raises(UsageError, match="'before' has no samples of b"):
        trajectory.regime(base, before[before.task == "a"], after)


def test_entropic_advantages_by_hand():
    for flat in ([[2.0, 2.0, 2.0]], [[5.0]], [[0.0, 0.0]]):
        assert (entropic(np.array(flat)) == 0).all()
    # more than half, or half, share the best: q is uniform over the m best of n
    np.testing.assert_allclose(entropic(np.array([[1.0, 1, 0, 0]])), [[2, 2, -1, -1]])
    np.testing.assert_allclose(entropic(np.array([[9.0, 9, 9, 1]])), [[0.5, 0.5, 0.5, -1]])
    np.testing.assert_allclose(entropic(np.array([[0.0, 7.0]])), [[-1, 1]])  # a single best of two
    # one best of n = 4, the others equal: q solves ln 4 - H(q) = ln 2, A = 3 q / (1 - q) - 1
    found = entropic(np.array([[1.0, 0, 0, 0]]))[0]
    q = (found[0] + 1) / (found[0] + 4)
    rest = (1 - q) / 3
    assert math.log(4) + q * math.log(q) + 3 * rest * math.log(rest) == pytest.approx(math.log(2))
    np.testing.assert_allclose(found[1:], rest * 3 / (1 - rest) - 1)


def test_entropic_advantages_have_no_unit_and_keep_the_order():
    rewards = np.random.default_rng(0).exponential(size=(5, 8))
    found = entropic(rewards)
    np.testing.assert_allclose(entropic(100 * rewards + 7), found, rtol=1e-6)
    assert (found.argsort(axis=1) == rewards.argsort(axis=1)).all()
    near = entropic(np.array([[1.0, 1 - 1e-7, 0.5, 0.2, 0.0]]))  # nearly a tie
    assert np.isfinite(near).all() and near[0, 0] >= near[0, 1] > 0


def test_every_objective_has_a_shape_and_no_gradient_in_equal_rewards():
    rewards = np.random.default_rng(1).exponential(size=(3, 4))
    for name, objective in OBJECTIVES.items():
        assert objective(rewards).shape == (3, 4) and objective(rewards).any(), name
        assert not objective(np.full((3, 4), 2.0)).any(), name


def test_the_figures_say_what_is_missing_and_draw():
    table = pd.concat([samples({"a": 0.4, "b": 0.1}, 16, s) for s in range(3)])
    steps, start = trajectory.by_step(table), table[table.step == 0]
    curve = pd.DataFrame({"k": [1, 2, 4], "value": [0.2, 0.4, 0.5], "lo": 0.1, "hi": 0.6})
    band = trajectory.no_learning_band(start, 2)
    fig = plots_ttt.trajectory(steps, band, 0, steps.head(1), curve)
    assert "n = 32 rollouts a step" in fig.get_supxlabel() and len(fig.axes) == 2
    places = trajectory.placement([("TTT", 4, 0.45, 20), ("one", 1, 0.0, 20)], curve)
    fig = plots_ttt.placement(places, curve)
    (ax,) = fig.axes
    spots = {(line.get_xdata()[0], line.get_ydata()[0]) for line in ax.get_lines()}
    assert (3.0, 0.45) in spots  # on the curve, where Best-of-N has TTT's value
    said = [text.get_text() for text in ax.texts]
    assert any(text.startswith("TTT\nworth K = 3 [") for text in said)
    assert any(text.startswith("one\nworth K = 0 [0, ") for text in said)
    with pytest.raises(UsageError, match="needs the columns equivalent_k"):
        plots_ttt.placement(places.drop(columns="equivalent_k"), curve)
    gains = trajectory.regime(start, start, start)
    fig = plots_ttt.regime(gains)
    assert "n = 2 tasks" in fig.get_supxlabel()
    assert {t.get_text() for t in fig.axes[0].texts} >= {"a", "b"}
    with pytest.raises(UsageError, match="needs the columns coverage"):
        plots_ttt.regime(gains.drop(columns="coverage"))
    with pytest.raises(UsageError, match="needs rows"):
        plots_ttt.regime(gains.head(0))
