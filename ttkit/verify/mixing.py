"""Inputs that are made of others, so that nobody has met them: mixed, or changed at a few places.

They keep what a task's own inputs may promise, as those of `ttkit.verify.variations` do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ttkit.verify.arena import tensors_of
from ttkit.verify.structure import (
    INTEGERS,
    free,
    map_tensors,
    ordered,
    square,
    symmetric,
)

# How many elements of a tensor are touched, and pairs of integers swapped, at most, and by factors
# of what range, usual ones and outliers. A glance at some of the elements misses so few, a
# comparison of all outputs does not.
TOUCHES, SWAPS, TOUCHED_BY, OUTLIERS_BY = 16, 8, (1.5, 3.0), (3.0, 300.0)
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
