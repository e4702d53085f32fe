"""The trusted worker of one task: inputs from secret seeds, expected answers, comparisons.

It runs the reference and nothing else, is kept warm between candidates of a task, and never shares
a process with one. What a candidate can reach is its own copy of the weights and inputs and a place
for its output, poisoned before every run. Expected answers stay in this process's own memory.

The reference is timed in a twin of the candidate's process, not here: a process that has just
written the inputs and flushed the caches runs on without a context switch, and beat an identical
candidate by 10 to 15 % on a 0.4 ms task.
"""

from __future__ import annotations

import contextlib
import math
import os
import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ttkit.verify import libraries, physics
from ttkit.verify.arena import ALIGN, extent, place_contiguous
from ttkit.verify.casemaker import CaseMaker
from ttkit.verify.cases import LARGE_BYTES, Case, NativeCase, judge, same_values, size_of
from ttkit.verify.channel import BadMessage, Channel, ChannelClosed
from ttkit.verify.correctness import surely_close
from ttkit.verify.draws import Draws
from ttkit.verify.reference import Reference
from ttkit.verify.runner import Runner, give_back_memory, load_module, secret_seed, values_of
from ttkit.verify.shared import Taken, Weights, share
from ttkit.verify.stage import Stage
from ttkit.verify.variations import TOUCHED, WEIGHT_CHANGES
from ttkit.verify.worker import describe

# A timed run calls the model once for each of several input sets until it lasts about this long,
# well above the round trip (and on CUDA above launch and synchronisation).
TRIAL_MS = {"cpu": 0.5, "cuda": 8.0}
MAX_SLOTS = {"cpu": 16, "cuda": 64}
SLOT_BYTES = {"cpu": 64 << 20, "cuda": 2 << 30}
# Cases larger than this are made anew each time rather than kept; one holds about five times its
# inputs and outputs.
KEEP_BYTES = {"cpu": 32 << 20, "cuda": 128 << 20}
DECK_BYTES = {"cpu": 256 << 20, "cuda": 512 << 20}
PROBES = 9
RENEW_EVERY = 4
NOTHING = Case("none", None, [], [])


class Referee:
    """Answers the judge's requests about one task."""

    def __init__(self, channel: Channel, spec: dict[str, Any]):
        self.channel = channel
        self.device: str = spec["device"]
        self.kind = "cpu" if self.device == "cpu" else "cuda"
        self.path = os.path.join(spec["directory"], "task.py")
        self.served = 0
        self.case: Case = NOTHING
        # The weights of the candidate, and in a race of both sides, if they are not the task's own.
        self.weights_now: dict[str, torch.Tensor] | None = None
        self.current: list[Any] = []
        # Of the last timing's turns on varied inputs, what finds out whether they were right.
        self.varied: list[Callable[[], dict[str, Any]]] = []
        # Inputs drawn for timed pairs, and those that the present candidate has not met.
        self.deck: list[list[Any]] = []
        self.unseen: list[list[Any]] = []

    def serve(self) -> None:
        while True:
            try:
                message, _ = self.channel.recv()
            except (ChannelClosed, BadMessage):
                return
            fds: list[int] = []
            try:
                reply = getattr(self, "do_" + message["op"])(message)
                fds = reply.pop("fds", [])
            except Exception as error:
                reply = describe(error, self.path)
            self.channel.send(reply, fds)

    def do_ceiling(self, message: dict[str, Any]) -> dict[str, Any]:
        found = physics.measure_ceiling(self.device)
        self._release()
        return {"ceiling": found}

    def do_load(self, message: dict[str, Any]) -> dict[str, Any]:
        """Run the reference for the first time and make the shared memory."""
        task = load_module(self.path, "task")
        seed = secret_seed() % 2**31
        runner = Runner(task.Model, task, seed, self.device)
        # The float64 copy is taken before any run could change a buffer of the model.
        self.reference = Reference(runner)
        self.draws = Draws(task, self.reference, self.device)
        self.cases = CaseMaker(self.draws, KEEP_BYTES[self.kind])
        weights = Weights(runner.model)
        makes = []
        for _ in range(3):  # of one alone, a slow moment would decide for all candidates
            args: Any = None  # large ones have no room beside others
            started = time.perf_counter()
            args = self.draws.inputs()
            makes.append((time.perf_counter() - started) * 1e3)
        make_ms = min(makes)
        runner.inputs = [tuple(args)]
        del args
        needed = libraries.used(partial(runner.run, [0])) if self.kind == "cuda" else []
        reference_ms = _time(runner)
        runner.inputs = []
        case = self.cases.first()
        self._release()
        self.habits = self.cases.habits(case)
        args = case.args
        runner.inputs = []
        input_bytes, output_bytes = size_of(args), place_contiguous(case.outputs)[1]
        limit_ms = physics.limit_ms(self.draws, args, message["ceiling"])
        del case, args
        self._release()
        room = max(1, SLOT_BYTES[self.kind] // max(input_bytes + output_bytes, 1))
        wanted = math.ceil(TRIAL_MS[self.kind] / max(reference_ms, 1e-4))
        self.slots = max(1, min(wanted, MAX_SLOTS[self.kind], room))
        # Other strides, or other random shapes, may need a little more room than these.
        self.slot_bytes = input_bytes + (input_bytes >> 2) + 4096
        self.slot_bytes += -self.slot_bytes % 256
        if input_bytes > LARGE_BYTES:
            self.slot_bytes = input_bytes + 4096 - input_bytes % 256
        room = output_bytes + (output_bytes >> 2 if output_bytes <= LARGE_BYTES else 0) + 4096
        # Two calls that follow each other have inputs of their own (of large ones cut-down forms).
        slots = max(self.slots, 1 if input_bytes > LARGE_BYTES else 2)
        shared = share(self.device, self._start(slots), room, weights)
        self.stage = Stage(self.device, shared, message["flush_bytes"])
        # Fresh inputs for every pair where making them does not dwarf the pair itself, and where
        # they are not the same ones each time.
        self.fresh = make_ms <= 4 * reference_ms + 5.0 and not self.draws.repeats()
        return {
            # On CUDA only the weights lie in files; the rest goes by its handle.
            "fds": [fd for side in shared.values() for fd in side.fds],
            "candidate": shared[False].describe(),
            "twin": shared[True].describe(),
            "weights": weights.specs,
            "libraries": needed,
            "seed": seed,
            "slots": self.slots,
            "reference_ms": reference_ms,
            "limit_ms": limit_ms,
            # How long the device takes for a fixed piece of work while nobody else is on it.
            "quiet_seconds": statistics.median(self.stage.flush() for _ in range(PROBES)),
            **self.habits,
        }

    def _release(self) -> None:
        # What the allocator holds back is missing where the next large tensor is of another size.
        if self.kind == "cuda":
            give_back_memory()

    def do_renew(self, message: dict[str, Any]) -> dict[str, Any]:
        """Before candidates are loaded: now and then a case is replaced."""
        self.served += 1
        if self.served % RENEW_EVERY == 0:
            self.cases.renew()
        return self.do_wipe(message)

    def do_wipe(self, message: dict[str, Any]) -> dict[str, Any]:
        """Nothing that an earlier candidate had is left for the next."""
        self.stage.sides[False].wipe()
        self.weights_now = None
        return {}

    # Correctness -----------------------------------------------------------------------------

    def do_check_begin(self, message: dict[str, Any]) -> dict[str, Any]:
        """Put case `number` into the memory of one side and say where it lies."""
        self.case, self.current = NOTHING, []
        self.stage.clear()
        self.stage.begin(message["trusted"])
        name, kept = message["name"], message["weights"]
        if name in WEIGHT_CHANGES:
            unclear = self.reference.constant(message["unclear"])  # nothing else can be
            if missing := self.cases.missing(kept + unclear):
                return {"name": name, "skipped": "", "missing": missing}
        if message["judged"]:
            number, fresh = message["number"], message["fresh"]
            case = self.cases.numbered(number, name, kept, fresh, self.weights_now)
        else:
            case = self.cases.unanswered()
        if case.args is None and not case.skipped:
            case.args = self.draws.inputs_alike()
        self.case = case
        if case.skipped:
            return {"name": case.name, "skipped": case.skipped}
        self._release()
        places = self.slot_bytes, self.stage.turn.output.size
        if size_of(case.args) > places[0] or size_of(case.outputs) > places[1]:
            return {"name": case.name, "skipped": "there is no room for more rows of large tensors"}
        inputs, size = [case.args], size_of(case.args)
        if case.name == TOUCHED and self._start(0) + 2 * size <= self.stage.size:
            inputs.append(self.draws.touched(case.args))  # for a call after it
        # As far into the memory as the inputs of a timed call may lie.
        begin = self._start(secret_seed() % self.slots)
        begin = min(begin, (self.stage.size - len(inputs) * size) // ALIGN * ALIGN)
        sets = [self.stage.describe_inputs(args, begin + i * size) for i, args in enumerate(inputs)]
        self.stage.filled = begin + len(inputs) * size
        self.stage.put(zip(inputs, sets, strict=True))
        if case.weights is not None:
            self.weights_now = case.weights
            self.stage.sides[False].write_weights(case.weights)
        self.stage.poison(self.case)
        self._release()
        return {
            "name": case.name,
            "skipped": "",
            "aliases": case.aliases,
            "reweigh": case.weights is not None,
            "sets": sets,
            "output": self.stage.describe_output(case),
        }

    def do_cover(self, message: dict[str, Any]) -> dict[str, Any]:
        self.stage.cover(self.case)
        return {}

    def do_take(self, message: dict[str, Any]) -> dict[str, Any]:
        self.stage.take(self.case)
        return {}

    def do_check_end(self, message: dict[str, Any]) -> dict[str, Any]:
        """Compare what was delivered with the case."""
        self.stage.look_for_changes()
        delivered = [taken.tensor for taken in self.stage.taken.pop(False)]
        found = self._judge(self.case, delivered, message["values"])
        return {**found, "mutated": self.stage.mutated}

    def _judge(self, case: Case, delivered: list[torch.Tensor], values: Any) -> dict[str, Any]:
        """Compare with a case; what just fails, once more after another look at the reference."""
        found = judge(case, delivered, values, values_of(case.tree))
        if found["near"]:
            with contextlib.suppress(Exception):  # whatever the reference raises, or no memory
                self.reference.settle(case)
                found = judge(case, delivered, values, values_of(case.tree))
        return found

    def do_own_weights(self, message: dict[str, Any]) -> dict[str, Any]:
        """The weights in the shared memory are the task's own again."""
        self.stage.write_weights()
        self.weights_now = None
        return {}

    def _start(self, slot: int) -> int:
        """Where a slot begins. Not at 0, where torch.compile takes a tensor for another kind."""
        return ALIGN + slot * self.slot_bytes

    # Timing ----------------------------------------------------------------------------------

    def do_timing_begin(self, message: dict[str, Any]) -> dict[str, Any]:
        self.case, self.current, self.varied = self.cases.unanswered(), [], []
        self.errors = self.cases.timed_errors(self.case)
        # Draws made for earlier candidates serve again: no process meets one of them twice.
        self.unseen = random.SystemRandom().sample(self.deck, len(self.deck))
        self.do_draw(message)
        starts = map(self._start, range(self.slots))
        self.sets = list(map(self.stage.describe_inputs, self.current, starts))
        self.stage.filled, self.stage.mutated = self.stage.size, False
        self._release()
        return {"sets": self.sets, "output": self.stage.describe_output(self.case)}

    def do_draw(self, message: dict[str, Any]) -> dict[str, Any]:
        """Inputs for the next pair, a set a slot, kept here to be written when a side's turn comes.

        Tasks with random shapes keep the shapes of the first draw: a pair needs equal work.
        """
        self.current = []
        self.stage.clear()
        if self.unseen:
            self.current = self.unseen.pop()
        else:
            self.current = self._drawn()
            if self._room_on_deck():
                self.deck.append(self.current)
        return {}

    def do_deal(self, message: dict[str, Any]) -> dict[str, Any]:
        """Draw the inputs of the first `pairs` pairs while nothing is timed."""
        while len(self.deck) < message["pairs"] and self._room_on_deck():
            self.deck.append(self._drawn())
        return {}

    def _drawn(self) -> list[Any]:
        if self.fresh:
            draws = [self.draws.inputs_alike() for _ in range(self.slots)]
        else:
            draws = self.draws.pooled_inputs(self.slots)
        return list(map(self.draws.touched, draws))

    def _room_on_deck(self) -> bool:
        return (len(self.deck) + 1) * self.slots * self.slot_bytes <= DECK_BYTES[self.kind]

    def do_vary(self, message: dict[str, Any]) -> dict[str, Any]:
        """Put varied inputs in the place of those that were drawn for a slot."""
        slot = message["slot"]
        args = self.cases.varied(message["name"], self.current[slot])
        if args is None:
            return {"varied": False}
        self.current = [*self.current[:slot], args, *self.current[slot + 1 :]]
        return {"varied": True}

    def do_varied(self, message: dict[str, Any]) -> dict[str, Any]:
        """Keep what the candidate delivered from varied inputs, if it is not the very same as the
        reference's own process did, to be judged when nothing is timed; at once where it is too
        large to be kept."""
        taken, args = self.stage.taken.pop(False), self.current[message["slot"]]
        both = zip(taken, self.stage.taken[True], strict=True)
        if same_values(message["values"], message["expected"]) and all(
            torch.equal(theirs.tensor, ours.tensor) for theirs, ours in both
        ):
            return {}
        found = partial(self._judge_varied, message, args, self.weights_now, taken)
        if not all(t.whole for t in taken):
            found = partial(dict, found())
        self.varied.append(found)
        return {}

    def do_judge_varied(self, message: dict[str, Any]) -> dict[str, Any]:
        """The first of the varied turns of the last timing that was wrong, if one was."""
        varied, self.varied = self.varied, []
        results = (judged() for judged in varied)
        return next((found for found in results if not found["ok"]), {"ok": True})

    def _judge_varied(
        self, turn: dict[str, Any], args: Any, weights: Any, taken: list[Taken]
    ) -> dict[str, Any]:
        """Compare with the reference, if it bears these inputs."""
        try:
            case = self.reference.judged(turn["name"], args, weights)
        except Exception:  # whatever the reference raises: it does not take them
            return {"ok": True}
        if case.skipped:
            return {"ok": True}
        found = self._judge(case, [t.tensor for t in taken], turn["values"])
        return {"ok": found["ok"], "what": found["what"], "name": turn["name"]}

    def do_reweigh(self, message: dict[str, Any]) -> dict[str, Any]:
        """Other weights for both sides, until `own_weights`."""
        self.weights_now = self.cases.reweighed(message["weights"])
        if self.weights_now is None:
            return {"reweighed": False}
        self.stage.write_weights(self.weights_now)
        return {"reweighed": True}

    def do_stage(self, message: dict[str, Any]) -> dict[str, Any]:
        """Before every run of either side: its inputs written anew, its output poisoned, caches
        flushed. Slots that it is not to use hold nothing but poison. With keys, what a slot holds
        cannot be read without its own."""
        slots, keys = message["slots"], message["keys"]
        self.stage.begin(message["trusted"])
        if len(slots) < self.slots:
            self.stage.turn.inputs.base.fill_(255)
        self.stage.put((self.current[slot], self.sets[slot]) for slot in slots)
        for slot, key in zip(slots, keys, strict=bool(keys)):
            self.stage.turn.inputs.scramble(self.sets[slot]["tensors"], key)
        self.stage.poison(self.case)
        return {"seconds": self.stage.flush()}

    def do_recheck(self, message: dict[str, Any]) -> dict[str, Any]:
        """Compare what the two sides delivered in the timed runs of one pair."""
        mutated, self.stage.mutated = self.stage.mutated, False
        ours, theirs = ([t.tensor for t in self.stage.taken[trusted]] for trusted in (True, False))
        case: Case = NativeCase(self.case, ours, self.errors)
        if same_values(message["values"], message["expected"]) and all(
            surely_close(y, reference, error)
            for y, reference, error in zip(theirs, ours, case.reference_errors, strict=True)
        ):
            return {"ok": True, "what": "", "mutated": mutated}
        found = judge(case, theirs, message["values"], message["expected"])
        if not found["ok"]:
            # By how much both are off on these very inputs decides, unless there is no room for it.
            with contextlib.suppress(torch.OutOfMemoryError):
                case = self.reference.case("timed", self.current[message["slot"]], self.weights_now)
                found = self._judge(case, theirs, message["values"])
        return {"ok": found["ok"], "what": found["what"], "mutated": mutated}

    def do_yardstick(self, message: dict[str, Any]) -> dict[str, Any]:
        """Seconds to deliver tensors with the strides that a candidate's output had.

        Only strides of a dense tensor count: the candidate names them itself, and could make any
        delivery look long.
        """
        targets = self.stage.delivered(self.case, trusted=True)
        strides = [[max(step, 0) for step in steps] for steps in message["strides"]]
        for target, stride in zip(targets, strides, strict=True):
            if extent(list(target.shape), stride) > target.numel():
                return {"seconds": 0.0}
        times = []
        for _ in range(message["repeats"]):
            sources = [
                torch.empty_strided(
                    tuple(target.shape), tuple(stride), dtype=target.dtype, device=target.device
                ).zero_()
                for target, stride in zip(targets, strides, strict=True)
            ]
            self.stage.flush()
            started = time.perf_counter()
            for source, target in zip(sources, targets, strict=True):
                target.copy_(source)
            self.stage.synchronize()
            times.append(time.perf_counter() - started)
        return {"seconds": statistics.median(times)}


def _time(runner: Runner) -> float:
    """Median milliseconds of a call, warm: only to size trials and limits by."""
    times = []
    for _ in range(7):
        started = time.perf_counter()
        runner.run([0])
        times.append(time.perf_counter() - started)
        runner.forget()
    return statistics.median(times[2:]) * 1e3


def main(channel: Channel, spec: dict[str, Any]) -> None:
    """Entry point of a referee's process, called by the zygote."""
    try:
        if spec["device"] != "cpu":
            torch.cuda.set_device(spec["device"])
    except Exception as error:
        # No such device: said in answer to the first request, where it becomes the verdict.
        channel.recv()
        channel.send(describe(error, ""))
        return
    Referee(channel, spec).serve()
