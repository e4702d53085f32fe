"""Makes a task's correctness cases: the referee's private knowledge."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import torch

from ttkit.verify import correctness, mixing, structure, variations
from ttkit.verify.arena import flatten, tensors_of, unflatten
from ttkit.verify.cases import LARGE_BYTES, Case, NativeCase, same_bits, size_of
from ttkit.verify.draws import Draws, secret_choice
from ttkit.verify.protocol import TOUCHED_WEIGHTS
from ttkit.verify.reference import unless_vague
from ttkit.verify.runner import secret_seed, seed_all, values_of

# A reference that disagrees so much with float64, or with its own second run, is no yardstick.
# Where nearly all of its output is NaN, so may a candidate's be.
UNUSABLE_ERROR, UNUSABLE_SPREAD, UNUSABLE_NANS = 0.1, 1e-3, 0.9
# Weights that are so many times smaller than the largest are not touched alone.
MUCH_SMALLER = 16


class CaseMaker:
    """Chooses inputs and weights of each kind, and keeps the cases that come of them.

    Those whose inputs and outputs take more than `keep_bytes` are made anew for each candidate.
    """

    def __init__(self, draws: Draws, keep_bytes: int):
        self.draws, self.reference = draws, draws.reference
        self.keep_bytes = keep_bytes
        self.kept: dict[int, Case] = {}
        self.touched_errors: list[float] = []
        self.follows = False  # whether the first output has the first input's batch size
        self.needed: dict[frozenset[str], bool] = {}  # see `missing`
        self.untouched: list[str] = []  # see `_next_weight`
        self.borne: dict[str, int] = {}  # of each kind the first choice that the reference takes
        # Where case 0 is not kept: what it is without inputs and answers, but with its errors.
        self.pattern: NativeCase | None = None

    def timed_errors(self, case: Case) -> list[float]:
        """The reference's own errors on inputs like those of `case`, touched or not."""
        touched = self.touched_errors or case.own_errors
        return [max(pair) for pair in zip(case.own_errors, touched, strict=True)]

    def first(self) -> Case:
        """Case 0, of inputs as declared; before any other, while little memory is taken.

        Where it is not kept, the reference's error is found here once, on a cut-down form if a
        float64 run does not fit into the memory.
        """
        args = self.draws.inputs()
        if size_of(args) <= LARGE_BYTES:
            self.draws.like = args
        self.reference.fan_in = self._fan_in(args)
        native = self.reference.native("declared", args)
        self.follows = self._follows(native)
        try:
            native.exact = self.reference.in_float64(args, native.outputs)
            self.reference.usually_finite = native.finite
            errors = native.own_errors
        except torch.OutOfMemoryError:
            small = self.draws.shrunk(args)
            if small is None:
                raise
            cut = self.reference.case("declared", small)
            self.reference.usually_finite, errors = cut.finite, cut.own_errors
        if self._small(native):
            self.kept[0] = native
            return native
        blank = [torch.empty_like(t, device="meta") for t in native.outputs]
        self.pattern = NativeCase(native, blank, errors)
        self.pattern.args = None
        return NativeCase(native, native.outputs, errors)

    def _fan_in(self, args: Any) -> int:
        """That of the reference; where inputs are large, made of that of a cut-down form."""
        small = self.draws.manageable(args)
        if small is None:
            return 1
        # Both dimensions of a matrix are cut alike, and it sums over one.
        scale = math.sqrt(size_of(args) / max(size_of(small), 1))
        return round(scale * self.reference.find_fan_in(small))

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
        present: dict[str, torch.Tensor] | None = None,
    ) -> Case:
        """Correctness case `number`, of the kind `name`: the one that is kept, unless a `fresh` one
        is wanted and inputs are soon made. One with other weights has them where the candidate
        keeps `weights` (None: all); a weight is touched among those that it has at `present`.
        """
        if name in variations.WEIGHT_CHANGES and weights is not None:
            if not weights:
                return Case(name, None, [], [], skipped="it has no weights")
            if self.reference.state() - set(weights):
                return self._variation(name, set(weights), present)
        case = self.kept.get(number)
        if case is not None and not (fresh and self.pattern is None):
            return case
        if name == "declared" and self.pattern is not None:
            native = self.reference.native(name, self.draws.inputs_alike())
            return NativeCase(native, native.outputs, self.pattern.own_errors)
        if name == "declared":
            # What is declared is judged, NaN for NaN; only the variations are optional.
            case = self.reference.case(name, self.draws.inputs_alike())
            case.skipped = ""
        else:
            case = unless_vague(self._variation(name, None, present))
        if case.skipped or self._small(case):
            self.kept[number] = case
        return case

    def _variation(
        self,
        name: str,
        which: Collection[str] | None = None,
        present: dict[str, torch.Tensor] | None = None,
    ) -> Case:
        choices: Iterable[tuple[Any, dict[str, torch.Tensor] | None]]
        if name in variations.WEIGHT_CHANGES:
            names = self.reference.state() if which is None else which
            if not names:
                return Case(name, None, [], [], skipped="the model has no weights")
            if name == TOUCHED_WEIGHTS:
                names = self._next_weight(names)
            else:
                present = None
            args, changes = self.draws.small_inputs(), variations.WEIGHT_CHANGES[name]
            choices = (
                (args, self.reference.changed_weights(names, change, present)) for change in changes
            )
        elif name == "near_one" and 0 in self.kept and not self.kept[0].degenerate:
            return Case(name, None, [], [], skipped="what is declared tells enough")
        else:
            choices = ((choice, None) for choice in self._choices(name))
        why = "there is none"
        for number, (choice, weights) in enumerate(choices):
            if number < self.borne.get(name, 0):
                continue
            try:
                case = self.reference.case(name, choice, weights)
            except Exception as error:  # whatever the reference raises: it does not take them
                why = f"the reference raises {error!r:.80}"
                continue
            if name in (variations.SHAPES, variations.ROWS) and self._follows(case) < self.follows:
                why = "the reference takes them for inputs of another batch size"
                continue
            if not case.skipped:
                # What it did not bear before is not tried again.
                self.borne[name] = number
                self.draws.reorders |= name == variations.INDICES
                if name == variations.TOUCHED:
                    # Once not with other signs, never again: that one bore them may be chance.
                    self.draws.signs = number % 2 == 0 and self.draws.signs is not False
                    self.touched_errors = case.own_errors
                return case
            why = case.skipped
        return Case(name, None, [], [], skipped=why)

    def _next_weight(self, names: Collection[str]) -> Collection[str]:
        """One weight that is to be touched alone, since who looks at another one misses that;
        another one each time, of the large ones, from which most can be made."""
        state = self.reference.runner.model.state_dict()
        names = [n for n in names if variations.has_places(state[n])] or list(names)
        least = max(state[n].numel() for n in names) // MUCH_SMALLER
        names = [n for n in names if state[n].numel() >= least]
        self.untouched = [name for name in self.untouched if name in names]
        if not self.untouched:
            self.untouched = sorted(names, key=lambda _: secret_seed())
        return [self.untouched.pop()]

    def _choices(self, name: str) -> Iterator[Any]:
        """Inputs of the kind `name`, those first that tell most, if the reference takes them."""
        if name == variations.TOUCHED and 0 in self.kept:
            # The very inputs that were met before: what is remembered by a part of them is wrong.
            args = self.kept[0].args
            seed_all(secret_seed())
        else:
            args = self.draws.small_inputs()
        if name == variations.INDICES:
            yield from variations.reindexed(args)
        elif name == variations.SHAPES:
            yield from variations.reshaped(args, self.reference.sizes())
        elif name == variations.ROWS:
            odd = variations.enlarged_throughout(args, self.reference.sizes(), odd=True)
            if odd is not None and self._renames(args, odd):
                yield odd
            yield from variations.enlarged(args, self.reference.sizes())
        elif name == variations.TOUCHED:
            self.draws.touchable = mixing.touchable(args)
            for swap in (mixing.swapped, variations.unchanged):
                for outliers in (True, False):
                    for signs in (True, False):
                        yield swap(mixing.touched(args, signs, self.draws.touchable, outliers))
        elif name == variations.UNEVEN:
            seed_all(secret_seed())
            yield from filter(None, (mixing.uneven(args, only) for only in (False, True)))
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
            if name in variations.MILDER:
                yield variations.vary_freely(args, variations.MILDER[name])

    def _renames(self, args: Any, changed: Any) -> bool:
        """Whether the output has the sizes of `changed` inputs where it has those of `args`, and
        otherwise none of either: a pooled or padded one says that some sizes are not taken."""
        pairs = zip(tensors_of(args), tensors_of(changed), strict=True)
        new = {n: m for a, b in pairs for n, m in zip(a.shape, b.shape, strict=True)}
        try:
            before, after = (self.reference.native("own", x).outputs for x in (args, changed))
        except Exception:  # whatever the reference raises: it does not take them
            return False
        return all(
            list(b.shape) == [new.get(n, n) for n in a.shape]
            for a, b in zip(before, after, strict=True)
        )

    def varied(self, name: str, args: Any) -> Any:
        """`args` varied in place of what is declared, in the way that the kept case of this kind
        was; None where there is none, or where they are large."""
        if size_of(args) > LARGE_BYTES or not any(
            case.name == name and not case.skipped for case in self.kept.values()
        ):
            return None
        if name == variations.UNSATURATED:
            return next(self._unsaturated(args), None)
        milder = name in variations.MILDER and self.borne.get(name, 0) > 0
        return variations.vary_freely(
            args, variations.MILDER[name] if milder else variations.VALUES[name]
        )

    def reweighed(self, kept: Collection[str]) -> dict[str, torch.Tensor] | None:
        """Other weights anew, as in the kept case with such; None where there is none."""
        name = variations.WEIGHTS
        if not any(case.weights is not None for case in self.kept.values()):
            return None
        names = self.reference.state() & set(kept)
        return self.reference.changed_weights(
            names, variations.WEIGHT_CHANGES[name][self.borne.get(name, 0)]
        )

    def _unsaturated(self, args: Any) -> Iterator[Any]:
        """`args` with those tensors changed that make no difference to the output as they are, so
        that they make one, if something does it."""
        tensors: list[torch.Tensor] = []
        tree, others = flatten(list(args), tensors), tensors_of(self.draws.small_inputs())
        if [t.shape for t in tensors] != [t.shape for t in others]:
            return

        def differ(place: int, way: Callable[[torch.Tensor], torch.Tensor]) -> bool:
            """Whether tensor `place` matters, changed in this way."""
            pair = []
            for value in (tensors[place], others[place]):
                given = [*tensors[:place], way(value), *tensors[place + 1 :]]
                pair.append(self.reference.native("own", unflatten(tree, given)).outputs)
            if self.reference.usually_finite and not correctness.all_finite(pair[0] + pair[1]):
                return False
            return any(_unlike(*_finite_in_both(a, b)) for a, b in zip(*pair, strict=True))

        changed = list(tensors)
        for place, (tensor, other) in enumerate(zip(tensors, others, strict=True)):
            structured = structure.two_valued(tensor) or structure.with_zeros(tensor)
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
            changed = mixing.special(args, number, values)
            with contextlib.suppress(Exception):  # whatever the reference raises
                if changed is not None:
                    outputs = self.reference.native("own", changed).outputs
                    return changed if correctness.all_finite(outputs) else None
            return None

        for number in range(len(tensors_of(args))):
            infinite = None
            if finite(number, (math.nan,)) is not None:
                infinite = finite(number, mixing.INFINITE)
            args = infinite or finite(number, ()) or args
        return args

    def missing(self, kept: Collection[str]) -> list[str]:
        """The parameters that are not `kept` and without which the output is not what it is.

        Buffers are left aside: a mask or a table of constants may be made in each call.
        """
        model = self.reference.runner.model
        own = dict(model.named_parameters()) if isinstance(model, torch.nn.Module) else {}
        names = frozenset(own) - set(kept)
        if names not in self.needed:
            self.needed[names] = bool(names) and self._matter(names)
        return sorted(names) if self.needed[names] else []

    def _matter(self, names: Collection[str]) -> bool:
        """Whether the output is another one with other values of these weights."""
        args = self.draws.small_inputs()
        weights = self.reference.changed_weights(names, variations.reweighed_throughout)
        try:
            pair = [self.reference.native("own", args, w).outputs for w in (None, weights)]
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
        self.reference.runner.inputs = [tuple(copy.deepcopy(case.args))]
        layout = self.reference.runner.layout()
        self.reference.runner.run([0])
        rebinds = self.reference.runner.layout() != layout
        again: list[torch.Tensor] = []
        flatten(self.reference.runner.outputs[0], again)
        before, after = tensors_of(case.args), tensors_of(self.reference.runner.inputs[0])
        self.reference.runner.forget()
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
        self.reference.mutates = changed
        if not unusable and size_of(case.args) <= LARGE_BYTES:
            other = self.reference.native("own", self.draws.inputs_alike()).outputs
            if [t.shape for t in other] != [t.shape for t in case.outputs]:
                unusable = "the shape of the reference's output depends on the values of its inputs"
        return {
            "mutates": changed,
            "rebinds": rebinds,
            "unusable": unusable,
            "reuses": self._reuses(),
        }

    def _reuses(self) -> bool:
        """Whether what the reference returns is the same memory in each call."""
        args = self.draws.small_inputs()
        if size_of(args) > LARGE_BYTES:
            return False
        self.reference.runner.inputs = [tuple(args), tuple(copy.deepcopy(args))]
        self.reference.runner.run([0, 1])
        found = self.reference.runner.reuses()
        self.reference.runner.forget()
        return found


def _plain(args: Any) -> list[Any]:
    """The values among inputs that are no tensors."""
    return values_of(flatten(list(args), []))


def _finite_in_both(one: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    both = one.isfinite() & other.isfinite()
    return one[both], other[both]


def _unlike(one: torch.Tensor, other: torch.Tensor) -> bool:
    if not other.is_floating_point():
        return not torch.equal(one, other)
    return correctness.relative_error(one, other) > UNUSABLE_SPREAD
