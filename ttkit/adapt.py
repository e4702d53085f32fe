"""Test-time training (paper, inner loop): a few policy-gradient steps on the evaluation tasks.

A step draws R rollouts of each task under the checkpoint at hand, has them judged, and makes one
update of the LoRA adapter (`ttkit.update`). Its rollouts serve twice: they score the checkpoint
that drew them, and they are the batch of the update to the next one. `batch_ttt` adapts one policy
to all tasks together, `isolated_ttt` one to each; `ttkit.sdpo` is the same loop with other
advantages. Which checkpoint to take is asked of the history: `ttkit.trajectory`.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from ttkit import prompts
from ttkit.advantages import OBJECTIVES
from ttkit.errors import InfraError, UsageError
from ttkit.journal import disk, sha256_of, to_json, write_atomic
from ttkit.policy import load, lora_config, prompt_ids
from ttkit.rollouts import MEASURES, TTT, Rollouts, draw, judged, measured
from ttkit.scoring import score
from ttkit.tasks import Task
from ttkit.train import Judge
from ttkit.trajectory import stopped
from ttkit.update import update

log = logging.getLogger(__name__)

RECORD, HISTORY, STATE, OPTIMIZER = "ttt.json", "history.csv", "ttkit.json", "optimizer.pt"
FRESH = 1_000_000  # stands for the step of samples that no update has seen, in their seed
PROBE = 8  # sequences scored after an update, to see that it took
SECONDS = ("seconds_sampling", "seconds_verification")
UPDATE = ("loss", "grad_norm", "tokens_teacher", "teacher_gap", "seconds_update")
COLUMNS = ("step", *MEASURES, *SECONDS, *UPDATE)


@dataclass(frozen=True)
class Adaptation:
    """What came of a run; `checkpoints[s]` is a PEFT directory, [0] the unadapted start.

    `history` has one row a step s. Of the rollouts under checkpoint s (infra_error left out):
    sample_fast_1 (interval rule), sample_fast_1_point, correct_rate, speedup_gmean (of correct
    ones), reward_mean, reward_std, entropy (nats a token, temperature 1), nll_mean (nats a token,
    temperature 1, mean over samples), distinct (different programs), tokens_prompt and
    tokens_completion (summed over rollouts), seconds_sampling, seconds_verification. Of the update
    to s + 1, and nan in the last row: loss, grad_norm (before clipping at 1), tokens_teacher (read
    by a teacher: 0 but for SDPO), teacher_gap (its mean log-prob above the policy's, nats a token;
    nan but for SDPO), seconds_update. `samples` has the rows of `best_of_n`, but for
    the column `run`.
    """

    checkpoints: list[Path]
    history: pd.DataFrame
    samples: pd.DataFrame


# What a batch teaches: for each sample one advantage, or one a token, None if there is no gradient
# in it; and the columns of the history that are about a teacher.
Credit = tuple[Sequence[np.ndarray] | None, dict[str, float]]
Creditor = Callable[[Any, Any, Rollouts, np.ndarray], Credit]


def batch_ttt(
    model_dir: str | Path,
    adapter: str | Path | None,
    tasks: Sequence[Task],
    judge: Judge,
    out: str | Path,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    on_step: Callable[[dict[str, Any]], None] | None = None,
    **settings: Any,
) -> Adaptation:
    """Adapt one policy to all of `tasks` together (paper: five tasks, 32 rollouts each, a step).

    `settings` are the fields of `TTT`. Training goes on from `adapter`, or from a fresh LoRA if it
    is None. `judge` runs (task, code) pairs, each different program once, and returns a verdict
    each, in order. `on_step` gets each row of the history as it is made. Killed and called again
    with the same arguments, it goes on from the last complete step; finished, it only reads.
    Raises UsageError for settings that make no sense and when training diverges, InfraError when
    the adapter does not change the model or nothing of a task could be measured.
    """
    run = TTT(**settings)

    def credit(model: Any, tokenizer: Any, rollouts: Rollouts, rewards: np.ndarray) -> Credit:
        values = np.where(rollouts.known, OBJECTIVES[run.objective](rewards), 0.0).ravel()
        return (list(values) if values.any() or run.bonus else None), {"tokens_teacher": 0}

    return adapt(run, "ttt", credit, model_dir, adapter, tasks, judge, out, device, dtype, on_step)


def isolated_ttt(
    model_dir: str | Path,
    adapter: str | Path | None,
    tasks: Sequence[Task],
    judge: Judge,
    out: str | Path,
    **options: Any,
) -> dict[str, Adaptation]:
    """`batch_ttt` on one task at a time, each from the same start: by task key.

    With one task the global advantage is the group's, divided by its standard deviation.
    """
    return {
        task.key: batch_ttt(
            model_dir, adapter, [task], judge, Path(out) / f"task_{i:02}", **options
        )
        for i, task in enumerate(tasks)
    }


def rescore(
    model_dir: str | Path,
    checkpoints: dict[int, Path],
    tasks: Sequence[Task],
    judge: Judge,
    *,
    arm: str = "ttt_fresh",
    device: str = "cpu",
    dtype: str = "float32",
    **settings: Any,
) -> pd.DataFrame:
    """Fresh samples under the checkpoints (by step): the rows of `Adaptation.samples`.

    A checkpoint that was chosen for its score looks better than it is; these samples had no part
    in the choice. `settings` are those of the run. Every checkpoint meets the same random numbers,
    which are not those of any step, so that differences between them are paired.
    """
    run, rows = TTT(**settings), []
    for step, path in checkpoints.items():
        model, tokenizer = load(model_dir, path, device, dtype)
        drawn = draw(model, tokenizer, list(tasks), run, arm, step, FRESH)
        rows += judged(drawn, list(tasks), judge)
    return pd.DataFrame(rows).drop(columns="logps")


# --- the loop, which SDPO shares ----------------------------------------------------------------


def adapt(
    run: TTT,
    arm: str,
    credit: Creditor,
    model_dir: str | Path,
    adapter: str | Path | None,
    tasks: Sequence[Task],
    judge: Judge,
    out: str | Path,
    device: str,
    dtype: str,
    on_step: Callable[[dict[str, Any]], None] | None,
) -> Adaptation:
    """The loop of `batch_ttt`, with the advantages that `credit` gives."""
    if not tasks:
        raise UsageError("test-time training needs at least one task")
    out, start = Path(out), None if adapter is None else sha256_of(Path(adapter))
    record = {**asdict(run), "arm": arm, "tasks": [task.sha256 for task in tasks], "dtype": dtype}
    record |= {"model": sha256_of(Path(model_dir), whole=False), "adapter": start}
    history = _open(out, json.loads(to_json(record)))
    if history is None:
        return _result(out)
    resumed = _folder(out, len(history))
    model, tokenizer = _policy(
        model_dir, resumed if resumed.is_dir() else adapter, run, device, dtype
    )
    loop = _Loop(run, arm, credit, out, list(tasks), judge, model, tokenizer, history)
    if resumed.is_dir():
        saved = torch.load(resumed / OPTIMIZER, map_location=model.device)
        loop.optimizer.load_state_dict(saved)
    else:
        loop.save(0)
    with _divergence(run, out):
        while loop.step():
            (on_step or _quiet)(history[-1])
    (on_step or _quiet)(history[-1])
    write_atomic(
        out / HISTORY, pd.DataFrame(history, columns=list(COLUMNS)).to_csv(index=False).encode()
    )
    for leftover in out.glob(f"step_*/{OPTIMIZER}"):
        leftover.unlink()
    write_atomic(out / RECORD, to_json({"record": record, "done": True}))
    return _result(out)


@dataclass
class _Loop:
    """A run at work: `history` grows by a row a step."""

    run: TTT
    arm: str
    credit: Creditor
    out: Path
    tasks: list[Task]
    judge: Judge
    model: Any
    tokenizer: Any
    history: list[dict[str, Any]]
    optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        weights = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(weights, lr=self.run.lr, weight_decay=0.0)

    def step(self) -> bool:
        """Score the checkpoint at hand; unless it is the last, make and save the next: True."""
        step = len(self.history)
        rollouts, row = self.rollouts(step)
        rewards = rollouts.rewards(self.run)
        row |= measured(rollouts, rewards) | dict.fromkeys(UPDATE, math.nan)
        self.history.append(row)
        if step == self.run.steps or stopped(pd.DataFrame(self.history), self.run.patience):
            return False
        self.learn(step, rollouts, rewards)
        return True

    def rollouts(self, step: int) -> tuple[Rollouts, dict[str, Any]]:
        """The rollouts of a step, judged; read back if a killed run has left them."""
        path = self.out / f"rollouts_{step:02}.parquet"
        if not path.is_file():
            began = time.perf_counter()
            rows = draw(self.model, self.tokenizer, self.tasks, self.run, self.arm, step, step)
            if not all(math.isfinite(row["nll_sum"]) for row in rows):
                shutil.rmtree(_folder(self.out, step))  # whoever loads it gets no number either
                raise FloatingPointError(f"log-probs at step {step} are not numbers")
            drawn = time.perf_counter()
            rows = judged(rows, self.tasks, self.judge)
            took = dict(zip(SECONDS, (drawn - began, time.perf_counter() - drawn), strict=True))
            buffer = io.BytesIO()
            pd.DataFrame(rows).assign(**took).to_parquet(buffer, index=False)
            write_atomic(path, buffer.getvalue())
        table = pd.read_parquet(path)
        seconds = {name: float(table[name].iloc[0]) for name in SECONDS}
        rows = table.drop(columns=list(SECONDS)).to_dict("records")
        heads = {
            task.key: prompt_ids(
                self.tokenizer, prompts.messages(task, self.run.prompt_style, self.run.action)
            )
            for task in self.tasks
        }
        pairs = [(heads[row["task"]], row["token_ids"].tolist()) for row in rows]
        return Rollouts(self.tasks, rows, pairs), {"step": step, **seconds}

    def learn(self, step: int, rollouts: Rollouts, rewards: np.ndarray) -> None:
        """The update to checkpoint `step` + 1, and that checkpoint."""
        row, began = self.history[-1], time.perf_counter()
        values, teacher = self.credit(self.model, self.tokenizer, rollouts, rewards)
        row |= teacher
        if values is None:
            # no optimiser step either: Adam's momentum would move the weights all the same
            log.warning("step %d: all advantages are 0, no gradient: nothing is changed", step)
            row |= {"loss": 0.0, "grad_norm": 0.0, "seconds_update": 0.0}
            self.save(step + 1)
            return
        first = not any(past["grad_norm"] > 0 for past in self.history[:-1])
        before = self.probe(rollouts) if first else None
        row["loss"], row["grad_norm"] = update(
            self.model,
            self.optimizer,
            rollouts.pairs,
            [r["logps"] for r in rollouts.rows],
            values,
            pad=self.tokenizer.pad_token_id,
            temperature=self.run.temperature,
            max_tokens=self.run.max_tokens,
            entropy_weight=self.run.bonus,
            batch_tokens=self.run.update_tokens,
        )
        row["seconds_update"] = time.perf_counter() - began
        if not np.isfinite(self.probe(rollouts)).all():
            raise FloatingPointError(f"log-probs after step {step} are not numbers")
        self.save(step + 1)
        if before is not None and row["grad_norm"] > 0:
            self.check_took(step + 1, rollouts, before)

    def probe(self, rollouts: Rollouts) -> np.ndarray:
        """NLLs of a few completions of the batch, the same ones in the same order every time."""
        some = range(0, len(rollouts.rows), max(1, len(rollouts.rows) // PROBE))
        chats = {
            task.key: prompts.messages(task, self.run.prompt_style, self.run.action)
            for task in self.tasks
        }
        chosen = [chats[rollouts.rows[i]["task"]] for i in some]
        ids = [rollouts.pairs[i][1] for i in some]
        return np.array([s.nll_sum for s in score(self.model, self.tokenizer, chosen, ids)])

    def check_took(self, step: int, rollouts: Rollouts, before: np.ndarray) -> None:
        """InfraError if checkpoint `step`, as read from its folder, scores as the one before did:
        more than one library has dropped adapters without a word."""
        folder = _folder(self.out, step)
        self.model.load_adapter(str(folder), "reread")
        self.model.set_adapter("reread")
        after = self.probe(rollouts)
        self.model.set_adapter("default")
        self.model.delete_adapter("reread")
        if (after == before).all():
            shutil.rmtree(folder)
            raise InfraError(
                f"the adapter did not take: log-probs under {folder.name} equal those before it "
                f"although a gradient was applied (or lr = {self.run.lr:g} is lost in rounding)"
            )

    def save(self, step: int) -> None:
        """The checkpoint with all that it takes to go on: a whole folder or none."""
        folder, partial = _folder(self.out, step), self.out / ".partial"
        shutil.rmtree(partial, ignore_errors=True)
        with disk(folder):
            partial.mkdir()
            try:
                self.model.save_pretrained(partial)
                state = io.BytesIO()
                torch.save(self.optimizer.state_dict(), state)
                write_atomic(partial / OPTIMIZER, state.getvalue())
                write_atomic(partial / STATE, to_json(self.history))
                os.replace(partial, folder)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
        (_folder(self.out, step - 1) / OPTIMIZER).unlink(missing_ok=True)


def _policy(
    model_dir: str | Path, adapter: str | Path | None, run: TTT, device: str, dtype: str
) -> tuple[Any, Any]:
    model, tokenizer = load(model_dir, adapter, device, dtype, trainable=True)
    if adapter is None:
        from peft import get_peft_model

        torch.manual_seed(run.seed)
        model = get_peft_model(model, lora_config(model, run.rank)).eval()
    return model, tokenizer


def _open(out: Path, record: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The history of a run that is to go on, [] for a new one, None for a finished one.

    What other settings have left in `out` is deleted.
    """
    old = json.loads((out / RECORD).read_text()) if (out / RECORD).is_file() else {}
    if old.get("record") == record and old["done"]:
        return None
    if old.get("record") != record:
        for item in [*out.glob("step_*"), *out.glob("rollouts_*"), out / HISTORY]:
            shutil.rmtree(item) if item.is_dir() else item.unlink(missing_ok=True)
        write_atomic(out / RECORD, to_json({"record": record, "done": False}))
    last = max(out.glob("step_*"), default=None)
    return [] if last is None else json.loads((last / STATE).read_text())


def _result(out: Path) -> Adaptation:
    tables = [pd.read_parquet(path) for path in sorted(out.glob("rollouts_*.parquet"))]
    samples = pd.concat(tables, ignore_index=True).drop(columns=["logps", *SECONDS])
    return Adaptation(sorted(out.glob("step_*")), pd.read_csv(out / HISTORY), samples)


def _folder(out: Path, step: int) -> Path:
    return out / f"step_{step:02}"


@contextlib.contextmanager
def _divergence(run: TTT, out: Path) -> Iterator[None]:
    """Weights that are no longer numbers, met in an update or in sampling: one sentence."""
    try:
        yield
    except FloatingPointError as error:
        raise UsageError(
            f"test-time training diverged ({error}): lower lr, now {run.lr:g}; "
            f"the last good checkpoint is kept in {out}"
        ) from error


def _quiet(row: dict[str, Any]) -> None:
    """For who does not listen."""
