"""Makes a task's input sets and runs the reference on them: the referee's private knowledge."""

from __future__ import annotations

import contextlib
import copy
import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import torch

from ttkit.verify import correctness, variations
from ttkit.verify.arena import flatten, tensors_of, unflatten
from ttkit.verify.cases import Case, NativeCase, same_bits, size_of
from ttkit.verify.worker import Runner, kind_of, overlaps, seed_all, to_device, values_of

# A reference that disagrees so much with float64, or with its own second run, is no yardstick.
# Where nearly all of its output is NaN, so may a candidate's be.
UNUSABLE_ERROR, UNUSABLE_SPREAD, UNUSABLE_NANS = 0.1, 1e-3, 0.9
# A variation on which the reference itself is no better than this says nothing of a candidate.
VAGUE_ERROR = 1e-2
POOL = 4
DRAWS = 20
# Inputs above this are varied in a cut-down form, a few draws of them are kept at most, and no more
# than this much of them is looked through for changes.
LARGE_BYTES = 256 << 20
SMALL_BYTES = 32 << 20
DENSE = torch.contiguous_format


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
        self.exact = runner.twin().double()
        self.kept: dict[int, Case] = {}
        self.like: Any = None  # the first inputs, unless they are large
        self.pool: list[Any] = []
        self.mutates = True  # until it is known
        self.usually_finite = True  # the output, on inputs as declared
        # How inputs for timing may be touched: with other signs, without, or not at all.
        self.signs: bool | None = None
        self.touched_errors: list[float] = []
        self.touchable: list[bool] = []
        self.follows = False  # whether the first output has the first input's batch size
        self.reorders = False  # whether the reference takes integers in any order
        self.mixable: list[bool] | None = None  # which integers it takes from two draws at once
        self.needed: dict[frozenset[str], bool] = {}  # see `missing`
        self.borne: dict[str, int] = {}  # of each kind the first choice that the reference takes
        # Where case 0 is not kept: what it is without inputs and answers, but with its errors.
        self.pattern: NativeCase | None = None

    def inputs(self) -> Any:
        """Fresh inputs from a secret seed, made on the device that runs them."""
        seed_all(secret_seed())
        with torch.device(self.device), torch.no_grad():
            return _dense(to_device(list(self.task.get_inputs()), self.device))

    def inputs_alike(self) -> Any:
        """As `inputs`, of the shapes that the first ones had, if the task draws shapes as well;
        made of those where none come in many draws."""
        for _ in range(DRAWS):
            drawn = self.inputs()
            if self.like is None or _shapes(drawn) == _shapes(self.like):
                return drawn
        return variations.mixed(self.like, self.like, 0.5, 1.0, [])

    def repeats(self) -> bool:
        """Whether every draw is the same: a generator of a fixed seed."""
        one = tensors_of(first := self.inputs())
        if size_of(first) > LARGE_BYTES:
            return False
        other = tensors_of(self.inputs())
        equal = all(a.shape == b.shape and same_bits(a, b) for a, b in zip(one, other, strict=True))
        return equal and any(t.is_floating_point() for t in one)

    def pooled_inputs(self, count: int) -> list[Any]:
        """`count` sets for tasks whose inputs take long to make: a few, mixed anew each time.

        Mixed rather than scaled: a multiple of what it has met is soon recognised. Of large inputs
        there is only one set, which nothing but the noise makes new.
        """
        while not self.pool or (len(self.pool) < POOL and size_of(self.pool[0]) < LARGE_BYTES):
            self.pool.append(self.inputs_alike())
        if self.mixable is None:
            self.mixable = self._find_mixable()
        sets = []
        for _ in range(count):
            one = secret_choice(self.pool)
            other = secret_choice([drawn for drawn in self.pool if drawn is not one] or [one])
            share, factor = (secret_seed() / 2**56 for _ in range(2))
            args = variations.mixed(one, other, 0.25 + share / 2, 0.5 + factor, self.mixable)
            roll = not any(self.mixable)
            sets.append(variations.swapped(args, roll=roll) if self.reorders else args)
        return sets

    def _find_mixable(self) -> list[bool]:
        """For each integer tensor of the pooled inputs whether the reference takes its elements
        from either of two draws."""
        found = []
        for args in variations.integers_mixed(self.pool[0], self.pool[-1]):
            takes = args is not None and len(self.pool) > 1
            if takes:
                try:
                    takes = correctness.all_finite(self._native("mixed", args).outputs)
                except Exception:  # whatever the reference raises: it does not take them
                    takes = False
            found.append(takes)
        return found

    def timed_errors(self, case: Case) -> list[float]:
        """The reference's own errors on inputs like those of `case`, touched or not."""
        touched = self.touched_errors or case.own_errors
        return [max(pair) for pair in zip(case.own_errors, touched, strict=True)]

    def touched(self, args: Any) -> Any:
        """`args` with a few elements changed as in the variation, if the reference bears that."""
        if self.signs is None:
            return args
        return variations.touched(args, self.signs, self.touchable, outliers=False)

    def case(self, name: str, args: Any, weights: dict[str, torch.Tensor] | None = None) -> Case:
        """Run the reference on `args`, natively and in float64, with other `weights` if given."""
        case = self._native(name, args, weights)
        case.exact = self._exact(args, case.outputs, weights)
        # Where that is so as declared, NaN for NaN, if the reference itself agrees.
        # (How infinite inputs spread is nobody's promise.)
        strict = self.usually_finite or name == variations.SPECIAL
        if not case.finite and (strict or not max(case.own_errors) < VAGUE_ERROR):
            case.skipped = "the float64 reference is not finite"
        return case

    def judged(self, name: str, args: Any, weights: dict[str, torch.Tensor] | None) -> Case:
        """`case`, skipped where the reference itself is vague about it."""
        return _unless_vague(self.case(name, args, weights))

    def _native(self, name: str, args: Any, weights: dict[str, torch.Tensor] | None = None) -> Case:
        tensors: list[torch.Tensor] = []
        given = copy.deepcopy(args) if self.mutates else args
        with torch.no_grad():
            tree = flatten(_call(self.runner.model, given, weights), tensors)
            case = Case(name, args, [_own(t) for t in tensors], [], tree)
            case.aliases = overlaps(tensors_of(given), tensors)
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
        if size_of(args) <= LARGE_BYTES:
            self.like = args
        native = self._native("declared", args)
        self.follows = self._follows(native)
        try:
            native.exact = self._exact(args, native.outputs)
            self.usually_finite = native.finite
            errors = native.own_errors
        except torch.OutOfMemoryError:
            small = self.shrunk(args)
            if small is None:
                raise
            cut = self.case("declared", small)
            self.usually_finite, errors = cut.finite, cut.own_errors
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
        inputs = tensors_of(case.args)
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

    def numbered(
        self,
        number: int,
        name: str,
        weights: Collection[str] | None = None,
        fresh: bool = False,
    ) -> Case:
        """Correctness case `number`, of the kind `name`: the one that is kept, unless a `fresh` one
        is wanted and inputs are soon made. One with other weights has them where the candidate
        keeps `weights` (None: all).
        """
        if name in variations.WEIGHT_CHANGES and weights is not None:
            if not weights:
                return Case(name, None, [], [], skipped="it has no weights")
            if self.state() - set(weights):
                return self._variation(name, set(weights))
        case = self.kept.get(number)
        if case is not None and not (fresh and self.pattern is None):
            return case
        if name == "declared" and self.pattern is not None:
            native = self._native(name, self.inputs_alike())
            return NativeCase(native, native.outputs, self.pattern.own_errors)
        if name == "declared":
            # What is declared is judged, NaN for NaN; only the variations are optional.
            case = self.case(name, self.inputs_alike())
            case.skipped = ""
        else:
            case = _unless_vague(self._variation(name))
        if case.skipped or self._small(case):
            self.kept[number] = case
        return case

    def _variation(self, name: str, which: Collection[str] | None = None) -> Case:
        choices: Iterable[tuple[Any, dict[str, torch.Tensor] | None]]
        if name in variations.WEIGHT_CHANGES:
            names = self.state() if which is None else which
            if not names:
                return Case(name, None, [], [], skipped="the model has no weights")
            args, changes = self._small_inputs(), variations.WEIGHT_CHANGES[name]
            choices = ((args, self._weights(names, change)) for change in changes)
        elif name == "near_one" and 0 in self.kept and not self.kept[0].degenerate:
            return Case(name, None, [], [], skipped="what is declared tells enough")
        else:
            choices = ((choice, None) for choice in self._choices(name))
        why = "there is none"
        for number, (choice, weights) in enumerate(choices):
            if number < self.borne.get(name, 0):
                continue
            try:
                case = self.case(name, choice, weights)
            except Exception as error:  # whatever the reference raises: it does not take them
                why = f"the reference raises {error!r:.80}"
                continue
            if name in (variations.SHAPES, variations.ROWS) and self._follows(case) < self.follows:
                why = "the reference takes them for inputs of another batch size"
                continue
            if not case.skipped:
                # What it did not bear before is not tried again.
                self.borne[name] = number
                self.reorders |= name == variations.INDICES
                if name == variations.TOUCHED:
                    # Once not with other signs, never again: that one bore them may be chance.
                    self.signs = number % 2 == 0 and self.signs is not False
                    self.touched_errors = case.own_errors
                return case
            why = case.skipped
        return Case(name, None, [], [], skipped=why)

    def _choices(self, name: str) -> Iterator[Any]:
        """Inputs of the kind `name`, those first that tell most, if the reference takes them."""
        if name == variations.TOUCHED and 0 in self.kept:
            # The very inputs that were met before: what is remembered by a part of them is wrong.
            args = self.kept[0].args
            seed_all(secret_seed())
        else:
            args = self._small_inputs()
        if name == variations.INDICES:
            yield from variations.reindexed(args)
        elif name == variations.SHAPES:
            yield from variations.reshaped(args)
        elif name == variations.ROWS:
            yield from variations.enlarged(args)
        elif name == variations.TOUCHED:
            self.touchable = variations.touchable(args)
            for swap in (variations.swapped, variations.unchanged):
                for outliers in (True, False):
                    for signs in (True, False):
                        yield swap(variations.touched(args, signs, self.touchable, outliers))
        elif name == variations.UNSATURATED:
            yield from self._unsaturated(args)
        elif name == variations.SPECIAL:
            yield self._special(args)
        else:
            changed = variations.vary_freely(args, variations.VALUES[name])
            others = variations.with_other_numbers(changed) if name == "shifted" else changed
            if _plain(others) != _plain(changed):
                yield others
            yield changed
            if name == "large":
                yield variations.vary_freely(args, variations.less_large)

    def varied(self, name: str, args: Any) -> Any:
        """`args` varied in place of what is declared, in the way that the kept case of this kind
        was; None where there is none, or where they are large."""
        if size_of(args) > LARGE_BYTES or not any(
            case.name == name and not case.skipped for case in self.kept.values()
        ):
            return None
        if name == variations.UNSATURATED:
            return next(self._unsaturated(args), None)
        milder = name == "large" and self.borne.get(name, 0) > 0
        return variations.vary_freely(
            args, variations.less_large if milder else variations.VALUES[name]
        )

    def reweighed(self, kept: Collection[str]) -> dict[str, torch.Tensor] | None:
        """Other weights anew, as in the kept case with such; None where there is none."""
        name = variations.WEIGHTS
        if not any(case.weights is not None for case in self.kept.values()):
            return None
        names = self.state() & set(kept)
        return self._weights(names, variations.WEIGHT_CHANGES[name][self.borne.get(name, 0)])

    def _unsaturated(self, args: Any) -> Iterator[Any]:
        """`args` with those tensors changed that make no difference to the output as they are, so
        that they make one, if something does it."""
        tensors: list[torch.Tensor] = []
        tree, others = flatten(list(args), tensors), tensors_of(self._small_inputs())
        if [t.shape for t in tensors] != [t.shape for t in others]:
            return

        def differ(place: int, way: Callable[[torch.Tensor], torch.Tensor]) -> bool:
            """Whether tensor `place` matters, changed in this way."""
            pair = []
            for value in (tensors[place], others[place]):
                given = [*tensors[:place], way(value), *tensors[place + 1 :]]
                pair.append(self._native("own", unflatten(tree, given)).outputs)
            if self.usually_finite and not correctness.all_finite(pair[0] + pair[1]):
                return False
            return any(_unlike(*_finite_in_both(a, b)) for a, b in zip(*pair, strict=True))

        changed = list(tensors)
        for place, (tensor, other) in enumerate(zip(tensors, others, strict=True)):
            structured = variations.two_valued(tensor) or variations.with_zeros(tensor)
            if not tensor.is_floating_point() or structured or torch.equal(tensor, other):
                continue
            if not differ(place, variations.unchanged):
                ways = (way for way in variations.REGIMES if differ(place, way))
                changed[place] = next(ways, variations.unchanged)(tensor)
        if any(a is not b for a, b in zip(changed, tensors, strict=True)):
            yield unflatten(tree, changed)

    def _special(self, args: Any) -> Any:
        """`args` with elements that are equal and, where the reference looks for such, infinite."""

        def finite(number: int, values: tuple[float, ...]) -> Any:
            changed = variations.special(args, number, values)
            with contextlib.suppress(Exception):  # whatever the reference raises
                if changed is not None:
                    outputs = self._native("own", changed).outputs
                    return changed if correctness.all_finite(outputs) else None
            return None

        for number in range(len(tensors_of(args))):
            infinite = None
            if finite(number, (math.nan,)) is not None:
                infinite = finite(number, variations.INFINITE)
            args = infinite or finite(number, ()) or args
        return args

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

    def _weights(
        self, which: Collection[str], change: Callable[[torch.Tensor], torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        seed_all(secret_seed())
        state = self.runner.model.state_dict()
        return {k: change(v) if k in which else v for k, v in state.items()}

    def constant(self, names: Collection[str]) -> list[str]:
        """Those of `names` whose weights are of one value throughout."""
        state = self.runner.model.state_dict() if names else {}
        return [name for name in names if variations.constant(state[name])]

    def missing(self, kept: Collection[str]) -> list[str]:
        """The parameters that are not `kept` and without which the output is not what it is.

        Buffers are left aside: a mask or a table of constants may be made in each call.
        """
        model = self.runner.model
        own = dict(model.named_parameters()) if isinstance(model, torch.nn.Module) else {}
        names = frozenset(own) - set(kept)
        if names not in self.needed:
            self.needed[names] = bool(names) and self._matter(names)
        return sorted(names) if self.needed[names] else []

    def _matter(self, names: Collection[str]) -> bool:
        """Whether the output is another one with other values of these weights."""
        args = self._small_inputs()
        weights = self._weights(names, variations.reweighed_throughout)
        try:
            pair = [self._native("own", args, w).outputs for w in (None, weights)]
        except Exception:  # whatever the reference raises: nothing can be held against a candidate
            return False
        return any(map(_unlike, *reversed(pair)))

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
        again: list[torch.Tensor] = []
        flatten(self.runner.outputs[0], again)
        before, after = tensors_of(case.args), tensors_of(self.runner.inputs[0])
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
        if not unusable and size_of(case.args) <= LARGE_BYTES:
            other = self._native("own", self.inputs_alike()).outputs
            if [t.shape for t in other] != [t.shape for t in case.outputs]:
                unusable = "the shape of the reference's output depends on the values of its inputs"
        return {"mutates": changed, "unusable": unusable, "reuses": self._reuses()}

    def _reuses(self) -> bool:
        """Whether what the reference returns is the same memory in each call."""
        args = self._small_inputs()
        if size_of(args) > LARGE_BYTES:
            return False
        self.runner.inputs = [tuple(args), tuple(copy.deepcopy(args))]
        self.runner.run([0, 1])
        found = self.runner.reuses()
        self.runner.forget()
        return found


def _dense(value: Any) -> Any:
    """Expanded tensors written out: an element that is many cannot be written to."""
    if isinstance(value, torch.Tensor):
        expanded = any(
            n > 1 and step == 0 for n, step in zip(value.shape, value.stride(), strict=True)
        )
        return value.contiguous() if expanded else value
    if isinstance(value, (list, tuple)):
        return type(value)(_dense(v) for v in value)
    return value


def _plain(args: Any) -> list[Any]:
    """The values among inputs that are no tensors."""
    return values_of(flatten(list(args), []))


def _shapes(args: Any) -> list[torch.Size]:
    return [t.shape for t in tensors_of(args)]


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """A dense copy of an output, or a large one itself: for it there may be no room, and it is
    let go before the model runs again."""
    tensor = tensor.detach()
    if tensor.nbytes > LARGE_BYTES:
        return tensor.contiguous()
    return tensor.clone(memory_format=DENSE)


def _unless_vague(case: Case) -> Case:
    if not case.skipped and max(case.reference_errors, default=0.0) > VAGUE_ERROR:
        case.skipped = "the reference itself is far from its float64 run"
    return case


def _finite_in_both(one: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    both = one.isfinite() & other.isfinite()
    return one[both], other[both]


def _unlike(one: torch.Tensor, other: torch.Tensor) -> bool:
    if not other.is_floating_point():
        return not torch.equal(one, other)
    return correctness.relative_error(one, other) > UNUSABLE_SPREAD


def _call(model: Any, args: Any, weights: dict[str, torch.Tensor] | None) -> Any:
    if weights is None:
        return model(*args)
    return torch.func.functional_call(model, weights, tuple(args))
