"""Estimators and tests: hand arithmetic, brute force over subsets, scipy, the paper's figures."""

import subprocess
import sys
from collections import Counter
from itertools import combinations, product
from math import comb, e, sqrt
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.stats

from ttkit import stats
from ttkit.errors import UsageError

NAN = float("nan")


def table(speedups, lo=0.9, **columns):
    """{task: speedups} as a samples table; a 0 stands for an incorrect sample.

    The interval of every speedup begins at `lo` times it.
    """
    rows = [
        {
            "arm": "best-of-n",
            "temperature": 1.0,
            "task": task,
            "index": index,
            "correct": value > 0,
            "speedup": value or NAN,
            "speedup_lo": value * lo or NAN,
            "code_sha256": f"{value}",
        }
        for task, values in speedups.items()
        for index, value in enumerate(values)
    ]
    return pd.DataFrame(rows).assign(**columns)


def random_table(seed, tasks=6, n=7):
    rng = np.random.default_rng(seed)
    return table(
        {
            f"t{t}": np.where(rng.random(n) < 0.6, np.round(rng.lognormal(0.2, 0.5, n), 2), 0.0)
            for t in range(tasks)
        }
    )


def says(call, *words):
    """`call` raises a UsageError of one sentence that holds all the `words`."""
    with pytest.raises(UsageError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text and ". " not in text and not text.endswith(".")
    for word in words:
        assert word in text, text


def test_importing_the_statistics_does_not_import_torch():
    code = "import sys, ttkit.stats, ttkit.select; sys.exit('torch' in sys.modules)"
    root = Path(__file__).parent.parent
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0


# --- fast, pass@k, the expected best of k -------------------------------------------------------


def test_fast_needs_a_correct_sample_and_the_lower_end_above_p():
    samples = table({"a": [0, 1.0, 1.05, 1.2, 2.0]})  # lower ends: nan, 0.9, 0.945, 1.08, 1.8
    assert stats.fast(samples).tolist() == [False, False, False, True, True]
    assert stats.fast(samples, "point").tolist() == [False, False, True, True, True]
    assert stats.fast(samples, p=1.08).tolist() == [False, False, False, False, True]
    wrong = samples.assign(correct=False)  # a speedup measured on wrong output is no speedup
    assert not stats.fast(wrong).any() and not stats.fast(wrong, "point").any()
    says(lambda: stats.fast(samples, "mean"), "'mean'", "interval", "point")


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_is_the_share_of_subsets_with_a_good_sample(n):
    ks = range(1, n + 1)
    for c in range(n + 1):
        good = [i < c for i in range(n)]
        truth = [np.mean([any(s) for s in combinations(good, k)]) for k in ks]
        np.testing.assert_allclose(stats.pass_at_k(n, c, ks), truth, atol=1e-13)


def test_pass_at_k_by_hand():
    # 5 samples, 2 good, 2 drawn: 1 - C(3,2)/C(5,2) = 1 - 3/10; 4 drawn of 3 bad: certain
    np.testing.assert_allclose(stats.pass_at_k(5, 2, [1, 2, 4]), [0.4, 0.7, 1.0])
    assert stats.pass_at_k(5, 2, 2) == pytest.approx(0.7)


@pytest.mark.parametrize("n,c", [(1024, 0), (1024, 1), (1024, 3), (1024, 500), (1024, 1024)])
def test_pass_at_k_is_stable_for_many_samples(n, c):
    ks = np.arange(1, n + 1)
    truth = [1 - comb(n - c, int(k)) / comb(n, int(k)) for k in ks]  # exact integers
    found = stats.pass_at_k(n, c, ks)
    np.testing.assert_allclose(found, truth, atol=1e-10)
    assert (np.diff(found) >= -1e-10).all() and found.min() >= 0 and found.max() <= 1
    assert found[-1] == (c > 0)


@pytest.mark.parametrize("n,c,k", [(5, 6, [1]), (5, -1, [1]), (5, 2, [0]), (5, 2, [1, 6])])
def test_pass_at_k_refuses_impossible_counts(n, c, k):
    says(lambda: stats.pass_at_k(n, c, k), f"n={n}", f"c={c}", "1 <= k <= n")


def test_expected_best_of_k_is_the_mean_maximum_over_subsets():
    rng = np.random.default_rng(0)
    for n in range(1, 8):
        for values in (rng.normal(size=n), rng.integers(0, 3, n).astype(float)):
            truth = [np.mean([max(s) for s in combinations(values, k)]) for k in range(1, n + 1)]
            found = stats.expected_best_of_k(values, range(1, n + 1))
            np.testing.assert_allclose(found, truth, atol=1e-12)


def test_expected_best_of_k_by_hand():
    # of 1, 2, 4 in pairs: (2 + 4 + 4) / 3
    np.testing.assert_allclose(stats.expected_best_of_k([4, 1, 2], [1, 2, 3]), [7 / 3, 10 / 3, 4])
    # the weights of the same: C(0,1), C(1,1), C(2,1) over C(3,2)
    np.testing.assert_allclose(stats.best_of_k_weights(3, [2]), [[0, 1 / 3, 2 / 3]])


def test_expected_best_of_k_of_zeros_and_ones_is_pass_at_k():
    for n, c in ((9, 0), (9, 4), (300, 7)):
        ks = np.arange(1, n + 1)
        found = stats.expected_best_of_k([1.0] * c + [0.0] * (n - c), ks)
        np.testing.assert_allclose(found, stats.pass_at_k(n, c, ks), atol=1e-11)


def test_the_weights_are_probabilities_for_many_samples():
    ks = np.arange(1, 1025)
    weights = stats.best_of_k_weights(1024, ks)
    assert weights.min() >= 0
    np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-10)
    values = np.random.default_rng(1).lognormal(size=1024)
    curve = stats.expected_best_of_k(values, ks)
    assert curve[0] == pytest.approx(values.mean()) and curve[-1] == pytest.approx(values.max())
    assert (np.diff(curve) >= -1e-9).all()


@pytest.mark.parametrize("values,k", [([1, 2], [3]), ([1, 2], [0]), ([], [1])])
def test_the_best_of_k_refuses_a_k_out_of_range(values, k):
    says(lambda: stats.expected_best_of_k(values, k), "1 <= k <= n", f"n={len(values)}")


@pytest.mark.parametrize("value", [NAN, float("inf")])
def test_the_best_of_k_refuses_values_that_are_not_finite(value):
    says(lambda: stats.expected_best_of_k([1.0, value], [1]), "finite")


def test_worth_keeps_what_is_held_already():
    samples = table({"a": [0, 0.5, 3.0]})
    assert stats.worth(samples).tolist() == [1.0, 1.0, 3.0]
    assert stats.worth(samples, 0.0).tolist() == [0.0, 0.5, 3.0]
    assert stats.worth(samples, 2.0).tolist() == [2.0, 2.0, 3.0]
    wrong = samples.assign(speedup=[9.0, 0.5, 3.0])  # fast, but of wrong output
    assert stats.worth(wrong).tolist() == [1.0, 1.0, 3.0]


def test_geometric_mean():
    assert stats.geometric_mean([1, 2, 4]) == pytest.approx(2)  # cube root of 8
    assert np.isnan(stats.geometric_mean([]))


# --- the table ----------------------------------------------------------------------------------


def test_a_good_table_passes():
    stats.check(random_table(0))


@pytest.mark.parametrize("column", ["task", "correct", "speedup", "speedup_lo"])
def test_a_missing_column_is_named(column):
    samples = random_table(0).drop(columns=column)
    says(lambda: stats.check(samples), f"lacks the columns {column}")
    says(lambda: stats.scaling_curve(samples), column)


def test_missing_extra_columns_are_named_together():
    says(lambda: stats.check(random_table(0), ["nll_sum"], ["seed"]), "nll_sum, seed")


def test_an_empty_table_is_refused():
    says(lambda: stats.check(random_table(0).iloc[:0]), "no rows")
    says(lambda: stats.sample_rates(random_table(0).iloc[:0]), "no rows")


@pytest.mark.parametrize(
    "column,value,words",
    [
        ("task", None, "has task = None, not a name"),
        ("correct", None, "has correct = None, not true or false"),
        ("correct", NAN, "has correct = nan, not true or false"),
        ("correct", "yes", "has correct = 'yes', not true or false"),
        ("speedup", NAN, "has speedup = nan, not a finite number"),
        ("speedup", float("inf"), "has speedup = inf, not a finite number"),
        ("speedup", -2.0, "has speedup = -2.0, not positive"),
        ("speedup", 0.0, "has speedup = 0.0, not positive"),
        ("speedup", "fast", "has speedup = 'fast', not a number"),
        ("speedup_lo", NAN, "has speedup_lo = nan, not a finite number"),
        ("nll_sum", NAN, "has nll_sum = nan, not a finite number"),
        ("nll_sum", float("inf"), "has nll_sum = inf, not a finite number"),
        ("nll_sum", float("-inf"), "has nll_sum = -inf, not a finite number"),
        ("nll_sum", "3", "has nll_sum = '3', not a number"),
        ("nll_sum", None, "has nll_sum = None, not a number"),
    ],
)
def test_a_wrong_cell_is_named_with_its_row(column, value, words):
    samples = table({"a": [1.5, 2.0], "b": [3.0, 1.2]}, nll_sum=1.0).astype(
        {column: object}
    )  # rows 0 to 3; row 3 is sample 1 of b
    samples.at[3, column] = value
    task = None if column == "task" else "b"
    where = f"row 3 (task {task}, index 1)"
    says(lambda: stats.check(samples, ["nll_sum"]), where, words, "1 of 4 rows")
    several = pd.concat([samples, samples.iloc[3:]])  # the first is named, all are counted
    says(lambda: stats.check(several, ["nll_sum"]), where, words, "2 of 5 rows")


@pytest.mark.parametrize("dtype", [object, "float64"])
def test_whole_numbers_are_numbers_in_a_column_of_any_type(dtype):
    samples = table({"a": [1.5, 0]}, nll_sum=[3, 4])
    samples["nll_sum"] = samples["nll_sum"].astype(dtype)
    stats.check(samples, ["nll_sum"])


def test_the_speedup_of_an_incorrect_sample_may_be_anything():
    stats.check(table({"a": [1.5, 0, 0, 0]}).assign(speedup=[1.5, NAN, -1, 0]))


# --- shares of samples --------------------------------------------------------------------------


def test_sample_rates_by_hand():
    samples = pd.concat(
        [
            table({"a": [0, 1.0, 4.0, 4.0], "b": [2.0, 1.05, 0, 0]}),
            table({"a": [0, 0]}, arm="ttt", temperature=0.5),
        ]
    )
    rates = stats.sample_rates(samples).set_index(["arm", "temperature"])
    row = rates.loc[("best-of-n", 1.0)]
    assert (row.tasks, row.samples) == (2, 8)
    assert row.correct_rate == 5 / 8
    assert row.sample_fast_1 == 3 / 8  # 4.0, 4.0, 2.0: the lower end of 1.05 is 0.945
    assert row.sample_fast_1_point == 4 / 8
    assert row.speedup_gmean == pytest.approx((1 * 4 * 4 * 2 * 1.05) ** (1 / 5))
    assert row.speedup_mean == pytest.approx(12.05 / 5)
    assert row.speedup_median == 2.0
    assert row.distinct == 3  # a: 0, 1, 4; b: 2, 1.05, 0
    assert row.sample_fast_1_lo <= 3 / 8 <= row.sample_fast_1_hi
    none = rates.loc[("ttt", 0.5)]
    assert none.correct_rate == none.sample_fast_1 == none.sample_fast_1_hi == 0
    assert np.isnan(none.speedup_gmean)


def test_a_group_without_a_temperature_is_not_dropped():
    samples = pd.concat([table({"a": [2.0]}), table({"a": [2.0, 0]}, temperature=NAN)])
    assert stats.sample_rates(samples)["samples"].tolist() == [1, 2]


# --- curves -------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", stats.METRICS)
@pytest.mark.parametrize("seed", range(3))
def test_curves_rise_with_k_whatever_the_order_of_the_rows(metric, seed):
    samples = random_table(seed)
    curve = stats.scaling_curve(samples, metric, bootstrap=50)
    assert curve.table["k"].tolist() == list(range(1, 8))
    for column in ("value", "lo", "hi"):
        assert (np.diff(curve.table[column]) >= -1e-12).all()
    assert (curve.table.lo <= curve.table.value + 1e-12).all()
    assert (curve.table.hi >= curve.table.value - 1e-12).all()
    shuffled = stats.scaling_curve(samples.sample(frac=1, random_state=seed), metric, 50)
    pd.testing.assert_frame_equal(curve.table, shuffled.table)


def best_of_subsets(metric, values, lo, k):
    """What one task contributes to `metric`, from every subset of k of its samples."""
    values = np.array(values)
    worth = np.maximum(values, 1.0)  # an incorrect sample is a 0 here
    per_sample = {
        "task_success": values * lo > 1,
        "task_success_point": values > 1,
        "task_correct": values > 0,
        "speedup_gmean": np.log(worth),
        "speedup_median": worth,
        "speedup_mean": worth,
    }[metric]
    return np.mean([max(s) for s in combinations(per_sample.tolist(), k)])


@pytest.mark.parametrize("metric", stats.METRICS)
def test_curves_against_every_subset(metric):
    speedups = {
        "a": [0, 0, 0, 0],
        "b": [1.05, 0, 2.0, 0.5],
        "c": [3.0, 1.3, 1.3, 0],
        "d": [0.7] * 4,
    }
    over = {"speedup_gmean": lambda v: np.exp(np.mean(v)), "speedup_median": np.median}
    curve = stats.scaling_curve(table(speedups), metric, bootstrap=10)
    for k in (1, 2, 3, 4):
        each = [best_of_subsets(metric, v, 0.9, k) for v in speedups.values()]
        truth = over.get(metric, np.mean)(each)
        assert curve.table["value"][k - 1] == pytest.approx(truth, abs=1e-12)


@pytest.mark.parametrize(
    "rule,metric", [("interval", "task_success"), ("point", "task_success_point")]
)
def test_success_at_K_is_the_plain_share_and_at_1_the_sample_rate(rule, metric):
    samples = random_table(5)
    value = stats.scaling_curve(samples, metric, bootstrap=10).table["value"]
    by_task = stats.fast(samples, rule).groupby(samples["task"])
    assert value.iloc[-1] == pytest.approx(by_task.any().mean())
    assert value.iloc[0] == pytest.approx(by_task.mean().mean())
    assert 0 < value.iloc[0] < value.iloc[-1]


def test_one_sample_a_task_is_weighed_by_task_not_by_sample():
    # a: 1 of 1 fast, b: 1 of 4: the mean of 1 and 1/4, not 2 of 5
    curve = stats.scaling_curve(table({"a": [2.0], "b": [2.0, 0, 0, 0]}), bootstrap=10)
    assert curve.table["k"].tolist() == [1]  # the smallest number of samples
    assert curve.table["value"].tolist() == [pytest.approx(0.625)]


def test_a_task_without_a_correct_sample_is_counted():
    with_, without = {"a": [2.0, 4.0]}, {"a": [2.0, 4.0], "b": [0, 0]}

    def ends(speedups, metric):
        return stats.scaling_curve(table(speedups), metric, bootstrap=10).table["value"].iloc[-1]

    assert ends(with_, "task_success") == 1 and ends(without, "task_success") == 0.5
    assert ends(with_, "task_correct") == 1 and ends(without, "task_correct") == 0.5
    assert ends(without, "speedup_gmean") == pytest.approx(2)  # sqrt(4 * 1)
    assert ends(without, "speedup_mean") == pytest.approx(2.5)
    fallback = stats.scaling_curve(table(without), "speedup_mean", 10, fallback=0.0)
    assert fallback.table["value"].iloc[-1] == pytest.approx(2)  # (4 + 0) / 2


def test_the_geometric_curve_averages_logarithms_over_draws_too():
    curve = stats.scaling_curve(table({"a": [2.0, 8.0]}), "speedup_gmean", bootstrap=10)
    np.testing.assert_allclose(curve.table["value"], [4, 8])  # sqrt(2 * 8), not 5


def test_curves_refuse_what_they_cannot_draw():
    samples = table({"a": [2.0]})
    says(lambda: stats.scaling_curve(samples, "fast_1"), "'fast_1'", "task_success")
    says(lambda: stats.scaling_curve(samples.iloc[:0]), "no rows")
    says(lambda: stats.scaling_curve(samples, "speedup_gmean", fallback=0.0), "fallback above 0")


def test_saturation_on_known_curves():
    # one good sample of four: k / 4
    line = stats.scaling_curve(table({"a": [2.0, 0, 0, 0]}))
    reached = [line.saturation(share, bootstrap=10)["k"] for share in (0.2, 0.5, 0.6, 0.75, 0.99)]
    assert reached == [1, 2, 3, 3, 4]
    # speedups 1 and 4: 2 for one sample (sqrt(1 * 4)), 4 for two; the gain over 1 is 1, then 3
    gain = stats.scaling_curve(table({"a": [1.0, 4.0]}), "speedup_gmean")
    assert [gain.saturation(share, 10)["k"] for share in (0.33, 0.34)] == [1, 2]
    assert gain.saturation(0.5, 10, floor=0.0)["k"] == 1  # 2 is half of 4
    flat = stats.scaling_curve(table({"a": [2.0] * 5, "b": [3.0] * 5})).saturation(bootstrap=10)
    assert flat == {"k": 1, "lo": 1, "hi": 1, "undefined": 0}


@pytest.mark.parametrize("metric", stats.METRICS)
def test_a_curve_that_never_leaves_its_floor_does_not_saturate(metric):
    # different numbers of samples, so that rounding is not hidden by whole weights
    speedups = {"a": [0, 0, 0], "b": [0] * 700}
    found = stats.scaling_curve(table(speedups), metric, bootstrap=10).saturation(bootstrap=10)
    assert all(np.isnan(found[key]) for key in ("k", "lo", "hi")) and found["undefined"] == 1


def test_draws_without_any_success_are_counted_not_hidden():
    found = stats.scaling_curve(table({"a": [2.0, 2.0], "b": [0, 0]})).saturation(bootstrap=2000)
    assert (found["k"], found["lo"], found["hi"]) == (1, 1, 1)
    assert found["undefined"] == pytest.approx(0.25, abs=0.05)  # both draws are b: 1/2 * 1/2


# --- bootstrap ----------------------------------------------------------------------------------


def test_the_bootstrap_is_seeded():
    samples = random_table(3, tasks=12)

    def rate(t):
        return float(t["correct"].mean())

    for call in (
        lambda seed: (
            stats.scaling_curve(samples, seed=seed).table[["lo", "hi"]].to_numpy().tolist()
        ),
        lambda seed: stats.clustered_bootstrap(samples, rate, 50, seed),
        lambda seed: stats.bootstrap_mean(np.arange(9.0) ** 2, 50, seed),
        lambda seed: stats.sample_rates(samples, seed=seed)["sample_fast_1_lo"].tolist(),
        lambda seed: stats.scaling_curve(samples).draws(20, seed, within=True).tolist(),
    ):
        assert call(7) == call(7) and call(7) != call(8)


def test_bootstrap_mean_of_two_values_by_hand():
    # draws of two from (0, 1): means 0, 0.5, 1 with chance 1/4, 1/2, 1/4
    assert stats.bootstrap_mean([0, 1]) == {"value": 0.5, "lo": 0, "hi": 1, "n": 2}
    assert stats.bootstrap_mean([3, 3, 3]) == {"value": 3, "lo": 3, "hi": 3, "n": 3}
    none = stats.bootstrap_mean([])
    assert none["n"] == 0 and np.isnan([none["value"], none["lo"], none["hi"]]).all()


def test_the_clustered_bootstrap_draws_whole_tasks_and_renames_them():
    samples = table({"a": [2.0] * 3, "b": [0] * 5})
    seen = Counter()

    def statistic(drawn):
        if (drawn is samples) or drawn["task"].nunique() == 2:
            seen[len(drawn)] += 1
        return float(drawn["correct"].mean())

    found = stats.clustered_bootstrap(samples, statistic, 400)
    assert (found["value"], found["lo"], found["hi"]) == (3 / 8, 0, 1)
    assert (found["tasks"], found["samples"], found["undefined"]) == (2, 8, 0)
    # a task that is drawn twice stays two tasks: sizes 3+3, 3+5, 5+5 in the ratio 1 : 2 : 1
    assert sum(seen.values()) == 401 and set(seen) == {6, 8, 10}
    assert seen[6] / 400 == pytest.approx(0.25, abs=0.08)


def test_the_clustered_bootstrap_leaves_out_and_counts_undefined_draws():
    samples = table({"a": [2.0], "b": [0]})

    def share(drawn):
        return float(drawn["speedup"].mean())  # nan when b is drawn twice

    found = stats.clustered_bootstrap(samples, share, 400)
    assert (found["lo"], found["hi"]) == (2, 2)
    assert found["undefined"] == pytest.approx(0.25, abs=0.08)
    never = stats.clustered_bootstrap(samples, lambda drawn: NAN, 10)
    assert np.isnan(never["lo"]) and never["undefined"] == 1


def simulated_tasks(rng, tasks=20, n=16):
    """Shares of successes by task, each task with its own rate: uniform, so the truth is 1/2."""
    return rng.random((tasks, n)) < rng.random((tasks, 1))


def coverage(interval, truth, replications=200):
    rng = np.random.default_rng(2024)
    hits = [lo <= truth <= hi for lo, hi in (interval(rng) for _ in range(replications))]
    return float(np.mean(hits))


def test_bootstrap_mean_covers_where_the_independent_interval_does_not():
    def clustered(rng):
        found = stats.bootstrap_mean(simulated_tasks(rng).mean(axis=1), 400)
        return found["lo"], found["hi"]

    def independent(rng):
        hits = simulated_tasks(rng)
        half = 1.96 * sqrt(hits.mean() * (1 - hits.mean()) / hits.size)
        return hits.mean() - half, hits.mean() + half

    assert 0.88 <= coverage(clustered, 0.5) <= 0.99
    assert coverage(independent, 0.5) < 0.75


def as_table(hits):
    tasks, n = hits.shape
    one = hits.ravel()
    return pd.DataFrame(
        {
            "arm": "a",
            "temperature": 1.0,
            "task": np.repeat([f"t{i:02}" for i in range(tasks)], n),
            "correct": one,
            "speedup": np.where(one, 2.0, np.nan),
            "speedup_lo": np.where(one, 1.5, np.nan),
            "code_sha256": "x",
        }
    )


def test_sample_rates_cover():
    def interval(rng):
        row = stats.sample_rates(as_table(simulated_tasks(rng)), bootstrap=300).iloc[0]
        return row.sample_fast_1_lo, row.sample_fast_1_hi

    assert 0.88 <= coverage(interval, 0.5, 100) <= 0.99


def test_the_clustered_bootstrap_gives_the_interval_of_sample_rates():
    samples = as_table(simulated_tasks(np.random.default_rng(9)))
    rates = stats.sample_rates(samples, bootstrap=4000).iloc[0]
    drawn = stats.clustered_bootstrap(samples, lambda t: stats.fast(t).mean(), 400)
    assert drawn["value"] == rates.sample_fast_1
    assert drawn["lo"] == pytest.approx(rates.sample_fast_1_lo, abs=0.03)
    assert drawn["hi"] == pytest.approx(rates.sample_fast_1_hi, abs=0.03)


def test_the_curve_covers_at_every_budget():
    ks = np.arange(1, 9)
    truth = 1 - 1 / (ks + 1)  # 1 - E[(1 - p)^k] for a uniform p

    def interval(rng):
        hits = as_table(simulated_tasks(rng, tasks=24, n=8))
        band = stats.scaling_curve(hits, bootstrap=200).table
        return band[["lo", "hi"]].to_numpy().T

    rng = np.random.default_rng(11)
    bands = np.array([interval(rng) for _ in range(50)])
    hit = ((bands[:, 0] <= truth) & (truth <= bands[:, 1])).mean(axis=0)
    assert (hit >= 0.86).all() and (hit <= 1).all()


def test_resampling_within_tasks_lowers_a_maximum():
    curve = stats.scaling_curve(table({f"t{i}": [2.0] + [0] * 7 for i in range(10)}))
    assert curve.draws(200)[:, -1].mean() == 1
    # one good of 8 is drawn at least once in 8: 1 - (7/8)^8 = 0.656
    assert curve.draws(400, within=True)[:, -1].mean() == pytest.approx(1 - (7 / 8) ** 8, abs=0.03)


# --- comparisons --------------------------------------------------------------------------------


def test_cohens_h_of_the_paper():
    # 2 asin(sqrt 0.8) - 2 asin(sqrt 0.5) = 2.2143 - 1.5708
    assert stats.cohens_h(0.8, 0.5)["h"] == pytest.approx(0.6435, abs=5e-5)
    assert stats.cohens_h(0.5, 0.8)["h"] == pytest.approx(-0.6435, abs=5e-5)
    assert stats.cohens_h(1, 0)["h"] == pytest.approx(np.pi)
    assert stats.cohens_h(0.3, 0.3)["h"] == 0


def test_the_interval_of_cohens_h():
    found = stats.cohens_h(0.8, 0.5, 10, 10)
    half = 1.959964 * sqrt(1 / 10 + 1 / 10)  # 0.8765
    assert found["hi"] - found["h"] == pytest.approx(half, abs=1e-6)
    assert found["h"] - found["lo"] == pytest.approx(half, abs=1e-6)
    assert np.isnan(stats.cohens_h(0.8, 0.5)["lo"])


@pytest.mark.parametrize("p1,p2,wrong", [(1.2, 0.5, "1.2"), (0.5, -0.1, "-0.1"), (0.5, NAN, "nan")])
def test_cohens_h_refuses_what_is_no_share(p1, p2, wrong):
    says(lambda: stats.cohens_h(p1, p2), "between 0 and 1", wrong)


def test_the_sign_test_of_the_paper():
    # three discordant pairs, all won: 1/8 one-sided, 2/8 two-sided
    assert stats.sign_test(3, 0) == {"n": 3, "p_one_sided": 0.125, "p_two_sided": 0.25}
    assert stats.sign_test(0, 3)["p_one_sided"] == 1
    assert stats.sign_test(0, 0) == {"n": 0, "p_one_sided": 1, "p_two_sided": 1}
    # 4 of 5: (C(5,4) + C(5,5)) / 32 = 6/32
    assert stats.sign_test(4, 1)["p_one_sided"] == pytest.approx(6 / 32)
    assert stats.sign_test(4, 1)["p_two_sided"] == pytest.approx(12 / 32)


def test_the_power_of_the_sign_test_over_all_outcomes():
    chances = {1: 0.55, -1: 0.15, 0: 0.3}
    for n in (5, 6, 8):
        truth = 0.0
        for outcome in product(chances, repeat=n):
            p = stats_sign(outcome.count(1), outcome.count(-1))
            truth += np.prod([chances[o] for o in outcome]) if p <= 0.05 else 0.0
        assert stats.sign_test_power(n, 0.55, 0.15) == pytest.approx(truth)


def stats_sign(wins, losses):
    n = wins + losses
    return min(1.0, 2 * sum(comb(n, i) for i in range(max(wins, losses), n + 1)) / 2**n)


def test_the_power_of_the_sign_test_by_hand():
    # five wins: 2/32 = 0.0625 is not below 0.05; six: 2/64 = 0.03125 is
    assert stats.sign_test_power(5, 1, 0) == 0 and stats.sign_test_power(6, 1, 0) == 1
    assert stats.sign_test_power(6, 0.5, 0) == pytest.approx(1 / 64)  # all six must be wins
    assert stats.sign_test_power(30, 0.5, 0.5) < 0.05  # no effect: at most alpha
    assert stats.tasks_needed(1, 0) == 6
    assert stats.tasks_needed(0.3, 0.3) == stats.tasks_needed(0, 0) == np.inf
    assert stats.tasks_needed(0.01, 0) == 790  # the first n with P(B(n, 0.01) >= 6) >= 0.8
    n = int(stats.tasks_needed(0.6, 0.1))
    assert stats.sign_test_power(n, 0.6, 0.1) >= 0.8 > stats.sign_test_power(n - 1, 0.6, 0.1)


@pytest.mark.parametrize("n,win,loss", [(0, 0.5, 0.2), (5, -0.1, 0.5), (5, 0.7, 0.6), (5, 0, 0)])
def test_the_power_refuses_impossible_chances(n, win, loss):
    says(lambda: stats.sign_test_power(n, win, loss), f"n={n}", f"p_win={win}", f"p_loss={loss}")


def test_five_tasks_cannot_go_below_the_floor_of_wilcoxon():
    found = stats.compare_paired([2, 3, 5, 7, 11], [1, 1, 1, 1, 1])
    assert found["p_wilcoxon"] == found["p_wilcoxon_floor"] == pytest.approx(0.0625)  # 2 / 2^5
    assert found["p_sign"] == pytest.approx(0.0625) and found["p_permutation"] == 0.0625
    assert found["p_sign_one_sided"] == pytest.approx(1 / 32)


def test_a_paired_comparison_by_hand():
    found = stats.compare_paired([8, 1, 3, 2], [2, 2, 3, 1])  # ratios 4, 1/2, 1, 2
    assert (found["n"], found["n_different"]) == (4, 3)
    assert found["ratio"] == pytest.approx(4 ** (1 / 4))  # 4 * 1/2 * 1 * 2 = 4
    assert found["lo"] <= found["ratio"] <= found["hi"]
    # two wins of three: C(3,2) + C(3,3) = 4 of 8, doubled
    assert (found["p_sign"], found["p_sign_one_sided"]) == (1, 0.5)
    assert found["p_wilcoxon_floor"] == 0.25


def test_the_sign_flip_test_over_all_flips():
    rng = np.random.default_rng(3)
    for n in (2, 3, 5, 8):
        values = rng.normal(0.4, 1, n)
        means = [np.mean(np.multiply(values, flips)) for flips in product((1, -1), repeat=n)]
        truth = np.mean(np.abs(means) >= abs(values.mean()) - 1e-12)
        assert stats.sign_flip_test(values) == pytest.approx(truth)
    assert stats.sign_flip_test([0, 0, 0]) == 1
    many = rng.normal(0.5, 1, 40)
    assert stats.sign_flip_test(many) == stats.sign_flip_test(many)
    assert stats.sign_flip_test(many) == pytest.approx(
        scipy.stats.ttest_1samp(many, 0).pvalue, abs=0.01
    )


def test_the_papers_wilcoxon_p_belongs_to_ten_pairs_as_independent_units():
    """The pairs are not published; 0.084 is the exact two-sided p of n = 10 with rank sum 10."""
    ranks = np.arange(1.0, 11.0)
    against = np.isin(ranks, [1, 2, 3, 4])
    found = stats.compare_paired(np.exp(np.where(against, -ranks, ranks) / 10), np.ones(10))
    assert found["p_wilcoxon"] == pytest.approx(86 / 1024) == pytest.approx(0.084, abs=5e-5)
    assert stats.compare_paired(np.exp(ranks[:5]), np.ones(5))["p_wilcoxon"] == 0.0625 < 0.084


def test_wilcoxon_against_scipy():
    rng = np.random.default_rng(4)
    a, b = rng.lognormal(0.3, 1, 12), rng.lognormal(0, 1, 12)
    truth = scipy.stats.wilcoxon(np.log(a), np.log(b), method="exact").pvalue
    assert stats.compare_paired(a, b)["p_wilcoxon"] == pytest.approx(truth)


def test_a_ratio_ties_with_its_inverse_whatever_the_rounding():
    # log(3/5), log(5/3) and log(exp(log 3)/5) differ in their last bits
    a, b = [1, 3, 5, 5, 7, 7, 1, 3], [7, 5, 3, 1, 1, 5, 5, 1]
    signed = [-5, -1, 1, 4, 5, 0, -4, 3]  # the same order and ties: 7, 5/3, 5, 7/5 (0: lowest), 3
    signed[5] = 0.5
    truth = scipy.stats.wilcoxon(signed).pvalue
    assert stats.compare_paired(a, b)["p_wilcoxon"] == pytest.approx(truth)
    assert stats.compare_paired(np.exp(np.log(a)), b)["p_wilcoxon"] == pytest.approx(truth)


def test_equal_speedups_are_no_difference_whatever_the_rounding():
    same = np.array([2.0, 3.0, 5.0, 7.0, 11.0, 13.0])
    for other in (same, same * (1 + 1e-15), np.exp(np.log(same))):
        found = stats.compare_paired(other, same)
        assert found["n_different"] == 0 and found["ratio"] == pytest.approx(1)
        assert found["p_sign"] == found["p_wilcoxon"] == found["p_permutation"] == 1


@pytest.mark.parametrize("pairs", [0, 1, 2])
def test_few_pairs_prove_nothing(pairs):
    found = stats.compare_paired([3.0] * pairs, [2.0] * pairs)
    assert found["n"] == pairs
    for name in ("p_sign", "p_wilcoxon", "p_permutation", "p_wilcoxon_floor"):
        assert found[name] == pytest.approx(min(1.0, 2.0 ** (1 - pairs)))


def test_a_paired_comparison_refuses_what_is_no_pair():
    says(lambda: stats.compare_paired([1, 2], [1]), "pairs", "2 and 1")
    for wrong in (0.0, -1.0, NAN, float("inf")):
        says(lambda wrong=wrong: stats.compare_paired([1, 2], [1, wrong]), "pair 1", str(wrong))
        says(lambda wrong=wrong: stats.compare_paired([wrong, 2], [1, 1]), "pair 0", str(wrong))


# --- association --------------------------------------------------------------------------------


def test_spearman_by_hand_and_against_scipy():
    # squared rank differences of 1..5 and 2 1 4 3 5: 4; rho = 1 - 6 * 4 / (5 * 24) = 0.8
    found = stats.spearman([1, 2, 3, 4, 5], [20, 10, 40, 30, 50])
    assert found["rho"] == pytest.approx(0.8) and found["n"] == 5
    rng = np.random.default_rng(5)
    for _ in range(10):
        x, y = rng.integers(0, 6, 25), rng.integers(0, 6, 25)  # many ties
        truth = scipy.stats.spearmanr(x, y)
        found = stats.spearman(x, y)
        assert found["rho"] == pytest.approx(truth.statistic)
        assert found["p"] == pytest.approx(truth.pvalue)
    assert stats.spearman([1, 2, 3, 4], [1, e, e**2, e**9]) == {
        "rho": pytest.approx(1),
        "p": pytest.approx(0, abs=1e-12),
        "n": 4,
    }


@pytest.mark.parametrize("x,y", [([1, 1, 1], [1, 2, 3]), ([1, 2, 3], [4, 4, 4]), ([1, 2], [2, 1])])
def test_spearman_is_undefined_where_nothing_varies(x, y):
    found = stats.spearman(x, y)
    assert np.isnan([found["rho"], found["p"]]).all() and found["n"] == len(x)


def test_the_papers_correlation_has_the_papers_p():
    # 550 samples: rho -0.047, p 0.27; the probe's 9.8e-17 for rho -0.442 needs 320, not 80
    assert stats.correlation_p(-0.047, 550) == pytest.approx(0.27, abs=0.005)
    assert stats.correlation_p(0.003, 550, controls=1) == pytest.approx(0.95, abs=0.01)
    assert stats.correlation_p(-0.442, 320) == pytest.approx(9.8e-17, rel=0.3)
    assert stats.correlation_p(-0.442, 80) > 1e-5
    assert np.isnan(stats.correlation_p(0.5, 2)) and np.isnan(stats.correlation_p(NAN, 9))


def residual_correlation(x, y, control):
    """Partial Spearman the long way: ranks, each regressed on the control's ranks."""
    x, y, control = (scipy.stats.rankdata(v) for v in (x, y, control))
    design = np.column_stack([np.ones(len(control)), control])
    left, right = (v - design @ np.linalg.lstsq(design, v, rcond=None)[0] for v in (x, y))
    rho = np.corrcoef(left, right)[0, 1]
    free = len(x) - 3
    t = rho * sqrt(free / (1 - rho**2))
    return rho, 2 * scipy.stats.t.sf(abs(t), free)


def test_partial_spearman_against_the_regression_of_ranks():
    rng = np.random.default_rng(6)
    for n in (8, 30, 200):
        z = rng.integers(1, 20, n)  # token counts: tied
        x, y = z + rng.normal(0, 5, n), -z + rng.integers(0, 9, n)
        found = stats.partial_spearman(x, y, z)
        rho, p = residual_correlation(x, y, z)
        assert found["rho"] == pytest.approx(rho, abs=1e-10) and found["n"] == n
        assert found["p"] == pytest.approx(p)


def test_partial_spearman_by_hand():
    # squared rank differences 4, 36, 26 of n = 5 give xy 0.8, xz -0.8, yz -0.3
    found = stats.partial_spearman([1, 2, 3, 4, 5], [2, 1, 4, 3, 5], [5, 3, 4, 1, 2])
    assert found["rho"] == pytest.approx((0.8 - 0.24) / sqrt((1 - 0.64) * (1 - 0.09)))


def test_a_common_cause_is_held_fixed():
    rng = np.random.default_rng(7)
    z = rng.normal(size=400)
    x, y = z + rng.normal(size=400), z + rng.normal(size=400)
    assert stats.spearman(x, y)["rho"] > 0.35
    assert abs(stats.partial_spearman(x, y, z)["rho"]) < 0.1


def test_a_control_that_does_not_vary_controls_nothing():
    x, y = [1, 2, 3, 4, 5], [2, 1, 4, 3, 5]
    assert stats.partial_spearman(x, y, [7] * 5) == stats.spearman(x, y)


@pytest.mark.parametrize("n", [4, 5, 7, 11, 30, 101])
def test_a_control_that_decides_the_ranks_leaves_nothing(n):
    rng = np.random.default_rng(n)
    x, y = rng.normal(size=n), rng.normal(size=n)
    for a, b, control in ((x, y, x**3), (x, y, -y), (x, x, x)):
        found = stats.partial_spearman(a, b, control)
        assert np.isnan(found["rho"]) and np.isnan(found["p"])


def test_what_is_not_known_is_not_correlated():
    x = np.arange(6.0)
    y, hole = x[::-1] ** 2, np.array([0, 1, 2, 3, 4, NAN])
    assert np.isnan(stats.spearman(x, hole)["rho"])
    for args in ((hole, y, x), (x, hole, y), (x, y, hole)):
        assert np.isnan(stats.partial_spearman(*args)["rho"])


# --- power --------------------------------------------------------------------------------------


def test_the_power_of_the_t_test_is_that_of_many_simulated_ones():
    rng = np.random.default_rng(0)
    for n, effect in ((5, 0.8), (12, 0.5), (20, 1.0)):
        draws = rng.normal(effect, 1.0, (20000, n))
        seen = (scipy.stats.ttest_1samp(draws, 0, axis=1).pvalue < 0.05).mean()
        assert stats.mean_test_power(n, effect) == pytest.approx(seen, abs=0.02)
        assert stats.mean_test_power(n, -effect) == stats.mean_test_power(n, effect)
    assert stats.mean_test_power(20, 0.0) == pytest.approx(0.05, abs=1e-6)
    assert stats.mean_test_power(500, 5.0) == pytest.approx(1.0)


def test_tasks_needed_is_the_first_n_with_that_power():
    differences = np.random.default_rng(1).normal(0.4, 1.0, 20)
    effect = differences.mean() / differences.std(ddof=1)
    n = stats.tasks_needed_mean(differences)
    assert stats.mean_test_power(n, effect) >= 0.8 > stats.mean_test_power(n - 1, effect)
    assert stats.tasks_needed_mean(-differences) == n
    assert stats.tasks_needed_mean(differences, power=0.95) > n
    # Cohen (1988), table 2.4.1 for d = 0.5, two-sided 0.05, power 0.8: 34 pairs.
    pattern = np.array([1.0, -1.0] * 50)
    assert stats.tasks_needed_mean(pattern / pattern.std(ddof=1) + 0.5) == 34


def test_tasks_needed_where_nothing_differs_or_everything_alike():
    assert stats.tasks_needed_mean([0.0, 0.0, 0.0]) == np.inf
    assert stats.tasks_needed_mean([1.0, -1.0]) == np.inf
    assert stats.tasks_needed_mean([0.3]) == np.inf
    assert stats.tasks_needed_mean([0.3, 0.3, 0.3]) == 2
    with pytest.raises(UsageError, match="no such t test"):
        stats.mean_test_power(1, 0.5)


def test_one_import_serves_a_notebook():
    from ttkit import hypothesis, resample

    assert all(hasattr(stats, name) for name in stats.__all__)
    assert stats.cohens_h is hypothesis.cohens_h
    assert stats.interval is resample.interval


def test_the_chance_test_is_the_sum_over_all_outcomes():
    chances = [0.1, 0.5, 0.25, 0.0, 1.0]
    weight = {}
    for hits in product((0, 1), repeat=5):
        p = np.prod([c if hit else 1 - c for hit, c in zip(hits, chances, strict=True)])
        weight[sum(hits)] = weight.get(sum(hits), 0) + p
    mean = sum(chances)
    for hits in ([0, 0, 0, 0, 1], [1, 1, 0, 0, 1], [1, 1, 1, 0, 1], [0.5, 0.5, 0, 0, 1]):
        found, total = stats.chance_test(hits, chances), sum(hits)
        more = sum(p for s, p in weight.items() if s >= total)
        far = sum(p for s, p in weight.items() if abs(s - mean) >= abs(total - mean) - 1e-9)
        assert found["p_one_sided"] == pytest.approx(more)
        assert found["p_two_sided"] == pytest.approx(far) and found["n"] == 3
    equal = stats.chance_test([1] * 8 + [0] * 12, [0.4] * 20)
    assert equal["p_two_sided"] == pytest.approx(1)
    truth = scipy.stats.binomtest(14, 20, 0.4, "greater").pvalue
    found = stats.chance_test([1] * 14 + [0] * 6, [0.4] * 20)
    assert found["p_one_sided"] == pytest.approx(truth)
    for hits, odds in (([1], [0.5, 0.5]), ([2.0], [0.5]), ([1.0], [1.5]), ([np.nan], [0.5])):
        with pytest.raises(UsageError):
            stats.chance_test(hits, odds)
