"""What a candidate saves and what reappears elsewhere, on made-up times."""

from __future__ import annotations

import math
import random
import types

import pytest

from ttkit.verify import PROTOCOLS, timing
from ttkit.verify.race import Race
from ttkit.verify.sides import Outcome

RIGOROUS = PROTOCOLS["rigorous"]
N = 22


def race(delivery, idle=(0.0,) * N, reference=1.1e-3, candidate=1.0e-3):
    """A race that was run: `delivery` and `idle` are what the candidate's took beyond the other's,
    in seconds, for each pair."""
    sides = [
        types.SimpleNamespace(
            deliveries=[1e-4 + d for d in late],
            delivery_cpu=[math.nan] * N,
            idle_cpu=list(rest),
            strides=[],
            device="cpu",
        )
        for late, rest in ((delivery, idle), ([0.0] * N, [0.0] * N))
    ]
    made = Race(types.SimpleNamespace(info={"slots": 1}), *sides, RIGOROUS, 1.0)
    noise = random.Random(0)
    pairs = [
        (reference * (1 + 0.01 * noise.random()), candidate * (1 + 0.01 * noise.random()))
        for _ in range(N)
    ]
    found = timing.interval([r / c for r, c in pairs], 0.004, RIGOROUS.process_spread)
    made.record.update(
        speedup=found.speedup, speedup_lo=found.lo, speedup_hi=found.hi, reference_ms=1.1
    )
    return made, pairs


def checked(delivery, **rest):
    made, pairs = race(delivery, **rest)
    before = dict(made.record)
    made._check_deferred(pairs, 0.004)
    return before, made.record


def test_noise_at_delivery_takes_nothing_from_a_small_saving():
    noise = random.Random(1)
    late = [noise.gauss(2.5e-5, 1.5e-4) for _ in range(N)]
    before, after = checked(late)
    assert after == before and after["speedup_lo"] > 1


def test_a_good_part_that_surely_reappears_is_counted():
    noise = random.Random(2)
    late = [noise.gauss(9e-5, 1e-5) for _ in range(N)]
    before, after = checked(late)
    assert before["speedup_lo"] > 1.05 and after["speedup"] < 1.02 > after["speedup_lo"]
    before, after = checked([0.0] * N, idle=late)
    assert after["speedup"] < 1.02 < before["speedup"]


def test_work_put_off_is_called_what_it_is():
    made, pairs = race([6e-4] * N, reference=1.1e-3, candidate=0.5e-3)
    with pytest.raises(Outcome, match="more when its output is fetched") as raised:
        made._check_deferred(pairs, 0.004)
    assert raised.value.status == "rejected" and raised.value.flags == ("deferred_work",)


def test_a_task_of_microseconds_is_not_a_cheat_by_noise():
    made, pairs = race([4e-6] * N, reference=1.0e-5, candidate=0.995e-5)
    made.record["reference_ms"] = 0.01
    assert made.record["speedup_lo"] < 1 < made.record["speedup"]
    made._check_deferred(pairs, 0.004)
    assert made.record["speedup"] < 1


def test_who_saves_nothing_is_not_asked():
    made, pairs = race([1.0] * N, reference=1.0e-3, candidate=1.1e-3)
    before = dict(made.record)
    made._check_deferred(pairs, 0.004)
    assert made.record == before
