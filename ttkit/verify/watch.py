"""What a candidate's own process can tell about it: replaced functions, changed defaults, and whose
code ran.

A hostile candidate can silence all of this, and gains nothing by it: the answers here only ever
incriminate. What makes a candidate correct and fast is decided in other processes.
"""

from __future__ import annotations

import builtins
import contextlib
import gc
import json
import re
import socket
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

# Honest programs call these and never replace them.
GUARDED: tuple[tuple[Any, tuple[str, ...]], ...] = (
    (builtins, ("open", "exec", "eval", "compile", "len", "isinstance", "type", "getattr", "max")),
    (time, ("perf_counter", "perf_counter_ns", "monotonic", "time", "time_ns", "sleep")),
    (json, ("dumps", "loads")),
    (socket.socket, ("send", "sendmsg", "recv", "recvmsg")),
    (torch, ("allclose", "equal", "isclose", "empty", "empty_like", "zeros", "as_strided")),
    (torch.cuda, ("synchronize", "Event", "Stream", "current_stream")),
    (torch.Tensor, ("copy_", "clone", "stride", "data_ptr", "untyped_storage", "equal")),
    (torch.nn.Module, ("__call__", "state_dict", "to")),
    (torch.testing, ("assert_close",)),
)
# The harness itself, as far as it runs in this process.
HARNESS = (
    "ttkit.verify.worker",
    "ttkit.verify.runner",
    "ttkit.verify.weights",
    "ttkit.verify.arena",
    "ttkit.verify.channel",
    __name__,
)


def runtime() -> dict[str, int]:
    """Identities of the guarded functions and of all functions of the harness, by name."""
    found = {}
    for owner, names in GUARDED:
        for name in names:
            found[f"{owner.__name__}.{name}"] = id(getattr(owner, name, None))
    for module_name in HARNESS:
        module = sys.modules.get(module_name)
        for name, value in vars(module).items() if module else ():
            if isinstance(value, types.FunctionType):
                found[f"{module_name}.{name}"] = id(value.__code__)
            elif isinstance(value, type) and value.__module__ == module_name:
                for inner, member in vars(value).items():
                    if isinstance(member, types.FunctionType):
                        found[f"{module_name}.{name}.{inner}"] = id(member.__code__)
    return found


def global_state() -> dict[str, str]:
    """Process-wide settings of torch that change what other code computes."""
    return {
        "default dtype": str(torch.get_default_dtype()),
        "default device": str(torch.get_default_device()),
        "grad mode": str(torch.is_grad_enabled()),
        "inference mode": str(torch.is_inference_mode_enabled()),
        "precision of float32 products": _told(torch.get_float32_matmul_precision),
        "TF32 in convolutions": _told(lambda: torch.backends.cudnn.allow_tf32),
        "treatment of denormal numbers": _told(_denormal),
        "modes that intercept torch's functions": str(_modes()),
    }


def _denormal() -> str:
    smallest = torch.tensor(1e-40, dtype=torch.float32, device="cpu")
    return "kept" if smallest.mul(1.0).item() > 0 else "flushed to zero"


def _told(ask: Callable[[], object]) -> str:
    """An answer as text; torch refuses one where its older and newer settings contradict."""
    try:
        return str(ask())
    except RuntimeError:
        return "contradictory"


def _modes() -> list[str]:
    stacks = (
        torch.overrides._get_current_function_mode_stack(),
        torch.utils._python_dispatch._get_current_dispatch_mode_stack(),
    )
    return [type(mode).__name__ for stack in stacks for mode in stack]


class Before:
    """The process as it was before any line of the candidate ran."""

    def __init__(self) -> None:
        self.runtime, self.state = runtime(), global_state()

    def changes(self) -> dict[str, str]:
        """What was replaced or changed since, by the name of the check; empty for nothing."""
        found = {}
        now = runtime()
        replaced = sorted(name for name, value in self.runtime.items() if now.get(name) != value)
        if replaced:
            found["tampered_runtime"] = f"it replaced {', '.join(replaced[:3])}"
        state = global_state()
        changed = [f"the {k} to {v}" for k, v in state.items() if v != self.state[k]]
        if changed:
            found["global_state"] = f"it changed {' and '.join(changed)}"
        return found


@contextlib.contextmanager
def reference_calls(code: types.CodeType) -> Iterator[list[str]]:
    """While the context lasts, notes each call of the reference's own forward, of whatever copy.

    A candidate with the reference's very lines as its own is not one: the qualified name counts.
    """
    seen: list[str] = []
    mine = (code.co_qualname, code.co_code, code.co_names)

    def profile(frame: types.FrameType, event: str, _: Any) -> None:
        ran = frame.f_code
        if event == "call" and (ran.co_qualname, ran.co_code, ran.co_names) == mine:
            seen.append(ran.co_qualname)

    sys.setprofile(profile)
    threading.setprofile(profile)
    try:
        yield seen
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]


CUDA_KERNEL = (
    r"__global__\s+(?:__launch_bounds__\([^)]*\)\s*)?void\s+(?:__launch_bounds__\([^)]*\)\s*)?(\w+)"
)


def kernels_defined(source: str, module: str) -> set[str]:
    """Names of the CUDA kernels in a source and of the Triton kernels alive that `module` made."""
    found = set(re.findall(CUDA_KERNEL, source))
    triton = sys.modules.get("triton")
    if triton is not None:
        kind = triton.runtime.JITFunction
        # Not isinstance, which asks a weak proxy for the class of what may be gone.
        kernels = [k for k in gc.get_objects() if issubclass(type(k), kind)]
        functions = [k.fn for k in kernels if getattr(k.fn, "__module__", None) == module]
        found |= {function.__name__ for function in functions}
    return found


def idle_kernels(defined: set[str], ran: list[str]) -> list[str]:
    """The kernels `defined`, if none of them is among those that `ran`, else nothing.

    A name counts as a whole word, and never in a kernel of torch's own: a kernel called `kernel`
    did not run because `vectorized_elementwise_kernel` did.
    """
    if not ran:  # a profiler that saw no kernel at all does not work on this machine
        return []
    theirs = " ".join(text for text in ran if "at::native::" not in text)
    words = set(re.findall(r"\w+", theirs))
    return [] if words & defined else sorted(defined)


@contextlib.contextmanager
def kernels_run() -> Iterator[list[str]]:
    """Names of the device's kernels that run while the context lasts; filled in at its end."""
    from torch.profiler import ProfilerActivity, profile

    names: list[str] = []
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        torch.ones(1, device="cuda")  # so that a profiler that works has seen a kernel
        yield names
        torch.cuda.synchronize()
    names += {
        event.name
        for event in recorded.events() or ()
        if event.device_type == torch.autograd.DeviceType.CUDA
    }
