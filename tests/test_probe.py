import time

import numpy as np
import pandas as pd
import pytest
from scipy import stats as scipy_stats

from ttkit import probe
from ttkit.errors import UsageError


def fixed(tasks=8, samples=10, seed=0, steps=(0, 1, 2)):
    """The same samples under three checkpoints; under later ones NLL falls on fast samples."""
    rng = np.random.default_rng(seed)
    n = tasks * samples
    base = pd.DataFrame(
        {
            "task": np.repeat([f"t{i:02}" for i in range(tasks)], samples),
            "index": np.tile(np.arange(samples), tasks),
            "correct": rng.random(n) < 0.7,
            "speedup": np.exp(rng.normal(0, 0.5, n)),
        }
    )
    base.loc[~base["correct"], "speedup"] = np.nan
    base["speedup_lo"] = base["speedup"] * 0.95
    noise, slope = rng.normal(0, 1, n), np.log(base["speedup"].fillna(0.5))
    frames = [
        base.assign(step=s, nll_sum=5 + noise - s * slope, nll_mean=1 + noise / 9, entropy_mean=0.4)
        for s in steps
    ]
    return pd.concat(frames, ignore_index=True)


def one(table, step, subset):
    return table[(table["step"] == step) & (table["subset"] == subset)].iloc[0]


def test_weighted_spearman_is_spearman_of_the_repeated_samples():
    rng = np.random.default_rng(1)
    x, y = rng.integers(0, 6, 30), rng.integers(0, 5, 30)  # with ties
    weights = rng.integers(0, 4, (5, 30))
    found = probe.weighted_spearman(x, y, weights)
    for rho, row in zip(found, weights, strict=True):
        expected = scipy_stats.spearmanr(np.repeat(x, row), np.repeat(y, row)).statistic
        assert rho == pytest.approx(expected, abs=1e-12)
    assert np.isnan(probe.weighted_spearman(x, np.ones(30), weights)).all()


def test_weights_resample_tasks_then_samples():
    tasks = np.repeat(["a", "b", "c", "d"], [2, 3, 4, 5])
    weights = probe.cluster_weights(tasks, 4000, seed=3)
    by_task = np.stack([weights[:, tasks == t].sum(axis=1) for t in "abcd"], axis=1)
    assert (by_task % [2, 3, 4, 5] == 0).all()  # a task comes whole, as often as it was picked
    assert ((by_task // [2, 3, 4, 5]).sum(axis=1) == 4).all()
    assert weights.mean(axis=0) == pytest.approx(np.ones(14), abs=0.1)
    assert (weights == probe.cluster_weights(tasks, 4000, seed=3)).all()


def test_the_interval_agrees_with_the_plain_clustered_bootstrap():
    from ttkit import stats

    table = fixed(steps=(1,))
    table["speedup"] = table["speedup"].fillna(0.0)
    args = table["nll_sum"], table["speedup"], table["task"]
    found, _ = probe.rho(*args, bootstrap=2000)
    slow = stats.clustered_bootstrap(
        table, lambda t: stats.spearman(t["nll_sum"], t["speedup"])["rho"], 1000
    )
    assert found["value"] == pytest.approx(slow["value"])
    assert found["lo"] == pytest.approx(slow["lo"], abs=0.05)
    assert found["hi"] == pytest.approx(slow["hi"], abs=0.05)


def test_the_interval_covers_at_the_stated_rate():
    """True rho 0, samples of a task alike: units are tasks, and 95 % means about that."""
    hits = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        x, y = (np.repeat(rng.normal(size=20), 5) + rng.normal(size=100) for _ in range(2))
        found, _ = probe.rho(x, y, np.repeat(np.arange(20), 5), bootstrap=300, seed=seed)
        hits += found["lo"] <= 0 <= found["hi"]
    assert 180 <= hits <= 200


def test_by_step_follows_the_change_and_its_sign():
    table = probe.by_step(fixed(), bootstrap=300)
    assert set(table["subset"]) == set(probe.SUBSETS) and len(table) == 3 * len(probe.SUBSETS)
    start, end = one(table, 0, "correct"), one(table, 2, "correct")
    assert abs(start["value"]) < 0.35 and end["value"] < -0.4  # low NLL now goes with high speedup
    assert start["change"] == 0 and start["change_lo"] == 0 == start["change_hi"]
    assert end["change"] == pytest.approx(end["value"] - start["value"])
    assert end["change_hi"] < 0
    # paired: narrower than the two intervals together
    widths = [row["hi"] - row["lo"] for row in (start, end)]
    assert end["change_hi"] - end["change_lo"] < sum(widths)
    assert one(table, 0, "all")["n"] == 80
    assert [one(table, 1, q)["n"] for q in probe.QUARTERS] == [20] * 4
    assert one(table, 1, "within task, correct")["tasks"] == 8


def test_the_first_quarter_holds_the_least_likely_at_the_first_step():
    scored = fixed()
    first = scored[scored["step"] == 0]
    table = probe.by_step(scored, bootstrap=50)
    quarter = first.nlargest(20, "nll_sum")
    later = scored[scored["step"] == 2].set_index(["task", "index"])
    keys = pd.MultiIndex.from_frame(quarter[["task", "index"]])
    speed = later.loc[keys, "speedup"].where(later.loc[keys, "correct"], 0.0)
    expected = scipy_stats.spearmanr(later.loc[keys, "nll_sum"], speed).statistic
    assert one(table, 2, "Q1")["value"] == pytest.approx(expected)


def test_where_rho_is_undefined_it_is_said_and_nothing_stops():
    flat = fixed().assign(correct=True, speedup=1.0, speedup_lo=0.9)
    table = probe.by_step(flat, bootstrap=50)
    assert table["value"].isna().all() and (table["undefined"] == 1).all()
    assert one(table, 0, "within task")["tasks"] == 0

    single = fixed()
    keep = single["correct"] & (single["task"] == "t03") & (single["index"] == 0)
    single.loc[~keep, ["speedup", "speedup_lo"]] = np.nan
    single["correct"] = keep | False
    single.loc[keep, ["speedup", "speedup_lo"]] = [2.0, 1.9]
    single.loc[(single["task"] == "t03") & (single["index"] == 0), "correct"] = True
    single.loc[single["correct"], ["speedup", "speedup_lo"]] = [2.0, 1.9]
    table = probe.by_step(single, bootstrap=50)
    assert one(table, 0, "correct")["n"] == 1 and np.isnan(one(table, 0, "correct")["value"])
    assert np.isfinite(one(table, 0, "all")["value"])


def test_steps_with_unlike_samples_are_refused():
    table = fixed()
    with pytest.raises(UsageError, match="every step must score the same ones"):
        probe.by_step(table.drop(table[table["step"] == 1].index[0]))
    with pytest.raises(UsageError, match="the probe needs rows with nll_best"):
        probe.by_step(table, "nll_best")


def test_likelihood_by_group():
    scored = fixed()
    table = probe.likelihood(scored, bootstrap=200)
    everyone = table[(table["group"] == "all") & (table["measure"] == "nll_mean")]
    part = scored[scored["step"] == 0]
    assert everyone["value"].iloc[0] == pytest.approx(part["nll_mean"].mean())
    assert (everyone["lo"] <= everyone["value"]).all() and (everyone["n"] == 80).all()
    groups = table[(table["measure"] == "nll_mean") & (table["step"] == 1)].set_index("group")["n"]
    assert groups["all"] == groups["fast"] + groups["correct, not fast"] + groups["incorrect"]


def test_checkpoints_are_found_by_step(tmp_path):
    with pytest.raises(UsageError, match="no checkpoint .* run notebook 03 first"):
        probe.checkpoints(tmp_path / "none")
    for name in ("step_00", "step_02", "other", "step_tmp"):
        (tmp_path / name).mkdir()
    with pytest.raises(UsageError, match="lacks step_01"):
        probe.checkpoints(tmp_path)
    (tmp_path / "step_01").mkdir()
    assert list(probe.checkpoints(tmp_path)) == [0, 1, 2]


def test_the_draws_are_made_all_at_once():
    """Four hundred draws are cheaper than forty by the plain loop."""
    from ttkit import stats

    table = fixed(tasks=20, samples=16, steps=(0,))
    args = table["nll_sum"], table["speedup"].fillna(0.0), table["task"]
    started = time.process_time()
    probe.rho(*args, bootstrap=400)
    fast = time.process_time() - started
    started = time.process_time()
    stats.clustered_bootstrap(
        table, lambda t: stats.spearman(t["nll_sum"], t["speedup"].fillna(0.0))["rho"], 40
    )
    assert fast < time.process_time() - started
