"""The published numbers looked at again: each by hand, by scipy or by simulation."""

import numpy as np
import pytest
import scipy.stats

from ttkit import published
from ttkit.errors import UsageError


def test_the_largest_speedups_need_more_than_the_memory_can_carry():
    four = published.implied_traffic(4, 859.8)
    assert four["traffic_tb_s"] == pytest.approx(8.59 / 2.77e-3 * 859.8 / 1e3)
    assert round(four["traffic_tb_s"]) in (2666, 2667, 2668)
    assert round(published.implied_traffic(5, 191.7)["traffic_tb_s"]) == 578
    assert four["ceiling"] == 1.08 and four["peak_tb_s"] == pytest.approx(3.34, abs=0.01)
    # at the ceiling the traffic is what the GPU carries
    assert published.implied_traffic(4, 1.08)["traffic_tb_s"] == pytest.approx(3.35, abs=0.02)
    with pytest.raises(UsageError, match="no limits for problem 6"):
        published.implied_traffic(6, 2.0)


@pytest.mark.parametrize("n", [4, 7, 10])
def test_wilcoxon_against_scipy_for_every_statistic(n):
    rng = np.random.default_rng(n)
    for _ in range(20):
        values = rng.permutation(np.arange(1.0, n + 1)) * rng.choice([-1, 1], n)
        found = scipy.stats.wilcoxon(values, method="exact")
        assert published.wilcoxon_p(int(found.statistic), n) == pytest.approx(found.pvalue)


def test_the_published_wilcoxon_and_the_floor_of_five_tasks():
    assert (
        published.wilcoxon_p(10, 10) == pytest.approx(86 / 1024) == pytest.approx(0.084, abs=5e-5)
    )
    assert published.wilcoxon_p(0, 5) == 0.0625


def test_the_maximum_of_noisy_steps_is_that_of_simulated_ones():
    rng = np.random.default_rng(0)
    share = (0.375 * 160 - 32) / 128
    best = ((32 + rng.binomial(128, share, (200_000, 6))) / 160).max(axis=1)
    assert published.expected_gain_of_maximum(0.375, 6) == pytest.approx(
        best.mean() - 0.375, abs=5e-4
    )
    assert published.expected_gain_of_maximum(0.375, 6) == pytest.approx(0.0376, abs=5e-5)
    assert published.expected_gain_of_maximum(0.375, 1) == pytest.approx(0, abs=1e-12)
    mean = np.mean(published.TRAJECTORY)
    assert published.chance_of_maximum(mean, 6, 0.425) == pytest.approx(0.61, abs=0.005)
    assert published.chance_of_maximum(mean, 6, 0.2) == pytest.approx(1.0)
    with pytest.raises(UsageError, match="does not go with"):
        published.noisy_maximum(0.1, 6)


def test_random_top_3_from_the_published_rates():
    low, high = published.random_top3()
    assert high == pytest.approx(1 - 0.408**3)
    assert (round(low, 2), round(high, 2)) == (0.86, 0.93)


def test_random_top_3_bounds_hold_for_made_up_tasks(monkeypatch):
    """Tasks of known rates: the truth lies between what their curve and their mean give."""
    q, c = np.array([0.1, 0.3, 0.6, 0.7, 0.85]), 0.9
    curve = {k: float((1 - (1 - q) ** k).mean()) for k in (1, 2, 4)}
    monkeypatch.setattr(published, "BEST_OF_N", curve)
    monkeypatch.setattr(published, "RANDOM_CORRECT", float((q / c).mean()))
    truth = float((1 - (1 - q / c) ** 3).mean())
    low, high = published.random_top3()
    assert low - 1e-9 <= truth <= high


def test_every_point_has_its_arithmetic():
    table = published.recomputed()
    assert list(table) == ["point", "published", "recomputed", "how"]
    assert len(table) == 12 and table.map(len).gt(0).all(axis=None)
    text = " ".join(table["recomputed"])
    for number in ("0.6435", "0.125 one-sided, 0.25 two-sided", "0.084", "0.0625", "578 TB/s"):
        assert number in text
    for number in ("+3.8 points", "= 0.61", "n = 320: ", "e-17", "0.94"):
        assert number in text
