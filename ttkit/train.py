"""The base policy: GRPO with a LoRA adapter on the train tasks (paper, outer loop).

TRL's `GRPOTrainer` does the training. Here are the reward (judged by a callable, so that this
module knows no verifier), the history, and what makes a killed run continue.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import random
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd
from transformers import TrainerCallback

from ttkit import prompts
from ttkit.errors import UsageError
from ttkit.journal import disk, sha256_of, to_json, write_atomic
from ttkit.policy import load, lora_config
from ttkit.rewards import Baseline, FixedBaseline, RunningMedian, rewards, transform
from ttkit.sampling import SamplingParams, TransformersSampler
from ttkit.scoring import check_adapter
from ttkit.tasks import Task

log = logging.getLogger(__name__)

BASELINES = ("fixed", "running_median")
DONE, HISTORY, ADAPTER = "grpo.json", "history.csv", "adapter"
BASELINE, STATE = "baseline.json", "ttkit.json"
COLUMNS = (
    "step",
    "tasks",
    "reward_mean",
    "reward_std",
    "correct_rate",
    "speedup_mean",
    "speedup_gmean",
    "entropy",
    "n_tokens",
    "distinct",
    "flat_groups",
    "loss",
    "grad_norm",
    "seconds_sampling",
    "seconds_verification",
    "seconds_update",
)


class Judged(Protocol):
    """What training needs of a verdict; `speedup` is NaN when not correct."""

    @property
    def correct(self) -> bool: ...

    @property
    def speedup(self) -> float: ...

    @property
    def status(self) -> str: ...


Judge = Callable[[list[tuple[Task, str]]], Sequence[Judged]]


@dataclass(frozen=True)
class GRPO:
    """The settings of a run.

    A step draws `group` completions for each of `tasks_per_step` tasks and makes one update.
    `micro_batch` completions at a time go through the update (default: all). `baseline` is what
    speedups are divided by (`ttkit.rewards`): "fixed", from `baseline_samples` completions a task
    of the initial policy, or "running_median", the paper's. `max_tokens` ends a completion, and
    is the constant that the dr_grpo loss is divided by.
    """

    steps: int = 16
    tasks_per_step: int = 8
    group: int = 8
    temperature: float = 1.0
    lr: float = 1e-3
    rank: int = 16
    max_tokens: int = 128
    prompt_style: str = "compact"
    action: str = "body"
    baseline: str = "fixed"
    baseline_samples: int = 8
    reward_transform: str = "none"
    micro_batch: int | None = None
    save_steps: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        transform(self.reward_transform)
        if self.baseline not in BASELINES:
            raise UsageError(
                f"unknown baseline {self.baseline!r}: it is one of {', '.join(BASELINES)}"
            )
        counts = ("steps", "tasks_per_step", "rank", "max_tokens", "baseline_samples", "save_steps")
        for name in counts:
            if getattr(self, name) < 1:
                raise UsageError(f"{name} = {getattr(self, name)}: GRPO needs at least 1")
        if self.group < 2:
            raise UsageError(
                f"group = {self.group}: GRPO compares the samples of a task with each other "
                "and needs at least 2"
            )
        if self.samples_per_step % (self.micro_batch or 1):
            raise UsageError(
                f"micro_batch = {self.micro_batch} does not divide the "
                f"{self.samples_per_step} samples of a step"
            )
        if not (self.temperature > 0 and self.lr > 0):
            raise UsageError("GRPO needs a temperature and a learning rate above 0")

    @property
    def samples_per_step(self) -> int:
        return self.tasks_per_step * self.group


@dataclass(frozen=True)
class TrainResult:
    """`adapter` is a PEFT directory for `policy.load`; `history` has one row a step.

    Columns: step, tasks (keys), reward_mean, reward_std, correct_rate, speedup_mean and
    speedup_gmean (of correct samples, NaN without one), entropy (nats a token, at the sampling
    temperature), n_tokens (mean completion length), distinct (different codes), flat_groups (tasks
    whose rewards were all equal: no gradient from them), loss, grad_norm (before clipping at 1),
    seconds_sampling, seconds_verification, seconds_update.
    """

    adapter: Path
    history: pd.DataFrame


def train_grpo(
    model_dir: str | Path,
    tasks: Sequence[Task],
    judge: Judge,
    out: str | Path,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    on_step: Callable[[dict[str, Any]], None] | None = None,
    on_baseline: Callable[[int, int], None] | None = None,
    **settings: Any,
) -> TrainResult:
    """Train a LoRA adapter on `tasks` into `out`, and return it with the history.

    `settings` are the fields of `GRPO`. `judge` runs (task, code) pairs and returns one verdict
    each, in order. `on_step` gets each row of the history as it is made; without it a progress
    bar is shown. `on_baseline(done, tasks)` is called while the fixed baseline is measured. Killed
    and called again with the same settings, it goes on from the last checkpoint; finished, it only
    reads the result.
    Raises UsageError for settings that make no sense, and when the loss is no longer a number (the
    last checkpoint is kept); InfraError when the saved adapter does not change the model.
    """
    run, out, model_dir = GRPO(**settings), Path(out), Path(model_dir)
    if len(tasks) < run.tasks_per_step:
        raise UsageError(
            f"tasks_per_step = {run.tasks_per_step} of only {len(tasks)} training tasks: "
            "name more tasks, or lower tasks_per_step"
        )
    model, tokenizer = load(model_dir, device=device, dtype=dtype)
    record = {
        **asdict(run),
        "tasks": [t.sha256 for t in tasks],
        "model": sha256_of(model_dir, whole=False),
    }
    if _read(out / DONE) == record:
        return TrainResult(out / ADAPTER, pd.read_csv(out / HISTORY))
    out.mkdir(parents=True, exist_ok=True)
    (out / DONE).unlink(missing_ok=True)
    checkpoint = _last_checkpoint(out, record)
    baseline: Baseline = RunningMedian()
    if run.baseline == "fixed":
        baseline = _fixed_baseline(
            out / BASELINE, model, tokenizer, tasks, judge, run, record, on_baseline
        )
    recorder = _Recorder(run, record, list(tasks), judge, baseline, on_step or _progress_bar(run))
    if checkpoint is not None:
        recorder.restore(checkpoint)
    trainer = _trainer(model, tokenizer, tasks, out, recorder, device, dtype)
    with disk(out), _divergence(run, out):
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        trainer.model.save_pretrained(out / ADAPTER)

    adapted, _ = load(model_dir, out / ADAPTER, device, dtype)
    chats = [prompts.messages(task, run.prompt_style, run.action) for task in tasks]
    codes = [task.forward_body if run.action == "body" else task.code for task in tasks]
    if any(row["flat_groups"] < run.tasks_per_step for row in recorder.history):
        check_adapter(adapted, tokenizer, chats, codes)
    else:
        log.warning("the rewards of every group of every step were equal: nothing was learned")
    table = pd.DataFrame(recorder.history, columns=list(COLUMNS)).to_csv(index=False)
    write_atomic(out / HISTORY, table.encode())
    write_atomic(out / DONE, to_json(record))
    return TrainResult(out / ADAPTER, pd.read_csv(out / HISTORY))


def _trainer(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[Task],
    out: Path,
    recorder: _Recorder,
    device: str,
    dtype: str,
) -> Any:
    from datasets import Dataset
    from transformers import PrinterCallback, set_seed
    from trl import GRPOConfig, GRPOTrainer

    run = recorder.run
    micro_batch = run.micro_batch or run.samples_per_step
    config = GRPOConfig(
        output_dir=str(out),
        max_steps=run.steps,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=run.samples_per_step // micro_batch,
        num_generations=run.group,
        max_completion_length=run.max_tokens,
        temperature=run.temperature,
        learning_rate=run.lr,
        lr_scheduler_type="constant",
        beta=0.0,
        loss_type="dr_grpo",
        scale_rewards="none",
        disable_dropout=True,
        shuffle_dataset=False,  # the deck below is shuffled already, by this run's seed
        gradient_checkpointing=False,
        use_cpu=device == "cpu",
        bf16=dtype == "bfloat16",
        fp16=dtype == "float16",
        logging_steps=1,
        logging_nan_inf_filter=False,  # it would replace the very value that has to stop the run
        save_steps=run.save_steps,
        save_total_limit=2,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=device != "cpu",
        seed=run.seed,
    )
    order = _deck(len(tasks), run)
    chats = [prompts.messages(tasks[i], run.prompt_style, run.action) for i in order]
    set_seed(run.seed)  # LoRA's initial weights are drawn before the trainer seeds anything
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=recorder.reward,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": chats, "task": order}),
        processing_class=tokenizer,
        callbacks=[recorder],
        peft_config=lora_config(model, run.rank),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


@contextlib.contextmanager
def _divergence(run: GRPO, out: Path) -> Iterator[None]:
    """Weights that are no longer numbers, met in an update or in sampling: one sentence."""
    try:
        yield
    except (FloatingPointError, RuntimeError) as error:
        if not isinstance(error, FloatingPointError) and "probability tensor" not in str(error):
            raise
        raise UsageError(
            f"training diverged ({error}): lower lr, now {run.lr:g}; "
            f"the last checkpoint is kept in {out}"
        ) from error


def _deck(n_tasks: int, run: GRPO) -> list[int]:
    """Task numbers, step after step; no task twice in a step, and all before any comes again."""
    rng, deck, order = random.Random(run.seed), list[int](), list[int]()
    for _ in range(run.steps):
        if len(deck) < run.tasks_per_step:
            deck = rng.sample(range(n_tasks), n_tasks)
        order += [deck.pop() for _ in range(run.tasks_per_step)]
    return order


class _Recorder(TrainerCallback):
    """The reward function, and the history that it and TRL's log make together."""

    def __init__(
        self,
        run: GRPO,
        record: dict[str, Any],
        tasks: list[Task],
        judge: Judge,
        baseline: Baseline,
        on_step: Callable[[dict[str, Any]], None],
    ) -> None:
        self.run, self.record, self.tasks = run, record, tasks
        self.judge, self.baseline, self.on_step = judge, baseline, on_step
        self.transform = transform(run.reward_transform)
        self.history: list[dict[str, Any]] = []
        self.row: dict[str, Any] = {}
        self.started = self.rewarded = 0.0

    def reward(
        self,
        completions: list[list[dict[str, str]]],
        completion_ids: list[list[int]],
        task: list[int],
        **_: Any,
    ) -> list[float | None]:
        began = time.perf_counter()
        chosen = [self.tasks[i] for i in task]
        codes = [prompts.extract(c[0]["content"], self.run.action) for c in completions]
        verdicts = self.judge(list(zip(chosen, codes, strict=True)))
        correct = [v.correct for v in verdicts]
        speedups = [v.speedup for v in verdicts]
        raw = rewards([t.key for t in chosen], correct, speedups, self.baseline)
        failed = np.array([v.status == "infra_error" for v in verdicts])
        values = _neutral([self.transform(r) for r in raw], failed, self.run.group)
        gained = np.array([s for ok, s in zip(correct, speedups, strict=True) if ok])
        groups = np.reshape(values, (-1, self.run.group))
        self.rewarded = time.perf_counter()
        self.row = {
            "tasks": " ".join(dict.fromkeys(t.key for t in chosen)),
            "reward_mean": float(np.mean(values)),
            "reward_std": float(np.std(values)),
            "correct_rate": float(np.mean(correct)),
            "speedup_mean": float(gained.mean()) if len(gained) else math.nan,
            "speedup_gmean": float(np.exp(np.log(gained).mean())) if len(gained) else math.nan,
            "n_tokens": float(np.mean([len(ids) for ids in completion_ids])),
            "distinct": len({prompts.code_sha256(code) for code in codes}),
            "flat_groups": int((np.ptp(groups, axis=1) == 0).sum()),
            "seconds_sampling": began - self.started,
            "seconds_verification": self.rewarded - began,
        }
        return list(values)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.row["seconds_update"] = time.perf_counter() - self.rewarded

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" not in logs:  # the summary at the end of training
            return
        step, loss, norm = state.global_step, float(logs["loss"]), float(logs["grad_norm"])
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise FloatingPointError(f"at step {step}: loss {loss}, gradient norm {norm}")
        if self.row["flat_groups"] == self.run.tasks_per_step:
            log.warning("step %d: the rewards of every group are equal: no gradient", step)
        made = {"loss": loss, "grad_norm": norm, "entropy": float(logs["entropy"])}
        self.history.append({"step": step, **self.row, **made})
        self.on_step(self.history[-1])

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # written last, so that a checkpoint with it is a whole one
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        seen = getattr(self.baseline, "seen", {})
        moving = {task: list(values) for task, values in seen.items()}
        state = {"record": self.record, "history": self.history, "baseline": moving}
        write_atomic(folder / STATE, to_json(state))

    def restore(self, checkpoint: Path) -> None:
        saved = _read(checkpoint / STATE)
        self.history = saved["history"]
        if isinstance(self.baseline, RunningMedian):
            for task, speedups in saved["baseline"].items():
                for speedup in speedups:
                    self.baseline.observe(task, True, speedup)


def _neutral(values: list[float], failed: np.ndarray, group: int) -> list[float]:
    """Rewards with those of samples that could not be judged replaced by their group's mean.

    A failure of the harness is not the model's: such a sample gets no advantage.
    """
    rewards = np.reshape(values, (-1, group)).astype(float)
    judged = ~failed.reshape(rewards.shape)
    counts = np.maximum(judged.sum(axis=1, keepdims=True), 1)
    means = (rewards * judged).sum(axis=1, keepdims=True) / counts
    return np.where(judged, rewards, means).ravel().tolist()


def _fixed_baseline(
    path: Path,
    model: Any,
    tokenizer: Any,
    tasks: Sequence[Task],
    judge: Judge,
    run: GRPO,
    record: dict[str, Any],
    on_baseline: Callable[[int, int], None] | None,
) -> FixedBaseline:
    """Per-task medians of the initial policy, kept in `path` for a run that is resumed."""
    saved = _read(path)
    if saved is not None and saved["record"] == record:
        return FixedBaseline(saved["medians"])
    params = SamplingParams(
        n=run.baseline_samples,
        temperature=run.temperature,
        max_tokens=run.max_tokens,
        seed=run.seed,
    )
    sampler = TransformersSampler(model, tokenizer, batch_size=run.samples_per_step)
    drawn = sampler.sample(
        [prompts.messages(t, run.prompt_style, run.action) for t in tasks], params
    )
    seen: list[tuple[str, bool, float]] = []
    for done, (task, completions) in enumerate(zip(tasks, drawn, strict=True), start=1):
        codes = [prompts.extract(completion.text, run.action) for completion in completions]
        seen += [(task.key, v.correct, v.speedup) for v in judge([(task, c) for c in codes])]
        if on_baseline is not None:
            on_baseline(done, len(tasks))
    baseline = FixedBaseline.of(seen)
    write_atomic(path, to_json({"record": record, "medians": dict(baseline.medians)}))
    return baseline


def _last_checkpoint(out: Path, record: dict[str, Any]) -> Path | None:
    """The newest whole checkpoint of this run; others (torn, or of other settings) are deleted."""
    whole: list[Path] = []
    for folder in out.glob("checkpoint-*"):
        saved = _read(folder / STATE)
        if saved is not None and saved["record"] == record:
            whole.append(folder)
        else:
            shutil.rmtree(folder)
    return max(whole, key=lambda folder: int(folder.name.split("-")[1]), default=None)


def _read(path: Path) -> Any:
    return json.loads(path.read_text()) if path.is_file() else None


def _progress_bar(run: GRPO) -> Callable[[dict[str, Any]], None]:
    from tqdm.auto import tqdm

    bar = tqdm(total=run.steps, desc="GRPO", unit="step")

    def report(row: dict[str, Any]) -> None:
        bar.set_postfix(correct=f"{row['correct_rate']:.0%}", reward=f"{row['reward_mean']:.2f}")
        bar.update(row["step"] - bar.n)
        if row["step"] == run.steps:
            bar.close()

    return report
