"""What a candidate saves and what reappears elsewhere, on made-up times."""

from __future__ import annotations

import math
import random
import types

import pytest

from ttkit.errors import InfraError
from ttkit.verify import PROTOCOLS, timing
from ttkit.verify.race import Race
from ttkit.verify.session import Session
from ttkit.verify.sides import Outcome

RIGOROUS = PROTOCOLS["rigorous"]
N = 22


def race(
    delivery,
    idle=(0.0,) * N,
    ending=(0.0,) * N,
    reference=1.1e-3,
    candidate=1.0e-3,
    strides=(),
    conversion=0.0,
    slots=1,
    device="cpu",
):
    """A race that was run: `delivery`, `idle` and `ending` are what the candidate's took beyond the
    other's, in seconds, for each pair; `strides` those of its output, where the other's are (),
    from which the referee needs `conversion` seconds to copy; `slots` calls made a run."""
    sides = [
        types.SimpleNamespace(
            deliveries=[1e-4 + d for d in late],
            late_cpu=[math.nan] * N,
            endings=list(after),
            idle_cpu=list(rest),
            strides=layout,
            device=device,
        )
        for late, rest, layout, after in (
            (delivery, idle, strides, ending),
            ([0.0] * N, [0.0] * N, (), [0.0] * N),
        )
    ]
    for side in sides:
        side.start_counting = side.deliveries.clear
    referee = types.SimpleNamespace(
        info={"slots": slots}, ask=lambda op, **fields: {"seconds": conversion}
    )
    made = Race(referee, *sides, RIGOROUS, 1.0)
    noise = random.Random(0)
    pairs = [
        (reference * (1 + 0.01 * noise.random()), candidate * (1 + 0.01 * noise.random()))
        for _ in range(N)
    ]
    found = timing.interval(pairs, 0.004, RIGOROUS)
    made.shapes = [[64, 64]] if strides else []
    made.record.update(
        speedup=found.speedup, speedup_lo=found.lo, speedup_hi=found.hi, reference_ms=1.1
    )
    return made, pairs


def checked(delivery, **rest):
    made, pairs = race(delivery, **rest)
    before = dict(made.record)
    made._check_deferred(pairs)
    return before, made.record


@pytest.mark.parametrize(("milliseconds", "expected"), [(2.9, RIGOROUS.warmup), (3.1, 1)])
def test_a_call_that_takes_long_is_warmed_up_by_one(milliseconds, expected):
    made, _ = race([0.0] * N)
    made.referee.info["reference_ms"] = milliseconds
    called = []
    made._pair = lambda: called.append("pair") or (1.0, 1.0)
    made._measure_null = lambda: called.append("null")

    def counting():
        raise InfraError("warm")

    made.candidate.start_counting = counting
    with pytest.raises(InfraError, match="warm"):
        made._paired()
    # The round trip is measured on one side, which must not be the warmer for the first pair.
    assert called == ["pair", "null", "pair"][: expected + 1]


@pytest.mark.parametrize("shared", [False, True])
def test_before_they_are_timed_both_sides_run_the_last_cases_in_turns(shared):
    session = object.__new__(Session)
    session.protocol, session.cases_run = RIGOROUS, list(range(10))
    ran, awake = [], set()
    made = {}
    for name in ("reference", "candidate"):
        side = made[name] = types.SimpleNamespace(shared=shared and name == "reference")
        side.thaw = lambda name=name: awake.add(name)
        side.set_aside = lambda name=name: awake.discard(name)
    session.candidate, reference = made["candidate"], made["reference"]
    mine = random.getstate()
    session.between = lambda *sides: None
    session.referee = types.SimpleNamespace(ask=lambda op, **fields: {})
    session._begin = lambda number, side, judged: number

    def run(side, number):
        name = "candidate" if side is session.candidate else "reference"
        assert awake == {name}  # whoever is not running is frozen
        ran.append((number, name))

    session._run_case = run
    awake.add("reference")
    session.prepare(reference)
    assert random.getstate() == mine  # whoever verifies has seeded it for work of their own
    if shared:  # on CUDA its process is as old as the referee
        assert not ran
        return
    alone, turns = ran[:-8], ran[-8:]
    assert alone == [(number, "reference") for number in range(6)]
    assert sorted(turns) == [(n, side) for n in range(6, 10) for side in ("candidate", "reference")]
    assert [number for number, _ in turns] == [6, 6, 7, 7, 8, 8, 9, 9]


def test_a_turn_that_does_not_count_is_a_turn_of_both_sides():
    made, _ = race([0.0] * N)
    turns, uncounted, asked = [], [], []
    for side in (made.candidate, made.reference):
        side.uncount = lambda side=side: uncounted.append(side)
    made._turn = lambda side, slots, which: turns.append(side)
    made._values = {False: "ours", True: "theirs"}
    made.referee.ask = lambda op, **fields: asked.append((op, fields)) or {"varied": True}
    for _ in range(20):
        made._vary("negated")
    assert turns == uncounted and [op for op, _ in asked] == ["vary", "varied"] * 20
    assert asked[1][1]["values"] == "ours" and asked[1][1]["expected"] == "theirs"
    assert turns.count(made.candidate) == turns.count(made.reference) == 20
    assert 0 < sum(first is made.candidate for first in turns[::2]) < 20


def test_all_that_varies_comes_among_the_pairs_that_are_surely_run():
    made, _ = race([0.0] * N, slots=3)
    made.varied, made.reweigh = ["negated", "large"], True
    seen = []
    made._vary = seen.append
    made._change_weights = lambda: seen.append("weights")
    made._pair = lambda: seen.append("pair") or (1.0, 1.0)
    trial = made._interrupted()
    for _ in range(RIGOROUS.looks[0]):
        trial()
    assert seen[0] == seen[-1] == "pair" and seen.count("weights") == 1
    assert seen.count("negated") == seen.count("large") == 1


def test_a_reason_can_be_written_down():
    assert Outcome("runtime_error", "\udcff").reason == "?"


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
    for where in ("idle", "ending"):
        before, after = checked([0.0] * N, **{where: late})
        assert after["speedup"] < 1.02 < before["speedup"]


def test_work_put_off_is_called_what_it_is():
    made, pairs = race([6e-4] * N, reference=1.1e-3, candidate=0.5e-3)
    with pytest.raises(Outcome, match="more when its output is fetched") as raised:
        made._check_deferred(pairs)
    assert raised.value.status == "rejected" and raised.value.flags == ("deferred_work",)


def test_a_task_of_microseconds_is_not_a_cheat_by_noise():
    made, pairs = race([4e-6] * N, reference=1.0e-5, candidate=0.995e-5)
    made.record["reference_ms"] = 0.01
    assert made.record["speedup_lo"] < 1 < made.record["speedup"]
    made._check_deferred(pairs)
    assert made.record["speedup"] < 1


def test_who_saves_nothing_is_not_asked():
    made, pairs = race([1.0] * N, reference=1.0e-3, candidate=1.1e-3)
    before = dict(made.record)
    made._check_deferred(pairs)
    assert made.record == before


def rows(made, saved, late=0.0):
    """Let calls whose inputs come one by one save `saved` seconds each, about, of 1.1 ms, and the
    output of a row take `late` seconds more to fetch."""
    noise = random.Random(3)

    def pair(one_by_one):
        assert one_by_one
        made.candidate.deliveries.append(1e-4 + late)
        made.reference.deliveries.append(1e-4)
        return 1.1e-3, 1.1e-3 - saved + noise.gauss(0, 1e-5)

    made._pair = pair


def test_what_one_delivery_of_many_calls_took_is_seen_where_calls_come_one_by_one():
    made, pairs = race([0.0] * N, reference=1.1e-3, candidate=0.1e-3, slots=16)
    made._check_deferred(pairs)
    assert made.record["speedup_lo"] > 5
    rows(made, saved=1e-3, late=1e-3)
    with pytest.raises(Outcome, match="more when an output is fetched"):
        made._check_batched(pairs)
    made, pairs = race([0.0] * N, candidate=0.1e-3, strides=[[1, 64]], conversion=3e-4, slots=16)
    rows(made, saved=1e-3, late=1e-3)
    with pytest.raises(Outcome, match="more when an output is fetched"):
        made._check_batched(pairs)  # what the referee can do in 0.3 ms took 1.1


def test_one_delivery_of_many_calls_counts_for_each_of_them():
    made, pairs = race([1.0e-3] * N, reference=1.1e-3, candidate=0.1e-3, slots=16)
    with pytest.raises(Outcome, match="more when its output is fetched"):
        made._check_deferred(pairs)
    made, pairs = race([1.0e-4] * N, reference=1.1e-3, candidate=0.1e-3, slots=16)
    made._check_deferred(pairs)  # a little later is no cheat, but it counts
    assert made.record["speedup"] == pytest.approx(1.1 / 0.2, rel=0.05)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_saving_that_stays_where_calls_come_one_by_one_is_one(device):
    made, pairs = race([0.0] * N, candidate=0.6e-3, slots=16, device=device)
    before = dict(made.record)
    rows(made, saved=0.4e-3)
    made._check_batched(pairs)
    assert made.record == before and made.checks == ["batched_calls"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_saving_that_is_gone_where_calls_come_one_by_one_was_that_of_a_batch(device):
    made, pairs = race([0.0] * N, candidate=0.6e-3, slots=16, device=device)
    rows(made, saved=0.0)
    with pytest.raises(Outcome, match="when they come one by one") as raised:
        made._check_batched(pairs)
    assert raised.value.flags == ("batched_calls",)


def test_a_little_more_at_delivery_is_counted():
    made, pairs = race([0.0] * N, reference=1.6e-5, candidate=1.4e-5, slots=16)
    made.record["reference_ms"] = 0.016
    rows(made, saved=2e-6, late=1.5e-5)
    made._check_batched(pairs)
    assert made.record["speedup"] < 1


def test_a_narrow_winner_that_is_none_in_rows_is_no_cheat():
    made, pairs = race([0.0] * N, candidate=0.95e-3, slots=2)
    rows(made, saved=-0.05e-3)
    assert made.record["speedup_lo"] > 1
    made._check_batched(pairs)
    assert made.record["speedup"] < 1 and made.record["speedup_lo"] < 1


def test_what_a_launcher_may_cost_is_no_cheat_but_no_saving_either():
    made, pairs = race([0.0] * N, candidate=1.0e-3, slots=16, device="cuda")
    rows(made, saved=-0.05e-3)
    assert made.record["speedup_lo"] > 1
    made._check_batched(pairs)
    assert made.record["speedup"] < 1 and made.record["speedup_lo"] < 1


def test_what_is_fetched_late_comes_on_top_of_what_rows_show():
    made, pairs = race([0.0] * N, candidate=1.0e-3, slots=16, device="cuda")
    rows(made, saved=-0.05e-3, late=0.08e-3)
    made._check_batched(pairs)
    assert made.record["speedup"] < 0.95  # not 1.1 / 1.08, as calls that came together would say


def test_an_output_of_another_layout_pays_for_its_conversion_and_is_no_cheat():
    other = {"candidate": 0.5e-3, "strides": [[1, 64]], "slots": 16}
    made, pairs = race([0.5e-3] * N, conversion=1e-3, **other)
    made._check_deferred(pairs)  # whole, not a sixteenth: each output has to be converted
    assert 1.05 < made.record["speedup"] < 1.15
    made, pairs = race([0.8e-3] * N, conversion=1e-3, **other)
    made._check_deferred(pairs)
    assert made.record["speedup"] < 1
    made, pairs = race([0.8e-3] * N, conversion=3e-4, **other)
    with pytest.raises(Outcome, match="more when its output is fetched"):
        made._check_deferred(pairs)  # what the referee can do in 0.3 ms took 0.9


def test_an_expanded_output_has_yet_to_be_written():
    made, pairs = race([0.0] * N, reference=1.1e-3, candidate=0.95e-3, strides=[[1, 0]])
    made._check_deferred(pairs)  # 0.1 ms of delivery, as long as the reference's
    assert 1.02 < made.record["speedup"] < 1.08
