"""The GPU's libraries for products and for convolutions, loaded before they are needed.

The first call that needs one waits for it: 0.1 to 0.15 s in every process (measured on an H100).
Where processes load side by side, before their first run, that is next to nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

PRODUCT, CONVOLUTION = "product", "convolution"
OPERATIONS = {
    PRODUCT: {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::mv", "aten::dot"},
    CONVOLUTION: {"aten::_convolution", "aten::convolution"},
}


def used(call: Callable[[], object]) -> list[str]:
    """The names of the libraries that `call` needs, by the operations that it comes down to."""
    with torch.autograd.profiler.profile() as profile:
        call()
    names = {event.name for event in profile.function_events}
    return [library for library, operations in OPERATIONS.items() if names & operations]


def load(names: list[str], device: str) -> None:
    """Load the libraries of these names, by the smallest call of each."""
    with torch.no_grad():
        if PRODUCT in names:
            one = torch.ones(8, 8, device=device)
            one @ one
        if CONVOLUTION in names:
            torch.nn.functional.conv2d(
                torch.ones(1, 4, 8, 8, device=device), torch.ones(4, 4, 1, 1, device=device)
            )
    if names:
        torch.cuda.synchronize(device)
