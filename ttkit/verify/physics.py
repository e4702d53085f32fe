"""No candidate can be faster than its inputs can be read: a lower bound for any algorithm.

Only bytes count that every correct algorithm must touch: input elements on which the output really
depends (a non-zero derivative, found by one backward pass of the float64 reference; integers and
elements with derivative zero are left out, which only lowers the bound). The reference's own FLOPs
and temporaries do not count, since a better algorithm may need far fewer: A @ (B @ v) reads what
(A @ B) @ v reads and computes a fraction. Outputs do not count either: a broadcast result may be
returned as a view of a few bytes, and one that is a view of an input is made without reading any.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from ttkit.verify.arena import tensors_of
from ttkit.verify.cases import size_of
from ttkit.verify.draws import Draws
from ttkit.verify.reference import Reference
from ttkit.verify.runner import aliases

SAFETY = 2.0


def measure_ceiling(device: str) -> dict[str, float]:
    """Read rates of this device in bytes a millisecond: `cached` and, past the cache, `memory`."""
    if device == "cpu":
        rate = max(_rate(torch.ones(1 << n), 20) for n in (14, 16, 18))
        return {"cached": rate, "memory": rate, "cache_bytes": 0.0}
    cache = float(torch.cuda.get_device_properties(device).L2_cache_size)
    small = _rate(torch.ones(int(cache) // 16, device=device), 50)
    large = _rate(torch.ones(1 << 28, device=device), 10)
    return {"cached": max(small, large), "memory": large, "cache_bytes": cache}


def _rate(tensor: torch.Tensor, repeats: int) -> float:
    best = float("inf")
    out = torch.empty_like(tensor)
    for _ in range(repeats):
        _synchronize(tensor)
        started = time.perf_counter()
        torch.mul(tensor, 2.0, out=out)
        _synchronize(tensor)
        best = min(best, time.perf_counter() - started)
    return 2 * tensor.numel() * tensor.element_size() / (best * 1e3)


def _synchronize(tensor: torch.Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()


def limit_ms(draws: Draws, args: Any, ceiling: dict[str, float]) -> float:
    """The least time, in ms, in which one call can read what the reference's output depends on.

    Of large inputs the share that counts is found on a cut-down form; without one there is no
    limit, since a backward pass in float64 takes several times their memory.
    """
    looked_at = draws.manageable(args)
    if looked_at is None:
        return 0.0
    needed = needed_bytes(draws.reference, looked_at) * size_of(args) / max(size_of(looked_at), 1)
    rate = ceiling["memory"] if needed > 2 * ceiling["cache_bytes"] else ceiling["cached"]
    return needed / (rate * SAFETY)


def needed_bytes(reference: Reference, args: Any) -> int:
    """Bytes of the inputs that the output of the float64 reference depends on, at least."""
    sizes = [t.element_size() for t in tensors_of(args) if t.is_floating_point()]
    try:
        leaves, found = reference.differentiable(args)
        views = aliases(leaves, found)
        outputs = [t for t, shares in zip(found, views, strict=True) if not shares]
        if not outputs or not leaves:
            return 0
        # Random weights, so that derivatives of different outputs do not cancel.
        total = torch.stack([(t * torch.rand_like(t)).sum() for t in outputs]).sum()
        gradients = torch.autograd.grad(total, leaves, allow_unused=True)
    except (RuntimeError, TypeError, NotImplementedError):
        return 0
    return sum(
        size * int(torch.count_nonzero(g))
        for size, g in zip(sizes, gradients, strict=True)
        if g is not None
    )
