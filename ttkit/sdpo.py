"""SDPO: self-distillation as the source of advantages (arXiv 2601.20802; paper, inner loop).

The teacher is the policy itself, reading the prompt with a further text: what became of the
attempt, or another attempt that was right. It scores the tokens of the attempt, and where it finds
a token likelier than the policy did when sampling it, that token is reinforced:
A_t = beta (log p_teacher(t) - log p_student(t)), both at the sampling temperature. The reward
enters through the text alone. The loop is that of `ttkit.adapt`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ttkit import prompts
from ttkit.adapt import Adaptation, Credit, adapt
from ttkit.errors import UsageError
from ttkit.policy import prompt_ids
from ttkit.rollouts import TTT, Rollouts
from ttkit.scoring import token_logprobs
from ttkit.tasks import Task
from ttkit.train import Judge
from ttkit.update import buckets

FEEDBACK = ("none", "outcome", "paper")
PEER = "\nCorrect solution:\n\n{code}\n"
HEADS = {
    "outcome": "\nThe following is feedback on your earlier attempt:\n\n{text}\n",
    # what the paper says of every attempt, the successful ones too
    "paper": "\nThe following is feedback from your unsuccessful earlier attempt:\n\n{text}\n",
}
ASK = "\nCorrectly solve the original question.\n"


@dataclass(frozen=True)
class SDPO(TTT):
    """The settings of `TTT`, of which objective and reward are not used, and the teacher's.

    `beta` scales the advantages. `feedback` is what the teacher reads of the attempt: "none" (the
    paper's prompt-only), "outcome" (worded by what really came out), or "paper" (the same facts
    after the paper's words, which call every attempt unsuccessful). With `peer` it also reads the
    fastest other program for the task in the batch that is correct, if there is one.
    """

    beta: float = 1.0
    feedback: str = "none"
    peer: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.feedback not in FEEDBACK:
            raise UsageError(
                f"unknown feedback {self.feedback!r}: it is one of {', '.join(FEEDBACK)}"
            )
        if not self.beta > 0:
            raise UsageError(f"beta = {self.beta}: it has to be above 0")


def sdpo(
    model_dir: str | Path,
    adapter: str | Path | None,
    tasks: Sequence[Task],
    judge: Judge,
    out: str | Path,
    *,
    arm: str = "sdpo",
    device: str = "cpu",
    dtype: str = "float32",
    on_step: Callable[[dict[str, Any]], None] | None = None,
    **settings: Any,
) -> Adaptation:
    """As `ttkit.adapt.batch_ttt`, with the teacher's advantages; `settings` are those of `SDPO`.

    With the seed of a TTT run, step 0 draws the same rollouts. Raises what `batch_ttt` raises.
    """
    run = SDPO(**settings)

    def credit(model: Any, tokenizer: Any, rollouts: Rollouts, rewards: np.ndarray) -> Credit:
        values, read = teacher_gaps(model, tokenizer, rollouts, run)
        gap = float(np.concatenate(values).mean())
        values = [
            run.beta * gaps * known for gaps, known in zip(values, rollouts.known.flat, strict=True)
        ]
        flat = not any(gaps.any() for gaps in values)
        return None if flat else values, {"tokens_teacher": read, "teacher_gap": gap}

    return adapt(run, arm, credit, model_dir, adapter, tasks, judge, out, device, dtype, on_step)


def teacher_gaps(
    model: Any, tokenizer: Any, rollouts: Rollouts, run: SDPO
) -> tuple[list[np.ndarray], int]:
    """log p_teacher - log p_student (nats) of every token of every rollout; the tokens read."""
    by_key = {task.key: task for task in rollouts.tasks}
    pairs = []
    for row, (_, completion) in zip(rollouts.rows, rollouts.pairs, strict=True):
        peer = best_peer(row, rollouts.rows) if run.peer else None
        pairs.append(
            (prompt_ids(tokenizer, messages(by_key[row["task"]], row, peer, run)), completion)
        )
    gaps: list[np.ndarray] = [np.empty(0)] * len(pairs)
    with torch.inference_mode():
        for rows in buckets(pairs, run.update_tokens):
            logps, _, mask = token_logprobs(
                model,
                [pairs[i] for i in rows],
                tokenizer.pad_token_id,
                run.temperature,
                entropy=False,
            )
            for i, logp, kept in zip(rows, logps.cpu(), mask.cpu(), strict=True):
                gaps[i] = logp[kept].double().numpy() - np.asarray(rollouts.rows[i]["logps"])
    return gaps, sum(len(prompt) + len(completion) for prompt, completion in pairs)


def messages(task: Task, row: dict[str, Any], peer: str | None, run: SDPO) -> list[dict[str, str]]:
    """The chat that the teacher reads before the attempt `row`."""
    chat = prompts.messages(task, run.prompt_style, run.action)
    text = "" if peer is None else PEER.format(code=peer)
    if run.feedback != "none":
        text += HEADS[run.feedback].format(text=outcome(row))
    return [*chat[:-1], {**chat[-1], "content": chat[-1]["content"] + "\n" + text + ASK}]


def outcome(row: dict[str, Any]) -> str:
    """What became of an attempt, in words."""
    if row["correct"]:
        rate = row["speedup"]
        settled = row["speedup_lo"] > 1 or row["speedup_hi"] < 1
        word = ("faster" if rate > 1 else "slower") if settled else "not measurably faster"
        return f"It is correct and {word}: its speedup over the reference is {rate:.2f}."
    said = {
        "incorrect": "It returns wrong values",
        "compile_error": "It is not valid Python",
        "runtime_error": "It fails when it is run",
        "timeout": "It takes too long",
        "rejected": "It was rejected",
    }.get(row["status"], "It could not be measured")
    return f"{said}: {row['reason']}." if row["reason"] else f"{said}."


def best_peer(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str | None:
    """The fastest correct program for the same task that is not this one; None without any."""
    others = [
        other
        for other in rows
        if other["task"] == row["task"]
        and other["correct"]
        and other["code_sha256"] != row["code_sha256"]
    ]
    return max(others, key=lambda other: other["speedup"])["code"] if others else None
