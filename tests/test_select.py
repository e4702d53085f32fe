"""Selection: against every order of the samples, by hand, and what it refuses."""

from itertools import combinations, permutations, product

import numpy as np
import pandas as pd
import pytest

from ttkit import prefilter, select, stats
from ttkit.errors import UsageError

NAN = float("nan")


def table(tasks, lo=0.9, **columns):
    """{task: [(nll, speedup), ...]} as a samples table; speedup 0 stands for an incorrect sample.

    Each interval begins at `lo` times the speedup. Samples of equal nll and speedup are one body.
    """
    rows = [
        {
            "arm": "best_of_n",
            "step": 0,
            "task": task,
            "temperature": 1.0,
            "index": index,
            "code_sha256": f"{nll}/{speedup}",
            "correct": speedup > 0,
            "speedup": speedup or NAN,
            "speedup_lo": speedup * lo or NAN,
            "n_tokens": 10 + index,
            "nll_sum": float(nll),
            "nll_mean": -float(nll),
            "nll_sum_temp": float(nll),
            "nll_mean_temp": -float(nll),
        }
        for task, samples in tasks.items()
        for index, (nll, speedup) in enumerate(samples)
    ]
    return pd.DataFrame(rows).assign(**columns)


def random_table(seed, tasks=5, n=8, ties=True):
    rng = np.random.default_rng(seed)
    levels = 3 if ties else 10**6
    return table(
        {
            f"t{t}": [
                (rng.integers(levels), round(rng.lognormal(0.1, 0.5), 3) * (rng.random() < 0.7))
                for _ in range(n)
            ]
            for t in range(tasks)
        }
    )


def says(call, *words):
    """`call` raises a UsageError of one sentence that holds all the `words`."""
    with pytest.raises(UsageError) as caught:
        call()
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def value(picks, strategy, column="speedup", key="nll_sum", k=1, task=None):
    wanted = "" if strategy in ("oracle", "random") else key
    part = picks[(picks.strategy == strategy) & (picks.key == wanted) & (picks.k == k)]
    part = part if task is None else part[part.task == task]
    assert len(part) == 1
    return part[column].iloc[0]


# --- one task: which sample is kept -------------------------------------------------------------


def weights_over_all_orders(score, speed, k):
    """The kept sample counted over every order that the scores allow."""
    counts, total = np.zeros(len(score)), 0
    for order in permutations(range(len(score))):
        if any(score[a] < score[b] for a, b in zip(order, order[1:], strict=False)):
            continue
        best = max(speed[i] for i in order[:k])
        kept = [i for i in order[:k] if speed[i] == best]
        top = max(score[i] for i in kept)
        kept = [i for i in kept if score[i] == top]
        counts[kept] += 1 / len(kept)
        total += 1
    return counts / total


@pytest.mark.parametrize("seed", range(6))
def test_the_weights_are_those_over_every_order_of_the_ties(seed):
    rng = np.random.default_rng(seed)
    score = rng.integers(0, 3, 6).astype(float)
    speed = rng.integers(1, 4, 6).astype(float)
    for k in range(1, 7):
        weights = select.pick_weights(score, speed, k)
        np.testing.assert_allclose(weights, weights_over_all_orders(score, speed, k), atol=1e-12)
        assert weights.sum() == pytest.approx(1)


def test_a_budget_above_the_number_of_samples_takes_all():
    score, speed = np.array([1.0, 2.0, 3.0]), np.array([5.0, 1.0, 2.0])
    assert select.pick_weights(score, speed, 99).tolist() == [1, 0, 0]


# --- every strategy on every task ---------------------------------------------------------------


HAND = {"a": [(1, 1.0), (2, 1.5), (3, 3.0), (4, 0)], "b": [(5, 4.0), (6, 2.0), (7, 0.5), (8, 1.0)]}


def test_the_strategies_by_hand():
    picks = select.select(table(HAND), ks=[1, 2])
    for task, truth in {"a": [3, 5.5 / 3, 1, 3], "b": [4, 7.5 / 4, 4, 1]}.items():
        assert [value(picks, s, task=task) for s in select.STRATEGIES] == pytest.approx(truth)
    # a: the pairs of its three correct samples have the maxima 1.5, 3, 3
    assert value(picks, "random", k=2, task="a") == pytest.approx(7.5 / 3)
    assert value(picks, "confidence", k=2, task="a") == 1.5
    assert value(picks, "surprisal", k=2, task="b") == 1.0
    assert value(picks, "random", "log_speedup", task="a") == pytest.approx(np.log(4.5) / 3)
    # the other convention has the opposite sign here, and so the opposite pick
    assert value(picks, "surprisal", key="nll_mean", task="b") == 4
    assert (picks.groupby("task").n.first() == 4).all()
    assert picks.groupby("task").n_correct.first().tolist() == [3, 4]


def test_the_two_rules_differ_where_the_interval_reaches_below_one():
    picks = select.select(table({"a": [(1, 1.05), (2, 2.0)]}))  # lower ends 0.945 and 1.8
    assert value(picks, "confidence", "fast_1") == 0
    assert value(picks, "confidence", "fast_1_point") == 1
    assert value(picks, "random", "fast_1") == 0.5


def test_what_is_kept_is_judged_not_what_was_passed_over():
    """The fastest of the picks is kept, though only another one's interval lies above 1."""
    samples = table({"a": [(1, 1.2), (2, 3.0)]}).assign(speedup_lo=[1.1, 0.8])
    picks = select.select(samples, ks=[1, 2])
    for strategy in select.STRATEGIES:
        assert value(picks, strategy, "fast_1", k=2) == value(picks, "oracle", "fast_1") == 0


@pytest.mark.parametrize("seed", range(4))
def test_no_strategy_beats_the_oracle_and_all_meet_it_in_the_end(seed):
    samples = random_table(seed)
    picks = select.select(samples, ks=range(1, 9))
    for task, part in picks.groupby("task"):
        best = value(picks, "oracle", task=task)
        if not part.n_correct.iloc[0]:
            assert part[["fast_1", "fast_1_point", "speedup", "log_speedup"]].isna().all(axis=None)
            continue
        for _, curve in part.groupby(["strategy", "key"]):
            speedup = curve.sort_values("k").speedup.to_numpy()
            assert (np.diff(speedup) > -1e-12).all() and speedup[-1] == pytest.approx(best)


def test_random_is_the_mean_over_all_subsets():
    samples = random_table(7, tasks=1)
    right = samples[samples.correct]
    picks = select.select(samples, ks=[1, 3])
    for k in (1, 3):
        kept = [right.loc[list(c)].speedup.idxmax() for c in combinations(right.index, k)]
        hits = stats.fast(right).loc[kept]
        assert value(picks, "random", k=k) == pytest.approx(right.speedup.loc[kept].mean())
        assert value(picks, "random", "fast_1", k=k) == pytest.approx(hits.mean())


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_the_rows_decides_nothing(seed):
    samples = random_table(seed)
    shuffled = samples.sample(frac=1, random_state=seed)
    for unit in select.UNITS:
        one, two = (select.select(s, ks=[1, 2, 3], unit=unit) for s in (samples, shuffled))
        pd.testing.assert_frame_equal(one, two)


def test_equal_bodies_count_once_each_in_the_distinct_unit():
    samples = table({"a": [(2, 1.0), (2, 1.0), (2, 1.0), (3, 3.0)]})
    assert value(select.select(samples), "random") == pytest.approx(1.5)
    assert value(select.select(samples, unit="distinct"), "random") == pytest.approx(2.0)
    # the same body written two ways: the likelier one stands for it
    samples = table({"a": [(1, 1.0), (9, 1.0), (3, 3.0)]}).assign(code_sha256=["x", "x", "y"])
    assert value(select.select(samples), "surprisal") == 1.0
    assert value(select.select(samples, unit="distinct"), "surprisal") == 3.0


def test_available_keys_are_those_with_values():
    samples = table(HAND).assign(nll_max=NAN, entropy_mean=1.0)
    keys = (*select.CONVENTIONS, "entropy_mean", "n_tokens")
    assert select.available_keys(samples) == keys


# --- over tasks ---------------------------------------------------------------------------------


def test_a_task_without_a_correct_sample_is_counted_apart():
    picks = select.select(table(HAND | {"c": [(1, 0), (2, 0)]}))
    summary = select.summarise(picks)
    assert (summary.tasks == 2).all() and (summary.without == 1).all()
    assert (picks[picks.task == "c"].n_correct == 0).all() and (picks.n > 0).all()
    found = select.compare(picks)
    assert (found["n"], found["without"]) == (2, 1)


def test_the_summary_by_hand():
    summary = select.summarise(select.select(table(HAND), ks=[1]), bootstrap=200)
    row = summary[(summary.strategy == "oracle")].iloc[0]
    assert row.fast_1 == 1 and row.speedup_mean == 3.5 and row.speedup_median == 3.5
    assert row.speedup_gmean == pytest.approx(np.sqrt(12))
    row = summary[(summary.strategy == "surprisal") & (summary.key == "nll_sum")].iloc[0]
    assert row.fast_1 == 0.5 and row.fast_1_lo == 0 and row.fast_1_hi == 1
    assert row.speedup_gmean == pytest.approx(np.sqrt(3))
    assert row.speedup_gmean_lo == pytest.approx(1) and row.speedup_gmean_hi == pytest.approx(3)
    assert row.speedup_mean_lo == 1 and row.speedup_mean_hi == 3


def test_the_summary_is_seeded():
    picks = select.select(random_table(1))
    first, again = select.summarise(picks, seed=3), select.summarise(picks, seed=3)
    pd.testing.assert_frame_equal(first, again)
    other = select.summarise(picks, seed=4)
    assert not np.allclose(first.speedup_mean_lo, other.speedup_mean_lo)


def test_nothing_to_summarise_but_tasks_without_a_correct_sample():
    picks = select.select(table({"a": [(1, 0)], "b": [(2, 0)]}))
    summary = select.summarise(picks)
    assert (summary.tasks == 0).all() and (summary.without == 2).all()
    assert summary[["fast_1", "speedup_gmean", "speedup_mean"]].isna().all(axis=None)
    says(lambda: select.compare(picks), "no task has a correct sample", "surprisal")


def test_the_k_that_matches_the_oracle():
    picks = select.select(table(HAND), ks=[1, 2, 3, 4])

    def found(column, picks=picks, **more):
        rows = select.matches_oracle(picks, column, within=0, **more)
        return rows.set_index(["strategy", "key"])

    assert found("fast_1").loc[("oracle", ""), ["k", "lo", "hi", "never"]].tolist() == [1, 1, 1, 0]
    # surprisal finds 4.0, the likeliest of b, last; confidence finds 3.0, the third of a, last
    assert found("log_speedup").loc[("surprisal", "nll_sum"), "k"] == 4
    assert found("log_speedup").loc[("confidence", "nll_sum"), "k"] == 3
    assert found("fast_1").loc[("surprisal", "nll_sum"), "k"] == 3
    few = found("log_speedup", picks[picks.k <= 2])
    assert np.isnan(few.loc[("surprisal", "nll_sum"), "k"])
    assert 0 < few.loc[("surprisal", "nll_sum"), "never"] <= 1


def test_the_interval_of_the_matching_k_is_that_of_the_tasks():
    """Task a needs 1 pick, task b needs 3: a draw of tasks needs 1 if all of it is a, else 3."""
    tasks = {"a": [(3, 2.0), (2, 1.1), (1, 0.5)], "b": [(3, 0.5), (2, 0.6), (1, 2.0)]}
    picks = select.select(table(tasks), ks=[1, 2, 3], keys=["nll_sum"])
    row = select.matches_oracle(picks, bootstrap=400).set_index("strategy").loc["surprisal"]
    assert (row["k"], row["lo"], row["hi"], row["never"]) == (3, 1, 3, 0)
    only = picks[picks.task == "a"]
    row = select.matches_oracle(only, bootstrap=10).set_index("strategy").loc["surprisal"]
    assert (row["k"], row["lo"], row["hi"]) == (1, 1, 1)
    # within 1 % of a speedup: 1.99 of 2.0 is enough, 1.97 is not
    near = {"a": [(2, 1.99), (1, 2.0)], "b": [(2, 1.97), (1, 2.0)]}
    for task, k in (("a", 1), ("b", 2)):
        one = select.select(table({task: near[task]}), [1, 2], ["nll_sum"])
        rows = select.matches_oracle(one, "log_speedup", bootstrap=5).set_index("strategy")
        assert rows.loc["surprisal", "k"] == k
    none = select.select(table({"a": [(1, 0)]}))
    says(lambda: select.matches_oracle(none), "no task has a correct sample")


PAPER = {  # the paper's counts: surprisal 8 of 10, confidence 5 of 10, 3 discordant pairs
    **{f"s{i}": [(1, 0.5), (2, 2.0)] for i in range(3)},
    **{f"b{i}": [(1, 1.5), (2, 2.0)] for i in range(5)},
    **{f"n{i}": [(1, 0.5), (2, 0.6)] for i in range(2)},
}


def test_the_papers_comparison_gives_the_papers_statistics():
    found = select.compare(select.select(table(PAPER)))
    assert (found["fast_1_first"], found["fast_1_second"]) == (0.8, 0.5)
    assert found["difference"] == pytest.approx(0.3)
    assert found["cohens_h"] == pytest.approx(0.6435, abs=5e-5)
    assert found["cohens_lo"] < 0 < found["cohens_hi"]  # ten pairs do not settle it
    assert (found["wins"], found["losses"]) == (3, 0)
    assert (found["p_sign_one_sided"], found["p_sign"]) == (0.125, 0.25)
    assert (found["n"], found["unit"]) == (10, "task")
    # six discordant pairs that agree are the fewest that settle a two-sided test
    assert found["tasks_needed"] == 25 and stats.sign_test_power(25, 0.3, 0) >= 0.8
    assert stats.sign_test_power(24, 0.3, 0) < 0.8
    swapped = select.compare(select.select(table(PAPER)), "confidence", "surprisal")
    assert swapped["difference"] == pytest.approx(-0.3) and swapped["losses"] == 3
    assert swapped["speedup_ratio"] == pytest.approx(1 / found["speedup_ratio"])


def test_all_comparisons_in_one_table():
    picks = select.select(random_table(2), ks=[1, 3])
    found = select.comparisons(picks)
    assert len(found) == 3 * 4 * 2  # pairs, keys, budgets
    row = found[(found.key == "nll_mean") & (found.k == 3) & (found["second"] == "confidence")]
    one = select.compare(picks, key="nll_mean", k=3)
    assert row.iloc[0].to_dict() == pytest.approx(one, nan_ok=True)


# --- ranking before anything is run -------------------------------------------------------------


@pytest.mark.parametrize("strategy,sign", [("surprisal", 1), ("confidence", -1), ("random", 0)])
def test_prefilter_over_every_order(strategy, sign):
    samples = random_table(3, tasks=1, n=6)
    hit, score = stats.fast(samples).to_numpy(), sign * samples.nll_sum.to_numpy()
    orders = [
        order
        for order in permutations(range(6))
        if all(score[a] >= score[b] for a, b in zip(order, order[1:], strict=False))
    ]
    found = prefilter.curve(samples).query("strategy == @strategy").set_index("m").task_success
    for m in range(1, 7):
        assert found[m] == pytest.approx(np.mean([hit[list(o[:m])].any() for o in orders]))


def test_random_prefiltering_is_pass_at_k():
    samples = random_table(4)
    curve = stats.scaling_curve(samples, "task_success").table
    found = prefilter.curve(samples).query("strategy == 'random'")
    np.testing.assert_allclose(found.task_success, curve.value)
    assert (found.tasks == 5).all() and (found.lo <= found.task_success).all()


def test_running_everything_makes_the_ranking_irrelevant():
    found = prefilter.curve(random_table(5))
    assert found[found.m == 8].task_success.nunique() == 1


# The least likely sample is broken, the next one fast, the likeliest slow.
BROKEN_TAIL = {f"t{i}": [(1, 0.5), (2, 0.5), (3, 0.5), (4, 2.0), (5, 0)] for i in range(6)}


def test_the_crossover_comes_after_the_broken_tail():
    per_task = prefilter.by_task(table(BROKEN_TAIL))
    chance = per_task.groupby(["strategy", "m"]).success.mean().unstack()
    assert chance.loc["surprisal"].tolist() == [0, 1, 1, 1, 1]
    np.testing.assert_allclose(chance.loc["random"], [0.2, 0.4, 0.6, 0.8, 1])
    found = prefilter.crossover(per_task)
    assert found == {"m": 2, "lo": 2, "hi": 2, "never": 0}
    behind = prefilter.crossover(per_task, "random", "surprisal")
    assert np.isnan(behind["m"]) and np.isnan(behind["lo"]) and behind["never"] == 1
    # confidence comes upon the fast sample as the fourth, random has it by then in 4 of 5 orders
    assert prefilter.crossover(per_task, "confidence", "random")["m"] == 4


def test_a_lead_that_is_lost_again_is_no_crossover():
    rows = [
        {"task": "a", "strategy": strategy, "m": m, "success": success}
        for strategy, curve in {
            "surprisal": [0.3, 0.3, 0.9, 1],
            "random": [0.2, 0.5, 0.7, 1],
        }.items()
        for m, success in enumerate(curve, start=1)
    ]
    assert prefilter.crossover(pd.DataFrame(rows))["m"] == 3
    # behind at 1, ahead at 2, behind at 3, equal at 4, ahead at 5
    twice = successes([[0.0, 0.3, 0.3, 0.5, 0.9]], [[0.1, 0.2, 0.4, 0.5, 0.6]])
    assert prefilter.crossover(twice, bootstrap=10)["m"] == 5


# --- which tasks, and the shape -----------------------------------------------------------------


def test_the_variance_gate_by_hand():
    samples = table({"a": [(0, 1.0), (2, 1.0), (4, 0)], "b": [(1, 1.0), (1, 1.0), (1, 2.0)]})
    gate = select.variance_gate(samples).set_index("task")
    assert gate.loc["a"].tolist() == [3, 2, 3, 2.0, pytest.approx(np.sqrt(2)), True]
    assert gate.loc["b"].tolist() == [3, 3, 2, 0.0, 0.0, False]
    assert not select.variance_gate(samples, threshold=2.0).open.any()  # above, not at
    single = select.variance_gate(table({"a": [(1, 1.0)]})).iloc[0]
    assert np.isnan(single["std"]) and not single.open


def test_the_quartiles_by_hand():
    # nll 8..1; the fast ones are the second quarter, as in the paper's table
    speeds = [0.5, 0.8, 3.0, 2.0, 1.0, 2.0, 0.5, 0.5]
    samples = table({"a": [(8 - i, s) for i, s in enumerate(speeds)], "b": [(99, 0)]})
    found = select.quartiles(samples)
    assert found.quartile.tolist() == ["Q1", "Q2", "Q3", "Q4"]
    assert found.n.tolist() == [2] * 4 and found.tasks.tolist() == [1] * 4
    assert found.fast_1.tolist() == [0, 1, 0.5, 0]
    assert found.lowest.tolist() == [7, 5, 3, 1] and found.highest.tolist() == [8, 6, 4, 2]
    assert found.speedup_gmean[1] == pytest.approx(np.sqrt(6)) and found.speedup_mean[1] == 2.5
    assert found.tokens.tolist() == [10.5, 12.5, 14.5, 16.5]
    says(lambda: select.quartiles(samples.iloc[:3]), "at least 4", "has 3")


def test_the_quartile_intervals_come_from_tasks():
    """Samples that agree within a task are as few as the tasks are, whatever their number."""
    one = {f"t{t}": [(i + t / 9, 2.0 if t % 2 else 0.5) for i in range(40)] for t in range(8)}
    found = select.quartiles(table(one))
    width = found.fast_1_hi - found.fast_1_lo
    assert (width > 0.4).all()  # 80 independent samples a quarter would give about 0.22
    assert ((found.fast_1_lo <= found.fast_1) & (found.fast_1 <= found.fast_1_hi)).all()
    # half the tasks at 2, half at 0.5: a draw of 8 tasks has 1 to 7 of the fast ones (95 %)
    np.testing.assert_allclose(found.speedup_gmean, 1)
    np.testing.assert_allclose(found.speedup_gmean_hi, 2 ** (2 * found.fast_1_hi - 1))
    np.testing.assert_allclose(found.speedup_gmean_lo, 2 ** (2 * found.fast_1_lo - 1))
    assert len(select.quartiles(table({"a": [(i, 2.0) for i in range(4)]}))) == 4


# --- wrong input --------------------------------------------------------------------------------


@pytest.mark.parametrize("call", [select.select, prefilter.curve, prefilter.by_task])
def test_every_entry_names_what_is_missing_or_wrong(call):
    good = table(HAND)
    call(good)
    says(lambda: call(good.drop(columns=["nll_sum", "index"])), "lacks", "nll_sum", "index")
    says(lambda: call(good.iloc[:0]), "no rows")
    for bad in (NAN, float("inf"), float("-inf")):
        samples = good.copy()
        samples.loc[5, "nll_sum"] = bad
        says(lambda s=samples: call(s), "row 5", "task b", "index 1", f"nll_sum = {bad}", "1 of 8")
    samples = good.astype({"nll_sum": object})
    samples.at[2, "nll_sum"] = "3.5"
    says(lambda: call(samples), "row 2", "'3.5'", "not a number")
    says(lambda: call(good.assign(correct="False")), "row 0", "'False'", "true or false")
    samples = good.copy()
    samples.loc[4, "speedup"] = NAN
    says(lambda: call(samples), "row 4", "speedup = nan")


def test_a_repeated_sample_is_named_with_what_to_do():
    good = table(HAND)
    says(lambda: select.select(pd.concat([good, good.iloc[[2]]])), "sample 2 of a", "remove")
    arms = pd.concat([good, good.assign(temperature=0.25)], ignore_index=True)
    says(lambda: select.select(arms), "row 8", "sample 0 of a", "one temperature", "8 of 16")
    arms = pd.concat([good, good.assign(arm="ttt", step=3)], ignore_index=True)
    says(lambda: select.select(arms), "one arm and step at a time")


@pytest.mark.parametrize("ks", [[], [0], [1, -2], [1.5]])
def test_a_budget_is_a_whole_number_from_one_on(ks):
    says(lambda: select.select(table(HAND), ks=ks), "whole number from 1", str(ks))
    says(lambda: prefilter.curve(table(HAND), budgets=ks), "whole number from 1", str(ks))


def test_what_is_not_there_is_refused_by_name():
    says(lambda: select.select(table(HAND), unit="body"), "'body'", "sample", "distinct")
    says(lambda: prefilter.curve(table(HAND), [5]), "budget of 5", "4 samples")
    picks = select.select(table(HAND), ks=[1])
    says(lambda: select.compare(picks, k=3), "surprisal", "nll_sum", "k=3")
    says(lambda: select.compare(picks, "oracle", "best"), "best")


# --- what holds for every table -----------------------------------------------------------------

COLUMNS = ["fast_1", "fast_1_point", "speedup", "log_speedup"]


def test_the_weights_by_hand():
    score, speed = np.array([5.0, 3, 3, 3, 1]), np.array([2.0, 1, 4, 3, 9])
    # k = 2: the first and one of three: 2 against 1, 4 or 3
    weights = select.pick_weights(score, speed, 2)
    np.testing.assert_allclose(weights, [1 / 3, 0, 1 / 3, 1 / 3, 0])
    # k = 3: the first and two of three: 4 is in two of the three pairs, else 3
    weights = select.pick_weights(score, speed, 3)
    np.testing.assert_allclose(weights, [0, 0, 2 / 3, 1 / 3, 0], atol=1e-12)


def test_the_weights_are_stable_for_many_samples():
    rng = np.random.default_rng(0)
    speed, ks = rng.lognormal(size=1024), [1, 2, 31, 512, 1000, 1023, 1024]
    for score in (np.zeros(1024), rng.integers(0, 3, 1024) * 1.0, rng.normal(size=1024)):
        weights = np.array([select.pick_weights(score, speed, k) for k in ks])
        np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-10)
        assert weights.min() >= 0 and (np.diff(weights @ speed) >= -1e-9).all()
        assert weights[-1] @ speed == pytest.approx(speed.max())
    alike = [select.pick_weights(np.zeros(1024), speed, k) @ speed for k in ks]
    np.testing.assert_allclose(alike, stats.expected_best_of_k(speed, ks))


def kept_over_all_orders(score, speed, of, k):
    """Mean of `of` of the fastest among the k highest scores, ties by every order."""
    kept = []
    for order in permutations(range(len(score))):
        first = sorted(order, key=lambda i: -score[i])[:k]  # sorted keeps the order of ties
        kept.append(max(first, key=lambda i: speed[i]))
    return np.mean(np.asarray(of, dtype=float)[kept])


@pytest.mark.parametrize("ties", [True, False])
def test_every_column_of_every_strategy_over_every_order(ties):
    samples, ks = random_table(11, tasks=4, n=6, ties=ties), [1, 2, 3, 6]
    found = select.select(samples, ks, ["nll_sum"]).set_index(["task", "strategy", "k"])
    for task, part in samples[samples.correct].groupby("task"):
        speed, nll = part.speedup.to_numpy(), part.nll_sum.to_numpy()
        truths = dict(zip(COLUMNS, (speed * 0.9 > 1, speed > 1, speed, np.log(speed)), strict=True))
        scores = {"oracle": speed, "random": 0 * nll, "confidence": -nll, "surprisal": nll}
        for (strategy, score), k in product(scores.items(), ks):
            for column, of in truths.items():
                truth = kept_over_all_orders(score, speed, of, k)
                assert found.loc[(task, strategy, k), column] == pytest.approx(truth, abs=1e-12)


@pytest.mark.parametrize("ties", [True, False])
def test_the_oracle_dominates_and_everything_kept_is_the_oracle(ties):
    found = select.select(random_table(21, ties=ties), [1, 2, 4, 100], ["nll_sum"])
    wide = found.pivot(index=["task", "k"], columns="strategy")
    for column, strategy in product(COLUMNS, select.STRATEGIES):
        if column != "fast_1":  # the fastest sample need not be the one whose interval is above 1
            assert not (wide[column][strategy] > wide[column]["oracle"] + 1e-12).any()
        everything = wide[column].xs(100, level="k")
        np.testing.assert_allclose(everything[strategy], everything["oracle"])


def test_equal_scores_are_the_random_strategy():
    samples = random_table(4).assign(nll_sum=2.5)
    found = select.select(samples, [1, 3], ["nll_sum"])
    wide = found.pivot(index=["task", "k"], columns="strategy")
    for column, strategy in product(COLUMNS, ("surprisal", "confidence")):
        assert wide[column][strategy].tolist() == wide[column]["random"].tolist()


def test_the_surprisal_of_the_negated_score_is_confidence():
    samples = random_table(5)
    one = select.select(samples, [1, 2], ["nll_sum"])
    other = select.select(samples.assign(nll_sum=-samples.nll_sum), [1, 2], ["nll_sum"])
    for column in COLUMNS:
        left = one[one.strategy == "surprisal"][column].to_numpy()
        np.testing.assert_array_equal(left, other[other.strategy == "confidence"][column])


def test_a_body_stands_once_in_each_task_whatever_the_key():
    same = table({"a": [(1, 2.0), (2, 2.0)], "b": [(1, 2.0)]}).assign(code_sha256="same")
    picks = select.select(same.drop(columns="nll_sum"), [1], ["n_tokens"], "distinct")
    assert picks.groupby("task").n.first().to_dict() == {"a": 1, "b": 1}


def test_a_budget_list_may_be_any_sequence():
    samples = random_table(7)
    picks, chances = select.select(samples, [1, 2]), prefilter.curve(samples, [1, 2])
    for ks in ((1, 2), range(1, 3), np.array([1, 2])):
        pd.testing.assert_frame_equal(select.select(samples, ks), picks)
        pd.testing.assert_frame_equal(prefilter.curve(samples, ks), chances)


def test_a_strategy_does_not_differ_from_itself():
    found = select.compare(select.select(random_table(9)), "surprisal", "surprisal")
    assert (found["difference"], found["cohens_h"], found["wins"], found["losses"]) == (0, 0, 0, 0)
    assert found["p_sign"] == found["speedup_p_wilcoxon"] == found["speedup_p_permutation"] == 1
    assert found["tasks_needed"] == np.inf and np.isnan(found["p_chance"])


def test_a_pick_as_good_as_chance_is_seldom_called_different_from_it():
    """One in eight samples is fast, whatever its likelihood: a pick lies below the expectation on
    most tasks, which is no evidence."""
    rng, called, tables = np.random.default_rng(0), 0, 150
    for _ in range(tables):
        rows = {
            f"t{i}": [(rng.random(), 2.0 if rng.random() < 0.125 else 0.9) for _ in range(16)]
            for i in range(20)
        }
        found = select.compare(select.select(table(rows), [1], ["nll_sum"]), second="random")
        called += found["p_chance"] < 0.05
        for name in ("p_sign", "speedup_p_wilcoxon", "speedup_p_permutation", "tasks_needed"):
            assert np.isnan(found[name]), name
    assert called <= 15  # at 5 % the chance of more is 0.4 %


def test_picks_that_hit_where_chance_seldom_does_differ_from_it():
    rows = {f"t{i}": [(9, 2.0)] + [(1, 0.9)] * 7 for i in range(6)}
    picks = select.select(table(rows), [1], ["nll_sum"])
    found = select.compare(picks, second="random")
    assert found["p_chance"] == pytest.approx(0.125**6)
    turned = select.compare(picks, "random", "surprisal")
    assert turned["p_chance"] == found["p_chance"]


def test_equal_expectations_tie_whatever_the_rounding():
    # surprisal draws one of 11 alike, confidence has one sample: 2.0 on both sides
    picks = select.select(table({f"t{i}": [(9, 2.0)] * 11 + [(1, 2.0)] for i in range(6)}))
    found = select.compare(picks)
    assert (found["wins"], found["losses"], found["speedup_n_different"]) == (0, 0, 0)


def test_prefiltering_ranks_incorrect_samples_too():
    samples = table(
        {"a": [(9, 0), (8, 0.5), (5, 2.0), (1, 3.0)], "b": [(9, 3.0), (1, 0), (2, 0), (3, 0)]}
    )
    found = prefilter.curve(samples).pivot(index="m", columns="strategy", values="task_success")
    assert found.surprisal.tolist() == [0.5, 0.5, 1, 1]
    assert found.confidence.tolist() == [0.5, 0.5, 0.5, 1]
    # a has two fast of four, b one: m of them miss with C(2, m) / C(4, m) and C(3, m) / C(4, m)
    truth = [(1 / 2 + 1 / 4) / 2, (5 / 6 + 1 / 2) / 2, (1 + 3 / 4) / 2, 1]
    np.testing.assert_allclose(found.random, truth)


def test_prefiltering_rises_with_m_and_does_not_depend_on_the_rows():
    samples = random_table(14)
    found = prefilter.curve(samples)
    pd.testing.assert_frame_equal(prefilter.curve(samples.sample(frac=1, random_state=0)), found)
    for _, part in found.groupby("strategy"):
        assert (np.diff(part.task_success) >= -1e-12).all()
    share = stats.fast(samples).groupby(samples.task).any().mean()
    np.testing.assert_allclose(found[found.m == 8].task_success, share)
    curve, random = stats.scaling_curve(samples).table, found[found.strategy == "random"]
    for column in ("lo", "hi"):  # the same tasks are drawn
        np.testing.assert_allclose(random[column], curve[column])


def successes(surprisal, random):
    """A table as of `prefilter_tasks`: a list for each task, a value for each budget."""
    return pd.DataFrame(
        [
            {"task": f"t{t}", "strategy": strategy, "m": m, "success": value}
            for strategy, tasks in (("surprisal", surprisal), ("random", random))
            for t, row in enumerate(tasks)
            for m, value in enumerate(row, start=1)
        ]
    )


def test_the_crossover_by_hand():
    # means over tasks: surprisal 0.1, 0.4, 0.9; random 0.3, 0.4, 0.8: behind, equal, ahead
    table_ = successes([[0.0, 0.3, 0.9], [0.2, 0.5, 0.9]], [[0.3, 0.4, 0.8], [0.3, 0.4, 0.8]])
    # when only the second task is drawn, it is ahead from m = 2 on
    assert prefilter.crossover(table_) == {"m": 3, "lo": 2, "hi": 3, "never": 0}
    same = prefilter.crossover(successes([[0.5, 0.5]], [[0.5, 0.5 - 1e-12]]), bootstrap=10)
    assert np.isnan([same["m"], same["lo"], same["hi"]]).all() and same["never"] == 1
    # only draws of the first task alone get ahead: 1/2 * 1/2
    some = prefilter.crossover(successes([[0, 1], [0, 0]], [[0, 0], [1, 1]]), bootstrap=2000)
    assert np.isnan(some["m"]) and (some["lo"], some["hi"]) == (2, 2)
    assert some["never"] == pytest.approx(0.75, abs=0.05)


@pytest.mark.parametrize("n", range(4, 13))
def test_quartiles_are_as_equal_as_can_be_with_ties_too(n):
    sizes = select.quartiles(table({"a": [(3, 2.0)] * n + [(9, 0)]}), bootstrap=10).n
    assert sizes.sum() == n and len(sizes) == 4 and sizes.max() - sizes.min() <= 1


def test_quartiles_do_not_depend_on_the_order_of_rows_that_differ():
    samples = random_table(16, tasks=6, ties=False)
    found = select.quartiles(samples, bootstrap=100)
    shuffled = samples.sample(frac=1, random_state=0)
    pd.testing.assert_frame_equal(select.quartiles(shuffled, bootstrap=100), found)


def test_the_gate_and_the_quartiles_name_what_is_wrong():
    samples = table({"a": [(i, 2.0) for i in range(5)]})
    says(lambda: select.variance_gate(samples, "nll_max"), "lacks", "nll_max")
    says(lambda: select.quartiles(samples.drop(columns="n_tokens")), "lacks", "n_tokens")
    samples.loc[4, "nll_sum"] = NAN
    says(lambda: select.quartiles(samples), "row 4", "nll_sum = nan")
    says(lambda: select.variance_gate(samples), "row 4", "nll_sum = nan")


@pytest.mark.parametrize("column", ["task", "index", "correct", "speedup_lo", "code_sha256"])
def test_each_missing_column_is_named(column):
    samples = table(HAND).drop(columns=column)
    for call in (select.select, prefilter.curve):
        says(lambda call=call: call(samples), f"lacks the columns {column}")


# --- the published shape of the quartiles -------------------------------------------------------


def shaped(second=2.0, last=0.5, task="t"):
    """Twelve correct samples: three in each quarter, of speedups 1.1-ish in the others."""
    speeds = [1.2, 0.5, 0.5] + [second] * 3 + [1.2, 0.5, 0.5] + [last] * 3
    return {task: [(12 - i, s) for i, s in enumerate(speeds)]}


def test_the_quartile_shape_is_found_where_it_is_and_only_there():
    assert select.quartile_shape(table(shaped(), lo=1.0), bootstrap=20) == 1.0
    assert select.quartile_shape(table(shaped(second=0.5), lo=1.0), bootstrap=20) == 0.0
    assert select.quartile_shape(table(shaped(last=2.0), lo=1.0), bootstrap=20) == 0.0
    # the interval rule sees no fast sample where every interval begins below 1
    narrow = table(shaped(), lo=0.4)
    assert select.quartile_shape(narrow, bootstrap=20) == 0.0
    assert select.quartile_shape(narrow, rule="point", bootstrap=20) == 1.0


def test_the_quartile_shape_counts_the_draws_of_tasks():
    """Of two tasks one has the shape, and the other, drawn alone, has its opposite."""
    both = table({**shaped(), **shaped(0.5, 2.0, task="u")}, lo=1.0)
    share = select.quartile_shape(both, bootstrap=4000)
    assert share == pytest.approx(0.25, abs=0.03)  # only where t is drawn twice
    says(lambda: select.quartile_shape(table({"a": [(1, 2.0)]})), "at least 4 correct samples")


def test_power_of_a_comparison_is_that_of_its_differences():
    picks = select.select(table(PAPER), keys=["nll_sum"])
    found = select.compare(picks)
    gap = np.array([1.0] * 3 + [0.0] * 7)
    assert found["tasks_needed_t"] == stats.tasks_needed_mean(gap)
    logs = np.log([4.0] * 3 + [4 / 3] * 5 + [1.2] * 2)
    assert found["tasks_needed_speedup"] == stats.tasks_needed_mean(logs)
    assert found["tasks_needed"] == stats.tasks_needed(0.3, 0.0)
