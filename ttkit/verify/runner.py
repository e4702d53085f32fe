"""A model on a device: built, run on inputs, its outputs handed over.

The referee times the reference through the same `Runner` as candidates run in, so that both sides
of a pair do the same things in the same order.
"""

from __future__ import annotations

import copy
import ctypes
import linecache
import mmap
import os
import random
import sys
import types
from collections.abc import Iterable
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from ttkit.verify.arena import extent, flatten, tensors_of
from ttkit.verify.structure import constant

RELEASE_BYTES = 4 << 30
# Below MALLOC_MMAP_THRESHOLD_ (ttkit.verify.launcher): a larger block would not lie in the heap.
PAD_BLOCK = 16 << 20
POPULATE_WRITE = 23  # MADV_POPULATE_WRITE of Linux 5.14, which Python's mmap does not name
_libc = ctypes.CDLL(None)


class OutputError(Exception):
    """The output is not of the kind, shape or dtype that the reference returns."""

    def __init__(self, kind: str, text: str):
        super().__init__(text)
        self.kind = kind


def load_module(path: str, name: str) -> types.ModuleType:
    """Execute the file as a module of its own, visible to `inspect` and to Triton."""
    with open(path, encoding="utf-8") as file:
        source = file.read()
    module = types.ModuleType(name)
    module.__file__ = path
    sys.modules[name] = module
    linecache.checkcache(path)
    exec(compile(source, path, "exec"), module.__dict__)
    return module


def seed_all(seed: int) -> None:
    """Seed Python and torch (every device)."""
    random.seed(seed)
    if torch.backends.cuda.is_built():
        torch.manual_seed(seed)
    else:  # or torch would keep a formatted stack of each call for a device that is never there
        torch.default_generator.manual_seed(seed)


def secret_seed() -> int:
    """From the system's generator: no candidate can make the same inputs."""
    return int.from_bytes(os.urandom(7), "little")


def to_device(value: Any, device: str) -> Any:
    """Move tensors in lists and tuples to `device`."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, (list, tuple)):
        return type(value)(to_device(v, device) for v in value)
    return value


def give_back_memory() -> None:
    """What the allocator holds back is missing where others need it, or other sizes are needed."""
    if torch.cuda.memory_reserved() > RELEASE_BYTES:
        torch.cuda.empty_cache()


class Runner:
    """One model on one device: bound inputs, `run`, `deliver`."""

    def __init__(self, model_class: Any, task_module: types.ModuleType, seed: int, device: str):
        self.device = device
        self.cuda = device != "cpu"
        self._made_of, self._seed = (model_class, task_module), seed
        self.model = self._build(seed)
        self.inputs: list[tuple[Any, ...]] = []
        self.outputs: list[Any] = []
        self.handed_out: set[StorageWeakRef] = set()  # see `reuses`
        self.pad: list[torch.Tensor] = []
        self.touched = 0
        # Taken before any candidate code could replace them.
        self._no_grad, self._synchronize = torch.no_grad, torch.cuda.synchronize

    def _build(self, seed: int) -> Any:
        model_class, task_module = self._made_of
        # The inputs of __init__ are declared with the task, not secret, and part of the model.
        seed_all(seed)
        init = task_module.get_init_inputs()
        seed_all(seed)
        with torch.device(self.device):
            if isinstance(init, dict):
                model = model_class(**init)
            else:
                model = model_class(*to_device(init, self.device))
        return model.to(self.device) if isinstance(model, torch.nn.Module) else model

    def twin(self) -> Any:
        """A copy of the model, made anew where it cannot be copied (weights that are computed of
        others, as `torch.nn.utils.weight_norm` does)."""
        try:
            return copy.deepcopy(self.model)
        except RuntimeError:
            twin = self._build(self._seed)
            twin.load_state_dict(self.model.state_dict())
            return twin

    def tables(self) -> set[str]:
        """The buffers of several values that are the same for every seed: part of the code."""
        if not isinstance(self.model, torch.nn.Module):
            return set()
        state = self.model.state_dict()
        buffers = {k: b for k, b in self.model.named_buffers() if k in state and not constant(b)}
        if not buffers:
            return set()
        others = dict(self._build(secret_seed() % 2**31).named_buffers())
        return {k for k, b in buffers.items() if torch.equal(b, others[k])}

    def run(self, slots: list[int]) -> None:
        """Call the model once a slot; the outputs are kept for `deliver`."""
        model, inputs = self.model, self.inputs
        with self._no_grad():
            self.outputs = [model(*inputs[slot]) for slot in slots]
        if self.cuda:
            self._synchronize()

    def forget(self) -> None:
        """Drop the outputs, and give back what the run before was shifted by."""
        self.outputs, self.pad = [], []

    def shift(self, pad: int) -> None:
        """Shift where the next run's buffers will lie by `pad` bytes.

        Which pages large buffers lie on (cache sets), and how they lie to each other (4 KiB
        aliasing), makes a process faster or slower by several percent for as long as it lives. A
        shift drawn for every run turns that bias into noise, which more pairs average out
        (Curtsinger and Berger 2013, Stabilizer).
        """
        if self.cuda:
            return
        whole, rest = divmod(pad, PAD_BLOCK)
        sizes = [PAD_BLOCK] * whole + [rest] * (rest > 0)
        self.pad = [torch.empty(size, dtype=torch.uint8) for size in sizes]
        if pad > self.touched:
            # Pages are met for the first time here and not in a timed run.
            for block in self.pad:
                _populate(block)
                block[:: mmap.PAGESIZE] = 0
            self.touched = pad

    def deliver(
        self, which: int, tree: Any, types_: list[str], targets: list[torch.Tensor]
    ) -> dict[str, Any]:
        """Copy output number `which` into `targets`; raises OutputError when it does not fit."""
        leaves: list[torch.Tensor] = []
        output = self.outputs[which]
        try:
            found = flatten(output, leaves)
        except TypeError as error:
            raise OutputError("output_structure", f"the output contains {error}") from None
        if shape_of(found) != shape_of(tree):
            text = f"it returned {_described(found)}, the reference returns {_described(tree)}"
            raise OutputError("output_structure", text)
        for leaf, target, name in zip(leaves, targets, types_, strict=True):
            _check_leaf(leaf, target, name)
        with self._no_grad():
            for leaf, target in zip(leaves, targets, strict=True):
                target.copy_(leaf)
        if self.cuda:
            self._synchronize()
        return {"strides": [_strides(leaf) for leaf in leaves], "values": values_of(found)}

    def aliases(self) -> list[list[int]]:
        """What the tensors of the first output share memory with."""
        return aliases(tensors_of(self.inputs[0]), tensors_of([self.outputs[0]]))

    def layout(self) -> list[tuple[Any, ...]]:
        """What the caller's tensors are, besides the values that lie in their memory."""
        return [
            (tuple(t.shape), t.stride(), t.data_ptr(), t.requires_grad)
            for inputs in self.inputs
            for t in tensors_of(inputs)
        ]

    def reuses(self) -> bool:
        """Whether the outputs of the last run share memory with each other, or lie where an earlier
        one did and that somebody has kept ever since. To be asked once after every run."""
        try:
            first, *others = outputs = [tensors_of([output]) for output in self.outputs]
        except TypeError:  # one that is not delivered may be anything
            return False
        memory = _memory(outputs)
        kept = {earlier for earlier in self.handed_out if not earlier.expired()}
        self.handed_out = kept | memory
        again = kept & memory
        if again:
            again -= _memory(map(tensors_of, self.inputs))
        return bool(again) or any(any(overlaps(first, other)) for other in others)


def _populate(block: torch.Tensor) -> None:
    """Ask for all pages of a block at once, where the system can: in half the time of as many
    faults."""
    ahead = -block.data_ptr() % mmap.PAGESIZE
    size = max(block.numel() - ahead, 0)
    _libc.madvise(ctypes.c_void_p(block.data_ptr() + ahead), ctypes.c_size_t(size), POPULATE_WRITE)


def _memory(values: Iterable[list[torch.Tensor]]) -> set[StorageWeakRef]:
    """The blocks of memory that tensors lie in, for as long as anybody keeps them."""
    return {StorageWeakRef(t.untyped_storage()) for tensors in values for t in tensors}


def aliases(args: list[torch.Tensor], outputs: list[torch.Tensor]) -> list[list[int]]:
    """For each of `outputs` the numbers of those of `args`, and counted on from these of the
    outputs before it, that it shares memory with."""
    found = overlaps([*args, *outputs], outputs)
    return [[n for n in shared if n < len(args) + i] for i, shared in enumerate(found)]


def overlaps(args: list[torch.Tensor], outputs: list[torch.Tensor]) -> list[list[int]]:
    """For each of `outputs` the numbers of those of `args` that it shares memory with."""
    spans = [_span(t) for t in args]
    return [
        [i for i, (low, high) in enumerate(spans) if max(low, start) < min(high, end)]
        for start, end in map(_span, outputs)
    ]


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    # Its own part of the storage: all inputs lie in one.
    size = extent(list(tensor.shape), list(tensor.stride())) * tensor.element_size()
    return tensor.data_ptr(), tensor.data_ptr() + size


def shape_of(tree: Any) -> Any:
    """The tree with the values of its numbers left out (their types stay)."""
    if "v" in tree:
        return type(tree["v"]).__name__
    if "t" in tree:
        return "t"
    return {kind: [shape_of(item) for item in items] for kind, items in tree.items()}


def _described(tree: Any) -> str:
    """A tree in words."""
    if "t" in tree:
        return "a tensor"
    if "v" in tree:
        return "None" if tree["v"] is None else f"a plain {type(tree['v']).__name__}"
    ((kind, items),) = tree.items()
    inside = ", ".join(map(_described, items[:4])) + ", ..." * (len(items) > 4)
    return f"a {'list' if kind == 'l' else 'tuple'} of {len(items)} ({inside})"


def values_of(tree: Any) -> list[Any]:
    """The plain values in the tree, in order."""
    if "v" in tree:
        return [tree["v"]]
    if "t" in tree:
        return []
    return [value for items in tree.values() for item in items for value in values_of(item)]


def _strides(tensor: torch.Tensor) -> list[int]:
    """Strides, -1 where they mean nothing."""
    return [step if n > 1 else -1 for n, step in zip(tensor.shape, tensor.stride(), strict=True)]


def kind_of(tensor: torch.Tensor) -> str:
    """The type of an output tensor, and what is left to compute for who reads it."""
    marks = {"negated": tensor.is_neg(), "conjugated": tensor.is_conj()}
    kind = "Tensor" if type(tensor) is torch.nn.Parameter else type(tensor).__name__
    return " ".join([kind, *(mark for mark, there in marks.items() if there)])


def _check_leaf(leaf: torch.Tensor, target: torch.Tensor, name: str) -> None:
    """`name` is the `kind_of` the reference's; a candidate may leave less to do."""
    if leaf.layout is not torch.strided or leaf.device.type != target.device.type:
        raise OutputError("output_type", f"the output is a {leaf.layout} tensor on {leaf.device}")
    plain = type(leaf) in (torch.Tensor, torch.nn.Parameter)
    (kind, *marks), (expected, *allowed) = kind_of(leaf).split(), name.split()
    if not plain or kind != expected or not set(marks) <= set(allowed):
        text = f"the output is a {kind_of(leaf)}, the reference's a {name}"
        raise OutputError("output_type", text)
    if leaf.dtype != target.dtype:
        raise OutputError(
            "output_dtype", f"the output is {leaf.dtype}, the reference's is {target.dtype}"
        )
    if leaf.shape != target.shape:
        raise OutputError(
            "output_shape",
            f"the output has shape {list(leaf.shape)}, the reference's has {list(target.shape)}",
        )
