"""Inputs and weights unlike the declared ones: what a right program must bear as well.

A task fixes its sizes and the distribution of its inputs; a program that is right only there is not
the same function. Each variation keeps what the task's own inputs may promise: zeros stay zeros and
equal elements equal (triangular, diagonal, symmetric and sparse matrices), and tensors of two
values (masks, labels of plus and minus one) keep these, at other places at most. Where the
reference itself fails or is not finite on a variation, that variation is left out.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch

from ttkit.verify.arena import tensors_of
from ttkit.verify.mixing import LARGEST, roughened
from ttkit.verify.protocol import TOUCHED_WEIGHTS
from ttkit.verify.structure import (
    INTEGERS,
    constant,
    definite,
    free,
    map_tensors,
    square,
    symmetric,
    two_valued,
    with_zeros,
)

SHIFT = 2.0
# A sixteenth more of a size, in three dimensions at most: there is room for a quarter more in all.
PART = 16
SHARES = (0.01, 0.5, 0.99)  # of true ones


def unchanged(value: Any) -> Any:
    """What is declared."""
    return value


def negated(tensor: torch.Tensor) -> torch.Tensor:
    """With the other sign; positive definite matrices as they are."""
    return tensor if definite(tensor) else -tensor


def scaled(tensor: torch.Tensor) -> torch.Tensor:
    """4 times; the first and the last number, which loops are most likely to miss, far more."""
    larger = four_times(tensor)
    if tensor.numel() > 1:
        for end in (0, -1):
            larger[(end,) * tensor.dim()] *= 256
    return larger


def four_times(tensor: torch.Tensor) -> torch.Tensor:
    return tensor * 4


def large(tensor: torch.Tensor) -> torch.Tensor:
    """32 times, and so far that the largest is beyond what exp can take in single precision."""
    most = float(tensor.abs().max()) if tensor.numel() else 0.0
    return tensor * max(32.0, LARGEST / most if most > LARGEST / 1024 else 32.0)


def less_large(tensor: torch.Tensor) -> torch.Tensor:
    return tensor * 32


def tiny(tensor: torch.Tensor) -> torch.Tensor:
    """So small that what is added to keep a divisor from zero may be felt."""
    return tensor * 2.0**-20


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
    if constant(tensor):
        return tensor + SHIFT * (0.25 + 0.75 * torch.rand_like(tensor))
    if with_zeros(tensor) or symmetric(tensor):
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
    "tiny": tiny,
    "near_one": near_one,
    "shifted": shifted,
    "noncontiguous": strided,
}
# What takes their place where the reference does not bear them.
MILDER = {"scaled": four_times, "large": less_large}
# Where an input makes no difference as declared (a sum of many that saturates what follows, a
# product that vanishes), one of these may bring it to where it does.
REGIMES: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (
    *(lambda t, k=k: t * 2.0**-k for k in (4, 8, 12, 16, 20)),  # type: ignore[misc]
    *(lambda t, c=c: t - c for c in (4.0, 8.0, 12.0, 16.0, 24.0, -4.0, -8.0, -16.0)),  # type: ignore[misc]
    *(lambda t, k=k: t * 2.0**-k + 1 for k in (4, 8, 12, 16)),  # type: ignore[misc]
)
# The rest are no functions of a tensor's values alone.
INDICES, SHAPES, WEIGHTS = "other_indices", "other_shapes", "other_weights"
UNEVEN, UNSATURATED = "uneven", "unsaturated"
ROWS, TOUCHED = "more_rows", "touched"
SPECIAL = "special"
# Where roundings of a long sum are no longer independent: beside far larger terms, or where all are
# nearly equal, what is lost of each is lost to the same side.
BIASED = frozenset({"scaled", "large", "near_one", UNEVEN, TOUCHED})


def vary(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Apply `change` to the floating tensors; integers keep their dtype and values."""
    if isinstance(value, torch.Tensor):
        return change(value) if value.is_floating_point() else value
    if isinstance(value, (list, tuple)):
        return type(value)(vary(v, change) for v in value)
    return value


def with_other_numbers(value: Any) -> Any:
    """Plain floating numbers a fifth smaller, or 0.2: a temperature of 1.0 is an argument too."""
    if isinstance(value, float):
        return 0.8 * value or 0.2
    if isinstance(value, (list, tuple)):
        return type(value)(with_other_numbers(v) for v in value)
    return value


def vary_freely(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """As `vary`, but tensors of two values are left alone."""
    return vary(value, lambda t: t if change is not strided and two_valued(t) else change(t))


def reindexed(args: Any) -> Iterator[Any]:
    """Integers in another order, so that each stays in range, booleans drawn anew, and floats of
    two values (masks, labels) in another order, if they are no matrix with a structure; nothing
    where there are none of them. Lines of booleans are nearly all true, nearly all false or mixed,
    if the reference bears that."""

    def change(tensor: torch.Tensor, shares: tuple[float, ...]) -> torch.Tensor:
        if tensor.dtype is torch.bool:
            lines = (*tensor.shape[:-1], 1) if tensor.dim() > 1 else (1,)
            which = torch.randint(0, len(shares), lines, device=tensor.device)
            share = torch.tensor(shares, device=tensor.device)[which]
            return torch.rand(tensor.shape, device=tensor.device) < share
        if _reorderable(tensor):
            order = torch.randperm(tensor.numel(), device=tensor.device)
            return tensor.flatten()[order].view(tensor.shape)
        return tensor

    masks = any(t.dtype is torch.bool for t in tensors_of(args))
    if not masks and not any(map(_reorderable, tensors_of(args))):
        return
    for shares in (SHARES, (0.5,)) if masks else ((0.5,),):
        yield map_tensors(args, lambda t, shares=shares: change(t, shares))  # type: ignore[misc]


def _reorderable(tensor: torch.Tensor) -> bool:
    two = tensor.is_floating_point() and not square(tensor) and two_valued(tensor)
    return two or tensor.dtype in INTEGERS


def reshaped(args: Any, fixed: Collection[int] = ()) -> Iterator[Any]:
    """The inputs with other sizes, the likeliest to be taken by the reference first.

    Every size renamed alike, so that products still fit and square matrices stay square, but for
    those that are `fixed` and no batch sizes; then all but the second, the channels that
    convolutions have weights for; then the batch size only, of all tensors that share it; then that
    of the first tensor alone, if no other has that size anywhere. Sizes that wide tiles do not
    divide come first.
    """
    tensors = tensors_of(args)
    if not tensors:
        return
    batch = tensors[0].shape[0] if tensors[0].dim() else 1
    for smaller in (_uneven, _smaller):
        for kept in ((), (1,)) if any(t.dim() > 2 for t in tensors) else ((),):

            def cut(
                t: torch.Tensor,
                by: Callable[[int], int] = smaller,
                kept: tuple[int, ...] = kept,  # dimensions
            ) -> list[int]:
                stays = [i in kept or _is_fixed(t, i, fixed, batch) for i in range(t.dim())]
                return [n if stay else by(n) for n, stay in zip(t.shape, stays, strict=True)]

            if any(cut(t) != list(t.shape) for t in tensors):
                yield _cut(args, cut)
    if batch > 1:
        rest = _uneven(batch)
        yield _cut(args, lambda t: [rest if n == batch else n for n in t.shape[:1]])
        if not any(batch in t.shape for t in tensors[1:]):
            yield _cut(args, lambda t: [rest] if t is tensors[0] else [])


def _is_fixed(tensor: torch.Tensor, dim: int, fixed: Collection[int], batch: int) -> bool:
    n = tensor.shape[dim]
    return n in fixed and not (dim == 0 and n == batch)


def enlarged(args: Any, fixed: Collection[int] = ()) -> Iterator[Any]:
    """Larger sizes, what is added repeated from anywhere: a sixteenth more of all but small and
    `fixed` ones, if these are not many; an eighth more rows, of every dimension as long as the
    batch of the first tensor, so that square matrices stay square; of all tensors that share its
    batch size; of the first tensor alone, if no other has that size anywhere. Where nothing else
    is as long, rows come in odd numbers."""
    tensors = tensors_of(args)
    if not _enlargeable(tensors):
        return
    whole = enlarged_throughout(args, fixed)
    if whole is not None:
        yield whole
    batch = tensors[0].shape[0]
    start = torch.rand(()).item()
    more = _more(batch, 8, odd=not any(batch in t.shape[1:] for t in tensors))

    def grown(tensor: torch.Tensor, dims: list[int]) -> torch.Tensor:
        return _grown(tensor, [(dim, more) for dim in dims], [start] * len(dims))

    def rows(tensor: torch.Tensor) -> list[int]:
        free_ones = (i for i in range(tensor.dim()) if not _is_fixed(tensor, i, fixed, batch))
        return [i for i in free_ones if tensor.shape[i] == batch]

    yield map_tensors(args, lambda t: grown(t, rows(t)))
    yield map_tensors(args, lambda t: grown(t, [0]) if t.shape[:1] == (batch,) else t)
    if not any(batch in t.shape for t in tensors[1:]):
        yield map_tensors(args, lambda t: grown(t, [0]) if t is tensors[0] else t)


def enlarged_throughout(args: Any, fixed: Collection[int] = (), odd: bool = False) -> Any:
    """All sizes but small and `fixed` ones a sixteenth larger, or a little less and `odd`: what
    takes them by twos or fours leaves one over. None if that is none, or more than three of a
    tensor."""
    tensors = tensors_of(args)
    if not _enlargeable(tensors):
        return None
    batch = tensors[0].shape[0]
    start = {n: torch.rand(()).item() for t in tensors for n in t.shape}

    def sizes(tensor: torch.Tensor) -> list[int]:
        shape = enumerate(tensor.shape)
        return [i for i, n in shape if n >= PART and not _is_fixed(tensor, i, fixed, batch)]

    def grown(tensor: torch.Tensor) -> torch.Tensor:
        dims = [(dim, _more(tensor.shape[dim], PART, odd)) for dim in sizes(tensor)]
        return _grown(tensor, dims, [start[tensor.shape[dim]] for dim, _ in dims])

    if not 0 < max(len(sizes(t)) for t in tensors) <= 3:
        return None
    return map_tensors(args, grown)


def _enlargeable(tensors: list[torch.Tensor]) -> bool:
    """Not a triangle, a band, blocks: repeated rows would not keep to it."""
    if not tensors or not tensors[0].dim() or tensors[0].shape[0] < 2:
        return False
    return not any(square(t) and with_zeros(t) for t in tensors)


def _more(size: int, part: int, odd: bool) -> int:
    """A part of `size`, if possible so much that it makes an `odd` number of it."""
    more = size // part
    return max(more - (odd and (size + more) % 2 == 0), 1)


def _grown(tensor: torch.Tensor, dims: list[tuple[int, int]], starts: list[float]) -> torch.Tensor:
    """Dimensions that are longer by so much of what stands somewhere in them (`starts`, shares of
    their length). What is symmetric stays so, if both its dimensions grow from one place."""
    dense = tensor.is_floating_point() and free(tensor)
    for (dim, more), start in zip(dims, starts, strict=True):
        at = int(start * (tensor.shape[dim] - more + 1))
        added = tensor.narrow(dim, at, more)
        # The very same values once more would tie with the first.
        tensor = torch.cat([tensor, roughened(added.clone()) if dense else added], dim)
    return tensor


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


def has_places(tensor: torch.Tensor) -> bool:
    """Whether single weights of it can be touched: it is no mask, and not of integers."""
    return tensor.is_floating_point() and tensor.numel() > 0 and not two_valued(tensor)


def touched_weight(tensor: torch.Tensor) -> torch.Tensor:
    """One of the weights, at a random place, a tenth to a quarter larger or smaller, so that who
    looks at a part of them most likely misses it; a mask, which may be read as one, stays."""
    if not has_places(tensor):
        return tensor.clone()
    tensor = tensor.clone(memory_format=torch.contiguous_format)
    moved = random.choice((-1, 1)) * random.uniform(0.1, 0.25)
    tensor.view(-1)[random.randrange(tensor.numel())] *= 1 + moved
    return tensor


# What may be done to the weights, the first that the reference bears.
WEIGHT_CHANGES: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], ...]] = {
    WEIGHTS: (reweighed_throughout, reweighed),
    TOUCHED_WEIGHTS: (touched_weight,),
}


def _smaller(size: int) -> int:
    """Three quarters, so that most of what divided the old size divides the new one."""
    return size - max(size // 4, 1) if size > 1 else size


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
    wanted = [sizes(t) for t in tensors_of(value)]
    bound = min((n for new in wanted for n in new if n > 1), default=1)

    def cut(tensor: torch.Tensor) -> torch.Tensor:
        for dim, size in enumerate(sizes(tensor)):
            tensor = tensor.narrow(dim, 0, size)
        if tensor.dtype in INTEGERS:
            tensor = tensor.remainder(bound)
        return tensor.clone(memory_format=torch.contiguous_format)

    return map_tensors(value, cut)
