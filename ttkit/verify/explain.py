"""A verdict in plain words, one fact a line: what came out, and why."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from ttkit.verify.verdict import Verdict

WIDTH = 80
# Columns of the labels, and of the checks' names.
LABEL, CHECK = 16, 22

MEANINGS = {
    "incorrect": "what it returns is not what the reference returns",
    "compile_error": "its code could not be loaded",
    "runtime_error": "it failed while it ran",
    "timeout": "it took too long",
    "rejected": "it cheats, or its speed is not possible",
    "infra_error": "the machine, the verifier or the reference failed; this says nothing of the "
    "candidate",
}
# What follows `values_` in the name of a check: the inputs on which values were compared.
INPUTS = {
    "declared": "as the task declares them",
    "touched": "the same, but for a few values",
    "other_shapes": "of other shapes",
    "more_rows": "with more rows",
    "negated": "with the sign changed",
    "scaled": "4 times as large, or more",
    "large": "32 times as large, or more",
    "small": "64 times smaller",
    "tiny": "a million times smaller",
    "near_one": "of little more than 1",
    "shifted": "with another mean",
    "noncontiguous": "not contiguous in memory",
    "other_indices": "with other indices",
    "uneven": "with some rows unlike the others",
    "unsaturated": "of a size at which each makes a difference",
    "special": "a few of them equal, or infinite",
    "other_weights": "with other weights in the model",
    "touched_weights": "with one of the weights changed",
    "timed": "of every timed pair",
}
# What the other checks demand of a candidate.
DEMANDS = {
    "compile": "its code can be loaded",
    "exception": "it raises no exception",
    "crashed": "its process does not die",
    "time_limit": "it ends within the time allowed",
    "cpu_limit": "it ends within the CPU time allowed",
    "memory_limit": "it stays within the memory allowed",
    "output_flood": "it writes no more text than allowed",
    "output_type": "it returns plain tensors of the reference's kind",
    "output_dtype": "it returns the reference's dtypes",
    "output_shape": "it returns the reference's shapes",
    "output_structure": "its tensors come in the same lists and tuples",
    "output_aliases_input": "its output shares memory with no other tensor",
    "output_reused": "what it returned stays as it is when it is called again",
    "weights_kept": "it keeps the reference's weights, and takes others",
    "inputs_mutated": "it does not write to its inputs",
    "calls_reference": "it does not run the reference",
    "tampered_runtime": "it replaces nothing of Python, torch, the verifier",
    "global_state": "it leaves torch's global settings alone",
    "forged_answer": "its process says nothing but what it is asked",
    "kernel_never_launched": "the kernels that it defines do run",
    "child_process": "no process of its own is left running",
    "more_cores": "it computes on one core, as the reference does",
    "deferred_work": "it leaves no work for after the timed call",
    "batched_calls": "no call does the work of later ones",
    "device_kept_busy": "the device is idle between its turns",
    "impossible_speed": "it is not faster than its inputs can be read",
    "relaunched": "a (possible) narrow lead, again in new processes",
}
GUARDS = {
    "parent_death_signal": "ends with the verifier",
    "network_namespace": "no network",
    "ipc_namespace": "no shared memory or queues that outlive it",
    "read_only_files": "read-only files",
    "cpu_limit": "limited CPU time",
    "memory_limit": "limited memory",
    "open_files_limit": "limited open files",
    "file_size_limit": "limited file size",
    "no_core_files": "no core files",
    "pending_signals_limit": "limited timers",
    "capabilities_dropped": "no capabilities",
    "own_user_id": "a user id of its own",
    "process_limit": "limited processes",
    "no_new_privileges": "no new privileges",
    "system_call_filter": "filtered system calls",
    "not_dumpable": "memory closed to others",
    "pid_namespace": "no sight of other processes",
}


def explain(verdict: Verdict, source: str = "") -> str:
    """The facts of `verdict` as lines of at most 80 columns, each under its label.

    `source` is the module that was judged: of a line that the reason names, its text is shown.
    """
    facts = [
        *_outcome(verdict, source),
        *_times(verdict),
        *_values(verdict),
        *_circumstances(verdict),
    ]
    lines = [line for label, text in facts for line in _wrapped(label, text)]
    return "\n".join([*lines, *_checks(verdict)])


def _wrapped(label: str, text: str) -> list[str]:
    # An error message is the candidate's own text: nothing in it may steer a terminal.
    text = "".join(c if c.isprintable() else " " for c in text)
    start = label.ljust(LABEL)
    return textwrap.wrap(text, WIDTH, initial_indent=start, subsequent_indent=" " * LABEL)


def _outcome(verdict: Verdict, source: str) -> Iterator[tuple[str, str]]:
    yield "meaning", MEANINGS.get(verdict.status) or _speed(verdict)
    if verdict.correct:
        return
    for name in verdict.flags:
        yield "failed check", name
        yield "required", demand(name)
    yield "evidence", verdict.reason
    named = re.search(r"\bline (\d+)\)", verdict.reason)
    lines = source.splitlines()
    if named and 0 < int(named[1]) <= len(lines):
        yield "that line", lines[int(named[1]) - 1].strip()


def demand(check: str) -> str:
    """What the check of that name demands of a candidate, in words."""
    inputs = check.removeprefix("values_")
    if inputs != check:
        return f"right values on inputs {INPUTS.get(inputs, inputs.replace('_', ' '))}"
    return DEMANDS.get(check, check.replace("_", " "))


def _speed(verdict: Verdict) -> str:
    if math.isnan(verdict.speedup_lo):
        return "right values; whether it is faster, this protocol cannot tell"
    if verdict.fast():
        return "right values, and faster: the whole interval is above 1"
    if verdict.speedup_hi < 1:
        return "right values, but slower: the whole interval is below 1"
    return "right values, but not shown to be faster: the interval reaches 1"


def _times(verdict: Verdict) -> Iterator[tuple[str, str]]:
    if math.isnan(verdict.candidate_ms):
        yield "speedup", "not measured"
        return
    if not math.isnan(verdict.speedup):
        text = f"{verdict.speedup:.3f}x, "
        if math.isnan(verdict.speedup_lo):
            text += "without an interval"
        else:
            text += f"95 % interval {verdict.speedup_lo:.3f}x to {verdict.speedup_hi:.3f}x"
        yield "speedup", text + ("" if verdict.correct else "; it does not count")
    kind = "runs of each" if math.isnan(verdict.speedup_lo) else "pairs of runs"
    yield "measured", f"{verdict.n_pairs} {kind}"
    yield "reference", f"{verdict.reference_ms:.4g} ms"
    yield "candidate", f"{verdict.candidate_ms:.4g} ms"
    if not verdict.limit_ms > 0:
        yield "physical limit", "none is known for this task"
        return
    share = verdict.candidate_ms / verdict.limit_ms
    yield (
        "physical limit",
        f"{verdict.limit_ms:.3g} ms to read the inputs once; the candidate takes {share:.3g} times "
        "that",
    )


def _values(verdict: Verdict) -> Iterator[tuple[str, str]]:
    wrong = any(name.startswith("values_") for name in verdict.flags)
    if math.isnan(verdict.max_error) and not wrong:
        yield "KernelBench", "no values were compared"
        return
    side = "within" if verdict.kernelbench_allclose else "outside"
    yield "KernelBench", f"{side} its tolerance, on the inputs that were compared here"
    if not math.isnan(verdict.max_error):
        yield (
            "largest error",
            f"{verdict.max_error:.2g}, the reference's own {verdict.reference_error:.2g} "
            "(relative, against float64)",
        )


def _circumstances(verdict: Verdict) -> Iterator[tuple[str, str]]:
    yield "measured by", f"protocol {verdict.protocol} on {verdict.device}"
    if verdict.contention:
        yield "device shared", _contention(verdict.contention)
    for label, wanted in (("guards on", True), ("guards off", False)):
        names = [GUARDS.get(k, k) for k, v in verdict.guards.items() if bool(v) is wanted]
        if names:
            yield label, ", ".join(names)


def _contention(record: Mapping[str, Any]) -> str:
    parts = []
    if "load_average" in record:
        state = "busy" if record.get("busy") else "not busy"
        parts.append(
            f"load average {record['load_average']} on {record.get('cores')} cores ({state})"
        )
    if record.get("stolen_seconds", 0) > 0:
        parts.append(f"{record['stolen_seconds']} s taken by the host of this virtual machine")
    if "gpu_processes" in record:
        parts.append(f"{record['gpu_processes']} processes on the GPU")
    if record.get("gpu_state"):
        parts.append(f"its throttling, clock and temperature: {record['gpu_state']}")
    return "; ".join(parts)


def _checks(verdict: Verdict) -> list[str]:
    names = list(dict.fromkeys(verdict.checks))
    ended = f"; {', '.join(verdict.flags)} failed" if verdict.flags else ""
    lines = _wrapped("checks", f"{len(names)} ran{ended}")
    return lines + [f"  {name.ljust(CHECK)}{demand(name)}" for name in names]
