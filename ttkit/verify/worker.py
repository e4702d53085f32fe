"""What runs in a candidate's process: load the module, run it, hand its output over.

The referee times the reference through the same `Runner`, so that both sides of a pair do the same
things in the same order. Nothing here decides anything: a candidate can rewrite all of this in its
own process and still only change what it delivers and when.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import functools
import linecache
import os
import random
import sys
import traceback
import types
from typing import Any

import torch

from ttkit.verify import watch
from ttkit.verify.arena import Arena, extent, flatten, tensors_of, unflatten
from ttkit.verify.channel import BadMessage, Channel, ChannelClosed
from ttkit.verify.variations import constant

TEXT = 2000
RELEASE_BYTES = 4 << 30
# Objects that are looked through for a model's weights.
OBJECTS = 10_000


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
    torch.manual_seed(seed)


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
        self._made_of = model_class, task_module, seed
        self.model = self._build()
        self.inputs: list[tuple[Any, ...]] = []
        self.outputs: list[Any] = []
        self.pad: torch.Tensor | None = None
        self.touched = 0
        # Taken before any candidate code could replace them.
        self._no_grad, self._synchronize = torch.no_grad, torch.cuda.synchronize

    def _build(self) -> Any:
        model_class, task_module, seed = self._made_of
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
            twin = self._build()
            twin.load_state_dict(self.model.state_dict())
            return twin

    def run(self, slots: list[int]) -> None:
        """Call the model once a slot; the outputs are kept for `deliver`."""
        model, inputs = self.model, self.inputs
        with self._no_grad():
            self.outputs = [model(*inputs[slot]) for slot in slots]
        if self.cuda:
            self._synchronize()

    def forget(self, pad: int = 0) -> None:
        """Drop the outputs, and shift where the next run's buffers will lie by `pad` bytes.

        Where large buffers lie relative to each other (4 KiB aliasing, cache sets) makes a process
        faster or slower by several percent for as long as it lives. A shift drawn for every run
        turns that bias into noise, which more pairs average out (Curtsinger and Berger 2013,
        Stabilizer).
        """
        self.outputs = []
        self.pad = None
        if pad and not self.cuda:
            self.pad = torch.empty(pad, dtype=torch.uint8)
            if pad > self.touched:
                # Pages are met for the first time here and not in a timed run.
                self.pad.fill_(0)
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
        """For each tensor of the first output the tensors of its inputs that share its memory."""
        return overlaps(tensors_of(self.inputs[0]), tensors_of([self.outputs[0]]))

    def reuses(self) -> bool:
        """Whether the outputs of the last run share memory with each other."""
        try:
            first, *others = (tensors_of([output]) for output in self.outputs)
        except TypeError:  # one that is not delivered may be anything
            return False
        return any(any(overlaps(first, other)) for other in others)


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


def describe(error: BaseException, path: str) -> dict[str, Any]:
    """The message that tells the judge about an exception, with the line in the file `path`."""
    if isinstance(error, OutputError):
        return {"error": error.kind, "text": str(error)[:TEXT]}
    kind = "runtime_error"
    try:
        message = str(error)
    except Exception:  # it is the candidate's own class
        message = "its message cannot be read"
    if isinstance(error, SyntaxError) or "Error building extension" in message:
        kind = "compile_error"
    text = message.strip().splitlines()
    where = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
    if isinstance(error, SyntaxError):
        where = []
    name = type(error).__name__
    if (
        isinstance(error, MemoryError)
        or "allocate memory" in message
        or name.startswith("OutOfMemory")
    ):
        name = "out of memory"
    elif isinstance(error, OSError) and error.errno == errno.EFBIG:
        name = "too much output"
    return {
        "error": kind,
        "text": f"{name}: {text[0] if text else 'no message'}"[:TEXT]
        + (f" (line {where[-1]})" if where else ""),
    }


class Candidate:
    """Answers the judge's requests one after another until the channel closes."""

    def __init__(self, channel: Channel, spec: dict[str, Any]):
        self.channel, self.spec = channel, spec
        self.path = os.path.join(spec["directory"], "candidate.py")
        self.runner: Runner | None = None
        self.targets: list[torch.Tensor] = []

    def serve(self) -> None:
        while True:
            try:
                message, fds = self.channel.recv()
            except (ChannelClosed, BadMessage):
                return
            try:
                reply = getattr(self, "do_" + message["op"])(message, fds)
            except BaseException as error:
                if isinstance(error, SystemExit):
                    raise
                reply = describe(error, self.path)
                # The traceback would keep the failed run's tensors alive.
                del error
            # The judge takes no answer but the one to this request.
            self.channel.send(reply | {"id": message["id"]})

    def do_load(self, message: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        device = self.spec["device"]
        self.before = watch.Before()
        if device != "cpu":
            torch.cuda.set_per_process_memory_fraction(self.spec["gpu_memory_fraction"])
        inputs_fd, outputs_fd, weights_fd = fds if device == "cpu" else (-1, -1, *fds)
        self.arena = Arena(
            message["input_size"], device, fd=inputs_fd, handle=message["input_handle"]
        )
        self.output = Arena(
            message["output_size"], device, fd=outputs_fd, handle=message["output_handle"]
        )
        try:
            module = load_module(self.path, "candidate")
        except SyntaxError as error:
            line = f" (line {error.lineno})" if error.lineno else ""
            kind = type(error).__name__
            return {"error": "compile_error", "text": f"{kind}: {error.msg}{line}"}
        model_class = getattr(module, "ModelNew", None)
        if model_class is None:
            return {"error": "compile_error", "text": "the source defines no class ModelNew"}
        task = load_module(os.path.join(self.spec["directory"], "task.py"), "task")
        self.reference = task.Model.forward.__code__
        self.runner = Runner(model_class, task, message["seed"], device)
        self.specs = message["weights"]
        self.places: dict[str, list[torch.Tensor]] | None = None if self.specs else {}
        self.unclear: list[str] = []
        if self.specs:
            self.weights = Arena(message["weights_size"], "cpu", fd=weights_fd)
        loaded = self._load_weights()
        changes = self.before.changes()
        return {"weights_loaded": loaded, "weights_unclear": self.unclear, "changes": changes}

    def do_reweigh(self, message: dict[str, Any], _: list[int]) -> dict[str, Any]:
        """Take the weights that now lie in the shared memory."""
        return {"weights_loaded": self._load_weights()}

    def _load_weights(self) -> list[str]:
        """Copy the reference's weights to their places; the names of those that have one.

        What the model holds besides them stays as it is: weights folded in its constructor do not
        follow.
        """
        if self.places is None:
            self.places = self._find_places()
        for key, places in self.places.items():
            for place in places:
                # By way of `data`, so that no version tells that something was written.
                place.data.copy_(self.weights.view(self.specs[key]).reshape(place.shape))
        return list(self.places)

    def _find_places(self) -> dict[str, list[torch.Tensor]]:
        """The model's tensors for the reference's weights, by their names there.

        Where names do not fit: by value, since both models were built from one seed. Of as many
        equal ones on both sides (biases of zeros) the first is for the first; a single weight has
        all its copies. What else is equal is `unclear`, if it is of one value throughout.
        """
        assert self.runner is not None
        model = self.runner.model
        own: dict[str, Any] = {}
        with contextlib.suppress(AttributeError, TypeError):
            own = model.state_dict()
        if all(k in own and list(own[k].shape) == s["shape"] for k, s in self.specs.items()):
            return {key: [own[key]] for key in self.specs}
        found: dict[str, list[torch.Tensor]] = {}
        tensors = tensors_within(model)
        alike: dict[str, list[str]] = {}
        values = {k: self.weights.view(s).to(self.runner.device) for k, s in self.specs.items()}
        for key, value in values.items():
            first = next((k for k in values if _equal(values[k], value)), key)
            alike.setdefault(first, []).append(key)
        for first, keys in alike.items():
            value = values[first]
            equal = [t for t in tensors if _equal(t, value)]
            # One that is stored the other way round is a view for what is stored.
            equal = equal or [t.t() for t in tensors if t.dim() == 2 and _equal(t.t(), value)]
            if len(keys) == len(equal):
                found |= {key: [tensor] for key, tensor in zip(keys, equal, strict=True)}
            elif equal and constant(value):
                self.unclear += keys
            elif len(keys) == 1 and equal:
                found[keys[0]] = equal
        return found

    def do_bind(self, message: dict[str, Any], _: list[int]) -> dict[str, Any]:
        self.sets = message["sets"]
        self._view_inputs()
        output = message["output"]
        self.tree, self.types = output["tree"], output["types"]
        self.targets = [self.output.view(spec) for spec in output["tensors"]]
        return {}

    def _view_inputs(self) -> None:
        """New tensors for every run, which no earlier one could have marked."""
        assert self.runner is not None
        self.runner.inputs = []
        for item in self.sets:
            tensors = [self.arena.view(spec) for spec in item["tensors"]]
            self.runner.inputs.append(tuple(unflatten(item["tree"], tensors)))

    def do_run(self, message: dict[str, Any], _: list[int]) -> dict[str, Any]:
        assert self.runner is not None
        if "key" in message:
            for slot in message["slots"]:
                self.arena.scramble(self.sets[slot]["tensors"], message["key"])
        self.runner.run(message["slots"])
        return {}

    def do_run_watched(self, message: dict[str, Any], _: list[int]) -> dict[str, Any]:
        """As `run`, with a look at whose code runs: the reference's, or kernels of its own."""
        assert self.runner is not None
        with open(self.path, encoding="utf-8") as file:
            source = file.read()
        defined, ran = set[str](), list[str]()
        with contextlib.ExitStack() as stack:
            if self.runner.cuda and (defined := watch.kernels_defined(source, "candidate")):
                ran = stack.enter_context(watch.kernels_run())
            reference = stack.enter_context(watch.reference_calls(self.reference))
            self.runner.run(message["slots"])
        idle = watch.idle_kernels(defined, ran)
        return {"reference_ran": bool(reference), "idle_kernels": idle}

    def do_deliver(self, message: dict[str, Any], _: list[int]) -> dict[str, Any]:
        assert self.runner is not None
        return self.runner.deliver(message["which"], self.tree, self.types, self.targets)

    def do_release(self, message: dict[str, Any], _: list[int]) -> dict[str, Any]:
        """Leave the device's memory to others for a while."""
        give_back_memory()
        return {}

    def do_finish(self, message: dict[str, Any], _: list[int]) -> dict[str, Any]:
        """After a trial drop the outputs; before, see what is aliased and what was replaced."""
        assert self.runner is not None
        found: dict[str, Any] = {}
        if message["look"]:
            found = {"aliases": self.runner.aliases(), "reuses": self.runner.reuses()}
            found["changes"] = self.before.changes()
        self.runner.forget(message["pad"])
        self._view_inputs()
        return found


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


def main(channel: Channel, spec: dict[str, Any]) -> None:
    """Entry point of a candidate's process, called by the zygote after the guards are on."""
    channel.send({"guards": spec["guards"]})
    if spec["device"] != "cpu":
        torch.cuda.set_device(spec["device"])
    Candidate(channel, spec).serve()
