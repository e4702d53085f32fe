"""Rewards from verdicts: pure functions and small state.

The paper's reward is the speedup divided by a per-task baseline, 0 for an incorrect sample. Its
baseline, a running median, depends on the order in which samples arrive; the fixed one does not.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Protocol

from ttkit.errors import UsageError


def speedup_reward(correct: bool, speedup: float, baseline: float = 1.0) -> float:
    """`speedup / baseline` of a correct sample, 0 for any other (paper, outer loop)."""
    return speedup / baseline if correct and math.isfinite(speedup) else 0.0


def threshold_reward(correct: bool, speedup: float, p: float = 1.0) -> float:
    """1 if correct and faster than `p`, else 0: the sparse counterpart of `speedup_reward`."""
    return float(correct and speedup > p)


class Baseline(Protocol):
    """What a task's speedups are divided by; `divisor` is asked before `observe` is told."""

    def divisor(self, task: str) -> float: ...

    def observe(self, task: str, correct: bool, speedup: float) -> None: ...


@dataclass
class RunningMedian:
    """The paper's baseline: the median of a task's last `window` correct speedups.

    Order-dependent: the first correct sample of a task is divided by 1.0, whatever it is, and a
    sample later in a batch meets a baseline that the earlier ones have moved.
    """

    window: int = 32
    seen: dict[str, deque[float]] = field(default_factory=dict)

    def divisor(self, task: str) -> float:
        return median(self.seen[task]) if task in self.seen else 1.0

    def observe(self, task: str, correct: bool, speedup: float) -> None:
        if correct and math.isfinite(speedup):
            self.seen.setdefault(task, deque(maxlen=self.window)).append(speedup)


@dataclass(frozen=True)
class FixedBaseline:
    """A baseline that does not move: the median speedup of the initial policy's correct samples.

    1.0 for a task in which none was correct, or that was not sampled.
    """

    medians: Mapping[str, float]

    @classmethod
    def of(cls, samples: Sequence[tuple[str, bool, float]]) -> FixedBaseline:
        """From (task, correct, speedup) of samples drawn before training."""
        speedups: dict[str, list[float]] = {}
        for task, correct, speedup in samples:
            if correct and math.isfinite(speedup):
                speedups.setdefault(task, []).append(speedup)
        return cls({task: median(values) for task, values in speedups.items()})

    def divisor(self, task: str) -> float:
        return self.medians.get(task, 1.0)

    def observe(self, task: str, correct: bool, speedup: float) -> None:
        """Nothing to note: that is the point."""


def rewards(
    tasks: Sequence[str],
    correct: Sequence[bool],
    speedups: Sequence[float],
    baseline: Baseline,
) -> list[float]:
    """The reward of each sample, in the order given; the baseline sees each after its reward."""
    values = []
    for task, ok, speedup in zip(tasks, correct, speedups, strict=True):
        values.append(speedup_reward(ok, speedup, baseline.divisor(task)))
        baseline.observe(task, ok, speedup)
    return values


CLIP = 4.0

TRANSFORMS: dict[str, Callable[[float], float]] = {
    "none": lambda r: r,
    "log1p": math.log1p,
    "clip": lambda r: min(r, CLIP),
}


def transform(name: str) -> Callable[[float], float]:
    """How a reward's heavy tail is treated: `none` (the paper), `log1p`, or `clip` at 4.

    One sample that is 30 times faster outweighs every other in a batch's gradient; all three
    keep the order of samples and leave 0 at 0. Raises UsageError for another name.
    """
    if name not in TRANSFORMS:
        raise UsageError(f"unknown reward transform {name!r}: it is one of {', '.join(TRANSFORMS)}")
    return TRANSFORMS[name]
