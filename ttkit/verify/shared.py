"""The memory that a referee shares with the two sides of a pair."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from ttkit.verify.arena import Arena, place
from ttkit.verify.cases import LARGE_BYTES, same_bits
from ttkit.verify.runner import secret_seed

PAGE, POISON = 4096, 16


class Weights:
    """The reference's weights as they were built, and where each lies in the shared memory."""

    def __init__(self, model: Any):
        state = model.state_dict() if isinstance(model, torch.nn.Module) else {}
        specs, self.size = place(list(state.values()), 0)
        self.own = {name: value.clone() for name, value in state.items()}
        self.specs = dict(zip(state, specs, strict=True))


@dataclass
class Shared:
    """The memory that one side of a pair shares with the referee.

    Each side has its own, or the candidate could write what the reference reads. Only on CUDA,
    where an allocation cannot be taken apart and whoever waits has nothing running, the inputs of
    both lie in one place.
    """

    inputs: Arena
    output: Arena
    weights: Arena
    built: Weights

    @property
    def fds(self) -> list[int]:
        return [a.fd for a in (self.inputs, self.output, self.weights) if a.fd >= 0]

    def describe(self) -> dict[str, Any]:
        """What the other process needs to find it, besides the descriptors."""
        return {
            "input_size": self.inputs.size,
            "input_handle": self.inputs.handle,
            "output_size": self.output.size,
            "output_handle": self.output.handle,
            "weights_size": self.weights.size,
        }

    def write_weights(self, values: dict[str, torch.Tensor] | None = None) -> None:
        """The values that the weights were built with, or others."""
        for name, value in (self.built.own if values is None else values).items():
            self.weights.view(self.built.specs[name]).copy_(value)

    def wipe(self) -> None:
        """Leave it as if nobody had ever used it, the weights written again.

        So no candidate meets what an earlier one could have altered, or anything else it left.
        """
        for arena in (self.inputs, self.output, self.weights):
            arena.base.fill_(255)
        self.write_weights()

    def poison_output(self, size: int) -> None:
        """Every byte of the first `size` 0xFF: NaN in all floating types, -1 in signed integers."""
        self.output.base[:size].fill_(255)

    def cover_inputs(self, start: int, size: int) -> None:
        """Poison some of every page of a part of the inputs, at a secret place in it."""
        memory = self.inputs.base[start:][:size]
        place = secret_seed() % (PAGE // POISON) * POISON
        pages = memory[: len(memory) // PAGE * PAGE].view(-1, PAGE)
        pages[:, place : place + POISON] = 255
        memory[:POISON] = 255

    def holds(self, tensor: torch.Tensor, spec: dict[str, Any]) -> bool:
        """Whether an input is still this tensor; of a large one a random part counts."""
        there = self.inputs.view(spec)
        part = random_part(tensor)
        if part is not None and tensor.is_contiguous():
            there, tensor = (t.view(-1)[part] for t in (there, tensor))
        return same_bits(there, tensor)


def share(device: str, input_size: int, output_size: int, weights: Weights) -> dict[bool, Shared]:
    """Memory for both sides, by whether the side is trusted."""
    shared: dict[bool, Shared] = {}
    inputs = None
    for trusted in (False, True):
        if inputs is None or device == "cpu":
            inputs = Arena(input_size, device)
        output = Arena(output_size, device)
        shared[trusted] = Shared(inputs, output, Arena(max(weights.size, 1), "cpu"), weights)
        shared[trusted].write_weights()
    return shared


class Taken:
    """A tensor as it was delivered. Of a large one there is no copy, only of a random part: where
    that is another by now, `tensor` is nothing but NaN."""

    def __init__(self, tensor: torch.Tensor):
        self._part = random_part(tensor)
        self.whole = self._part is None
        self._tensor = tensor.clone() if self._part is None else tensor
        self._kept = None if self._part is None else tensor.view(-1)[self._part].clone()

    @property
    def tensor(self) -> torch.Tensor:
        if self._kept is not None and not same_bits(self._tensor.view(-1)[self._part], self._kept):
            self._tensor.fill_(math.nan if self._tensor.is_floating_point() else -1)
        return self._tensor


def random_part(tensor: torch.Tensor) -> slice | None:
    """Where a secret part of a large tensor lies among its elements; None for any other."""
    part = LARGE_BYTES // tensor.element_size()
    if tensor.numel() <= part:
        return None
    start = secret_seed() % (tensor.numel() - part)
    return slice(start, start + part)
