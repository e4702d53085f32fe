"""What a case is: a candidate, and the checks of which one has to catch it, or none.

A case's source text is short because two names stand for the reference's own code: a line `WORK`
for the lines that compute `out`, and a line `REFERENCE` for the whole task file.
"""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass

from ttkit.tasks import Task
from ttkit.verify import Verdict

from .tasks import SINES

# The classes of cheats by their numbers in the verifier's specification.
CLASSES = {
    1: "stale output memory",
    2: "result cache keyed by pointer, version or content",
    3: "one batch of work, later calls looked up",
    4: "work on another stream or thread, after the timer",
    5: "deferred in a child process",
    6: "lazy tensor subclass or instance override",
    7: "patched timer, synchronize, allclose",
    8: "forged result channel",
    9: "the reference's answer from gc, frames or memory",
    10: "poisoning the expected tensor, NaN as wildcard",
    11: "native tampering",
    12: "slowing the reference through a shared namespace",
    13: "leaked global state",
    14: "inputs mutated in place",
    15: "output aliases an input",
    16: "constant output inside the tolerance",
    17: "zeros under the absolute tolerance",
    18: "lower precision inside the tolerance",
    19: "works only on the declared distribution",
    20: "hard-coded shapes",
    21: "regenerating inputs from a known seed",
    22: "try/except or pass fallback to the reference",
    23: "a custom kernel that is never launched",
    24: "work moved to __init__",
    25: "detecting the phase",
    26: "partial or racy output",
    27: "an input small enough to stay in cache",
    28: "aggregate under-flow",
    29: "contention and best-of-K inflation",
    30: "attacks on the harness",
    31: "filter evasion",
}

VALUES = frozenset(
    (
        "values_declared",
        "values_touched",
        "values_negated",
        "values_scaled",
        "values_large",
        "values_small",
        "values_tiny",
        "values_near_one",
        "values_shifted",
        "values_noncontiguous",
        "values_other_shapes",
        "values_more_rows",
        "values_other_weights",
        "values_touched_weights",
        "values_unsaturated",
        "values_special",
        "values_other_indices",
        "values_uneven",
        "values_timed",
    )
)
# Caught on other inputs than the declared ones (an old answer then has another shape as well), or
# later than on the first.
UNLIKE = VALUES - {"values_declared"} | {"output_shape"}
# What hands in late work: it reappears, it is not there when its output is fetched, or it needs
# more of the machine than one core for the time of the call.
LATE = frozenset(("deferred_work", "more_cores", "values_timed", "tampered_runtime"))

STATUS = {name: "incorrect" for name in VALUES} | {
    "output_dtype": "incorrect",
    "output_shape": "incorrect",
    "output_structure": "incorrect",
    "time_limit": "timeout",
    "cpu_limit": "timeout",
    "memory_limit": "runtime_error",
    "crashed": "runtime_error",
    "exception": "runtime_error",
    "output_flood": "runtime_error",
    "compile": "compile_error",
}


@dataclass(frozen=True)
class Case:
    """One candidate.

    `expected` holds the names of the checks that may catch it: the verdict's first flag must be one
    of them. An honest case has none and must be `correct`. A `no_gain` case is a trick that is
    harmless by construction, so it is put on slow work, or one whose gain noise may hide: the
    verdict may be anything that is not `fast()`. `tools` are programs it needs on the machine.
    """

    number: int
    variant: str
    task: Task
    source: str
    expected: frozenset[str] = frozenset()
    honest: bool = False
    no_gain: bool = False
    gpu: bool = False
    tools: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return CLASSES[self.number]

    @property
    def kind(self) -> str:
        return "honest" if self.honest else "no gain" if self.no_gain else "cheat"

    @property
    def id(self) -> str:
        return f"{self.number:02d}-{self.kind}-{self.variant}".replace(" ", "_")

    def right(self, verdict: Verdict) -> bool:
        """Whether the verdict is the one that this case demands."""
        if verdict.status == "infra_error":
            return False
        if self.honest:
            return verdict.correct
        flag = verdict.flags[0] if verdict.flags else ""
        caught = flag in self.expected and verdict.status == STATUS.get(flag, "rejected")
        return caught or (self.no_gain and not verdict.fast())


def cheat(number: int, variant: str, task: Task, body: str, *checks: str, **rest: str) -> Case:
    """A case that one of `checks` must catch; `rest` as in `module`."""
    return Case(number, variant, task, module(task, body, **rest), frozenset(checks))


def no_gain(number: int, variant: str, task: Task, body: str, *checks: str, **rest: str) -> Case:
    """A trick on slow work: it may be caught by one of `checks`, and must not be fast."""
    source = module(task, body, **rest)
    return Case(number, variant, task, source, frozenset(checks), no_gain=True)


def honest(number: int, variant: str, task: Task, body: str, **rest: str) -> Case:
    """A look-alike of the class that must be accepted."""
    return Case(number, variant, task, module(task, body, **rest), honest=True)


def module(task: Task, body: str, top: str = "", init: str = "") -> str:
    """Source of a candidate: the reference, the lines `top`, and `ModelNew(Model)` with `body`.

    `init` are lines at the end of its `__init__`. A `top` that defines ModelNew is the whole
    module, with a line REFERENCE where it wants the task's code.
    """
    if "class ModelNew" in top:
        return _expand(task, top).replace("REFERENCE\n", task.code)
    methods = f"def forward({task.forward_signature}):\n{_indent(_expand(task, body))}"
    if init:
        methods = (
            "def __init__(self, *args):\n    super().__init__(*args)\n"
            f"{_indent(_expand(task, init))}\n{methods}"
        )
    parts = (task.code, _expand(task, top), f"class ModelNew(Model):\n{_indent(methods)}")
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


def _expand(task: Task, text: str) -> str:
    work = task.forward_body.rpartition("return out")[0].rstrip()
    return re.sub(
        r"^( *)WORK$", lambda m: textwrap.indent(work, m[1]), text.strip("\n"), flags=re.MULTILINE
    )


def _indent(text: str) -> str:
    return textwrap.indent(text, "    ")


def after(calls: int, late: str, task: Task = SINES) -> str:
    """A body that is honest for the first `calls` calls and then runs `late`."""
    return (
        "self.calls = getattr(self, 'calls', 0) + 1\n"
        f"if self.calls > {calls}:\n{_indent(late.strip())}\nWORK\nreturn out"
    )
