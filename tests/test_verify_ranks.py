"""Rank tests of timings: exact, and the same whichever side is called the first."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from ttkit.verify.ranks import Leads, centre, factor, signed_rank_quantile

BLOCK = 6


def noisy(n, seed, ratio=1.0):
    """Pairs of times that others on the machine made longer, every second one."""
    rng = np.random.default_rng(seed)
    hit = rng.exponential(0.5, (n, 2)) * (rng.random((n, 2)) < 0.5)
    return [(r, c) for r, c in (np.exp(rng.normal(0, 0.03, (n, 2))) + hit) * [ratio, 1]]


@pytest.mark.parametrize("n", [1, 2, 7, 12, 20])
def test_the_rank_quantile_is_that_of_scipys_exact_test(n):
    for alpha in (0.001, 0.004, 0.025, 0.1):
        k = signed_rank_quantile(n, alpha)
        values = np.arange(1, n + 1)  # their ranks are their values
        for w, below in ((k - 1, True), (k, False)):
            if w < 0:
                continue
            # Signs so that the positive ranks sum to w, taken greedily from the largest.
            signs, left = -np.ones(n), w
            for rank in range(n, 0, -1):
                if rank <= left:
                    signs[rank - 1], left = 1, left - rank
            p = stats.wilcoxon(values * signs, alternative="less", method="exact").pvalue
            assert (p <= alpha) == below


def test_the_bounds_are_walsh_averages():
    values = [1.0, 2.0, 4.0]  # averages 1, 1.5, 2, 2.5, 3, 4
    assert centre(values, 0.126) == (2.25, 1.0, 4.0)  # P(W < 1) = 1/8
    assert centre(values, 0.26) == (2.25, 1.5, 3.0)  # P(W < 2) = 2/8
    assert centre(values, 0.1) == (2.25, -math.inf, math.inf)


@pytest.mark.parametrize("seed", range(5))
def test_the_chance_is_that_of_all_ways_to_swap_sides(seed):
    n = 9
    pairs = noisy(n, seed, 1.1)
    leads = Leads(pairs, BLOCK)
    for shift in (0.0, 0.05, -0.3):
        swapped = []
        shifted = np.log(pairs) + [0, shift]
        for swap in itertools.product((False, True), repeat=n):
            turned = np.where(np.array(swap)[:, None], shifted[:, ::-1], shifted)
            # Scored anew: that ranks stay with their times is what the test rests on.
            swapped.append(Leads(np.exp(turned), BLOCK).at(0.0).sum())
        ours = leads.at(shift).sum()
        assert ours == swapped[0]
        assert leads.chance(shift) == pytest.approx(np.mean(np.array(swapped) >= ours))
        assert leads.chance(shift, -1) == pytest.approx(np.mean(np.array(swapped) <= ours))


def test_scores_are_savages_within_each_block():
    times = noisy(2 * BLOCK, 1)
    logs = np.log(times)
    leads = Leads(times, BLOCK).at(0.0)
    for part in (slice(0, BLOCK), slice(BLOCK, 2 * BLOCK)):
        both = np.concatenate([logs[part, 0], logs[part, 1]])
        m = len(both)
        savage = np.array([sum(1 / j for j in range(i, m + 1)) for i in range(1, m + 1)])
        score = savage[stats.rankdata(both, method="ordinal") - 1]
        expected = score[BLOCK:] - score[:BLOCK]
        # Twice the score, in fifths, each end rounded.
        assert np.abs(leads[part] / 10 - expected).max() <= 0.2


def test_equal_times_lead_nowhere_and_no_side_is_the_first_of_them():
    same = [(1.0, 1.0)] * 8
    assert not Leads(same, BLOCK).at(0.0).any() and Leads(same, BLOCK).chance(0.0) == 1
    some = [(1.0, 1.0), (1.0, 2.0), (2.0, 1.0), (1.0, 1.0), (3.0, 3.0)]
    turned = [(c, r) for r, c in some]
    assert (Leads(some, BLOCK).at(0.0) == -Leads(turned, BLOCK).at(0.0)).all()
    assert Leads(some, BLOCK).at(0.0).sum() == 0


@pytest.mark.parametrize("n", [8, 40])
def test_the_same_bounds_whichever_side_is_called_the_first(n):
    pairs = noisy(n, 2, 1.2)
    middle, low, high = factor(pairs, BLOCK, 0.02)
    turned = factor([(c, r) for r, c in pairs], BLOCK, 0.02)
    assert turned == pytest.approx((-middle, -high, -low), abs=1e-12)
    longer = factor([(2 * r, c) for r, c in pairs], BLOCK, 0.02)
    assert longer == pytest.approx([x + math.log(2) for x in (middle, low, high)], abs=1e-12)
    assert low < middle < high


def test_the_bounds_are_where_the_chance_is_the_error_rate():
    pairs = noisy(30, 3, 1.1)
    leads = Leads(pairs, BLOCK)
    _, low, high = factor(pairs, BLOCK, 0.01)
    assert leads.chance(low - 1e-9) <= 0.01 < leads.chance(low + 1e-9)
    assert leads.chance(high + 1e-9, -1) <= 0.01 < leads.chance(high - 1e-9, -1)
    assert 0 < low < math.log(1.1) < high


def test_too_few_pairs_bound_nothing():
    assert factor(noisy(5, 4), BLOCK, 0.03)[1:] == (-math.inf, math.inf)
    assert factor(noisy(5, 4, 2.0), BLOCK, 0.04)[1] > 0
    middle, low, high = factor([], BLOCK, 0.025)
    assert math.isnan(middle) and (low, high) == (-math.inf, math.inf)


@pytest.mark.parametrize("common", [0.0, 0.3])  # noise that both of a pair have
def test_equal_programs_are_told_apart_as_often_as_promised(common):
    rng = np.random.default_rng(5)
    runs, alpha, wrong = 2000, 0.05, 0
    for _ in range(runs):
        pairs = np.array(noisy(22, rng)) * np.exp(common * rng.standard_normal((22, 1)))
        wrong += Leads(pairs, BLOCK).chance(0.0) <= alpha
    assert 0.02 < wrong / runs < alpha + 3 * math.sqrt(alpha * (1 - alpha) / runs)


def test_where_runs_are_interrupted_the_least_times_tell_more_than_ratios():
    told = by_ratios = 0
    for seed in range(100):
        pairs = noisy(36, seed, 1.1)
        told += factor(pairs, BLOCK, 0.004)[1] > 0
        by_ratios += centre([math.log(r / c) for r, c in pairs], 0.004)[1] > 0
    assert told > by_ratios + 40
