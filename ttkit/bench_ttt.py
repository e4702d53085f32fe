"""Speed of test-time training, as ratios within one run: `ttkit bench ttt`.

Two comparisons on one model, one set of prompts and one device, in turn, medians over repeats:

- *update*: `ttkit.update` against the bare work that no update can avoid: forward, backward and
  optimiser step over the same tokens in the same parts, logits of the completions only, with a
  plain cross-entropy for a loss.
- *step*: sampling and update of `ttkit.adapt` against a step of TRL's `GRPOTrainer` on as many
  prompts and samples; what is drawn differs, so the time is taken per token drawn as well.

Verification is left out of both. What is not covered: several GPUs, and models beyond one device.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ttkit import prompts
from ttkit.policy import load, lora_config, prompt_ids
from ttkit.rollouts import TTT, draw
from ttkit.tasks import Task
from ttkit.update import MAX_NORM, Pair, buckets, update


def bench(
    model_dir: str | Path,
    tasks: Sequence[Task],
    *,
    device: str = "cpu",
    dtype: str = "float32",
    repeats: int = 5,
    **settings: Any,
) -> dict[str, Any]:
    """Seconds (medians over `repeats`) and their ratios; `settings` are those of `TTT`.

    Keys update_seconds, bare_seconds, update_ratio (ours over bare: 1 is the floor), step_seconds,
    trl_seconds, step_ratio (ours over TRL's, below 1 is faster), step_tokens and trl_tokens (drawn
    a step), step_ratio_per_token, samples, tokens (of the update's batch, without padding), device.
    """
    from peft import get_peft_model

    run, tasks = TTT(**settings), list(tasks)
    model, tokenizer = load(model_dir, device=device, dtype=dtype)
    torch.manual_seed(run.seed)
    model = get_peft_model(model, lora_config(model, run.rank)).eval()
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-12, weight_decay=0.0)  # every repeat: one policy
    heads = {
        task.key: prompt_ids(tokenizer, prompts.messages(task, run.prompt_style, run.action))
        for task in tasks
    }
    credit = np.random.default_rng(run.seed).normal(size=len(tasks) * run.rollouts)

    def sampled(step: int) -> tuple[list[Pair], list[Any]]:
        rows = draw(model, tokenizer, tasks, run, "bench", step, step)
        pairs = [(heads[row["task"]], row["token_ids"]) for row in rows]
        return pairs, [row["logps"] for row in rows]

    def ours(pairs: list[Pair], logps: list[Any]) -> None:
        update(
            model,
            optimizer,
            pairs,
            logps,
            list(credit),
            pad=tokenizer.pad_token_id,
            temperature=run.temperature,
            max_tokens=run.max_tokens,
            batch_tokens=run.update_tokens,
        )

    pairs, logps = sampled(0)
    updates, bares, steps = list[float](), list[float](), list[float]()
    drawn = list[int]()
    for _ in range(repeats + 1):  # the first is a warm-up
        updates.append(_seconds(device, ours, pairs, logps))
        bares.append(
            _seconds(
                device, _bare, model, optimizer, pairs, tokenizer.pad_token_id, run.update_tokens
            )
        )

    def step() -> None:
        batch = sampled(len(drawn) + 1)
        drawn.append(sum(len(completion) for _, completion in batch[0]))
        ours(*batch)

    def turn() -> None:
        steps.append(_seconds(device, step))

    trl, trl_tokens = _trl(model_dir, tasks, run, device, dtype, repeats + 1, turn)
    took = {
        name: statistics.median(values[1:])
        for name, values in (
            ("update_seconds", updates),
            ("bare_seconds", bares),
            ("step_seconds", steps),
            ("trl_seconds", trl),
        )
    }
    ratio = took["step_seconds"] / took["trl_seconds"]
    counts = statistics.median(drawn[1:]), statistics.median(trl_tokens[1:])
    return {
        **took,
        "update_ratio": took["update_seconds"] / took["bare_seconds"],
        "step_ratio": ratio,
        "step_tokens": counts[0],
        "trl_tokens": counts[1],
        "step_ratio_per_token": ratio * counts[1] / counts[0],
        "samples": len(pairs),
        "tokens": sum(len(prompt) + len(completion) for prompt, completion in pairs),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu",
    }


def _seconds(device: str, work: Any, *arguments: Any) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    work(*arguments)
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def _bare(
    model: Any, optimizer: torch.optim.Optimizer, pairs: list[Pair], pad: int, batch_tokens: int
) -> None:
    """Forward, backward and optimiser step with the cross-entropy of the completions."""
    optimizer.zero_grad(set_to_none=True)
    for rows in buckets(pairs, batch_tokens):
        part = [pairs[i] for i in rows]
        width = max(len(p) + len(c) for p, c in part)
        ids = [[pad] * (width - len(p) - len(c)) + p + c for p, c in part]
        longest = max(len(c) for _, c in part)
        labels = torch.tensor([[-100] * (longest - len(c)) + c for _, c in part])
        mask = [[0] * (width - len(p) - len(c)) + [1] * (len(p) + len(c)) for p, c in part]
        inputs = {"input_ids": ids, "attention_mask": mask}
        tensors = {k: torch.tensor(v, device=model.device) for k, v in inputs.items()}
        found = model(**tensors, use_cache=False, logits_to_keep=longest + 1).logits[:, :-1]
        targets = labels.to(model.device).flatten()
        torch.nn.functional.cross_entropy(found.flatten(0, 1), targets).backward()
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    torch.nn.utils.clip_grad_norm_(weights, MAX_NORM)
    optimizer.step()


def _trl(
    model_dir: str | Path,
    tasks: list[Task],
    run: TTT,
    device: str,
    dtype: str,
    steps: int,
    turn: Callable[[], None],
) -> tuple[list[float], list[int]]:
    """Seconds of each step of a GRPOTrainer, and the completion tokens that it drew.

    `turn` is called before each step and not counted.
    """
    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    model, tokenizer = load(model_dir, device=device, dtype=dtype)
    chats = [prompts.messages(task, run.prompt_style, run.action) for task in tasks]
    seconds, tokens = list[float](), list[int]()

    class Clock(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            turn()
            self.began = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if device.startswith("cuda"):
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - self.began)

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
        tokens.append(sum(map(len, completion_ids)))
        return [float(len(ids)) for ids in completion_ids]

    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=len(tasks) * run.rollouts,
            num_generations=run.rollouts,
            max_completion_length=run.max_tokens,
            temperature=run.temperature,
            learning_rate=1e-12,
            beta=0.0,
            loss_type="dr_grpo",
            scale_rewards="none",
            disable_dropout=True,
            gradient_checkpointing=False,
            use_cpu=device == "cpu",
            bf16=dtype == "bfloat16",
            fp16=dtype == "float16",
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=device != "cpu",
            seed=run.seed,
        )
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=reward,
            args=config,
            train_dataset=Dataset.from_dict({"prompt": chats * steps}),
            processing_class=tokenizer,
            callbacks=[Clock()],
            peft_config=lora_config(model, run.rank),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return seconds, tokens
