"""One candidate from its first line to its verdict, as the judge conducts it.

The judge asks, workers answer; every wait has a limit and every answer is checked. A candidate's
answers can only incriminate itself: what makes it correct is the referee's comparison, what makes
it fast is the judge's clock. Here is the first half, correctness; `ttkit.verify.race` is the other.
"""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections.abc import Callable
from typing import Any

from ttkit.verify import timing
from ttkit.verify.protocol import IN_PLACE, TOUCHED_WEIGHTS, Limits, Protocol
from ttkit.verify.race import PAD_BYTES, Race, shift
from ttkit.verify.sides import REUSED, Outcome, RefereeHandle, Side
from ttkit.verify.variations import WEIGHT_CHANGES

# How many times as long as one timed run of the reference all answers of a candidate may take.
TOTAL_FACTOR = 500.0
FEW_CASES = 3
# So many the two sides run in turns before they are timed.
LAST_CASES = 4
TOUCHED_LAST = (-1, -2, -3, -4)  # the numbers of the cases that are none of the protocol's


class Session:
    """Checks and times one candidate. `record` holds the fields of the verdict known so far.

    `between` is called between two cases with all sides there are, none of which is at work then.
    """

    def __init__(
        self,
        referee: RefereeHandle,
        candidate: Side,
        protocol: Protocol,
        limits: Limits,
        between: Callable[..., object] = lambda *sides: None,
    ):
        self.referee, self.candidate = referee, candidate
        self.protocol, self.between = protocol, between
        self.record: dict[str, Any] = {"limit_ms": referee.info["limit_ms"]}
        self.checks: list[str] = []
        self.slots = referee.info["slots"]
        reference_seconds = referee.info["reference_ms"] / 1e3 * self.slots
        self.run_limit = max(limits.run_seconds, limits.run_factor * reference_seconds)
        candidate.budget = candidate.spent + max(
            limits.total_seconds + candidate.compile_seconds,
            TOTAL_FACTOR * reference_seconds,
        )
        self.launches: list[float] = []  # the speedup that each launch found
        self.cases_run: list[int] = []
        self.reweighed = False  # whether it has been run with other weights

    # Correctness -----------------------------------------------------------------------------

    def check_values(self, few: bool = False) -> None:
        """Several input sets; raises Outcome on the first that fails, or InfraError.

        With `few` the declared one, those with other weights and some of the others.
        """
        close = True
        self._look(self.candidate.changes)
        numbers = list(range(len(self.protocol.cases)))
        if few:
            some = random.SystemRandom().sample(numbers[1:], min(FEW_CASES, len(numbers) - 1))
            weights = [n for n in numbers if self.protocol.cases[n] in WEIGHT_CHANGES]
            numbers = sorted({0, *some, *weights})
        for number in numbers:
            self.between(self.candidate)
            close = self._check(number, close)
        self.checks += ["inputs_mutated", "output_aliases_input", "output_type", "forged_answer"]
        if self.protocol.variations:
            self.checks += ["output_reused", "calls_reference", "tampered_runtime", "global_state"]

    def _check(
        self, number: int, close: bool = True, *, name: str = "", fresh: bool = False
    ) -> bool:
        """Case `number`, or one of the kind `name` in its place, `fresh` or as others met it;
        whether it and those before it (`close`) pass KernelBench's tolerance. What weights it is
        given in one of the kind `name` it keeps."""
        case = self._begin(number, self.candidate, name=name, fresh=fresh)
        if missing := case.get("missing"):
            raise Outcome("rejected", _without(missing), "weights_kept")
        check = f"values_{case['name']}"
        if case["skipped"]:
            return close
        if case["reweigh"]:
            self.candidate.reweigh(self.run_limit)
        self.checks.append(check)
        delivered, finish = self._run_case(self.candidate, case, watched=number == 0)
        result = self.referee.ask("check_end", values=delivered.get("values"))
        for key in ("max_error", "reference_error"):
            if math.isfinite(result[key]):
                self.record[key] = max(self.record.get(key, 0.0), result[key])
        if _beyond(finish.get("aliases"), case["aliases"]):
            raise Outcome(
                "rejected",
                "its output shares memory with an input or with another output, the reference's "
                f"does not (on inputs {case['name']})",
                "output_aliases_input",
            )
        if finish.get("rebinds") and not self.referee.info["rebinds"]:
            text = "it changed its caller's tensors: their shape, their memory or their gradient"
            raise Outcome("rejected", text, "inputs_mutated")
        if finish.get("reuses") and not self.referee.info["reuses"]:
            raise Outcome("rejected", REUSED, "output_reused")
        # Before it is judged: KernelBench may let pass what is incorrect here.
        self.record["kernelbench_allclose"] = close = close and result["allclose"]
        where = "on inputs " + case["name"]
        if case["reweigh"]:
            where = "with other weights (what depends on them has to be made of them in each call)"
        judge(result, check, self.referee.info["mutates"], where)
        self._look(finish.get("changes"))
        if name:
            return close
        if case["reweigh"]:
            self.referee.ask("own_weights")
            self.candidate.reweigh(self.run_limit)
            self.reweighed = True
        else:
            self.cases_run.append(number)
        return close

    def _begin(
        self, number: int, side: Side, judged: bool = True, name: str = "", fresh: bool = False
    ) -> dict[str, Any]:
        return self.referee.ask(
            "check_begin",
            number=number,
            name=name or self.protocol.cases[number],
            judged=judged,
            fresh=fresh,
            trusted=side.trusted,
            weights=side.weights_loaded,
            unclear=side.weights_unclear,
        )

    def _look(self, changes: Any) -> None:
        """Reject what the candidate's own process reports to have replaced or changed."""
        if self.protocol.variations and isinstance(changes, dict):
            for check in ("tampered_runtime", "global_state"):
                if check in changes:
                    raise Outcome("rejected", str(changes[check])[:300], check)

    def _run_case(
        self, side: Side, case: dict[str, Any], watched: bool = False
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        doing = f"on inputs {case['name']}"
        side.bind(case, self.run_limit)
        watched = watched and bool(self.protocol.variations)
        limit = side.call_limit(self.run_limit)
        run = {"op": "run_watched" if watched else "run", "slots": list(range(len(case["sets"])))}
        _, ran = side.ask(run, doing, limit)
        if self.protocol.compared:
            self.referee.ask("cover")
        _, delivered = side.ask({"op": "deliver", "which": 0}, doing, self.run_limit)
        side.hand_over(self.referee)
        # The largest shift comes first, so that later ones meet pages already in use.
        pad = shift() if side.cases else PAD_BYTES
        side.cases += 1
        end = {"op": "finish", "look": not side.trusted, "pad": pad}
        _, finish = side.ask(end, doing, self.run_limit)
        if ran.get("reference_ran"):
            text = "the reference's own forward ran in place of a program of its own"
            raise Outcome("rejected", text, "calls_reference")
        if idle := ran.get("idle_kernels"):
            names = ", ".join(map(str, idle)) if isinstance(idle, list) else idle
            text = f"none of the kernels that it defines ran ({names})"
            raise Outcome("rejected", text[:300], "kernel_never_launched")
        return delivered, finish

    def prepare(self, reference: Side) -> None:
        """Give the reference's process the history of the candidate's, and have inputs drawn.
        Raises InfraError, and Outcome if the candidate fails in a case that it has passed before.

        What a process has met before stays in its memory and in the caches: after unequal histories
        one of two identical processes was the faster one by a percent for as long as they lived,
        and the one that ran last by 2 % of a millisecond for ten turns. So they take turns at the
        last cases.
        """
        if not reference.shared:
            for number in self.cases_run[:-LAST_CASES]:
                self.between(reference)
                self._run_case(reference, self._begin(number, reference, judged=number > 0))
            reference.set_aside()
            for number in self.cases_run[-LAST_CASES:]:
                for side in random.SystemRandom().sample([reference, self.candidate], 2):
                    side.thaw()
                    self.between(side)
                    self._run_case(side, self._begin(number, side, judged=number > 0))
                    side.set_aside()
        if self.protocol.paired:
            self.between(reference)
            self.referee.ask("deal", pairs=self.protocol.warmup + self.protocol.looks[0])

    # Timing ----------------------------------------------------------------------------------

    def measure(self, reference: Side) -> None:
        """Time the candidate beside `reference`; raises Outcome if it cheats, or InfraError."""
        kinds = [self.protocol.cases[number] for number in self.cases_run]
        varied = [name for name in dict.fromkeys(kinds) if name in IN_PLACE]
        race = Race(
            self.referee,
            self.candidate,
            reference,
            self.protocol,
            self.run_limit,
            varied,
            self.reweighed,
        )
        try:
            race.run()
        finally:
            self.record |= race.record
            self.checks += race.checks
        self.launches = [self.record["speedup"]]

    def look_again(self) -> None:
        """Some fall back to the reference, or on what holds for the usual inputs, after a while."""
        if not self.protocol.variations:
            return
        found = self.referee.ask("judge_varied")
        if not found["ok"]:
            text = f"wrong values on inputs {found['name']} between timed runs: {found['what']}"
            raise Outcome("incorrect", text, "values_timed")
        begun = self._begin(0, self.candidate, judged=False)
        self._run_case(self.candidate, begun, watched=True)
        # Fresh ones: those that it met before it could tell from what it met in timed runs.
        if varied := self.cases_run[1:]:
            self._check(random.SystemRandom().choice(varied), fresh=True)
        # One weight after the other, without a way back to what it knows.
        if self.reweighed:
            for number in TOUCHED_LAST:
                self.between(self.candidate)
                self._check(number, name=TOUCHED_WEIGHTS, fresh=True)

    def narrow(self) -> bool:
        """Whether other launches have to say if it is faster: so this one found, but not by much,
        or it could not tell 1 from a speedup that is nearer to `futile`."""
        speedup, low = self.record["speedup"], self.record["speedup_lo"]
        undecided = low <= 1 and speedup > (1 + self.protocol.futile) / 2
        return undecided or 1 < low <= self.protocol.relaunch_below

    def take_in(self, other: Session) -> None:
        """Add what another launch of the same candidate found: the interval spans them all, until
        it is that of the launches (`concluded`)."""
        self.launches.append(other.record["speedup"])
        pairs = (*self.record["pairs"], *other.record["pairs"])
        self.record.update(
            pairs=pairs,
            reference_ms=statistics.median(r for r, _ in pairs),
            candidate_ms=statistics.median(c for _, c in pairs),
            speedup=statistics.median(self.launches),
            speedup_lo=min(self.record["speedup_lo"], other.record["speedup_lo"]),
            speedup_hi=max(self.record["speedup_hi"], other.record["speedup_hi"]),
            n_pairs=self.record["n_pairs"] + other.record["n_pairs"],
        )
        self.checks.append("relaunched")

    def concluded(self) -> bool:
        """Whether no other launch is needed: the last was not ahead, and then it is not known to be
        faster, or they are enough to say that it is."""
        if self.launches[-1] <= 1:
            return True
        found = timing.launch_interval(self.launches, self.protocol)
        if found is None or found.lo <= 1:
            return False
        self.record.update(speedup=found.speedup, speedup_lo=found.lo, speedup_hi=found.hi)
        return True


def judge(result: dict[str, Any], check: str, may_mutate: bool, where: str) -> None:
    """Raises Outcome where a comparison of the referee's went against the candidate."""
    if result["mutated"] and not may_mutate:
        raise Outcome("rejected", f"it changed its inputs in place ({where})", "inputs_mutated")
    if not result["ok"]:
        raise Outcome("incorrect", f"wrong values {where}: {result['what']}", check)


def _beyond(found: Any, allowed: list[list[int]]) -> bool:
    """Whether an output shares memory with inputs (a candidate's answer) that it may not."""
    rows = found if isinstance(found, list) else []
    rows = [row if isinstance(row, list) else [row] for row in rows]
    pairs = itertools.zip_longest(rows, allowed, fillvalue=())
    return any(n not in may for row, may in pairs for n in row)


def _without(missing: list[str]) -> str:
    names = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
    return (
        f"it keeps no place for the reference's {names}: what it made of them when it was built "
        "cannot be told from work that each call has to do"
    )
