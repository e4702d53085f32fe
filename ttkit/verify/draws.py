"""Inputs for a task, drawn from secret seeds."""

from __future__ import annotations

import copy
import itertools
import os
from collections.abc import Iterator
from typing import Any

import torch

from ttkit.verify import correctness, mixing, variations
from ttkit.verify.arena import tensors_of
from ttkit.verify.cases import LARGE_BYTES, same_bits, size_of
from ttkit.verify.reference import Reference
from ttkit.verify.runner import secret_seed, seed_all, to_device

POOL = 4
DRAWS = 20
SMALL_BYTES, STEPS = 32 << 20, 40


def secret_choice(items: list[Any]) -> Any:
    """One of `items`, by the system's generator: no seed of the task's code can predict it."""
    return items[int.from_bytes(os.urandom(4), "little") % len(items)]


class Draws:
    """Draws inputs as the task declares them, on the device that runs them.

    `like` are inputs whose shapes all that are timed have. What else is set from outside has been
    found by running the reference (`ttkit.verify.casemaker`).
    """

    def __init__(self, task: Any, reference: Reference, device: str):
        self.task, self.reference, self.device = task, reference, device
        self.like: Any = None  # the first inputs, unless they are large
        # How inputs for timing may be touched: with other signs, without, or not at all.
        self.signs: bool | None = None
        self.touchable: list[bool] = []
        self.reorders = False  # whether the reference takes integers in any order
        self._pool: list[Any] = []
        # See `shrunk`, by the shapes that large inputs have.
        self._ways: dict[tuple[torch.Size, ...], list[int]] = {}
        self._mixable: list[bool] | None = None  # which integers it takes from two draws at once

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
        return mixing.mixed(self.like, self.like, 0.5, 1.0, [])

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
        while not self._pool or (len(self._pool) < POOL and size_of(self._pool[0]) < LARGE_BYTES):
            self._pool.append(self.inputs_alike())
        if self._mixable is None:
            self._mixable = self._find_mixable()
        sets = []
        for _ in range(count):
            one = secret_choice(self._pool)
            other = secret_choice([drawn for drawn in self._pool if drawn is not one] or [one])
            share, factor = (secret_seed() / 2**56 for _ in range(2))
            args = mixing.mixed(one, other, 0.25 + share / 2, 0.5 + factor, self._mixable)
            roll = not any(self._mixable)
            sets.append(mixing.swapped(args, roll=roll) if self.reorders else args)
        return sets

    def _find_mixable(self) -> list[bool]:
        """For each integer tensor of the pooled inputs whether the reference takes its elements
        from either of two draws."""
        found = []
        for args in mixing.integers_mixed(self._pool[0], self._pool[-1]):
            takes = args is not None and len(self._pool) > 1
            if takes:
                try:
                    takes = correctness.all_finite(self.reference.native("mixed", args).outputs)
                except Exception:  # whatever the reference raises: it does not take them
                    takes = False
            found.append(takes)
        return found

    def touched(self, args: Any) -> Any:
        """`args` with a few elements changed as in the variation, if the reference bears that."""
        if self.signs is None:
            return args
        return mixing.touched(args, self.signs, self.touchable, outliers=False)

    def small_inputs(self) -> Any:
        """Inputs as declared or, where they are large, as much of them as makes a small task."""
        args = self.inputs()
        return self.manageable(args) or args

    def manageable(self, args: Any) -> Any:
        """The inputs themselves, or large ones cut down; None where that is not possible."""
        return args if size_of(args) <= LARGE_BYTES else self.shrunk(args)

    def shrunk(self, args: Any) -> Any:
        """The inputs cut down to SMALL_BYTES, or as near to it as the reference takes them; None
        where that is more than LARGE_BYTES."""
        shapes = tuple(_shapes(args))
        if shapes not in self._ways:
            self._ways[shapes] = self._ways_down(args)
        for number in self._ways[shapes]:
            args = next(itertools.islice(self._reshaped(args), number, None))
        return args if size_of(args) <= LARGE_BYTES else None

    def _ways_down(self, args: Any) -> list[int]:
        """Which of the ways to reshape inputs the reference takes, step by step."""
        ways: list[int] = []
        while size_of(args) > SMALL_BYTES and len(ways) < STEPS:
            smaller = enumerate(self._reshaped(args))
            taken = next(((number, cut) for number, cut in smaller if self._takes(cut)), None)
            if taken is None:
                break
            ways.append(taken[0])
            args = taken[1]
        return ways

    def _reshaped(self, args: Any) -> Iterator[Any]:
        return variations.reshaped(args, self.reference.sizes())

    def _takes(self, args: Any) -> bool:
        try:
            with torch.no_grad():
                self.reference.runner.model(*copy.deepcopy(args))
        except Exception:  # whatever the reference raises
            return False
        return True


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


def _shapes(args: Any) -> list[torch.Size]:
    return [t.shape for t in tensors_of(args)]
