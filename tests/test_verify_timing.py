"""The sequential rule by simulation, and the interval it reports."""

from __future__ import annotations

import dataclasses
import math
import random

import numpy as np
import pytest
from scipy import stats

from ttkit.verify import PROTOCOLS
from ttkit.verify.session import Session
from ttkit.verify.timing import (
    centre,
    interval,
    launch_interval,
    measure,
    signed_rank_quantile,
    spend,
)

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


def test_unchanged_programs_are_given_up_soon_and_small_winners_are_not():
    _, used, _ = simulate(lognormal, 1.0, 300, seed=6)
    assert used <= 32  # 44 where a look may give up at its share of the error rate only
    found, _, _ = simulate(lognormal, 1.07, 300, seed=5)
    assert found >= 0.9


def test_clearly_slower_candidates_cost_few_pairs():
    rate, used, _ = simulate(lognormal, 0.5, 300, seed=4)
    assert rate == 0.0
    assert used <= 17


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


def test_every_look_can_settle_something():
    for protocol in (p for p in PROTOCOLS.values() if p.paired):
        shares = spend(protocol.looks, protocol.alpha)
        assert sum(shares) == pytest.approx(protocol.alpha)
        assert all(map(signed_rank_quantile, protocol.looks, shares))


def test_the_bounds_are_walsh_averages():
    values = [1.0, 2.0, 4.0]  # averages 1, 1.5, 2, 2.5, 3, 4
    assert centre(values, 0.126) == (2.25, 1.0, 4.0)  # P(W < 1) = 1/8
    assert centre(values, 0.26) == (2.25, 1.5, 3.0)  # P(W < 2) = 2/8
    assert centre(values, 0.1) == (2.25, -math.inf, math.inf)


def test_the_interval_of_ratios_is_widened_by_the_spread():
    ratios = [math.exp(x) for x in (0.0, 0.1, 0.3)]
    found = interval(ratios, 0.126)
    assert (found.lo, found.hi, found.n) == (1.0, pytest.approx(math.exp(0.3)), 3)
    assert found.speedup == pytest.approx(math.exp(0.125))
    wide = interval(ratios, 0.126, spread=0.1)
    assert (wide.lo, wide.hi) == (pytest.approx(1 / 1.1), pytest.approx(1.1 * math.exp(0.3)))
    nothing = interval(ratios, 0.001)
    assert nothing.lo < 1e-9 and nothing.hi == math.inf


def test_the_same_interval_whichever_program_is_called_the_reference():
    ratios = [1.02, 0.97, 1.3, 1.11, 0.99, 1.05, 1.08, 1.2]
    found, turned = interval(ratios, 0.02), interval([1 / r for r in ratios], 0.02)
    assert (found.lo, found.hi) == (pytest.approx(1 / turned.hi), pytest.approx(1 / turned.lo))


def test_the_budget_brings_the_next_look_early():
    now = [0.0]

    def trial():
        now[0] += 1.0
        return 1.0 + 0.5 * (now[0] % 2), 1.2

    protocol = dataclasses.replace(RIGOROUS, seconds=11.5)
    found, pairs = measure(trial, protocol, clock=lambda: now[0])
    first, second = RIGOROUS.looks[:2]
    assert first < found.n == len(pairs) == 12 < second
    share = spend(RIGOROUS.looks, RIGOROUS.alpha)[1]
    assert found == interval([r / c for r, c in pairs], share, RIGOROUS.process_spread)
    # The first look is reached however long it takes.
    assert measure(trial, dataclasses.replace(RIGOROUS, seconds=0.0), lambda: now[0])[0].n == first


def test_what_is_futile_is_given_up_between_two_looks():
    """With the interval of the last look, at whose error rate it was found."""
    ratios = [0.98, 1.02, 0.9, 1.1, 1.04, 0.97, 1.06, 0.95, 1.09, 1.0, 1.01, 0.99, 1.0, 1.0]
    left = iter(ratios)
    found, pairs = measure(lambda: (next(left), 1.0), RIGOROUS, clock=lambda: 0.0)
    first, second = RIGOROUS.looks[:2]
    assert found.n == first < len(pairs) < second
    assert found.hi > RIGOROUS.futile


def test_launches_that_differ_are_noise_like_any_other():
    speedups = [1.05, 1.12, 1.08, 1.11, 1.02]
    found = launch_interval(speedups, 0.025)
    logs = [math.log(s) for s in speedups]
    low, high = stats.t.interval(0.95, 4, loc=sum(logs) / 5, scale=stats.sem(logs))
    assert found.lo == pytest.approx(math.exp(low)) and found.hi == pytest.approx(math.exp(high))
    assert found.speedup == pytest.approx(math.exp(sum(logs) / 5)) and found.n == 5
    # One that was far slower, and it cannot be told.
    assert launch_interval([1.05, 1.12, 1.08, 1.11, 0.8], 0.025).lo < 1
    with pytest.raises(ValueError, match="one launch"):
        launch_interval([1.1], 0.025)


def relaunched(noise, truth, spread):
    """Whether a program `truth` times as fast, in processes that differ by `spread`, is a narrow
    winner, whether it stays one, without and with the rule that ends early, and its launches."""
    session = object.__new__(Session)
    found = [truth * math.exp(noise.gauss(0, spread)) for _ in range(1 + RIGOROUS.relaunches)]
    stays = launch_interval(found, RIGOROUS.alpha).lo > 1
    for launches in range(1, len(found) + 1):
        session.launches = found[:launches]
        if not session.still_ahead():
            break
    return found[0] > 1.025, stays, stays and launches == len(found), launches - 1


@pytest.mark.parametrize("spread", [0.02, 0.05])
def test_the_rule_for_relaunched_winners_keeps_its_error_rate(spread):
    # Unchanged programs in processes that differ by 5 %, as large products on a GPU do; the first
    # launch is above the noise by luck, or there would be no other.
    noise = random.Random(3)
    runs = [relaunched(noise, 1.0, spread) for _ in range(4000)]
    narrow = [run for run in runs if run[0]]
    assert sum(stays for _, stays, _, _ in narrow) / 4000 < 0.025
    assert sum(early for _, _, early, _ in narrow) <= sum(stays for _, stays, _, _ in narrow)
    assert sum(launches for *_, launches in narrow) / len(narrow) < 3.2


@pytest.mark.parametrize(("truth", "spread"), [(1.03, 0.02), (1.1, 0.02), (1.1, 0.05)])
def test_relaunches_that_end_early_cost_hardly_a_winner(truth, spread):
    noise = random.Random(4)
    runs = [relaunched(noise, truth, spread) for _ in range(4000)]
    stays, early = (sum(run[0] and run[i] for run in runs) / 4000 for i in (1, 2))
    assert 0.3 < stays - 0.02 < early <= stays


def test_the_interval_of_a_relaunched_winner_spans_all_launches_and_is_then_theirs():
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
    assert first.record["speedup"] == pytest.approx((1.1 * 1.2) ** (1 / 3))
    assert first.record["speedup_lo"] == 0.95 and first.record["speedup_hi"] == 1.3
    assert first.record["n_pairs"] == 3 and len(first.record["pairs"]) == 3
    assert first.record["reference_ms"] == pytest.approx(1.1)
    first.protocol = RIGOROUS
    first.conclude()
    found = launch_interval([1.1, 1.0, 1.2], RIGOROUS.alpha)
    ends = [first.record[name] for name in ("speedup", "speedup_lo", "speedup_hi")]
    assert ends == [found.speedup, found.lo, found.hi]
