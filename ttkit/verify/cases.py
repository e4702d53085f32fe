"""An input set with what the reference makes of it, and whether a candidate's answer agrees."""

from __future__ import annotations

import ctypes
import functools
import math
from dataclasses import dataclass, field
from typing import Any

import torch

from ttkit.verify import correctness
from ttkit.verify.arena import place, tensors_of

# Inputs above this are varied in a cut-down form, a few draws of them are kept at most, and no more
# than this much of them is looked through for changes.
LARGE_BYTES = 256 << 20
MANY_ZEROS = 0.25
MEMCMP = ctypes.CDLL(None).memcmp
MEMCMP.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
# What is off by so many times what is allowed is not looked at again.
NEAR = 32.0
# How far plain numbers of an output may be off; a mean near zero has few digits that are sure.
NUMBER_RELATIVE, NUMBER_ABSOLUTE = 1e-4, 1e-6
# Cases in which values that vanish are no accident of extreme inputs.
USUAL = ("declared", "touched", "timed")


@dataclass
class Case:
    """One set of inputs, the reference's outputs on it, natively and in float64.

    `tree` says how the output is built (ttkit.verify.arena.flatten), `types` its tensors' types.
    `weights` are those of the model, by their names, where they are not its own, `aliases` for each
    output tensor what it shares memory with (ttkit.verify.runner). `skipped` says why a variation
    is left out, if it is.
    """

    name: str
    args: Any
    outputs: list[torch.Tensor]
    exact: list[torch.Tensor]
    tree: Any = None
    types: tuple[str, ...] = ()
    weights: dict[str, torch.Tensor] | None = None
    skipped: str = ""
    aliases: list[list[int]] = field(default_factory=list)
    fan_in: int = 1  # how many numbers of the inputs one of the output is made of

    @functools.cached_property
    def yardsticks(self) -> list[correctness.Yardstick | None]:
        """One for each output tensor; None for integers and booleans."""
        return _yardsticks(self.outputs, self.exact)

    @functools.cached_property
    def own_errors(self) -> list[float]:
        """The reference's own error for each output tensor."""
        return self.errors_of(self.outputs)

    def errors_of(self, outputs: list[torch.Tensor]) -> list[float]:
        """The error of each of `outputs`; of integers the share that the float64 run has
        otherwise."""
        exact = self.exact or self.outputs
        return [
            correctness.share_unlike(y, y64)
            if yardstick is None
            else yardstick.error(correctness.as_real(y))
            for y, y64, yardstick in zip(outputs, exact, self.yardsticks, strict=True)
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
        return self._usual(self.own_errors)

    def _usual(self, errors: list[float]) -> list[float]:
        """`errors`, but at least what rounding makes of sums as long as this."""
        pairs = zip(errors, self.outputs, strict=True)
        return [max(error, correctness.rounding(self.fan_in, y.dtype)) for error, y in pairs]


class NativeCase(Case):
    """`case` with native `outputs` as the yardstick, which saves a float64 run and its memory.

    The reference's error, `own_errors` as known from another draw, then counts on both sides.
    """

    own_errors: list[float]  # known beforehand

    def __init__(self, case: Case, outputs: list[torch.Tensor], own_errors: list[float]):
        super().__init__(case.name, case.args, outputs, [], case.tree, case.types)
        self.aliases, self.fan_in = case.aliases, case.fan_in
        self.own_errors = own_errors

    @functools.cached_property
    def yardsticks(self) -> list[correctness.Yardstick | None]:
        return _yardsticks(self.outputs, self.outputs)

    @property
    def reference_errors(self) -> list[float]:
        return self._usual([2 * error for error in self.own_errors])


def _yardsticks(
    outputs: list[torch.Tensor], exact: list[torch.Tensor]
) -> list[correctness.Yardstick | None]:
    return [
        correctness.Yardstick(correctness.as_real(y64))
        if y.is_floating_point() or y.is_complex()
        else None
        for y, y64 in zip(outputs, exact, strict=True)
    ]


def judge(
    case: Case, delivered: list[torch.Tensor], values: Any, expected: list[Any]
) -> dict[str, Any]:
    """Compare delivered tensors with the case and plain `values` with the `expected` ones."""
    worst = correctness.Comparison(True, 0.0, 0.0, True)
    close, vanished, near = True, False, False
    rounded = rounds(case.args)
    for number, (y, reference) in enumerate(zip(delivered, case.outputs, strict=True)):
        if torch.equal(y, reference):
            # As far from the truth as the reference is, which takes no look at large tensors.
            own = case.own_errors[number]
            found = correctness.Comparison(True, own, own, True)
        else:
            yardstick, allowed = case.yardsticks[number], case.reference_errors[number]
            found = correctness.compare(y, reference, yardstick, allowed, rounded)
            truth = case.exact[number] if case.exact else None
            vanished |= case.name in USUAL and correctness.lost(y, reference, truth)
        close = close and found.allclose
        if found.error >= worst.error or not found.ok:
            worst = found
        if not found.ok:
            near = found.error <= NEAR * found.allowed
            break
    ok, what = worst.ok, worst.what
    if ok and vanished:
        ok, what = False, "other values stand where the reference has small ones"
    if ok and not same_values(values, expected):
        ok, what = False, "a plain number in the output differs"
    return {
        "ok": ok,
        "what": what,
        "max_error": worst.error,
        "reference_error": max(case.reference_errors, default=0.0),
        "allclose": close,
        "near": near,
    }


def rounds(args: Any) -> bool:
    """Whether floating numbers go in, so that what comes out may depend on how they are rounded."""
    return any(t.is_floating_point() for t in tensors_of(args or ()))


def size_of(args: Any) -> int:
    """Bytes that the tensors in `args` take, laid out one after another."""
    return place(tensors_of(args), 0)[1]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors hold the same values, NaN equal to NaN."""
    if a.device.type == b.device.type == "cpu" and a.is_contiguous() and b.is_contiguous():
        # A third of the time of torch.equal, for what is looked at in every turn.
        alike = a.dtype == b.dtype and a.shape == b.shape
        if alike and not MEMCMP(a.data_ptr(), b.data_ptr(), a.nbytes):
            return True
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
            close = math.isclose(a, b, rel_tol=NUMBER_RELATIVE, abs_tol=NUMBER_ABSOLUTE)
            if not (close or (math.isnan(a) and math.isnan(b))):
                return False
        elif a != b:
            return False
    return True
