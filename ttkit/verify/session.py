"""One candidate from its first line to its verdict, as the judge conducts it.

The judge asks, workers answer; every wait has a limit and every answer is checked. A candidate's
answers can only incriminate itself: what makes it correct is the referee's comparison, what makes
it fast is the judge's clock.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from typing import Any

from ttkit.errors import InfraError
from ttkit.verify import timing
from ttkit.verify.protocol import Limits, Protocol
from ttkit.verify.sides import REFEREE_SECONDS, Outcome, RefereeHandle, Side

# What reappears outside the timed call is counted when it is more than this share of the saving,
# and called a cheat when it is surely (at this error rate) this share of the reference.
DEFERRED_SHARE = 0.2
DEFERRED_ALPHA = 0.025
DEFERRED_FLOOR = 0.2
PAD_BYTES, PAD_STEP = 4 << 20, 64


class Session:
    """Checks and times one candidate. `record` holds the fields of the verdict known so far."""

    def __init__(
        self,
        referee: RefereeHandle,
        candidate: Side,
        protocol: Protocol,
        limits: Limits,
    ):
        self.referee, self.candidate = referee, candidate
        self.protocol = protocol
        self.record: dict[str, Any] = {"limit_ms": referee.info["limit_ms"]}
        self.checks: list[str] = []
        # The system's generator: a candidate must not foresee the order of a pair.
        self.random = random.SystemRandom()
        self.slots = list(range(referee.info["slots"]))
        reference_seconds = referee.info["reference_ms"] / 1e3 * len(self.slots)
        self.run_limit = max(limits.run_seconds, limits.run_factor * reference_seconds)
        self.null = 0.0
        self.launches: list[float] = []  # the speedup that each launch found
        self.cases_run: list[int] = []
        self.reference: Side
        self._values: dict[bool, Any] = {}

    # Correctness -----------------------------------------------------------------------------

    def check_values(self) -> None:
        """Several input sets; raises Outcome on the first that fails, or InfraError."""
        close = True
        info = self.referee.info
        for number in range(self.protocol.correctness_trials):
            case = self.referee.ask("check_begin", number=number)
            if case["skipped"]:
                continue
            self.checks.append(f"values: {case['name']}")
            self.cases_run.append(number)
            delivered, finish = self._run_case(self.candidate, case)
            result = self.referee.ask("check_end", values=delivered.get("values"))
            for name in ("max_error", "reference_error"):
                if math.isfinite(result[name]):
                    self.record[name] = max(self.record.get(name, 0.0), result[name])
            self._judge(result, case["name"])
            close = close and result["allclose"]
            if finish.get("aliases") and not info["aliases"]:
                raise Outcome(
                    "rejected",
                    "its output shares memory with an input, the reference's does not",
                    "output_aliases_input",
                )
        self.checks += ["inputs_mutated", "output_aliases_input", "output_type"]
        self.record["kernelbench_allclose"] = close

    def _run_case(self, side: Side, case: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        doing = f"on inputs '{case['name']}'"
        self._bind(side, case)
        side.ask({"op": "run", "slots": [0]}, doing, self.run_limit)
        _, delivered = side.ask({"op": "deliver", "which": 0}, doing, self.run_limit)
        # The largest shift comes first, so that later ones meet pages already in use.
        end = {"op": "finish", "aliases": True, "pad": PAD_BYTES}
        _, finish = side.ask(end, doing, self.run_limit)
        return delivered, finish

    def _replay_cases(self) -> None:
        """Give the reference's process the history of the candidate's.

        Where its heap has the same layout a pair compares code; after unequal histories one of two
        identical processes was the faster one by several percent for as long as they lived.
        """
        for number in self.cases_run:
            self._run_case(self.reference, self.referee.ask("check_begin", number=number))

    def _judge(self, result: dict[str, Any], where: str) -> None:
        if result["mutated"] and not self.referee.info["mutates"]:
            raise Outcome("rejected", "it changed its inputs in place", "inputs_mutated")
        if not result["ok"]:
            raise Outcome("incorrect", f"wrong values on inputs '{where}': {result['what']}")

    def _bind(self, side: Side, case: dict[str, Any]) -> None:
        message = {"op": "bind", "sets": case["sets"], "output": case["output"]}
        side.ask(message, "taking its inputs", self.run_limit)

    # Timing ----------------------------------------------------------------------------------

    def measure(self, reference: Side) -> None:
        """Time the candidate beside `reference`; raises Outcome if it cheats, or InfraError."""
        self.reference = reference
        if not reference.shared:
            self._replay_cases()
        case = self.referee.ask("timing_begin")
        self._bind(self.candidate, case)
        self._bind(reference, case)
        # Measured on the reference's process: a candidate could slow its own empty runs.
        self.null = reference.null_seconds()
        self.record["null_ms"] = self.null * 1e3
        if self.protocol.paired:
            self._paired()
        else:
            self._unpaired()
        self.launches = [self.record["speedup"]]

    def take_in(self, other: Session) -> None:
        """Add what another launch of the same candidate found: the interval spans them all."""
        self.launches.append(other.record["speedup"])
        self._keep([(r / 1e3, c / 1e3) for r, c in (*self.record["pairs"], *other.record["pairs"])])
        self.record.update(
            speedup=statistics.median(self.launches),
            speedup_lo=min(self.record["speedup_lo"], other.record["speedup_lo"]),
            speedup_hi=max(self.record["speedup_hi"], other.record["speedup_hi"]),
            n_pairs=self.record["n_pairs"] + other.record["n_pairs"],
        )
        self.checks.append("relaunched")

    def _turn(self, side: Side, which: int, recheck: bool = False) -> float:
        """Seconds of one run of `side`, on inputs written anew after the caches were flushed."""
        self.referee.ask("stage")
        pad = self.random.randrange(PAD_STEP, PAD_BYTES, PAD_STEP)
        limit = REFEREE_SECONDS if side.trusted else self.run_limit
        seconds, delivered = side.turn(self.slots, which, pad, limit)
        if recheck:
            self.referee.ask("keep", trusted=side.trusted)
        self._values[side.trusted] = delivered.get("values")
        return max(seconds - self.null, 1e-6) / len(self.slots)

    def _pair(self, recheck: bool | None = None) -> tuple[float, float]:
        self.referee.ask("draw")
        if recheck is None:
            recheck = self.random.random() < self.protocol.recheck_share
        sides = [self.reference, self.candidate]
        self.random.shuffle(sides)
        # Both sides deliver the same one of their outputs, so that the two can be compared.
        which = self.random.choice(self.slots)
        times = {side.trusted: self._turn(side, which, recheck) for side in sides}
        if recheck:
            values = {"values": self._values[False], "expected": self._values[True]}
            result = self.referee.ask("recheck", **values)
            self._judge(result, "a timed run")
        return times[True], times[False]

    def _paired(self) -> None:
        for number in range(self.protocol.warmup):
            # At least one timing trial is compared, however few there will be.
            self._pair(recheck=number == self.protocol.warmup - 1)
        self.candidate.start_counting()
        self.reference.start_counting()
        found, pairs = timing.measure(self._pair, self.protocol, time.monotonic)
        self._keep(pairs)
        self.record.update(
            speedup=found.speedup, speedup_lo=found.lo, speedup_hi=found.hi, n_pairs=found.n
        )
        self.checks += ["values: timed runs", "deferred_work", "impossible_speed"]
        self._check_deferred(pairs, timing.spend(self.protocol.looks, self.protocol.alpha)[0])
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

    def _check_deferred(self, pairs: list[tuple[float, float]], share: float) -> None:
        """Does what the candidate saves reappear at delivery, or between its turns?

        If a good part does, what comes late counts as the candidate's time. It is called a
        cheat only where this is surely a fifth of the reference or more: fused kernels leave their
        output in other caches, which moves a little time into the copy quite honestly.
        """
        saved = statistics.median(r - c for r, c in pairs)
        if not self.record["speedup"] > 1 or saved <= 0:
            return
        usual = 0.0
        if self.candidate.strides != self.reference.strides:
            usual = max(self._yardstick() - statistics.median(self.reference.deliveries), 0.0)
        # By the wall clock, and by the CPU time that the kernel charges, which other processes on
        # the machine do not disturb.
        ours, theirs = self.candidate, self.reference
        fetched, between = "when its output is fetched", "between its turns"
        for mine, other, expected, where in (
            (ours.delivery_cpu, theirs.delivery_cpu, usual, fetched),
            (ours.deliveries, theirs.deliveries, usual, fetched),
            (ours.idle_cpu, theirs.idle_cpu, 0.0, between),
        ):
            extra = [(m - o - expected) / len(self.slots) for m, o in zip(mine, other, strict=True)]
            if not statistics.median(extra) > DEFERRED_SHARE * saved:
                continue
            low = timing.interval(extra, DEFERRED_ALPHA).lo
            if low > DEFERRED_FLOOR * self.record["reference_ms"] / 1e3:
                raise Outcome(
                    "rejected",
                    f"it saves {saved * 1e3:.3g} ms in the timed call but takes at least "
                    f"{low * 1e3:.3g} ms more {where}",
                    "deferred_work",
                )
            whole = [r / max(c + e, 1e-6) for (r, c), e in zip(pairs, extra, strict=True)]
            found = timing.interval(whole, share, self.protocol.process_spread)
            low = min(found.lo, self.record["speedup_lo"])
            self.record.update(speedup=found.speedup, speedup_lo=low, speedup_hi=found.hi)

    def _yardstick(self) -> float:
        """The referee's seconds for delivering outputs of the strides the candidate returned."""
        try:
            found = self.referee.ask("yardstick", strides=self.candidate.strides, repeats=5)
        except InfraError:
            # Strides that no tensor can have are the candidate's doing, not the referee's.
            raise Outcome("rejected", "it reported impossible strides", "output_type") from None
        return found["seconds"] + self.null

    def _unpaired(self) -> None:
        """The paper's way: all runs of the candidate, then all of the reference; means."""
        times: dict[bool, list[float]] = {False: [], True: []}
        for side in (self.candidate, self.reference):
            for number in range(self.protocol.warmup + self.protocol.trials):
                seconds = self._turn(side, 0)
                if number >= self.protocol.warmup:
                    times[side.trusted].append(seconds)
        reference, candidate = statistics.fmean(times[True]), statistics.fmean(times[False])
        self._keep(list(zip(times[True], times[False], strict=True)))
        self.record.update(
            speedup=reference / candidate,
            reference_ms=reference * 1e3,
            candidate_ms=candidate * 1e3,
            n_pairs=len(times[True]),
        )

    def _keep(self, pairs: list[tuple[float, float]]) -> None:
        self.record.update(
            pairs=tuple((round(r * 1e3, 6), round(c * 1e3, 6)) for r, c in pairs),
            reference_ms=statistics.median(r for r, _ in pairs) * 1e3,
            candidate_ms=statistics.median(c for _, c in pairs) * 1e3,
        )
