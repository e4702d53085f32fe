"""All cases, the verifier that judges them, and the table of what became of them."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Iterable

import torch

from ttkit.verify import PROTOCOLS, Limits, Verdict, Verifier

from . import (
    adaptive,
    gpu,
    harness,
    isolation,
    kernels,
    memory,
    outside,
    phases,
    rows,
    second_look,
    timing,
    unvaried,
    values,
)
from .case import CLASSES, Case

PARTS = (
    values,
    memory,
    timing,
    phases,
    harness,
    isolation,
    adaptive,
    unvaried,
    second_look,
    outside,
    rows,
    gpu,
    kernels,
)
CASES: tuple[Case, ...] = tuple(
    sorted(
        (case for part in PARTS for case in part.CASES),
        key=lambda case: (case.number, case.honest, case.gpu),
    )
)
# One look of ten pairs, no relaunch: whether a case is caught must not hang on a narrow interval.
QUICK = dataclasses.replace(PROTOCOLS["rigorous"], looks=(10,), warmup=2, seconds=1.0, relaunches=0)
LIMITS = Limits(run_seconds=1.5, load_seconds=15.0, cpu_seconds=12, memory_bytes=1 << 30)

# The ratio of an interval's ends from which a figure says nothing (in quiet it is 1.1 to 1.5).
WIDE = 2.0

# What the verifier does not catch, or misnames, and why.
GAPS: dict[str, str] = {}


def verifier(device: str = "cpu") -> Verifier:
    """The verifier of the suite: checks as under `rigorous`, limits that are soon reached."""
    return Verifier(QUICK, device=device, limits=LIMITS)


def lacking(case: Case) -> str:
    """Why `case` cannot run on this machine, or nothing."""
    if case.gpu and not torch.cuda.is_available():
        return "needs a CUDA device"
    missing = [tool for tool in case.tools if shutil.which(tool) is None]
    return f"needs {', '.join(missing)}" if missing else ""


def judged(v: Verifier, case: Case) -> Verdict:
    """The verdict on `case`; up to five times asked for while the machine is too busy to tell."""
    for number in range(5):
        verdict = v.verify(case.task, case.source, fresh=number > 0)
        if not (too_busy(verdict) or (not case.honest and undecided(verdict))):
            break
    return verdict


def undecided(verdict: Verdict) -> bool:
    """Whether an interval on both sides of 1 is so wide that noise hid what there is to gain."""
    low, high = verdict.speedup_lo, verdict.speedup_hi
    if low is None or high is None:
        return False
    return verdict.correct and low < 1 < high and high > WIDE * low


def too_busy(verdict: Verdict) -> bool:
    """Whether the verifier declined to say anything since other programs were in the way."""
    return verdict.status == "infra_error" and "busy" in verdict.reason


def machine() -> str:
    """The kind of machine, in a few words."""
    name = "no GPU"
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    return f"{os.cpu_count()} CPU cores, {name}, torch {torch.__version__}"


def table(results: Iterable[tuple[Case, Verdict | None]]) -> str:
    """The page of results in Markdown; a verdict of None stands for a case that did not run."""
    results = list(results)
    ran = [(case, verdict) for case, verdict in results if verdict is not None]
    right = sum(case.right(verdict) for case, verdict in ran)
    cheats = [case.number for case, _ in ran if not case.honest]
    lines = [
        "# The adversarial suite",
        "",
        "What the verifier says of programs that cheat, and of honest ones that look like them.",
        f"Made by `python -m tests.adversarial` on {machine()}.",
        "",
        f"{right} of {len(ran)} cases came out as they must: {len(cheats)} cheats of "
        f"{len(set(cheats))} classes, {len(ran) - len(cheats)} honest look-alikes.",
        f"Not run here: {len(results) - len(ran)} cases, which need a GPU (their lines say so).",
        "",
        "A cheat must be caught by one of the checks that its case names; an honest program must",
        "be `correct`. *No gain* marks a trick that is harmless by construction and put on slow",
        "work, or one whose gain noise may hide: caught or not, it must not be called fast.",
        "",
    ]
    for number, name in CLASSES.items():
        lines += [
            f"## {number} {name}",
            "",
            "| variant | kind | check | result |",
            "|---|---|---|---|",
        ]
        lines += [_line(case, verdict) for case, verdict in results if case.number == number]
        lines.append("")
    return "\n".join(lines)


def _line(case: Case, verdict: Verdict | None) -> str:
    kind = f"{case.kind}, GPU" if case.gpu else case.kind
    if verdict is None:
        return f"| {case.variant} | {kind} | | not run: {lacking(case)} |"
    check = verdict.flags[0] if verdict.flags else ""
    speed = " and fast" if verdict.fast() else ""
    gap = f": {GAPS[case.id]}" if case.id in GAPS else ""
    wrong = "" if case.right(verdict) else f", **not as it must be**{gap}"
    return f"| {case.variant} | {kind} | {check} | {verdict.status}{speed}{wrong} |"
