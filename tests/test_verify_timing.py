"""The sequential rule by simulation, and the interval it reports."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from ttkit.verify import PROTOCOLS
from ttkit.verify.session import Session
from ttkit.verify.timing import interval, measure, order_statistic, spend

RIGOROUS = PROTOCOLS["rigorous"]


def lognormal(rng):
    return math.exp(rng.normal(0, 0.08))


def heavy(rng):
    """One run in ten is hit by something that takes up to many times the run itself."""
    hit = 1 + (rng.pareto(1.1) if rng.random() < 0.1 else 0.0)
    return math.exp(rng.normal(0, 0.03)) * hit


def drift(rng):
    return math.exp(0.1 * rng.standard_t(2))


def simulate(noise, true_ratio, runs, seed):
    """How often the rule says `fast`, and the pairs it used on average."""
    rng = np.random.default_rng(seed)
    fast = used = covered = 0
    for _ in range(runs):
        found, pairs = measure(
            lambda: (true_ratio * noise(rng), noise(rng)), RIGOROUS, clock=lambda: 0.0
        )
        fast += found.lo > 1
        covered += found.lo <= true_ratio <= found.hi
        used += len(pairs)
    return fast / runs, used / runs, covered / runs


@pytest.mark.parametrize("noise", [lognormal, heavy, drift])
def test_false_fast_stays_within_the_promised_rate(noise):
    rate, _, covered = simulate(noise, 1.0, 4000, seed=1)
    # 2.5 % and three standard errors of a simulation of 4,000.
    assert rate <= 0.025 + 3 * math.sqrt(0.025 * 0.975 / 4000)
    assert covered >= 0.95 - 3 * math.sqrt(0.05 * 0.95 / 4000)


def test_true_speedups_are_found_with_few_pairs_where_they_are_large():
    found, used_small, covered = simulate(lognormal, 1.10, 300, seed=2)
    assert found >= 0.9
    assert covered >= 0.9
    found, used_large, _ = simulate(lognormal, 2.0, 300, seed=3)
    assert found == 1.0
    assert used_large < used_small
    assert used_large <= 17


def test_clearly_slower_candidates_cost_few_pairs():
    rate, used, _ = simulate(lognormal, 0.5, 300, seed=4)
    assert rate == 0.0
    assert used <= 17


def test_order_statistic_is_the_exact_binomial_one():
    # P(Bin(10, 1/2) < 1) = 0.00098, < 2: 0.0107, < 3: 0.0547.
    assert order_statistic(10, 0.0009) == 0
    assert order_statistic(10, 0.001) == 1
    assert order_statistic(10, 0.011) == 2
    assert order_statistic(10, 0.05) == 2
    assert sum(spend(RIGOROUS.looks, 0.025)) == pytest.approx(0.025)
    assert all(
        order_statistic(n, a)
        for n, a in zip(RIGOROUS.looks, spend(RIGOROUS.looks, RIGOROUS.alpha), strict=True)
    )


def test_interval_is_of_order_statistics_and_widened_by_the_spread():
    ratios = [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8, 1.9]
    found = interval(ratios, 0.011)
    assert (found.lo, found.speedup, found.hi, found.n) == (1.1, 1.45, 1.8, 10)
    wide = interval(ratios, 0.011, spread=0.1)
    assert (wide.lo, wide.hi) == (pytest.approx(1.0), pytest.approx(1.98))
    nothing = interval(ratios[:3], 0.001)
    assert nothing.lo < 0 < math.inf == nothing.hi


def test_the_budget_stops_after_a_complete_look():
    now = [0.0]

    def trial():
        now[0] += 1.0
        return 1.0 + 0.5 * (now[0] % 2), 1.2

    protocol = dataclasses.replace(RIGOROUS, seconds=12.5)
    found, pairs = measure(trial, protocol, clock=lambda: now[0])
    assert found.n == 10
    assert 10 < len(pairs) < 16


def test_the_interval_of_a_relaunched_winner_spans_all_launches():
    found = []
    for speedup, pair in ((1.1, (1.1, 1.0)), (1.0, (1.0, 1.0)), (1.2, (1.2, 1.0))):
        session = object.__new__(Session)
        session.launches, session.checks = [speedup], []
        ends = {"speedup_lo": speedup - 0.05, "speedup_hi": speedup + 0.1}
        session.record = {"speedup": speedup, "n_pairs": 1, "pairs": (pair,), **ends}
        found.append(session)
    first, *others = found
    for other in others:
        first.take_in(other)
    assert first.record["speedup"] == 1.1
    assert first.record["speedup_lo"] == 0.95 and first.record["speedup_hi"] == 1.3
    assert first.record["n_pairs"] == 3 and len(first.record["pairs"]) == 3
    assert first.record["reference_ms"] == pytest.approx(1.1)
