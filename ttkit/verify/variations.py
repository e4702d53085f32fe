"""Inputs and weights unlike the declared ones: what a right program must bear as well.

A task fixes its sizes and the distribution of its inputs; a program that is right only there is not
the same function. Each variation keeps what the task's own inputs may promise: zeros stay zeros and
equal elements equal (triangular, diagonal, symmetric and sparse matrices), and tensors of two
values (masks, labels of plus and minus one) are left alone. Where the reference itself fails or is
not finite on a variation, that variation is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

LOOKED_AT = 4096  # elements that decide what kind of tensor it is
SHIFT = 2.0
LARGEST = 192.0
# How many elements of a tensor are touched, at most, and by what factors. A glance at some of the
# elements misses so few, a comparison of all outputs does not.
TOUCHES, TOUCHED_BY = 8, (1.5, 3.0)
IN_PLACE_BYTES = 256 << 20
# The noise that mixed inputs are multiplied by is this large and repeats after so many elements: a
# prime, so that it meets each row at another place.
NOISE, NOISE_LENGTH = 0.1, 65_537


def identity(tensor: torch.Tensor) -> torch.Tensor:
    """The declared values, unchanged."""
    return tensor


def negated(tensor: torch.Tensor) -> torch.Tensor:
    return -tensor


def scaled(tensor: torch.Tensor) -> torch.Tensor:
    return tensor * 4


def large(tensor: torch.Tensor) -> torch.Tensor:
    """32 times, and so far that the largest is beyond what exp can take in single precision."""
    most = float(tensor.abs().max()) if tensor.numel() else 0.0
    return tensor * max(32.0, LARGEST / most if most > LARGEST / 1024 else 32.0)


def less_large(tensor: torch.Tensor) -> torch.Tensor:
    return tensor * 32


def near_one(tensor: torch.Tensor) -> torch.Tensor:
    """Little more than 1, where roots and logarithms are finite and products do not vanish."""
    return tensor.abs() / 1024 + 1


def small(tensor: torch.Tensor) -> torch.Tensor:
    return tensor / 64


def shifted(tensor: torch.Tensor) -> torch.Tensor:
    """Another mean; not where zeros or symmetry may be part of the task."""
    sample = tensor.flatten()[:LOOKED_AT]
    if float((sample == 0).sum()) > 0.01 * sample.numel() or _symmetric(tensor):
        return tensor
    return tensor + SHIFT


def strided(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, not contiguous: the last two dimensions stored the other way round."""
    if tensor.dim() < 2:
        return tensor
    return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)


VALUES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "declared": identity,
    "negated": negated,
    "scaled": scaled,
    "large": large,
    "small": small,
    "near_one": near_one,
    "shifted": shifted,
    "noncontiguous": strided,
}
# The rest are no functions of a tensor's values alone.
INDICES, SHAPES, WEIGHTS = "other_indices", "other_shapes", "other_weights"
ROWS, TOUCHED = "more_rows", "touched"
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def vary(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Apply `change` to the floating tensors; integers keep their dtype and values."""
    if isinstance(value, torch.Tensor):
        return change(value) if value.is_floating_point() else value
    if isinstance(value, (list, tuple)):
        return type(value)(vary(v, change) for v in value)
    return value


def vary_freely(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """As `vary`, but tensors of two values are left alone."""
    return vary(value, lambda t: t if change is not strided and _two_valued(t) else change(t))


def mixed(one: Any, other: Any, share: float, factor: float) -> Any:
    """`factor` times (`share` of one and the rest of the other), tensor by tensor, times noise;
    integers, and tensors of other shapes, are the first one's.

    Without the noise an answer would be a combination of those to few inputs, which are soon known.
    """
    if isinstance(one, torch.Tensor):
        if not one.is_floating_point():
            return one
        same = one is other or one.shape != other.shape
        value = one * factor if same else torch.lerp(other, one, share).mul_(factor)
        if _symmetric(one):
            noise = _noise(one.shape[0], one)
            return value.mul_(torch.outer(noise, noise))
        return roughened(value) if _free(one) else value
    if isinstance(one, (list, tuple)):
        return type(one)(mixed(a, b, share, factor) for a, b in zip(one, other, strict=True))
    return one


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
    places, around the end: at the cost of one pass not what was met before, nor that moved on."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype not in INTEGERS or tensor.numel() < 2:
            return tensor
        flat = tensor.flatten().roll(int(torch.randint(0, tensor.numel(), ())) if roll else 0)
        a, b = torch.randint(0, flat.numel(), (2, TOUCHES), device=flat.device).tolist()
        for i, j in zip(a, b, strict=True):
            flat[[i, j]] = flat[[j, i]]
        return flat.view(tensor.shape)

    return _map(value, change)


def touchable(args: Any) -> list[bool]:
    """For each tensor whether its elements are drawn one by one: no few values, not symmetric."""
    return [t.is_floating_point() and _free(t) for t in _tensors(args)]


def touched(args: Any, signs: bool, where: list[bool]) -> Any:
    """A few elements of the tensors that may be touched (`where`), at random places, times factors
    of their own, some of them negative with `signs`. Very large tensors are changed in place."""
    these = iter(where)

    def change(tensor: torch.Tensor) -> torch.Tensor:
        if not next(these):
            return tensor
        count = min(TOUCHES, 1 + tensor.numel() // 16)
        low, high = TOUCHED_BY
        factors = torch.rand(count, device=tensor.device).mul_(high - low).add_(low)
        if signs:
            factors.mul_(torch.randint(0, 2, (count,), device=tensor.device).mul_(2).sub_(1))
        if tensor.nbytes <= IN_PLACE_BYTES or not tensor.is_contiguous():
            tensor = tensor.clone()
        places = torch.randint(0, tensor.numel(), (count,), device=tensor.device)
        index = torch.unravel_index(places, tensor.shape)
        tensor[index] = tensor[index] * factors.to(tensor.dtype)
        return tensor

    return _map(args, change)


def reindexed(args: Any) -> Iterator[Any]:
    """Integers in another order, so that each stays in range, and booleans drawn anew; nothing
    where there are none."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype is torch.bool:
            return torch.rand(tensor.shape, device=tensor.device) < 0.5
        if tensor.dtype in INTEGERS:
            order = torch.randperm(tensor.numel(), device=tensor.device)
            return tensor.flatten()[order].view(tensor.shape)
        return tensor

    if any(t.dtype is torch.bool or t.dtype in INTEGERS for t in _tensors(args)):
        yield _map(args, change)


def reshaped(args: Any) -> Iterator[Any]:
    """The inputs with other sizes, the likeliest to be taken by the reference first.

    Every size renamed alike, so that products still fit and square matrices stay square; then all
    but the second, the channels that convolutions have weights for; then the batch size only, of
    all tensors that share it; then that of the first tensor alone, if no other has that size
    anywhere. Sizes that wide tiles do not divide come first.
    """
    tensors = list(_tensors(args))
    if not tensors:
        return
    batch = tensors[0].shape[0] if tensors[0].dim() else 1
    for smaller in (_uneven, _smaller):
        yield _cut(args, lambda t, by=smaller: list(map(by, t.shape)))  # type: ignore[misc]
        if any(t.dim() > 2 for t in tensors):
            yield _cut(args, lambda t, by=smaller: _but_channels(t, by))  # type: ignore[misc]
    if batch > 1:
        rest = _uneven(batch)
        yield _cut(args, lambda t: [rest if n == batch else n for n in t.shape[:1]])
        if not any(batch in t.shape for t in tensors[1:]):
            yield _cut(args, lambda t: [rest] if t is tensors[0] else [])


def enlarged(args: Any) -> Iterator[Any]:
    """An eighth more rows, repeated from the front: of every dimension as long as the batch of the
    first tensor, so that square matrices stay square; of all tensors that share its batch size; of
    the first tensor alone, if no other has that size anywhere."""
    tensors = list(_tensors(args))
    if not tensors or not tensors[0].dim() or tensors[0].shape[0] < 2:
        return
    batch = tensors[0].shape[0]
    more = max(batch // 8, 1)

    def grown(tensor: torch.Tensor, dims: list[int]) -> torch.Tensor:
        for dim in dims:
            tensor = torch.cat([tensor, tensor.narrow(dim, 0, more)], dim)
        return tensor

    yield _map(args, lambda t: grown(t, [i for i, n in enumerate(t.shape) if n == batch]))
    yield _map(args, lambda t: grown(t, [0]) if t.shape[:1] == (batch,) else t)
    if not any(batch in t.shape for t in tensors[1:]):
        yield _map(args, lambda t: grown(t, [0]) if t is tensors[0] else t)


def reweighed(tensor: torch.Tensor) -> torch.Tensor:
    """Each weight times a factor of its own between 3/4 and 5/4: signs and zeros stay."""
    if not tensor.is_floating_point() or _two_valued(tensor):
        return tensor.clone()
    return tensor * (0.75 + 0.5 * torch.rand_like(tensor))


def _smaller(size: int) -> int:
    """Three quarters, so that most of what divided the old size divides the new one."""
    return size - max(size // 4, 1) if size > 1 else size


def _but_channels(tensor: torch.Tensor, smaller: Callable[[int], int]) -> list[int]:
    return [n if i == 1 else smaller(n) for i, n in enumerate(tensor.shape)]


def _uneven(size: int) -> int:
    """As `_smaller`, divided by 4 or 2 if `size` is, and by no higher power of two: what is cut
    into halves and quarters comes out even, wider tiles leave something over."""
    step = math.gcd(size, 4)
    steps = _smaller(size) // step
    steps -= 1 - steps % 2
    return steps * step if steps > 0 else _smaller(size)


def _cut(value: Any, sizes: Callable[[torch.Tensor], list[int]]) -> Any:
    """The leading part of every tensor, `sizes` long in its first dimensions.

    Integers are taken modulo the smallest new size: an index that was in range stays in range.
    """
    wanted = [sizes(t) for t in _tensors(value)]
    bound = min((n for new in wanted for n in new if n > 1), default=1)

    def cut(tensor: torch.Tensor) -> torch.Tensor:
        for dim, size in enumerate(sizes(tensor)):
            tensor = tensor.narrow(dim, 0, size)
        if tensor.dtype in INTEGERS:
            tensor = tensor.remainder(bound)
        return tensor.clone(memory_format=torch.contiguous_format)

    return _map(value, cut)


def _map(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, (list, tuple)):
        return type(value)(_map(v, change) for v in value)
    return value


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _two_valued(tensor: torch.Tensor) -> bool:
    return tensor.flatten()[:LOOKED_AT].unique().numel() == 2


def _free(tensor: torch.Tensor) -> bool:
    sample = tensor.flatten()[:LOOKED_AT]
    sample = sample[sample != 0]
    return 2 * sample.unique().numel() > sample.numel() > 0 and not _symmetric(tensor)


def _symmetric(tensor: torch.Tensor) -> bool:
    if tensor.dim() != 2 or tensor.shape[0] != tensor.shape[1]:
        return False
    return torch.equal(tensor, tensor.T)
