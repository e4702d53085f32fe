"""A/A: the reference against itself. What a measuring protocol reports when nothing changed.

And its power: how often a candidate that is faster by construction is found to be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ttkit.errors import UsageError
from ttkit.prompts import candidate_source
from ttkit.tasks import Task
from ttkit.verify.verdict import Verdict
from ttkit.verify.verifier import Verifier

OnRun = Callable[[int, int, Task, Verdict], None]

ROUNDS = 100
# Clamping again changes nothing but the time it takes.
REPEATED = """
import torch

class Model(torch.nn.Module):
    def __init__(self, rounds):
        super().__init__()
        self.rounds = rounds
    def forward(self, x):
        for _ in range(self.rounds):
            x = torch.clamp(x, -2.0, 2.0)
        return x

def get_inputs():
    return [torch.randn({rows}, 1024)]

def get_init_inputs():
    return [{rounds}]
"""


@dataclass(frozen=True)
class AASummary:
    """Shares of the runs in which the reference came out faster than itself (truth: 0).

    `fast_interval` counts intervals that lie above 1, `fast_point` speedups above 1; rates are
    over the `measured` runs. `largest_speedup` is by point estimate.
    """

    protocol: str
    device: str
    workers: int
    runs: int
    measured: int
    fast_interval: int
    fast_point: int
    fast_interval_rate: float
    fast_point_rate: float
    largest_speedup: float
    seconds_per_run: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def aa(
    tasks: Sequence[Task],
    runs: int,
    verifier_kwargs: Mapping[str, Any] | None = None,
    on_run: OnRun | None = None,
) -> tuple[list[tuple[Task, Verdict]], AASummary]:
    """Measure each task's own forward body as the candidate, `runs` times a task, uncached.

    `on_run(done, total, task, verdict)` is called after each. Raises UsageError when `runs` is
    below 1 or there are no tasks.
    """
    if runs < 1 or not tasks:
        raise UsageError("an A/A test needs at least one task and one run")
    unchanged = [(task, candidate_source(task, task.forward_body)) for task in tasks]
    return _measure(unchanged, runs, verifier_kwargs, on_run)


def power(
    faster: float,
    runs: int,
    verifier_kwargs: Mapping[str, Any] | None = None,
    on_run: OnRun | None = None,
) -> tuple[list[tuple[Task, Verdict]], AASummary]:
    """As `aa`, with a candidate that is `faster` times as fast as its reference: the `fast` rates
    then are the share of runs in which that is seen.

    The reference clamps a tensor of 1 MiB, on CUDA 128 MiB, `faster` times ROUNDS times over, the
    candidate ROUNDS times, with the same result. Raises UsageError when `faster` is no more than 1
    or above 10.
    """
    if runs < 1 or not 1 < faster <= 10:
        raise UsageError("a test of power needs a run, and a candidate 1 to 10 times faster")
    settings = dict(verifier_kwargs or {})
    rows = 256 if settings.get("device", "cpu") == "cpu" else 1 << 15
    code = REPEATED.format(rounds=round(faster * ROUNDS), rows=rows)
    task = Task("file", 0, 0, f"{faster:g}x", code)
    body = task.forward_body.replace("self.rounds", str(ROUNDS))
    return _measure([(task, candidate_source(task, body))], runs, settings, on_run)


def _measure(
    candidates: Sequence[tuple[Task, str]],
    runs: int,
    verifier_kwargs: Mapping[str, Any] | None,
    on_run: OnRun | None,
) -> tuple[list[tuple[Task, Verdict]], AASummary]:
    settings = {**(verifier_kwargs or {}), "cache": None}
    results: list[tuple[Task, Verdict]] = []
    total = runs * len(candidates)
    with Verifier(**settings) as verifier:
        # Runs of one task follow each other, so that its referee stays warm and, under a contended
        # protocol, `workers` runs of it share the device as candidates of one task would.
        for task, source in candidates:

            def done(_: int, verdict: Verdict, task: Task = task) -> None:
                results.append((task, verdict))
                if on_run is not None:
                    on_run(len(results), total, task, verdict)

            verifier.verify_many([(task, source)] * runs, done, fresh=True)
        return results, summarize([v for _, v in results], verifier)


def is_measured(verdict: Verdict) -> bool:
    """Whether it is of a correct program and has a speedup."""
    return verdict.correct and math.isfinite(verdict.speedup)


def summarize(verdicts: Sequence[Verdict], verifier: Verifier) -> AASummary:
    """Count what came out faster; a verdict without a speedup is not measured."""
    measured = [v for v in verdicts if is_measured(v)]
    by_interval = sum(v.fast() for v in measured)
    by_point = sum(v.speedup > 1 for v in measured)
    n = len(measured)
    return AASummary(
        protocol=verifier.protocol.name,
        device=verifier.device,
        workers=verifier.workers,
        runs=len(verdicts),
        measured=n,
        fast_interval=by_interval,
        fast_point=by_point,
        fast_interval_rate=by_interval / n if n else math.nan,
        fast_point_rate=by_point / n if n else math.nan,
        largest_speedup=max((v.speedup for v in measured), default=math.nan),
        seconds_per_run=sum(v.seconds for v in verdicts) / len(verdicts),
    )
