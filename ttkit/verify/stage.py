"""What the sides of a pair find in the memory that they share with the referee, turn by turn.

Before a turn its inputs are written anew, the place of its output is poisoned and the caches are
flushed; between the run and the delivery the inputs are covered, and after it the output is taken.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import torch

from ttkit.verify.arena import flatten, place, place_contiguous, spanned_bytes, tensors_of
from ttkit.verify.cases import Case
from ttkit.verify.shared import PAGE, Shared, Taken


class Stage:
    """The memory of both sides, by whether a side is trusted, and whose turn it is."""

    turn: Shared  # that of the side whose turn it is
    staged: list[tuple[Any, dict[str, Any]]]  # its inputs, and where they lie
    filled: int  # bytes of its inputs that are in use

    def __init__(self, device: str, sides: dict[bool, Shared], flush_bytes: int):
        self.sides, self.cuda = sides, device != "cpu"
        self.size = sides[False].inputs.size  # bytes of the inputs of either
        if flush_bytes and self.cuda:
            flush_bytes = 2 * torch.cuda.get_device_properties(device).L2_cache_size
        self._flush_buffer = torch.ones(flush_bytes // 4, device=device) if flush_bytes else None
        # What was staged and is still to be looked at, and whether the candidate changed it.
        self.watched: list[tuple[Any, dict[str, Any]]] = []
        self.mutated = False
        # What each side delivered, as `take` found it, by whether it is trusted.
        self.taken: dict[bool, list[Taken]] = {}

    def begin(self, trusted: bool) -> None:
        """From here on it is this side's turn."""
        self.turn = self.sides[trusted]

    def clear(self) -> None:
        """Let go of the inputs of the last turn before others take memory."""
        self.staged, self.watched = [], []

    def put(self, staged: Iterable[tuple[Any, dict[str, Any]]]) -> None:
        """Write the inputs of whose turn it is; a candidate has to leave them as they are."""
        self.staged = list(staged)
        for args, described in self.staged:
            for tensor, spec in zip(tensors_of(args), described["tensors"], strict=True):
                self.turn.inputs.view(spec).copy_(tensor)
        self.watched = self.staged

    def poison(self, case: Case) -> None:
        """Whoever delivers nothing delivers no values that another has left."""
        self.turn.poison_output(place_contiguous(case.outputs)[1])
        self.synchronize()

    def flush(self) -> float:
        """Displace the caches; seconds it took, on CUDA with the device idle before and after."""
        if self._flush_buffer is None:
            return 0.0
        self.synchronize()
        started = time.perf_counter()
        self._flush_buffer.add_(1.0)
        self.synchronize()
        return time.perf_counter() - started

    def look_for_changes(self) -> None:
        """Note whether the candidate, if it was the one to run, left its inputs as they were.

        Both sides are looked at: what is read again lies in nearer caches, which made one of two
        equal programs the faster by 2 % of a call of a millisecond.
        """
        if self.watched:
            held = all(
                self.turn.holds(tensor, spec)
                for args, described in self.watched
                for tensor, spec in zip(tensors_of(args), described["tensors"], strict=True)
            )
            if self.turn is self.sides[False]:
                self.mutated = not held
        self.watched = []

    def cover(self, case: Case) -> None:
        """Between a run and its delivery: poison some of every page of the inputs.

        Then an output that is a view of an input, or is yet to be computed from one, is wrong.
        """
        self.look_for_changes()
        inputs = range(len(self.staged[0][1]["tensors"]))
        aliased = {n for shared in case.aliases for n in shared if n in inputs}
        if not aliased:
            self.turn.cover_inputs(0, self.filled + -self.filled % PAGE)
        else:  # but those that the reference's output may be a part of
            for _, described in self.staged:
                for number, spec in enumerate(described["tensors"]):
                    if number not in aliased:
                        self.turn.cover_inputs(spec["offset"], spanned_bytes(spec))
        self.synchronize()

    def take(self, case: Case) -> None:
        """After a delivery, while nobody else runs: keep what was delivered."""
        trusted = self.turn is self.sides[True]
        self.taken[trusted] = [Taken(tensor) for tensor in self.delivered(case, trusted)]
        self.synchronize()

    def delivered(self, case: Case, trusted: bool) -> list[torch.Tensor]:
        """The place of the outputs of `case` in the memory of one side."""
        output = self.sides[trusted].output
        return [output.view(spec) for spec in place_contiguous(case.outputs)[0]]

    def write_weights(self, values: dict[str, torch.Tensor] | None = None) -> None:
        """The weights that the task's model was built with, or others, for both sides."""
        for shared in self.sides.values():
            shared.write_weights(values)

    def describe_inputs(self, args: Any, start: int) -> dict[str, Any]:
        """Where inputs lie that begin at byte `start`. Raises RuntimeError if there is no room."""
        tensors: list[torch.Tensor] = []
        tree = flatten(list(args), tensors)
        specs, end = place(tensors, start)
        if end > self.size:
            raise RuntimeError("the inputs grew beyond the room made for them")
        return {"tree": tree, "tensors": specs}

    def describe_output(self, case: Case) -> dict[str, Any]:
        """What the output of `case` is like, and where it lies when it is delivered."""
        return {
            "tree": case.tree,
            "types": list(case.types),
            "tensors": place_contiguous(case.outputs)[0],
        }

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.cuda:
            torch.cuda.synchronize()
