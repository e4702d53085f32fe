"""Input sets of one task and what the reference makes of them: the referee's private knowledge."""

from __future__ import annotations

import copy
import functools
import math
import os
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from ttkit.verify import correctness, variations
from ttkit.verify.arena import flatten, place
from ttkit.verify.worker import Runner, kind_of, seed_all, to_device

# A reference that disagrees so much with float64, or with its own second run, is no yardstick.
# Where nearly all of its output is NaN, so may a candidate's be.
UNUSABLE_ERROR, UNUSABLE_SPREAD, UNUSABLE_NANS = 0.1, 1e-3, 0.9
# A variation on which the reference itself is no better than this says nothing of a candidate.
VAGUE_ERROR = 1e-2
MANY_ZEROS = 0.25
POOL = 4
# Cases in which values that vanish are no accident of extreme inputs.
USUAL = ("declared", "touched", "timed")
# Inputs above this are varied in a cut-down form, a few draws of them are kept at most, and no more
# than this much of them is looked through for changes.
LARGE_BYTES = 256 << 20
SMALL_BYTES = 32 << 20
DENSE = torch.contiguous_format


@dataclass
class Case:
    """One set of inputs, the reference's outputs on it, natively and in float64.

    `tree` says how the output is built (ttkit.verify.arena.flatten), `types` its tensors' types.
    `weights` are those of the model, in the order of its state, where they are not its own.
    `skipped` says why a variation is left out, if it is.
    """

    name: str
    args: Any
    outputs: list[torch.Tensor]
    exact: list[torch.Tensor]
    tree: Any = None
    types: tuple[str, ...] = ()
    weights: list[torch.Tensor] | None = None
    skipped: str = ""

    @functools.cached_property
    def yardsticks(self) -> list[correctness.Yardstick | None]:
        """One for each output tensor; None for integers and booleans."""
        return [
            correctness.Yardstick(correctness.as_real(y64))
            if y.is_floating_point() or y.is_complex()
            else None
            for y, y64 in zip(self.outputs, self.exact, strict=True)
        ]

    @functools.cached_property
    def own_errors(self) -> list[float]:
        """The reference's own error for each output tensor."""
        return [
            0.0 if yardstick is None else yardstick.error(correctness.as_real(y))
            for y, yardstick in zip(self.outputs, self.yardsticks, strict=True)
        ]

    @property
    def finite(self) -> bool:
        """Whether the float64 run's outputs are finite throughout."""
        return correctness.all_finite(self.exact)

    @property
    def degenerate(self) -> bool:
        """Whether some output is not finite or, for a good part, zero."""
        zeros = (float((y == 0).double().mean()) for y in self.outputs if y.numel())
        return not self.finite or max(zeros, default=0.0) > MANY_ZEROS

    @property
    def reference_errors(self) -> list[float]:
        """What a program as good as the reference is off by, for each output tensor."""
        return self.own_errors


class NativeCase(Case):
    """`case` with native `outputs` as the yardstick, which saves a float64 run and its memory.

    The reference's error, `own_errors` as known from another draw, then counts on both sides.
    """

    own_errors: list[float]  # known beforehand

    def __init__(self, case: Case, outputs: list[torch.Tensor], own_errors: list[float]):
        super().__init__(case.name, case.args, outputs, [], case.tree, case.types)
        self.own_errors = own_errors

    @functools.cached_property
    def yardsticks(self) -> list[correctness.Yardstick | None]:
        self.exact = self.outputs
        return super().yardsticks

    @property
    def reference_errors(self) -> list[float]:
        return [2 * error for error in self.own_errors]


def secret_seed() -> int:
    """From the system's generator: no candidate can make the same inputs."""
    return int.from_bytes(os.urandom(7), "little")


def secret_choice(items: list[Any]) -> Any:
    """One of `items`, by the system's generator: no seed of the task's code can predict it."""
    return items[int.from_bytes(os.urandom(4), "little") % len(items)]


class CaseMaker:
    """Makes inputs for one task and runs the reference on them.

    Cases whose inputs and outputs take more than `keep_bytes` are made anew for each candidate.
    """

    def __init__(self, task: Any, runner: Runner, device: str, keep_bytes: int):
        self.task, self.runner, self.device = task, runner, device
        self.keep_bytes = keep_bytes
        self.exact = copy.deepcopy(runner.model).double()
        self.kept: dict[int, Case] = {}
        self.pool: list[Any] = []
        self.mutates = True  # until it is known
        # How inputs for timing may be touched: with other signs, without, or not at all.
        self.signs: bool | None = None
        self.touched_errors: list[float] = []
        self.touchable: list[bool] = []
        self.follows = False  # whether the first output has the first input's batch size
        self.reorders = False  # whether the reference takes integers in any order
        # Where case 0 is not kept: what it is without inputs and answers, but with its errors.
        self.pattern: NativeCase | None = None

    def inputs(self) -> Any:
        """Fresh inputs from a secret seed, made on the device that runs them."""
        seed_all(secret_seed())
        with torch.device(self.device), torch.no_grad():
            return to_device(list(self.task.get_inputs()), self.device)

    def pooled_inputs(self, count: int) -> list[Any]:
        """`count` sets for tasks whose inputs take long to make: a few, mixed anew each time.

        Mixed rather than scaled: a multiple of what it has met is soon recognised. Of large inputs
        there is only one set, which nothing but the noise makes new.
        """
        while not self.pool or (len(self.pool) < POOL and size_of(self.pool[0]) < LARGE_BYTES):
            self.pool.append(self.inputs())
        sets = []
        for _ in range(count):
            one = secret_choice(self.pool)
            other = secret_choice([drawn for drawn in self.pool if drawn is not one] or [one])
            share, factor = (secret_seed() / 2**56 for _ in range(2))
            args = variations.mixed(one, other, 0.25 + share / 2, 0.5 + factor)
            sets.append(variations.swapped(args, roll=True) if self.reorders else args)
        return sets

    def timed_errors(self, case: Case) -> list[float]:
        """The reference's own errors on inputs like those of `case`, touched or not."""
        touched = self.touched_errors or case.own_errors
        return [max(pair) for pair in zip(case.own_errors, touched, strict=True)]

    def touched(self, args: Any) -> Any:
        """`args` with a few elements changed as in the variation, if the reference bears that."""
        if self.signs is None:
            return args
        return variations.touched(args, self.signs, self.touchable)

    def case(self, name: str, args: Any, weights: dict[str, torch.Tensor] | None = None) -> Case:
        """Run the reference on `args`, natively and in float64, with other `weights` if given."""
        case = self._native(name, args, weights)
        case.exact = self._exact(args, case.outputs, weights)
        if not case.finite:
            case.skipped = "the float64 reference is not finite"
        return case

    def _native(self, name: str, args: Any, weights: dict[str, torch.Tensor] | None = None) -> Case:
        tensors: list[torch.Tensor] = []
        given = copy.deepcopy(args) if self.mutates else args
        with torch.no_grad():
            tree = flatten(_call(self.runner.model, given, weights), tensors)
            case = Case(name, args, [_own(t) for t in tensors], [], tree)
        case.types = tuple(map(kind_of, tensors))
        case.weights = None if weights is None else list(weights.values())
        return case

    def _exact(
        self,
        args: Any,
        outputs: list[torch.Tensor],
        weights: dict[str, torch.Tensor] | None = None,
    ) -> list[torch.Tensor]:
        """The float64 run's outputs. Raises torch.OutOfMemoryError where there is no room."""
        exact: list[torch.Tensor] = []
        try:
            wide = weights and {k: correctness.to_float64(v) for k, v in weights.items()}
            with torch.no_grad(), correctness.widened():
                flatten(_call(self.exact, correctness.to_float64(args), wide), exact)
            exact = [_own(t) for t in exact]
        except (torch.OutOfMemoryError, torch.linalg.LinAlgError):
            # The second: there is no answer, and what single precision makes of it is chance.
            raise
        except (RuntimeError, TypeError):
            # No float64 kernel, say: the native run is the yardstick.
            exact = []
        if [t.shape for t in exact] != [t.shape for t in outputs]:
            return [correctness.to_float64(t) for t in outputs]
        # What no number of the native type is near to overflows there, and is right to.
        for y64, y in zip(exact, outputs, strict=True):
            if y.is_floating_point() and y64.is_floating_point() and y64.numel():
                correctness.overflow_(y64, torch.finfo(y.dtype).max)
        return exact

    def first(self) -> Case:
        """Case 0, of inputs as declared; before any other, while little memory is taken.

        Where it is not kept, the reference's error is found here once, on a cut-down form if a
        float64 run does not fit into the memory.
        """
        args = self.inputs()
        native = self._native("declared", args)
        self.follows = self._follows(native)
        try:
            native.exact = self._exact(args, native.outputs)
            errors = native.own_errors
        except torch.OutOfMemoryError:
            small = self.shrunk(args)
            if small is None:
                raise
            errors = self.case("declared", small).own_errors
        if self._small(native):
            self.kept[0] = native
            return native
        blank = [torch.empty_like(t, device="meta") for t in native.outputs]
        self.pattern = NativeCase(native, blank, errors)
        self.pattern.args = None
        return NativeCase(native, native.outputs, errors)

    @staticmethod
    def _follows(case: Case) -> bool:
        """Whether the first output has the batch size of the first input: one that is no longer of
        the declared sizes may be cut up at other places, by chance without a complaint."""
        inputs: list[torch.Tensor] = []
        flatten(list(case.args), inputs)
        if not (inputs and case.outputs):
            return False
        return inputs[0].shape[:1] == case.outputs[0].shape[:1]

    def _small(self, case: Case) -> bool:
        return size_of(case.args) + size_of(case.outputs) <= self.keep_bytes

    def unanswered(self) -> Case:
        """Case 0 for a run that is not judged, or whose answer another process gives.

        Where case 0 is not kept, it has no inputs and its outputs no values.
        """
        if self.pattern is None:
            return self.numbered(0, "declared")
        return NativeCase(self.pattern, self.pattern.outputs, self.pattern.own_errors)

    def numbered(self, number: int, name: str, weights: Collection[str] | None = None) -> Case:
        """Correctness case `number`, of the kind `name`; one with other weights has them where the
        candidate keeps `weights` (None: all)."""
        if name == variations.WEIGHTS and weights is not None and self.state() - set(weights):
            # Made for this candidate; if it has no place for any, whatever comes is not judged.
            return self._variation(name, set(weights) or self.state())
        case = self.kept.get(number)
        if case is not None:
            return case
        if name == "declared" and self.pattern is not None:
            native = self._native(name, self.inputs())
            return NativeCase(native, native.outputs, self.pattern.own_errors)
        if name == "declared":
            # What is declared is judged, NaN for NaN; only the variations are optional.
            case = self.case(name, self.inputs())
            case.skipped = ""
        else:
            case = self._variation(name)
            if not case.skipped and max(case.reference_errors, default=0.0) > VAGUE_ERROR:
                case.skipped = "the reference itself is far from its float64 run"
        if case.skipped or self._small(case):
            self.kept[number] = case
        return case

    def _variation(self, name: str, which: Collection[str] | None = None) -> Case:
        weights = None
        choices: Iterable[Any]
        args = self._small_inputs()
        if name == variations.WEIGHTS:
            weights = self._other_weights(self.state() if which is None else which)
            if not weights:
                return Case(name, None, [], [], skipped="the model has no weights")
            choices = [args]
        elif name == variations.INDICES:
            choices = variations.reindexed(args)
        elif name == variations.SHAPES:
            choices = variations.reshaped(args)
        elif name == variations.ROWS:
            choices = variations.enlarged(args)
        elif name == variations.TOUCHED:
            # Of the very inputs that were met before, where those are kept: what is remembered by a
            # part of them is then wrong.
            args = self.kept[0].args if 0 in self.kept else args
            self.touchable = variations.touchable(args)
            choices = (
                swap(variations.touched(args, signs, self.touchable))
                for swap in (variations.swapped, lambda touched: touched)
                for signs in (True, False)
            )
        elif name == "near_one" and 0 in self.kept and not self.kept[0].degenerate:
            return Case(name, None, [], [], skipped="what is declared tells enough")
        else:
            ways = [variations.VALUES[name]]
            if name == "large":
                ways.append(variations.less_large)
            choices = (variations.vary_freely(args, way) for way in ways)
        why = "there is none"
        for number, choice in enumerate(choices):
            try:
                case = self.case(name, choice, weights)
            except Exception as error:  # whatever the reference raises: it does not take them
                why = f"the reference raises {error!r:.80}"
                continue
            if name in (variations.SHAPES, variations.ROWS) and self._follows(case) < self.follows:
                why = "the reference takes them for inputs of another batch size"
                continue
            if not case.skipped:
                self.reorders |= name == variations.INDICES
                if name == variations.TOUCHED:
                    self.signs, self.touched_errors = number % 2 == 0, case.own_errors
                return case
            why = case.skipped
        return Case(name, None, [], [], skipped=why)

    def _small_inputs(self) -> Any:
        """Inputs as declared or, where they are large, as much of them as makes a small task."""
        args = self.inputs()
        if size_of(args) <= LARGE_BYTES:
            return args
        return self.shrunk(args) or args

    def shrunk(self, args: Any) -> Any:
        """The inputs cut down to SMALL_BYTES, or as near to it as the reference takes them; None
        where that is more than LARGE_BYTES."""
        for _ in range(40):
            if size_of(args) <= SMALL_BYTES:
                return args
            for smaller in variations.reshaped(args):
                try:
                    with torch.no_grad():
                        self.runner.model(*copy.deepcopy(smaller))
                except Exception:  # whatever the reference raises: it does not take them
                    continue
                break
            else:
                break
            args = smaller
        return args if size_of(args) <= LARGE_BYTES else None

    def state(self) -> set[str]:
        """The names of the reference's weights."""
        model = self.runner.model
        return set(model.state_dict()) if isinstance(model, torch.nn.Module) else set()

    def _other_weights(self, which: Collection[str]) -> dict[str, torch.Tensor]:
        if not which:
            return {}
        seed_all(secret_seed())
        state = self.runner.model.state_dict()
        return {k: variations.reweighed(v) if k in which else v for k, v in state.items()}

    def renew(self) -> None:
        """Forget one kept case, so that what is kept does not stay the same for long."""
        if self.kept:
            number = secret_choice(list(self.kept))
            self.kept.pop(number)
            if number == 0:
                # What touches it goes with it.
                self.kept = {k: c for k, c in self.kept.items() if c.name != variations.TOUCHED}

    def habits(self, case: Case) -> dict[str, Any]:
        """What the reference itself does cannot be held against a candidate; is it usable?"""
        self.runner.inputs = [tuple(copy.deepcopy(case.args))]
        self.runner.run([0])
        aliases = self.runner.aliases(0, 0)
        again: list[torch.Tensor] = []
        before: list[torch.Tensor] = []
        after: list[torch.Tensor] = []
        flatten(self.runner.outputs[0], again)
        flatten(list(case.args), before)
        flatten(list(self.runner.inputs[0]), after)
        self.runner.forget()
        changed = not all(same_bits(a, b) for a, b in zip(before, after, strict=True))
        unusable = ""
        for y, error, second in zip(case.outputs, case.own_errors, again, strict=True):
            if y.is_floating_point():
                if y.numel() and y.isnan().double().mean() > UNUSABLE_NANS:
                    unusable = "most of what the reference returns is not a number"
                elif correctness.relative_error(second, y) > UNUSABLE_SPREAD:
                    unusable = "the reference gives another answer each time it runs"
                elif error > UNUSABLE_ERROR:
                    unusable = "the reference disagrees with its own float64 run"
            elif not torch.equal(y, second):
                unusable = "the reference gives another answer each time it runs"
        self.mutates = changed
        return {"aliases": aliases, "mutates": changed, "unusable": unusable}


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """A dense copy of an output, or a large one itself: for it there may be no room, and it is
    let go before the model runs again."""
    tensor = tensor.detach()
    if tensor.nbytes > LARGE_BYTES:
        return tensor.contiguous()
    return tensor.clone(memory_format=DENSE)


def _call(model: Any, args: Any, weights: dict[str, torch.Tensor] | None) -> Any:
    if weights is None:
        return model(*args)
    return torch.func.functional_call(model, weights, tuple(args))


def judge(
    case: Case, delivered: list[torch.Tensor], values: Any, expected: list[Any]
) -> dict[str, Any]:
    """Compare delivered tensors with the case and plain `values` with the `expected` ones."""
    worst = correctness.Comparison(True, 0.0, 0.0, True)
    close = True
    for y, reference, yardstick, own in zip(
        delivered, case.outputs, case.yardsticks, case.reference_errors, strict=True
    ):
        found = correctness.compare(y, reference, yardstick, own)
        close = close and found.allclose
        if found.error >= worst.error or not found.ok:
            worst = found
        if not found.ok:
            break
    ok, what = worst.ok, worst.what
    if ok and case.name in USUAL and any(map(correctness.vanished, delivered, case.outputs)):
        ok, what = False, "zeros stand where the reference has small values"
    if ok and not same_values(values, expected):
        ok, what = False, "a plain number in the output differs"
    return {
        "ok": ok,
        "what": what,
        "max_error": worst.error,
        "reference_error": max(case.reference_errors, default=0.0),
        "allclose": close,
    }


def size_of(args: Any) -> int:
    """Bytes that the tensors in `args` take, laid out one after another."""
    tensors: list[torch.Tensor] = []
    flatten(list(args), tensors)
    return place(tensors, 0)[1]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors hold the same values, NaN equal to NaN."""
    if torch.equal(a, b):
        return True
    if not a.is_floating_point():
        return False
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


def same_values(found: Any, expected: list[Any]) -> bool:
    if not isinstance(found, list) or len(found) != len(expected):
        return False
    for a, b in zip(found, expected, strict=True):
        if isinstance(b, float):
            if not isinstance(a, (int, float)):
                return False
            try:
                a = float(a)
            except OverflowError:  # an integer that no float is near to
                return False
            if not (math.isclose(a, b, rel_tol=1e-5) or (math.isnan(a) and math.isnan(b))):
                return False
        elif a != b:
            return False
    return True
