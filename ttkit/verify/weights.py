"""Where a model keeps the reference's weights, whatever it calls them."""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Mapping
from typing import Any

import torch

from ttkit.verify.structure import constant

# Objects that are looked through for a model's weights.
OBJECTS = 10_000


def find_places(
    model: Any, weights: Mapping[str, torch.Tensor], device: str
) -> tuple[dict[str, list[torch.Tensor]], list[str]]:
    """The model's tensors for the reference's `weights`, by their names there, and unclear ones.

    Where names do not fit: by value, since both models were built from one seed. Of as many equal
    ones on both sides (biases of zeros) the first is for the first; a single weight has all its
    copies. What else is equal is unclear, if it is of one value throughout.
    """
    own: dict[str, Any] = {}
    with contextlib.suppress(AttributeError, TypeError):
        own = model.state_dict()
    if all(name in own and own[name].shape == value.shape for name, value in weights.items()):
        return {name: [own[name]] for name in weights}, []
    found: dict[str, list[torch.Tensor]] = {}
    unclear: list[str] = []
    tensors = tensors_within(model)
    alike: dict[str, list[str]] = {}
    values = {name: value.to(device) for name, value in weights.items()}
    for name, value in values.items():
        first = next((n for n in values if _equal(values[n], value)), name)
        alike.setdefault(first, []).append(name)
    for first, names in alike.items():
        value = values[first]
        equal = [t for t in tensors if _equal(t, value)]
        # One that is stored the other way round is a view for what is stored.
        equal = equal or [t.t() for t in tensors if t.dim() == 2 and _equal(t.t(), value)]
        if len(names) == len(equal):
            found |= {name: [tensor] for name, tensor in zip(names, equal, strict=True)}
        elif equal and constant(value):
            unclear += names
        elif len(names) == 1 and equal:
            found[names[0]] = equal
    return found, unclear


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors hold the same, one maybe in another shape (constants are everywhere)."""
    if one.dtype != other.dtype or one.numel() != other.numel():
        return False
    if one.shape == other.shape:
        return torch.equal(one, other)
    one, other = one.flatten(), other.flatten()
    return torch.equal(one, other) and not constant(one)


def tensors_within(value: Any) -> list[torch.Tensor]:
    """The dense tensors that an object's attributes, modules, lists, dictionaries and functions
    hold, each once, in the order of their definition."""
    found: dict[int, torch.Tensor] = {}
    seen: dict[int, Any] = {}
    waiting = [value]
    while waiting and len(seen) < OBJECTS:
        item = waiting.pop()
        if id(item) in seen:
            continue
        seen[id(item)] = item
        inside: list[Any] = []
        if isinstance(item, torch.Tensor):
            if item.layout is torch.strided:
                found[id(item)] = item
        elif isinstance(item, dict):
            inside = list(item.values())
        elif isinstance(item, (list, tuple)):
            inside = list(item)
        elif isinstance(item, torch.jit.ScriptModule):
            inside = [*item.parameters(), *item.buffers()]
        elif isinstance(item, functools.partial):
            inside = [item.func, item.args, item.keywords]
        elif isinstance(item, types.MethodType):
            inside = [item.__self__]
        elif isinstance(item, types.FunctionType):
            inside = [_cell(cell) for cell in item.__closure__ or ()]
        elif not isinstance(item, (type, types.ModuleType)):
            slots = getattr(type(item), "__slots__", ())
            names = (slots,) if isinstance(slots, str) else slots
            inside = [*getattr(item, "__dict__", {}).values()]
            inside += [getattr(item, name, None) for name in names if isinstance(name, str)]
        waiting += reversed(inside)
    return list(found.values())


def _cell(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None
