"""The second half of a session: candidate and reference timed in turns, and what could fool that.

Whoever is not running is frozen, so that it can neither prepare its next turn nor slow down the
other's. The outputs of every timed pair are compared. Among the pairs, at secret places, are turns
that do not count, on inputs unlike the declared ones, and all weights change once: a program cannot
do one thing where it is checked and another where it is timed. After the pairs, those whose
interval says "faster" are asked where the time went: to the delivery, to a moment between turns, to
another core, or to one call that served many.
"""

from __future__ import annotations

import itertools
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from ttkit.errors import InfraError
from ttkit.verify import ranks, timing
from ttkit.verify.protocol import Protocol
from ttkit.verify.sides import REFEREE_SECONDS, REUSED, Outcome, RefereeHandle, Side

# What surely (at this error rate, shared by the places that are looked at) reappears outside the
# timed call is counted, and called a cheat when it is surely this share of the reference, and in a
# whole turn more seconds than scheduling takes on a busy machine.
DEFERRED_ALPHA = 0.025
DEFERRED_PLACES = 4
DEFERRED_FLOOR, DEFERRED_SECONDS = 0.2, 2e-4
# A candidate that saves less than this share of its saving when inputs come one by one, in rows of
# at most so many, has done the work of many calls in one.
BATCHED_SHARE, BATCHED_PAIRS, ROW = 0.5, 12, 12
# Seconds by which one launcher may be slower than another to begin (measured on CUDA: up to 0.2 ms
# more for what torch.compile makes than for a dozen of torch's own kernels).
LAUNCHING = {"cpu": 5e-5, "cuda": 2.5e-4}
# CPU time beyond the wall time of a run, as a share of it and in seconds.
CORES_SHARE, CORES_FLOOR = 1.3, 2e-4
# How much slower than on an idle device the referee's fixed piece of work may be, and by how many
# seconds; how much slower than it has been the reference may be.
BUSY_FACTOR, BUSY_FLOOR = 2.0, 5e-5
SLOW_REFERENCE = 4.0
# A call that lasts so many milliseconds has warmed up what there is once it has been made.
WARM_MS = 3.0
# Turns on varied inputs among the timed ones of a launch: more would take longer than they tell.
VARIED_TURNS = 3
# Bytes by which a run's buffers are shifted. Over up to 8 MiB the intervals of 9 in 144 launches of
# unchanged programs (60 pairs each) lay beside 1, over 64 MiB of 3; its pages cost 15 ms a process.
PAD_BYTES, PAD_STEP = 64 << 20, 64

Pairs = list[tuple[float, float]]


class Race:
    """Times one candidate beside one process of the reference."""

    def __init__(
        self,
        referee: RefereeHandle,
        candidate: Side,
        reference: Side,
        protocol: Protocol,
        run_limit: float,
        varied: Sequence[str] = (),
        reweigh: bool = False,
    ):
        """`varied` names the variations that the candidate has passed (of those whose inputs look
        like the declared ones), `reweigh` says that it has been run with other weights."""
        self.referee, self.candidate, self.reference = referee, candidate, reference
        self.protocol, self.run_limit = protocol, run_limit
        self.varied, self.reweigh, self.reweighed = list(varied), reweigh, False
        self.record: dict[str, Any] = {}
        self.checks: list[str] = []
        # The system's generator: a candidate must not foresee the order of a pair.
        self.random = random.SystemRandom()
        self.slots = list(range(referee.info["slots"]))
        self.null = 0.0
        self.flushes: list[float] = []
        self._values: dict[bool, Any] = {}
        self.shapes: list[list[int]] = []  # of the output

    def run(self) -> None:
        """Fills in `record`; raises Outcome if the candidate cheats, or InfraError."""
        sides = (self.candidate, self.reference)
        case = self.referee.ask("timing_begin")
        self.shapes = [spec["shape"] for spec in case["output"]["tensors"]]
        try:
            for side in sides:
                side.thaw()
                side.bind(case, self.run_limit)
            self.candidate.freeze()
            self.null = math.inf
            self._measure_null()
            if self.protocol.paired:
                self._paired()
            else:
                self._unpaired()
        finally:
            for side in sides:
                side.thaw()
            if self.reweighed:
                self.referee.ask("own_weights")
                self.reference.reweigh(REFEREE_SECONDS)
        if self.reweighed:
            self.candidate.reweigh(self.run_limit)

    def _measure_null(self) -> None:
        """The round trip of a run of nothing, the least that has been found."""
        # On the reference's process: a candidate could slow its own empty runs.
        self.reference.thaw()
        self.null = min(self.null, self.reference.null_seconds())
        self.reference.freeze()
        self.record["null_ms"] = self.null * 1e3

    def _turn(self, side: Side, slots: list[int], which: int, keys: Sequence[int] = ()) -> float:
        """Seconds of one call of `side`, on inputs written anew after the caches were flushed.

        With `keys`, one for each slot, no slot can be read before it is asked for.
        """
        staged = self.referee.ask("stage", trusted=side.trusted, slots=slots, keys=list(keys))
        self.flushes.append(staged["seconds"])
        limit = REFEREE_SECONDS if side.trusted else side.call_limit(self.run_limit)
        # For both sides, or a delivery would start from another state of caches and device.
        referee = self.referee if self.protocol.compared else None
        seconds, delivered = side.turn(slots, which, shift(), limit, referee, keys)
        self._values[side.trusted] = delivered.get("values")
        return max(seconds - self.null, 1e-6) / (1 if keys else len(slots))

    def _in_random_order(self) -> list[Side]:
        return self.random.sample([self.reference, self.candidate], 2)

    def _pair(self, one_by_one: bool = False) -> tuple[float, float]:
        self.referee.ask("draw")
        sides = self._in_random_order()
        slots, keys = self.slots, list[int]()
        if one_by_one:
            # As many as nobody can foresee: the last is the one that is delivered.
            longest = min(ROW, len(self.slots))
            length = self.random.randint(min(2, longest - 1), longest)
            slots = self.random.sample(self.slots, length)
            keys = [self.random.getrandbits(60) for _ in slots]
        # Both sides deliver the same one of their outputs, so that the two can be compared.
        which = slots[-1] if one_by_one else self.random.choice(slots)
        times = {side.trusted: self._turn(side, slots, which, keys) for side in sides}
        if self.protocol.compared:
            result = self._compare("recheck", slot=which)
            if result["mutated"] and not self.referee.info["mutates"]:
                text = "it changed its inputs in place in a timed run"
                raise Outcome("rejected", text, "inputs_mutated")
            if self.candidate.reuses and not self.referee.info["reuses"]:
                raise Outcome("rejected", REUSED, "output_reused")
            if not result["ok"]:
                text = f"wrong values in a timed run: {result['what']}"
                raise Outcome("incorrect", text, "values_timed")
        return times[True], times[False]

    def _compare(self, op: str, **fields: Any) -> dict[str, Any]:
        """Have the referee compare what both sides delivered in their last turns."""
        values = {"values": self._values[False], "expected": self._values[True]}
        return self.referee.ask(op, **values, **fields)

    def _interrupted(self) -> Callable[[], tuple[float, float]]:
        """Pairs, before some of which, drawn among those that are surely run, something varies."""
        names = self.random.sample(self.varied, min(VARIED_TURNS, len(self.varied)))
        again: list[Callable[[], None]] = [partial(self._vary, name) for name in names]
        again += [self._change_weights] if self.reweigh else []
        plan = [(self.random.randrange(1, self.protocol.looks[0]), act) for act in again]
        done = itertools.count()

        def trial() -> tuple[float, float]:
            number = next(done)
            for due, act in plan:
                if due == number:
                    act()
            return self._pair()

        return trial

    def _vary(self, name: str) -> None:
        """A turn of each side like any other, but for its inputs and that nobody counts it. What
        the candidate delivers is judged when nothing is timed any more (`Session.look_again`).

        The reference's is only there since a process is the faster the more turns it has had: three
        more among nine pairs made one of two equal programs the faster by 3 %.
        """
        which = self.random.choice(self.slots)
        if not self.referee.ask("vary", slot=which, name=name)["varied"]:
            return
        for side in self._in_random_order():
            self._turn(side, self.slots, which)
            side.uncount()
        self._compare("varied", slot=which, name=name)

    def _change_weights(self) -> None:
        """From here on both sides have other weights than those they began with."""
        kept = self.candidate.weights_loaded
        if not self.referee.ask("reweigh", weights=kept)["reweighed"]:
            return
        self.reweighed = True
        for side in self._in_random_order():
            side.thaw()
            side.reweigh(self.run_limit)
            side.set_aside()

    def _paired(self) -> None:
        once = self.referee.info["reference_ms"] > WARM_MS
        for number in range(1 if once else self.protocol.warmup):
            self._pair()
            if number == 0:
                # The machine may have been slow to wake the first time, and what is taken off
                # without being there makes both sides look fast and their ratio large. Not right
                # before the first pair that counts: it wakes the reference.
                self._measure_null()
        self.candidate.start_counting()
        self.reference.start_counting()
        self.flushes.clear()
        found, pairs = timing.measure(self._interrupted(), self.protocol, time.monotonic)
        self._keep(pairs)
        self.record.update(
            speedup=found.speedup, speedup_lo=found.lo, speedup_hi=found.hi, n_pairs=found.n
        )
        self.checks += ["values_timed", "child_process", "more_cores", "deferred_work"]
        self._check_device()
        self._check_cores()
        self._check_deferred(pairs)
        self._check_batched(pairs)
        self._check_limit()

    def _check_device(self) -> None:
        """Was the device the harness's alone, and the reference as fast as it usually is?"""
        usual, quiet = self.referee.usual_ms, self.referee.info["quiet_seconds"]
        if self.reference.device != "cpu" and quiet:
            self.checks.append("device_kept_busy")
            busy = statistics.median(self.flushes)
            if busy > BUSY_FACTOR * quiet + BUSY_FLOOR:
                raise Outcome(
                    "rejected",
                    f"the device was busy between its turns: {busy * 1e3:.3g} ms for what takes "
                    f"{quiet * 1e3:.3g} ms on an idle one",
                    "device_kept_busy",
                )
        now = self.record["reference_ms"]
        if now > SLOW_REFERENCE * usual:
            raise InfraError(
                f"the reference took {now:.3g} ms, {now / usual:.1f} times what it took before: "
                "the machine is busy with something else"
            )
        self.referee.usual_ms = min(usual, now)

    def _check_cores(self) -> None:
        """Did its timed runs use more CPU time than they lasted? One core is what both have."""
        side = self.candidate
        if side.device != "cpu" or not side.run_cpu:
            return
        pairs = zip(side.run_cpu, side.run_seconds, strict=True)
        beyond = statistics.median(cpu - CORES_SHARE * wall for cpu, wall in pairs)
        if beyond > CORES_FLOOR:
            used, lasted = statistics.median(side.run_cpu), statistics.median(side.run_seconds)
            text = f"its timed runs used {used * 1e3:.3g} ms of CPU time in {lasted * 1e3:.3g} ms"
            raise Outcome("rejected", text, "more_cores")

    def _check_deferred(self, pairs: Pairs) -> None:
        """Does what the candidate saves in `pairs` reappear after its answer, or between its turns?

        What surely comes late counts as the candidate's time. It is called a cheat only where this
        is surely a fifth of the reference or more: fused kernels leave their output in other
        caches, which moves a little time into the copy quite honestly. One output of a turn is
        delivered, however many calls it was of, so what its delivery takes longer counts for each
        call; what else a turn does is shared among them. An output of another layout than the
        reference's has yet to be brought into that: all that its delivery takes longer counts, and
        no more of it than the referee needs to do that is honest. An expanded one has yet to be
        written: its delivery counts whole, and is no cheat.
        """
        saved = _saved(pairs)
        if not self.record["speedup"] > 1 or saved <= 0:
            return
        ours, theirs = self.candidate, self.reference
        converted = ours.strides != theirs.strides
        expanded = self._expanded(ours) and not self._expanded(theirs)
        written = [self.null] * len(theirs.deliveries) if expanded else theirs.deliveries
        usual = self._conversion(written)
        # By the wall clock, and by the CPU time that the kernel charges, which other processes on
        # the machine do not disturb.
        for mine, other, where in (
            (ours.late_cpu, theirs.late_cpu, "after its answer"),
            (ours.deliveries, written, "when its output is fetched"),
            (ours.endings, theirs.endings, "once its output was fetched"),
            (ours.idle_cpu, theirs.idle_cpu, "between its turns"),
        ):
            if not self.record["speedup"] > 1:
                return
            # Nobody cheats to be no faster: on a task of microseconds that would be noise.
            ahead = self.record["speedup_lo"] > 1
            conversion = converted and (mine is ours.late_cpu or mine is ours.deliveries)
            per = 1 if conversion or mine is ours.deliveries else len(self.slots)
            extra = [(m - o) / per for m, o in zip(mine, other, strict=True)]
            middle, low, _ = ranks.centre(extra, DEFERRED_ALPHA / DEFERRED_PLACES)
            # Noise must not be charged. (nan: the system told nothing.)
            if not (middle > 0 if conversion else low > 0):
                continue
            surely = low - conversion * usual / per
            if ahead and not expanded and surely > max(self._fifth(), DEFERRED_SECONDS / per):
                text = f"it saves {saved * 1e3:.3g} ms in the timed call but takes at least "
                text += f"{low * 1e3:.3g} ms more {where}"
                raise Outcome("rejected", text, "deferred_work")
            self._judge_by([(r, c + middle) for r, c in pairs])

    def _expanded(self, side: Side) -> bool:
        """Whether it returned something smaller than it looks: an element that stands for many."""
        return any(
            1 + sum((n - 1) * max(step, 0) for n, step in zip(shape, steps, strict=False))
            < math.prod(shape)
            for steps, shape in zip(side.strides, self.shapes, strict=False)
        )

    def _fifth(self) -> float:
        """Seconds of a fifth of the reference: what is less may be honest, and is no cheat."""
        return DEFERRED_FLOOR * self.record["reference_ms"] / 1e3

    def _conversion(self, deliveries: list[float]) -> float:
        """Seconds by which the referee delivers outputs of the layout that the candidate returned
        more slowly than `deliveries`, which are of the reference's."""
        if self.candidate.strides == self.reference.strides:
            return 0.0
        try:
            found = self.referee.ask("yardstick", strides=self.candidate.strides, repeats=5)
        except InfraError:
            # Strides that no tensor can have are the candidate's doing, not the referee's.
            raise Outcome("rejected", "it reported impossible strides", "output_type") from None
        return max(found["seconds"] + self.null - statistics.median(deliveries), 0.0)

    def _check_batched(self, pairs: Pairs) -> None:
        """A run of many short calls hands over all their inputs at once. Where each can be read
        only when it is its turn, a call has to save what it saved before, and must not have left
        that to the delivery: of many outputs only one is delivered.

        The round trip of a call, and making its inputs readable, is the same for both sides and
        drops out of the difference. What a process pays to begin is not: launchers of kernels
        written in Python take longer the less has just run. So calls stand in a row, the first does
        not count, and what a launcher may cost, or a fifth of the reference, which memory's layout
        may make of two processes, is no cheat: then the row is the measurement.
        """
        if len(self.slots) == 1 or not self.record["speedup_lo"] > 1:
            return
        self.checks.append("batched_calls")
        # What it surely saves: a narrow winner by chance must not be taken for a cheat.
        saved = self.record["reference_ms"] / 1e3 * (1 - 1 / self.record["speedup_lo"])
        self.candidate.start_counting()
        self.reference.start_counting()
        rows = [self._pair(one_by_one=True) for _ in range(BATCHED_PAIRS)]
        _, _, high = ranks.centre([r - c for r, c in rows], DEFERRED_ALPHA)
        launching = LAUNCHING["cpu" if self.candidate.device == "cpu" else "cuda"]
        honest = max(launching, self._fifth())
        if high < min(BATCHED_SHARE * saved, saved - honest):
            raise Outcome(
                "rejected",
                f"it saves at least {saved * 1e3:.3g} ms a call when {len(self.slots)} inputs come "
                f"together, at most {high * 1e3:.3g} ms when they come one by one",
                "batched_calls",
            )
        if high < BATCHED_SHARE * saved:
            pairs = rows
            self._judge_by(rows)
        ours, theirs = self.candidate.deliveries, self.reference.deliveries
        late = [m - o for m, o in zip(ours, theirs, strict=True)]
        middle, low, _ = ranks.centre(late, DEFERRED_ALPHA)
        surely = low - self._conversion(theirs)
        if surely < BATCHED_SHARE * saved:
            return
        if surely > max(self._fifth(), DEFERRED_SECONDS):
            raise Outcome(
                "rejected",
                f"it saves {saved * 1e3:.3g} ms a call but takes at least {surely * 1e3:.3g} ms "
                "more when an output is fetched",
                "deferred_work",
            )
        self._judge_by([(r, c + middle) for r, c in pairs])

    def _judge_by(self, pairs: Pairs) -> None:
        """The speedup is what `pairs` show, at the error rate of one look, if that is less."""
        share = timing.spend(self.protocol.looks, self.protocol.alpha)[0]
        found = timing.interval(pairs, share, self.protocol)
        low = min(found.lo, self.record["speedup_lo"])
        self.record.update(speedup=found.speedup, speedup_lo=low, speedup_hi=found.hi)

    def _check_limit(self) -> None:
        self.checks.append("impossible_speed")
        # With the round trip still in it: noise in what is subtracted must not make a cheat.
        took = self.record["candidate_ms"] + self.null * 1e3 / len(self.slots)
        limit = self.referee.info["limit_ms"]
        if took < limit:
            raise Outcome(
                "rejected",
                f"{took:.3g} ms is less than this device needs to read the inputs once "
                f"({limit:.3g} ms)",
                "impossible_speed",
            )

    def _unpaired(self) -> None:
        """The paper's way: all runs of the candidate, then all of the reference; means."""
        times: dict[bool, list[float]] = {False: [], True: []}
        for side in (self.candidate, self.reference):
            for number in range(self.protocol.warmup + self.protocol.trials):
                seconds = self._turn(side, self.slots, self.slots[0])
                if number >= self.protocol.warmup:
                    times[side.trusted].append(seconds)
        self._keep(list(zip(times[True], times[False], strict=True)))
        reference, candidate = statistics.fmean(times[True]), statistics.fmean(times[False])
        self.record.update(
            speedup=reference / candidate,
            reference_ms=reference * 1e3,
            candidate_ms=candidate * 1e3,
            n_pairs=len(times[True]),
        )

    def _keep(self, pairs: Pairs) -> None:
        self.record.update(
            pairs=tuple((round(r * 1e3, 6), round(c * 1e3, 6)) for r, c in pairs),
            reference_ms=statistics.median(r for r, _ in pairs) * 1e3,
            candidate_ms=statistics.median(c for _, c in pairs) * 1e3,
        )


def shift() -> int:
    """Bytes by which the buffers of a run are shifted, drawn anew for each."""
    return random.SystemRandom().randrange(PAD_STEP, PAD_BYTES, PAD_STEP)


def _saved(pairs: Pairs) -> float:
    """Median seconds by which the candidate is ahead."""
    return statistics.median(r - c for r, c in pairs)
