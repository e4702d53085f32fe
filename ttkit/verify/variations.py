"""Inputs and weights unlike the declared ones: what a right program must bear as well.

A task fixes its sizes and the distribution of its inputs; a program that is right only there is not
the same function. Each variation keeps what the task's own inputs may promise: zeros stay zeros and
equal elements equal (triangular, diagonal, symmetric and sparse matrices), and tensors of two
values (masks, labels of plus and minus one) keep these, at other places at most. Where the
reference itself fails or is not finite on a variation, that variation is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ttkit.verify.protocol import TOUCHED_WEIGHTS

LOOKED_AT = 4096  # elements that decide what kind of tensor it is
SHIFT = 2.0
LARGEST = 192.0
# How many elements of a tensor are touched, and pairs of integers swapped, at most, and by factors
# of what range, usual ones and outliers. A glance at some of the elements misses so few, a
# comparison of all outputs does not.
TOUCHES, SWAPS, TOUCHED_BY, OUTLIERS_BY = 16, 8, (1.5, 3.0), (3.0, 300.0)
IN_PLACE_BYTES = 256 << 20
# A sixteenth more of a size, in three dimensions at most: there is room for a quarter more in all.
PART = 16
# The noise that mixed inputs are multiplied by is this large and repeats after so many elements: a
# prime, so that it meets each row at another place.
NOISE, NOISE_LENGTH = 0.1, 65_537


def unchanged(value: Any) -> Any:
    """What is declared."""
    return value


def negated(tensor: torch.Tensor) -> torch.Tensor:
    """With the other sign; positive definite matrices as they are."""
    return tensor if _definite(tensor) else -tensor


def scaled(tensor: torch.Tensor) -> torch.Tensor:
    return tensor * 4


def large(tensor: torch.Tensor) -> torch.Tensor:
    """32 times, and so far that the largest is beyond what exp can take in single precision."""
    most = float(tensor.abs().max()) if tensor.numel() else 0.0
    return tensor * max(32.0, LARGEST / most if most > LARGEST / 1024 else 32.0)


def less_large(tensor: torch.Tensor) -> torch.Tensor:
    return tensor * 32


def near_one(tensor: torch.Tensor) -> torch.Tensor:
    """Little more than 1, where roots and logarithms are finite and products do not vanish; zeros
    stay where they may be part of the task."""
    near = tensor.abs() / 1024 + 1
    return near.masked_fill_(tensor == 0, 0.0) if with_zeros(tensor) else near


def small(tensor: torch.Tensor) -> torch.Tensor:
    return tensor / 64


def shifted(tensor: torch.Tensor) -> torch.Tensor:
    """Another mean; not where zeros or symmetry may be part of the task. A tensor of one value (an
    initial state of zeros) gets random values."""
    if tensor.numel() > 1 and constant(tensor):
        return tensor + SHIFT * torch.rand_like(tensor)
    if with_zeros(tensor) or _symmetric(tensor):
        return tensor
    return tensor + SHIFT


def strided(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, not contiguous: the last two dimensions stored the other way round."""
    if tensor.dim() < 2:
        return tensor
    return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)


VALUES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "declared": unchanged,
    "negated": negated,
    "scaled": scaled,
    "large": large,
    "small": small,
    "near_one": near_one,
    "shifted": shifted,
    "noncontiguous": strided,
}
# Where an input makes no difference as declared (a sum of many that saturates what follows, a
# product that vanishes), one of these may bring it to where it does.
REGIMES: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (
    *(lambda t, k=k: t * 2.0**-k for k in (4, 8, 12, 16, 20)),  # type: ignore[misc]
    *(lambda t, c=c: t - c for c in (4.0, 8.0, 12.0, 16.0, 24.0, -4.0, -8.0, -16.0)),  # type: ignore[misc]
    *(lambda t, k=k: t * 2.0**-k + 1 for k in (4, 8, 12, 16)),  # type: ignore[misc]
)
# The rest are no functions of a tensor's values alone.
INDICES, SHAPES, WEIGHTS = "other_indices", "other_shapes", "other_weights"
UNSATURATED = "unsaturated"
ROWS, TOUCHED = "more_rows", "touched"
SPECIAL = "special"
# What few elements may be, where the reference looks for what is not finite: its output is finite
# with NaN as well. What comes of an infinite one elsewhere, as of x * (x > 0), is nobody's promise.
INFINITE = (math.inf, -math.inf)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def vary(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Apply `change` to the floating tensors; integers keep their dtype and values."""
    if isinstance(value, torch.Tensor):
        return change(value) if value.is_floating_point() else value
    if isinstance(value, (list, tuple)):
        return type(value)(vary(v, change) for v in value)
    return value


def with_other_numbers(value: Any) -> Any:
    """Plain floating numbers a fifth smaller: a temperature of 1.0 is an argument too."""
    if isinstance(value, float):
        return 0.8 * value
    if isinstance(value, (list, tuple)):
        return type(value)(with_other_numbers(v) for v in value)
    return value


def vary_freely(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """As `vary`, but tensors of two values are left alone."""
    return vary(value, lambda t: t if change is not strided and two_valued(t) else change(t))


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
        if a is b and not _free(a) and not _square(a):
            b = a.flatten().roll(int(torch.randint(0, a.numel() + 1, ()))).view(a.shape)
        if _symmetric(a):
            noise = _noise(a.shape[-1], a)
            return torch.lerp(b, a, share).mul_(factor).mul_(torch.outer(noise, noise))
        if _free(a):
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
    tensors = [t for t in _tensors(one) if not t.is_floating_point()]
    for number, tensor in enumerate(tensors):
        marks = iter([i == number for i in range(len(tensors))])

        def mix(a: torch.Tensor, b: torch.Tensor, marks: Iterator[bool] = marks) -> torch.Tensor:
            marked = not a.is_floating_point() and next(marks)
            return _either(a, b, 0.5) if marked and a.shape == b.shape else a

        yield None if _ordered(tensor) else _map_pairs(one, other, mix)


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
    places, around the end."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype not in INTEGERS or tensor.numel() < 2:
            return tensor
        flat = tensor.flatten().roll(int(torch.randint(0, tensor.numel(), ())) if roll else 0)
        a, b = torch.randint(0, flat.numel(), (2, SWAPS), device=flat.device).tolist()
        for i, j in zip(a, b, strict=True):
            flat[[i, j]] = flat[[j, i]]
        return flat.view(tensor.shape)

    return _map(value, change)


def touchable(args: Any) -> list[bool]:
    """For each tensor whether its elements are drawn one by one: no few values, not symmetric."""
    return [t.is_floating_point() and _free(t) for t in _tensors(args)]


def touched(args: Any, signs: bool, where: list[bool], outliers: bool) -> Any:
    """A few elements of the tensors that may be touched (`where`), at random places, times factors
    of their own: some of them negative with `signs`. With `outliers` most of them are far larger
    than others are, many beyond what exp can take, and one in eight is zero. Very large
    tensors are changed in place."""
    these = iter(where)

    def change(tensor: torch.Tensor) -> torch.Tensor:
        if not next(these):
            return tensor
        places = _few_places(tensor)
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

    return _map(args, change)


def special(args: Any, number: int, values: tuple[float, ...]) -> Any:
    """A few elements of tensor `number`, at random places, are what another tensor of its shape has
    there, or of these `values`; zeros stay. None if it is not dense."""
    tensors = list(_tensors(args))
    tensor = tensors[number]
    if not (tensor.is_floating_point() and _free(tensor)):
        return None
    places = _few_places(tensor)
    flat = tensor.flatten().clone()
    for other in tensors:
        if other is not tensor and other.shape == tensor.shape:
            flat[places] = other.flatten()[places].to(flat.dtype)
    for first, value in enumerate(values):
        flat[places[first :: len(values) + 1]] = value
    changed = flat.masked_fill_(tensor.flatten() == 0, 0.0).view(tensor.shape)
    return _map(args, lambda t: changed if t is tensor else t)


def _few_places(tensor: torch.Tensor) -> torch.Tensor:
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


def reindexed(args: Any) -> Iterator[Any]:
    """Integers in another order, so that each stays in range, booleans drawn anew, and floats of
    two values (masks, labels) in another order, if they are no matrix with a structure; nothing
    where there are none of them."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype is torch.bool:
            return torch.rand(tensor.shape, device=tensor.device) < 0.5
        if _reorderable(tensor):
            order = torch.randperm(tensor.numel(), device=tensor.device)
            return tensor.flatten()[order].view(tensor.shape)
        return tensor

    if any(t.dtype is torch.bool or _reorderable(t) for t in _tensors(args)):
        yield _map(args, change)


def _reorderable(tensor: torch.Tensor) -> bool:
    two = tensor.is_floating_point() and not _square(tensor) and two_valued(tensor)
    return two or tensor.dtype in INTEGERS


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
    """Larger sizes, what is added repeated from anywhere: a sixteenth more of all but small ones,
    if these are not many; an eighth more rows, of every dimension as long as the batch of the first
    tensor, so that square matrices stay square; of all tensors that share its batch size; of the
    first tensor alone, if no other has that size anywhere."""
    tensors = list(_tensors(args))
    if not tensors or not tensors[0].dim() or tensors[0].shape[0] < 2:
        return
    if any(_square(t) and with_zeros(t) for t in tensors):
        return  # a triangle, a band, blocks: repeated rows would not keep to it
    batch = tensors[0].shape[0]
    sizes = {n for t in tensors for n in t.shape}
    chance = {n: torch.rand(()).item() for n in sizes}  # the same for all dimensions of a size

    def grown(tensor: torch.Tensor, dims: list[int], part: int = 8) -> torch.Tensor:
        free = _free(tensor)
        for dim in dims:
            n = tensor.shape[dim]
            more = max(n // part, 1)
            start = int(chance[n] * (n - more + 1))
            added = tensor.narrow(dim, start, more)
            # The very same values once more would tie with the first.
            added = roughened(added.clone()) if added.is_floating_point() and free else added
            tensor = torch.cat([tensor, added], dim)
        return tensor

    if all(sum(n >= PART for n in t.shape) <= 3 for t in tensors):
        yield _map(args, lambda t: grown(t, [i for i, n in enumerate(t.shape) if n >= PART], PART))

    yield _map(args, lambda t: grown(t, [i for i, n in enumerate(t.shape) if n == batch]))
    yield _map(args, lambda t: grown(t, [0]) if t.shape[:1] == (batch,) else t)
    if not any(batch in t.shape for t in tensors[1:]):
        yield _map(args, lambda t: grown(t, [0]) if t is tensors[0] else t)


def reweighed(tensor: torch.Tensor) -> torch.Tensor:
    """Each weight times a factor of its own between 3/4 and 5/4: signs and zeros stay."""
    if not tensor.is_floating_point() or two_valued(tensor):
        return tensor.clone()
    return tensor * (0.75 + 0.5 * torch.rand_like(tensor))


def reweighed_throughout(tensor: torch.Tensor) -> torch.Tensor:
    """As `reweighed`; tensors of one value (zeros, ones) get something between 1/4 and 1/2 added,
    so that what they switch off, or leave as it is, comes to matter."""
    if tensor.is_floating_point() and constant(tensor):
        return tensor + 0.25 * (1 + torch.rand_like(tensor))
    return reweighed(tensor)


def touched_weight(tensor: torch.Tensor) -> torch.Tensor:
    """A few of the weights, at random places, a tenth to a quarter larger or smaller; a mask, which
    may be read as one, stays what it is."""
    if not tensor.is_floating_point() or not tensor.numel() or two_valued(tensor):
        return tensor.clone()
    tensor = tensor.clone(memory_format=torch.contiguous_format)
    places = _few_places(tensor)
    moved = 0.1 + 0.15 * torch.rand(len(places), device=tensor.device)
    factors = torch.where(torch.rand_like(moved) < 0.5, 1 + moved, 1 - moved)
    tensor.view(-1)[places] *= factors.to(tensor.dtype)
    return tensor


# What may be done to the weights, the first that the reference bears.
WEIGHT_CHANGES: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], ...]] = {
    WEIGHTS: (reweighed_throughout, reweighed),
    TOUCHED_WEIGHTS: (touched_weight,),
}


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


def constant(tensor: torch.Tensor) -> bool:
    """Whether it is of one value throughout."""
    return tensor.numel() > 0 and bool((tensor == tensor.flatten()[:1]).all())


def two_valued(tensor: torch.Tensor) -> bool:
    """Whether it is a mask, or labels of two kinds."""
    return _sample(tensor).unique().numel() == 2


def with_zeros(tensor: torch.Tensor) -> bool:
    """Whether zeros may be part of the task: more than there are by chance."""
    sample = _sample(tensor)
    return float((sample == 0).sum()) > 0.01 * sample.numel()


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    """Some of the elements, from all over it: the first row of a triangle has no zeros."""
    flat = tensor.flatten()
    return flat[:: flat.numel() // LOOKED_AT | 1]


def _ordered(tensor: torch.Tensor) -> bool:
    flat = tensor.flatten().int() if tensor.dtype is torch.bool else tensor.flatten()
    return bool((flat[1:] >= flat[:-1]).all())


def _square(tensor: torch.Tensor) -> bool:
    return tensor.dim() > 1 and tensor.shape[-1] == tensor.shape[-2] > 1


def _free(tensor: torch.Tensor) -> bool:
    sample = _sample(tensor)
    sample = sample[sample != 0]
    return 2 * sample.unique().numel() > sample.numel() > 0 and not _symmetric(tensor)


def _symmetric(tensor: torch.Tensor) -> bool:
    return _square(tensor) and torch.equal(tensor, tensor.transpose(-1, -2))


def _definite(tensor: torch.Tensor) -> bool:
    if tensor.dtype not in (torch.float32, torch.float64) or not _symmetric(tensor):
        return False
    return not bool(torch.linalg.cholesky_ex(tensor).info.any())
