"""What a tensor among the inputs is by the look of its elements: a mask, a triangle, noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

LOOKED_AT = 4096  # elements that decide what kind of tensor it is
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def map_tensors(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """`value` with every tensor in its lists and tuples changed."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, (list, tuple)):
        return type(value)(map_tensors(v, change) for v in value)
    return value


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


def ordered(tensor: torch.Tensor) -> bool:
    """Whether no element is less than the one before it: offsets, segments."""
    flat = tensor.flatten().int() if tensor.dtype is torch.bool else tensor.flatten()
    return bool((flat[1:] >= flat[:-1]).all())


def square(tensor: torch.Tensor) -> bool:
    """Whether its last two dimensions are those of a square matrix."""
    return tensor.dim() > 1 and tensor.shape[-1] == tensor.shape[-2] > 1


def free(tensor: torch.Tensor) -> bool:
    """Whether its elements, zeros aside, are drawn one by one: no few values, not symmetric."""
    sample = _sample(tensor)
    sample = sample[sample != 0]
    return 2 * sample.unique().numel() > sample.numel() > 0 and not symmetric(tensor)


def symmetric(tensor: torch.Tensor) -> bool:
    """Whether it is a symmetric matrix, or matrices."""
    return square(tensor) and torch.equal(tensor, tensor.transpose(-1, -2))


def definite(tensor: torch.Tensor) -> bool:
    """Whether it is a positive definite matrix, or matrices."""
    if tensor.dtype not in (torch.float32, torch.float64) or not symmetric(tensor):
        return False
    return not bool(torch.linalg.cholesky_ex(tensor).info.any())
