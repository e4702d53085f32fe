"""What runs in a candidate's process: load the module, run it, hand its output over.

Nothing here decides anything: a candidate can rewrite all of this in its own process and still only
change what it delivers and when.
"""

from __future__ import annotations

import contextlib
import errno
import os
import traceback
from typing import Any

import torch

from ttkit.verify import libraries, watch
from ttkit.verify.arena import Arena, unflatten
from ttkit.verify.channel import BadMessage, Channel, ChannelClosed
from ttkit.verify.runner import OutputError, Runner, give_back_memory, load_module
from ttkit.verify.weights import find_places

TEXT = 2000


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
            libraries.load(message["libraries"], device)
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
        assert self.runner is not None
        if self.places is None:
            values = {name: self.weights.view(spec) for name, spec in self.specs.items()}
            self.places, self.unclear = find_places(self.runner.model, values, self.runner.device)
        for key, places in self.places.items():
            for place in places:
                # By way of `data`, so that no version tells that something was written.
                place.data.copy_(self.weights.view(self.specs[key]).reshape(place.shape))
        return list(self.places)

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
        found: dict[str, Any] = {"reuses": self.runner.reuses()}
        if message["look"]:
            found |= {"aliases": self.runner.aliases(), "changes": self.before.changes()}
        layout = self.runner.layout() if message["look"] else None
        self.runner.forget()
        self._view_inputs()  # first: what it allocates would lie above the shift, and pin it
        self.runner.shift(message["pad"])
        if layout is not None:
            found["rebinds"] = layout != self.runner.layout()
        return found


def main(channel: Channel, spec: dict[str, Any]) -> None:
    """Entry point of a candidate's process, called by the zygote after the guards are on."""
    channel.send({"guards": spec["guards"]})
    if spec["device"] != "cpu":
        torch.cuda.set_device(spec["device"])
    Candidate(channel, spec).serve()
