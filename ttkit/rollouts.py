"""Rollouts of a step of test-time training: the settings, drawing, judging, rewards, measures."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from ttkit import prompts
from ttkit.advantages import OBJECTIVES
from ttkit.best_of_n import sample_rows
from ttkit.errors import InfraError, UsageError
from ttkit.rewards import speedup_reward, threshold_reward
from ttkit.sampling import SamplingParams, TransformersSampler
from ttkit.stats import geometric_mean
from ttkit.tasks import Task
from ttkit.train import Judge, Judged
from ttkit.update import Pair

REWARDS = ("speedup", "threshold")
MEASURES = (
    "sample_fast_1",
    "sample_fast_1_point",
    "correct_rate",
    "speedup_gmean",
    "reward_mean",
    "reward_std",
    "entropy",
    "nll_mean",
    "distinct",
    "tokens_prompt",
    "tokens_completion",
)


@dataclass(frozen=True)
class TTT:
    """The settings of a run.

    `rollouts` are drawn for each task and step at `temperature`; after `steps` updates the last
    checkpoint is sampled too, so (steps + 1) * rollouts a task are spent. `objective` is a name in
    `ttkit.advantages.OBJECTIVES`; "entropy_bonus" is the global one plus `entropy_weight` times
    the mean token entropy (nats, at the sampling temperature). `reward` is the measured "speedup",
    or "threshold": 1 if the lower end of its interval exceeds `threshold`, else 0; an incorrect
    sample has 0 in both. `patience` ends the run when sample fast_1 has not risen for so many
    steps; 0 never does. `rank` is that of a fresh adapter. `max_tokens` ends a completion and
    normalises the loss. `sampling_batch` sequences are drawn together, and about `update_tokens`
    tokens, padding included, go through the model together in an update.
    """

    steps: int = 5
    rollouts: int = 16
    temperature: float = 1.0
    lr: float = 1e-3
    objective: str = "global"
    entropy_weight: float = 0.01
    reward: str = "speedup"
    threshold: float = 1.0
    patience: int = 0
    rank: int = 16
    max_tokens: int = 128
    prompt_style: str = "compact"
    action: str = "body"
    sampling_batch: int = 256
    update_tokens: int = 8192
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, known in (
            ("objective", self.objective, tuple(OBJECTIVES)),
            ("reward", self.reward, REWARDS),
        ):
            if value not in known:
                raise UsageError(f"unknown {name} {value!r}: it is one of {', '.join(known)}")
        for name in ("steps", "rollouts", "rank", "max_tokens", "sampling_batch", "update_tokens"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} = {getattr(self, name)}: TTT needs at least 1")
        if self.objective in ("group", "leave_one_out", "entropic") and self.rollouts < 2:
            raise UsageError(
                f"rollouts = {self.rollouts}: the objective {self.objective} compares the samples "
                "of a task with each other and needs at least 2"
            )
        if not (0 < self.temperature < math.inf and 0 < self.lr < math.inf):
            raise UsageError("TTT needs a temperature and a learning rate above 0")
        if min(self.patience, self.entropy_weight, self.seed) < 0:
            raise UsageError("patience, entropy_weight and seed cannot be negative")

    @property
    def bonus(self) -> float:
        """The weight of the entropy in the loss."""
        return self.entropy_weight if self.objective == "entropy_bonus" else 0.0


@dataclass(frozen=True)
class Rollouts:
    """The judged rollouts of a step, task after task: samples-table rows with `logps`, and what
    each is for the model: prompt ids, completion ids."""

    tasks: list[Task]
    rows: list[dict[str, Any]]
    pairs: list[Pair]

    @property
    def known(self) -> np.ndarray:
        """(tasks, rollouts): False where the verifier failed, which is no fault of the sample."""
        known = [row["status"] != "infra_error" for row in self.rows]
        return np.reshape(known, (len(self.tasks), -1))

    def rewards(self, run: TTT) -> np.ndarray:
        """(tasks, rollouts). What is not known counts as the mean of its task's others."""
        if run.reward == "speedup":
            values = [speedup_reward(r["correct"], r["speedup"]) for r in self.rows]
        else:
            p = run.threshold
            values = [threshold_reward(r["correct"], r["speedup_lo"], p) for r in self.rows]
        found, known = np.reshape(values, self.known.shape), self.known
        means = np.nanmean(np.where(known, found, np.nan), axis=1, keepdims=True)
        return np.where(known, found, means)


def draw(
    model: Any, tokenizer: Any, tasks: list[Task], run: TTT, arm: str, step: int, stream: int
) -> list[dict[str, Any]]:
    """Rollouts as rows of a samples table, with `logps`; `stream` tells random numbers apart."""
    seed = int(np.random.SeedSequence([run.seed, stream]).generate_state(1)[0])
    params = SamplingParams(run.rollouts, run.temperature, 1.0, run.max_tokens, seed)
    chats = [prompts.messages(task, run.prompt_style, run.action) for task in tasks]
    drawn = TransformersSampler(model, tokenizer, run.sampling_batch).sample(chats, params)
    identity = {"arm": arm, "step": step, "temperature": run.temperature, "seed": seed}
    rows = sample_rows(tasks, drawn, identity, run.action)
    logps = [completion.logps for completions in drawn for completion in completions]
    return [{**row, "logps": values} for row, values in zip(rows, logps, strict=True)]


def judged(rows: list[dict[str, Any]], tasks: list[Task], judge: Judge) -> list[dict[str, Any]]:
    """The rows with the columns of their verdicts; each different program is judged once.

    Raises InfraError when nothing of a task could be measured.
    """
    by_key = {task.key: task for task in tasks}
    distinct = {(row["task"], row["code_sha256"]): row["code"] for row in rows}
    verdicts = judge([(by_key[task], code) for (task, _), code in distinct.items()])
    columns = dict(zip(distinct, map(_verdict, verdicts), strict=True))
    found = [{**row, **columns[row["task"], row["code_sha256"]]} for row in rows]
    for task in tasks:
        mine = [row for row in found if row["task"] == task.key]
        if all(row["status"] == "infra_error" for row in mine):
            raise InfraError(
                f"no rollout of {task.key} could be measured ({mine[0]['reason'] or 'no reason'}): "
                "see `ttkit doctor`, then give the same command again"
            )
    return found


def _verdict(verdict: Judged) -> dict[str, Any]:
    """The verdict's columns; a judge without intervals has its estimate for both ends."""
    speedup = float(verdict.speedup) if verdict.correct else math.nan
    plain: dict[str, Any] = {"speedup_lo": speedup, "speedup_hi": speedup, "candidate_ms": math.nan}
    plain |= {"reference_ms": math.nan, "n_pairs": 0, "reason": "", "protocol": ""}
    return {
        "status": verdict.status,
        "correct": bool(verdict.correct),
        "speedup": speedup,
        **{name: getattr(verdict, name, value) for name, value in plain.items()},
        "flags": ",".join(getattr(verdict, "flags", ())),
    }


def measured(rollouts: Rollouts, rewards: np.ndarray) -> dict[str, Any]:
    """What the history says of the rollouts: `MEASURES`."""
    known = rollouts.known.ravel()
    table = pd.DataFrame(rollouts.rows)[known]
    right = table["correct"].astype(bool)
    return {
        "sample_fast_1": float((right & (table["speedup_lo"] > 1)).mean()),
        "sample_fast_1_point": float((right & (table["speedup"] > 1)).mean()),
        "correct_rate": float(right.mean()),
        "speedup_gmean": geometric_mean(table["speedup"][right]),
        "reward_mean": float(rewards.ravel()[known].mean()),
        "reward_std": float(rewards.ravel()[known].std()),
        "entropy": float(np.average(table["entropy_mean"], weights=table["n_tokens"])),
        "nll_mean": float(table["nll_mean"].mean()),
        "distinct": int(len(table.drop_duplicates(["task", "code_sha256"]))),
        "tokens_prompt": sum(len(prompt) for prompt, _ in rollouts.pairs),
        "tokens_completion": sum(len(completion) for _, completion in rollouts.pairs),
    }
