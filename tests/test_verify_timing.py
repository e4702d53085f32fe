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
    Interval,
    futile,
    interval,
    launch_interval,
    measure,
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


def simulate(noise, true_ratio, runs, seed, protocol=RIGOROUS):
    """How often the rule says `fast`, and the pairs it used on average."""
    rng = np.random.default_rng(seed)
    fast = used = covered = 0
    for _ in range(runs):
        found, pairs = measure(
            lambda: (true_ratio * noise(rng), noise(rng)), protocol, clock=lambda: 0.0
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


def test_every_look_can_settle_something():
    for protocol in (p for p in PROTOCOLS.values() if p.paired):
        shares = spend(protocol.looks, protocol.alpha)
        assert sum(shares) == pytest.approx(protocol.alpha)
        for look, share in zip(protocol.looks, shares, strict=True):
            found = interval([(1.1 + i / 1e4, 1.0) for i in range(look)], share, protocol)
            assert found.lo > 1 and found.hi < math.inf


def test_the_interval_of_ratios_is_widened_by_the_spread():
    pairs = [(math.exp(x), 1.0) for x in (0.0, 0.1, 0.3)]
    protocol = dataclasses.replace(RIGOROUS, process_spread=0.0)
    found = interval(pairs, 0.126, protocol)  # 1/8: only where the first leads in all three
    assert (found.lo, found.hi) == pytest.approx((1.0, math.exp(0.3)))
    assert found.lo < found.speedup < found.hi and found.n == 3
    wide = interval(pairs, 0.126, dataclasses.replace(protocol, process_spread=0.1))
    assert (wide.lo, wide.hi) == (pytest.approx(found.lo / 1.1), pytest.approx(found.hi * 1.1))
    assert wide.speedup == found.speedup
    nothing = interval(pairs, 0.001, protocol)
    assert nothing.lo < 1e-9 and nothing.hi == math.inf


def test_where_most_pairs_say_otherwise_the_interval_spans_both():
    """One whose every third run is short: by its least times it is twice as fast."""
    noise = random.Random(3)
    times = [(1 + 0.01 * noise.random(), 0.5 if i % 3 == 0 else 1.02) for i in range(60)]
    found = interval(times, 0.004, RIGOROUS)
    assert found.lo < 1 and found.hi > 1.99 and found.lo <= found.speedup <= found.hi


def test_a_machine_that_interrupts_most_runs_takes_no_more_pairs_than_it_must():
    """Others take a core for as long as a run takes: most of three runs have a good one."""

    def interrupted(rng):
        return math.exp(rng.normal(0, 0.03)) + (rng.exponential() if rng.random() < 0.5 else 0.0)

    found, used, covered = simulate(interrupted, 1.10, 300, seed=8)
    pair_by_pair = dataclasses.replace(RIGOROUS, block=1)
    less, more, _ = simulate(interrupted, 1.10, 300, seed=8, protocol=pair_by_pair)
    assert found > less + 0.25 and used < more
    assert covered >= 0.9
    rate, _, _ = simulate(interrupted, 1.0, 2000, seed=9)
    assert rate <= 0.025 + 3 * math.sqrt(0.025 * 0.975 / 2000)


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
    assert found == interval(pairs, share, RIGOROUS)
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


def test_where_pairs_disagree_nothing_is_futile():
    # As measured while a program 1.1 times as fast, and its reference, were interrupted by turns.
    ratios = [0.39, 2.07, 0.85, 0.52, 1.39, 0.69, 0.91, 0.6, 0.82, 0.58, 0.88, 0.76, 1.18, 0.6]
    apart = [(ratio, 1.0) for ratio in ratios]
    near = [(ratio**0.01 * 1.01, 1.0) for ratio in ratios]
    open_still = Interval(1.0, 0.5, 1.2, RIGOROUS.looks[0])
    wide = interval(apart, RIGOROUS.alpha, RIGOROUS)
    assert wide.hi < RIGOROUS.futile and wide.hi > RIGOROUS.futile_width * wide.lo
    assert not futile(apart, open_still, RIGOROUS)
    assert futile(near, open_still, RIGOROUS)


def test_launches_that_differ_are_noise_like_any_other():
    speedups = [1.05, 1.12, 1.08]
    found = launch_interval(speedups, RIGOROUS)
    logs = [math.log(s) for s in speedups]
    level = 1 - 2 * (RIGOROUS.alpha - 1 / 64)
    low, high = stats.t.interval(level, 2, loc=sum(logs) / 3, scale=stats.sem(logs))
    assert found.lo == pytest.approx(math.exp(low)) and found.hi == pytest.approx(math.exp(high))
    assert found.speedup == pytest.approx(math.exp(sum(logs) / 3)) and found.n == 3
    speedups += [1.02, 1.3, 0.9]
    assert launch_interval(speedups, RIGOROUS) == Interval(pytest.approx(1.065), 0.9, 1.3, 6)
    assert all(launch_interval(speedups[:n], RIGOROUS) is None for n in (1, 2, 4, 5))
    # Three that are all are not the first three.
    three = dataclasses.replace(RIGOROUS, relaunches=2)
    assert launch_interval(speedups[:3], three) == Interval(1.08, 1.05, 1.12, 3)
    # Where all of them need the whole error rate, nothing is left for the first.
    four = dataclasses.replace(RIGOROUS, relaunches=3)
    assert launch_interval(speedups[:3], four) is None


def test_all_launches_say_enough():
    protocols = [p for p in PROTOCOLS.values() if p.relaunches]
    assert protocols and all(0.5 ** (1 + p.relaunches) < p.alpha for p in protocols)


def launched(speedup, lo=None, pair=(1.0, 1.0)):
    session = object.__new__(Session)
    session.protocol, session.launches, session.checks = RIGOROUS, [speedup], []
    ends = {"speedup_lo": lo or speedup - 0.05, "speedup_hi": speedup + 0.1}
    session.record = {"speedup": speedup, "n_pairs": 1, "pairs": (pair,), **ends}
    return session


@pytest.mark.parametrize(
    ("speedup", "lo", "narrow"),
    [(1.1, 1.02, True), (1.3, 1.25, True), (1.4, 1.26, False), (1.04, 0.9, True)]
    + [(1.03, 0.99, False), (0.9, 0.5, False)],
)
def test_who_is_launched_again(speedup, lo, narrow):
    assert launched(speedup, lo).narrow() == narrow


def relaunched(noise, truth, spread, width):
    """Whether a program `truth` times as fast, in launches that differ by `spread` and have noise
    of `width`, is launched again, whether it is called faster then, and its launches."""
    off = math.hypot(spread, width)
    found = [truth * math.exp(noise.gauss(0, off)) for _ in range(1 + RIGOROUS.relaunches)]
    first = launched(found[0], found[0] * math.exp(-2.6 * width) / 1.01)
    if not first.narrow():
        return False, first.record["speedup_lo"] > 1, 1
    for speedup in found[1:]:
        first.take_in(launched(speedup))
        if first.concluded():
            break
    return True, first.record["speedup_lo"] > 1, len(first.launches)


@pytest.mark.parametrize(
    ("spread", "width"), [(0.002, 0.01), (0.002, 0.03), (0.02, 0.01), (0.05, 0.002), (0.05, 0.03)]
)
def test_the_rule_for_relaunches_keeps_its_error_rate(spread, width):
    # Unchanged programs in processes that differ by 5 %, as large products on a GPU do, or in noise
    # such as no launch can average out.
    noise = random.Random(3)
    runs = [relaunched(noise, 1.0, spread, width) for _ in range(4000)]
    assert sum(faster for _, faster, _ in runs) / 4000 < 0.025
    again = [launches for narrow, _, launches in runs if narrow]
    assert sum(again) < 3.2 * len(again) + 5


@pytest.mark.parametrize(
    ("spread", "width", "least"), [(0.002, 0.01, 0.99), (0.002, 0.03, 0.9), (0.02, 0.01, 0.95)]
)
def test_one_that_is_a_tenth_faster_is_found(spread, width, least):
    noise = random.Random(4)
    runs = [relaunched(noise, 1.09, spread, width) for _ in range(2000)]
    assert sum(faster for _, faster, _ in runs) / 2000 > least


def test_launches_that_agree_are_three():
    noise = random.Random(5)
    runs = [relaunched(noise, 1.09, 0.005, 0.005) for _ in range(500)]
    assert sum(launches for *_, launches in runs) / 500 < 3.3


def test_the_interval_of_a_relaunched_winner_spans_all_launches_and_is_then_theirs():
    first = launched(1.1, pair=(1.1, 1.0))
    for speedup in (1.3, 1.2):
        first.take_in(launched(speedup, pair=(speedup, 1.0)))
        assert not first.concluded()
    assert first.record["speedup"] == 1.2
    assert first.record["speedup_lo"] == pytest.approx(1.05)
    assert first.record["speedup_hi"] == pytest.approx(1.4)
    assert first.record["n_pairs"] == 3 and len(first.record["pairs"]) == 3
    assert first.record["reference_ms"] == pytest.approx(1.2)
    for speedup in (1.15, 1.25, 1.35):
        first.take_in(launched(speedup))
    assert first.concluded()
    ends = [first.record[name] for name in ("speedup", "speedup_lo", "speedup_hi")]
    assert ends == [pytest.approx(1.225), 1.1, 1.35]


def test_a_launch_that_is_not_ahead_is_the_last():
    first = launched(1.1)
    first.take_in(launched(1.0))
    assert first.concluded() and first.record["speedup_lo"] < 1


def test_another_launch_ends_by_no_rule_that_treats_the_sides_differently():
    again = RIGOROUS.again
    rng = np.random.default_rng(7)
    ahead = 0
    runs = 2000
    for _ in range(runs):
        found, _ = measure(lambda: (heavy(rng), heavy(rng)), again, clock=lambda: 0.0)
        ahead += found.speedup > 1
    assert abs(ahead / runs - 0.5) < 4 * 0.5 / math.sqrt(runs)
    # What is precise is not asked on.
    assert measure(lambda: (1.0, 1.0), again, clock=lambda: 0.0)[0].n == again.looks[0]
