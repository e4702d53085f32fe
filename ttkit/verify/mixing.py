"""Inputs that are made of others, so that nobody has met them: mixed, or changed at a few places.

They keep what a task's own inputs may promise, as those of `ttkit.verify.variations` do.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ttkit.verify.arena import tensors_of
from ttkit.verify.structure import (
    INTEGERS,
    constant,
    free,
    map_tensors,
    ordered,
    square,
    symmetric,
    two_valued,
)

# How many elements of a tensor are touched, and pairs of integers swapped, at most, and by factors
# of what range, usual ones and outliers. A glance at some of the elements misses so few, a
# comparison of all outputs does not.
TOUCHES, SWAPS, TOUCHED_BY, OUTLIERS_BY = 16, 8, (1.5, 3.0), (3.0, 300.0)
# How many lines are made unlike the others, of how many, of how many elements, and how small some.
LINES, SOME, FAINT = 12, 8, 2.0**-12
LARGEST = 192.0  # more than exp can take in single precision
IN_PLACE_BYTES = 256 << 20
# The noise that mixed inputs are multiplied by is this large and repeats after so many elements: a
# prime, so that it meets each row at another place.
NOISE, NOISE_LENGTH = 0.1, 65_537
# What few elements may be, where the reference looks for what is not finite: its output is finite
# with NaN as well. What comes of an infinite one elsewhere, as of x * (x > 0), is nobody's promise.
INFINITE = (math.inf, -math.inf)


def mixed(one: Any, other: Any, share: float, factor: float, integers: list[bool]) -> Any:
    """Tensors made of those of `one` and `other`, which no combination of few inputs gives.

    Dense ones: `factor` times (`share` of one and the rest of the other), times noise. Those of few
    values (masks, labels, counts), and of the integer ones those marked in `integers`: each element
    that of one or of the other, as chance has it. Tensors of other shapes are the first one's.
    """
    marks = iter(integers)

    def mix(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if not a.is_floating_point():
            return _either(a, b, share) if next(marks, False) and a.shape == b.shape else a
        if a.shape != b.shape:
            b = a
        if a is b and not free(a) and not square(a):
            b = a.flatten().roll(int(torch.randint(0, a.numel() + 1, ()))).view(a.shape)
        if symmetric(a):
            noise = _noise(a.shape[-1], a)
            return torch.lerp(b, a, share).mul_(factor).mul_(torch.outer(noise, noise))
        if free(a):
            return roughened(torch.lerp(b, a, share).mul_(factor))
        return _either(a, b, share)

    return _map_pairs(one, other, mix)


def _either(a: torch.Tensor, b: torch.Tensor, share: float) -> torch.Tensor:
    return torch.where(torch.rand(a.shape, device=a.device) < share, a, b)


def _map_pairs(one: Any, other: Any, change: Callable[..., torch.Tensor]) -> Any:
    if isinstance(one, torch.Tensor):
        return change(one, other)
    if isinstance(one, (list, tuple)):
        return type(one)(_map_pairs(a, b, change) for a, b in zip(one, other, strict=True))
    return one


def integers_mixed(one: Any, other: Any) -> Iterator[Any]:
    """For each tensor of integers or booleans the inputs with it alone mixed; None for one that is
    in order (offsets, segments), which would be no longer."""
    tensors = [t for t in tensors_of(one) if not t.is_floating_point()]
    for number, tensor in enumerate(tensors):
        marks = iter([i == number for i in range(len(tensors))])

        def mix(a: torch.Tensor, b: torch.Tensor, marks: Iterator[bool] = marks) -> torch.Tensor:
            marked = not a.is_floating_point() and next(marks)
            return _either(a, b, 0.5) if marked and a.shape == b.shape else a

        yield None if ordered(tensor) else _map_pairs(one, other, mix)


def roughened(tensor: torch.Tensor) -> torch.Tensor:
    """The dense `tensor`, multiplied in place by noise drawn anew: signs and zeros stay."""
    flat = tensor.view(-1) if tensor.is_contiguous() else tensor.flatten()
    whole = flat.numel() // NOISE_LENGTH * NOISE_LENGTH
    noise = _noise(NOISE_LENGTH, flat)
    flat[:whole].view(-1, NOISE_LENGTH).mul_(noise)
    flat[whole:].mul_(noise[: flat.numel() - whole])
    return flat.view(tensor.shape)


def _noise(length: int, like: torch.Tensor) -> torch.Tensor:
    noise = torch.rand(length, device=like.device).mul_(2 * NOISE).add_(1 - NOISE)
    return noise.to(like.dtype)


def swapped(value: Any, roll: bool = False) -> Any:
    """Integers of which a few have changed places; with `roll` after all have been moved on by some
    places, around the end. A few booleans are turned."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype is torch.bool and tensor.numel():
            places = torch.randint(0, tensor.numel(), (SWAPS,), device=tensor.device)
            flat = tensor.flatten().clone()
            flat[places] = ~flat[places]
            return flat.view(tensor.shape)
        if tensor.dtype not in INTEGERS or tensor.numel() < 2:
            return tensor
        flat = tensor.flatten().roll(int(torch.randint(0, tensor.numel(), ())) if roll else 0)
        a, b = torch.randint(0, flat.numel(), (2, SWAPS), device=flat.device).tolist()
        for i, j in zip(a, b, strict=True):
            flat[[i, j]] = flat[[j, i]]
        return flat.view(tensor.shape)

    return map_tensors(value, change)


def touchable(args: Any) -> list[bool]:
    """For each tensor whether its elements are drawn one by one: no few values, not symmetric."""
    return [t.is_floating_point() and free(t) for t in tensors_of(args)]


def touched(args: Any, signs: bool, where: list[bool], outliers: bool) -> Any:
    """A few elements of the tensors that may be touched (`where`), at random places, times factors
    of their own: some of them negative with `signs`. With `outliers` most of them are far larger
    than others are, many beyond what exp can take, and one in eight is zero. Very large
    tensors are changed in place."""
    these = iter(where)

    def change(tensor: torch.Tensor) -> torch.Tensor:
        if not next(these):
            return tensor
        places = few_places(tensor)
        count = len(places)
        index = _unravelled(places, tensor.shape)
        old = tensor[index].float()
        new = old * _between(*TOUCHED_BY, count, tensor)
        if outliers:
            largest = max(LARGEST, float(tensor.abs().max()))
            far = torch.copysign(_between(0.75 * largest, 1.5 * largest, count, tensor), old)
            chance = torch.rand(count, device=tensor.device)
            new = torch.where(chance < 0.6, old * _between(*OUTLIERS_BY, count, tensor), new)
            new = torch.where(chance < 0.45, far, new)
            new.masked_fill_(chance > 7 / 8, 0.0)
            new.masked_fill_(old == 0, 0.0)  # it may be one of those that a triangle has
        if signs:
            new.mul_(torch.randint(0, 2, (count,), device=tensor.device).mul_(2).sub_(1))
        if tensor.nbytes <= IN_PLACE_BYTES or not tensor.is_contiguous():
            tensor = tensor.clone()
        tensor[index] = new.to(tensor.dtype)
        return tensor

    return map_tensors(args, change)


def special(args: Any, number: int, values: tuple[float, ...]) -> Any:
    """A few elements of tensor `number`, at random places, are what another tensor of its shape has
    there, or of these `values`; zeros stay. None if it is not dense."""
    tensors = tensors_of(args)
    tensor = tensors[number]
    if not (tensor.is_floating_point() and free(tensor)):
        return None
    places = few_places(tensor)
    flat = tensor.flatten().clone()
    for other in tensors:
        if other is not tensor and other.shape == tensor.shape:
            flat[places] = other.flatten()[places].to(flat.dtype)
    for first, value in enumerate(values):
        flat[places[first :: len(values) + 1]] = value
    changed = flat.masked_fill_(tensor.flatten() == 0, 0.0).view(tensor.shape)
    return map_tensors(args, lambda t: changed if t is tensor else t)


def uneven(args: Any, floats_only: bool) -> Any:
    """Lines unlike the others, which keep nothing of what all lines have in common: some faint (or,
    of integers and booleans, of one value), some of one value in one half (floats nearly), some
    with one half (or, of integers, all) of what another tensor of that shape has there; the first
    or the second half of all integers is of one value. Tensors of one value have another at one
    place.

    None where no tensor has lines. Integers that are all different, or in order, and floats of two
    values stay as they are.
    """
    tensors = tensors_of(args)
    plans = {t.shape: _lines(t.shape) for t in tensors}
    twins = {id(a): b for n, a in enumerate(tensors) for b in tensors[n + 1 :] if _alike(a, b)}
    models = {id(b) for b in twins.values()}
    changed: list[torch.Tensor] = []

    def change(tensor: torch.Tensor) -> torch.Tensor:
        new, floating = tensor.flatten().clone(), tensor.is_floating_point()
        plan = plans[tensor.shape]
        twin = tensor if id(tensor) in models else twins.get(id(tensor))
        if floating and tensor.numel() > 1 and constant(tensor):
            new[random.randrange(len(new))] += 0.5 + random.random()
        elif floating and plan is not None and free(tensor):
            _change_lines(new, *plan, tensor, twin)
            new.masked_fill_(tensor.flatten() == 0, 0.0)  # it may be one that a triangle has
        elif not (floating or floats_only) and _arbitrary(tensor):
            new[_half(len(new))] = _level(new)
            if plan is not None:
                _change_lines(new, *plan, tensor, twin)
        else:
            return tensor
        changed.append(tensor)
        return new.view(tensor.shape)

    args = map_tensors(args, change)
    return args if changed else None


def _lines(shape: torch.Size) -> tuple[int, list[tuple[int, slice]]] | None:
    """How long the lines of a tensor are, which of them are to be changed, and half of each."""
    widths = [math.prod(shape[dim:]) for dim in range(1, len(shape))]
    widths = [n for n in widths if n >= SOME and math.prod(shape) >= SOME * n]
    if not widths:
        return None
    width = random.choice(widths)
    count = math.prod(shape) // width
    lines = random.sample(range(count), min(LINES, count // 4))
    return width, [(line, _half(width)) for line in lines]


def _half(length: int) -> slice:
    middle = length // 2
    return random.choice((slice(0, middle), slice(middle, length)))


def _change_lines(
    flat: torch.Tensor,
    width: int,
    lines: list[tuple[int, slice]],
    tensor: torch.Tensor,
    twin: torch.Tensor | None,
) -> None:
    """Change lines of `flat`, which are made of those of `tensor` and of its `twin`."""
    rows, floating = flat.view(-1, width), flat.is_floating_point()
    # Who looks at a sample of faint ones must not meet one too often.
    for number, (line, half) in enumerate(lines[: LINES // 2] if floating else lines):
        row = rows[line]
        row[:] = tensor.reshape(rows.shape)[line]
        if number % 3 == 0 and floating:
            row *= FAINT
        elif number % 3 == 0:
            row[:] = _level(row)
        elif number % 3 == 1 or twin is None:
            # Floats nearly: of equal ones a sum loses the same each time. (Noise alone leaves those
            # equal that are near zero.)
            level = _level(row)
            row[half] = roughened(row[half].lerp(level, 1 - NOISE)) if floating else level
        else:
            part = half if floating or number % 2 else slice(None)
            row[part] = twin.reshape(rows.shape)[line][part]


def _level(row: torch.Tensor) -> torch.Tensor:
    """One of the values of a line: the least, the most, any."""
    if row.dtype is torch.bool:
        return torch.rand((), device=row.device) < 0.5
    any_one = row[random.randrange(len(row))]
    return random.choice((row.min(), row.max(), any_one)).clone()


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype


def _arbitrary(tensor: torch.Tensor) -> bool:
    """Whether integers or booleans may be anything that they are somewhere."""
    if tensor.dtype is torch.bool:
        return tensor.numel() > 1
    if tensor.dtype not in INTEGERS or tensor.numel() < 2 or two_valued(tensor):
        return False
    in_order = bool((tensor[..., 1:] >= tensor[..., :-1]).all())
    return not in_order and tensor.unique().numel() < tensor.numel()


def few_places(tensor: torch.Tensor) -> torch.Tensor:
    """Where a few elements lie, at random, counted through the whole tensor."""
    count = min(TOUCHES, 1 + tensor.numel() // 16)
    return torch.randint(0, tensor.numel(), (count,), device=tensor.device)


def _unravelled(places: torch.Tensor, shape: torch.Size) -> tuple[torch.Tensor, ...]:
    """As torch.unravel_index, which imports sympy first: half a second and more a process."""
    index = []
    for size in reversed(shape):
        index.append(places % size)
        places = places // size
    return tuple(reversed(index))


def _between(low: float, high: float, count: int, like: torch.Tensor) -> torch.Tensor:
    """Random numbers, as likely in any part of the range by its logarithm."""
    share = torch.rand(count, device=like.device)
    return torch.exp(share.mul_(math.log(high / low)).add_(math.log(low)))
