"""The dial's effects and the evaluator's share: on tables made by hand."""

import numpy as np
import pandas as pd
import pytest
from test_select import table

from ttkit import dial, evaluators, select, stats

HAND = {"a": [(1, 0.5), (2, 2.0)], "b": [(1, 1.5), (2, 2.0)], "c": [(1, 0.5), (2, 0.6)]}


def two_temperatures(cold=None):
    hot = table(HAND)
    cold = table(cold or {name: [(2, 1.0), (2, 1.0)] for name in HAND}).assign(temperature=0.25)
    return pd.concat([cold, hot], ignore_index=True)


def test_effects_at_every_temperature_are_those_of_the_comparisons():
    found = dial.effects(two_temperatures()).set_index(["temperature", "first", "second", "k"])
    row = found.loc[(1.0, "surprisal", "confidence", 1)]
    truth = select.compare(select.select(table(HAND), [1], ["nll_sum"]))
    for name in ("difference", "difference_lo", "speedup_ratio", "speedup_hi", "n"):
        assert row[name] == truth[name]
    assert found.loc[(0.25, "surprisal", "confidence", 1), "difference"] == 0  # all alike
    assert found.loc[(0.25, "surprisal", "confidence", 1), "distinct"] == 1
    assert set(found.reset_index()["k"]) == {1, 3}


def test_a_temperature_without_a_correct_sample_is_counted():
    cold = {name: [(2, 0), (2, 0)] for name in HAND}
    found = dial.effects(two_temperatures(cold))
    row = found[found["temperature"] == 0.25]
    assert len(row) == 1 and row["n"].item() == 0 and row["tasks"].item() == 3
    assert np.isnan(row["difference"].item())


def verdicts(samples, speedup):
    columns = dict.fromkeys(evaluators.VERDICT_COLUMNS, "")
    bodies = samples.drop_duplicates(["task", "code_sha256"])[["task", "code_sha256"]]
    measured = {"correct": True, "speedup": speedup, "speedup_lo": np.nan}
    return bodies.assign(**{**columns, **measured})


def test_another_evaluators_verdicts_take_the_place_of_the_first():
    samples = table(HAND)
    proxy = evaluators.judged_by(samples, verdicts(samples, 1.3), paired=False)
    assert len(proxy) == len(samples) and (proxy["speedup"] == 1.3).all()
    assert (proxy["speedup_lo"] == 1.3).all() and proxy["nll_sum"].equals(samples["nll_sum"])
    found = evaluators.compare({"rigorous": samples, "fast-proxy": proxy})
    both = evaluators.moved(found, "rigorous", "fast-proxy").set_index(["number", "metric"])
    # fast samples by the interval rule (0.9 of the speedup): 2.0, 1.5, 2.0 of six
    assert both.loc[("sample fast_1", "fast_1"), "moved"] == pytest.approx(1 - 3 / 6)
    assert both.loc[("task success at K = 2", "fast_1"), "moved"] == pytest.approx(1 - 2 / 3)
    assert both.loc[("surprisal", "fast_1"), "rigorous"] == pytest.approx(2 / 3)
    mean = np.exp(np.log([2.0, 2.0, 0.6]).mean())
    assert both.loc[("oracle", "speedup_gmean"), "moved"] == pytest.approx(1.3 / mean)
    # no task has more than two correct samples: the best of three picks would be all of them
    assert not any("top 3" in number for number, _ in both.index)
    # the six by surprisal, in quarters: 2.0 | 2.0, 0.6 | 0.5 | 1.5, 0.5
    quarters = [both.loc[(f"quartile Q{q}", "fast_1"), "rigorous"] for q in (1, 2, 3, 4)]
    assert quarters == pytest.approx([1.0, 0.5, 0.0, 0.5])
    rho = stats.spearman(-samples["nll_sum"], samples["speedup"])["rho"]
    assert both.loc[("Spearman(log-prob, speedup)", "rho"), "rigorous"] == pytest.approx(rho)


def test_three_picks_count_where_there_is_something_to_leave_out():
    rows = {"a": [(1, 0.5), (2, 2.0), (3, 0.9), (4, 0.8)], "b": [(1, 1.5)]}
    found = evaluators.numbers(table(rows)).set_index(["number", "metric"])
    assert found.loc[("surprisal, top 3", "fast_1"), "value"] == 1.0
    assert found.loc[("random, top 3", "fast_1"), "value"] == pytest.approx((0.75 + 1) / 2)


def test_no_correct_sample_leaves_the_best_of_n_rows():
    found = evaluators.numbers(table({"a": [(1, 0), (2, 0)], "b": [(1, 0), (2, 0)]}))
    names = ["sample fast_1", "task success at K = 1", "task success at K = 2"]
    assert found["number"].tolist() == names
    assert (found["value"] == 0).all()
