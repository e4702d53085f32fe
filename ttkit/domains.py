"""The values that a parameter may have, beyond its type: refused by name before anything starts.

A parameter that is not named here may have any value of its type. Where a module has the list of
the values that it knows, a test holds this one against it, so that a run need not import it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ttkit.errors import UsageError

CHOICES: dict[str, tuple[object, ...]] = {
    "source": ("minibench", "kernelbench"),
    "scale": ("cpu", "gpu"),
    "level": (1, 2, 3),
    "other_level": (1, 2, 3),
    "dtype": ("float32", "float16", "bfloat16"),
    "prompt_style": ("compact", "full"),
    "action": ("body", "module"),
    "baseline": ("fixed", "running_median"),
    "reward_transform": ("none", "log1p", "clip"),
    "protocol": ("rigorous", "reward", "full", "fast-proxy"),
    "train_protocol": ("rigorous", "reward", "full", "fast-proxy"),
    "ttt_subset": (1, 2),
    "ttt_objective": ("global", "group", "leave_one_out", "entropic", "entropy_bonus"),
    "ttt_reward": ("speedup", "threshold"),
    "sdpo_wording": ("outcome", "paper"),
}
AT_LEAST_1 = {
    *("aa_tasks", "aa_runs", "aa_workers", "corpus_size", "pretrain_batch", "max_links", "vocab"),
    *("hidden", "layers", "max_tokens", "tasks_per_step", "group_size", "lora_rank"),
    *("baseline_samples", "check_samples", "k", "tasks_per_batch", "bootstrap", "ttt_tasks"),
    *("ttt_steps", "ttt_rollouts", "ttt_fresh", "top_k", "probe_samples", "transfer_samples"),
    "judged_samples",
}
NOT_BELOW_0 = {
    *("seed", "split_seed", "max_train_tasks", "max_eval_tasks", "grpo_steps", "sdpo_steps"),
    *("ttt_patience", "transfer_step", "gate_std", "ttt_entropy_weight", "sdpo_beta"),
}
ABOVE_0 = {
    *("grpo_temperature", "learning_rate", "temperatures", "timing_seconds", "ttt_temperature"),
    *("ttt_lr", "ttt_threshold", "top_p"),
}
AT_MOST_1 = {"expert_share", "top_p"}
FOLDERS = {"model", "kernelbench_dir"}
# Tasks that have samples at this temperature only are compared with those that notebook 02 drew.
SAMPLED_AT = "ttt_temperature"


def check(name: str, value: Any, where: str) -> None:
    """Raises UsageError, naming `where` the value came from, for one outside its domain."""
    if value is None:
        return
    if value == [] and name in {*AT_LEAST_1, *ABOVE_0}:
        raise UsageError(f"{where}: {name} must have one value at least, not []")
    for item in value if isinstance(value, list) else [value]:
        if wanted := _wrong(name, item):
            raise UsageError(f"{where}: {name} must be {wanted}, not {item!r}")


def _wrong(name: str, value: Any) -> str:
    """What `value` should be; empty if that is what it is."""
    if name in CHOICES and value not in CHOICES[name]:
        return f"one of {', '.join(map(str, CHOICES[name]))}"
    if name in AT_LEAST_1 and value < 1:
        return "1 or more"
    if name in NOT_BELOW_0 and value < 0:
        return "0 or more"
    if name in ABOVE_0 and value <= 0:
        return "above 0"
    if name in AT_MOST_1 and not 0 <= value <= 1:
        return "between 0 and 1"
    return ""


def check_together(values: Mapping[str, Any], notebooks: Iterable[str], root: Path) -> None:
    """What a run of these notebooks needs beside each other and outside, before it starts.

    Raises UsageError for a folder that does not exist, a temperature of the adaptation at which
    notebook 02 draws nothing to compare with, and a CUDA device where there is none.
    """
    for name in sorted(FOLDERS & set(values)):
        if values[name] is not None and not (root / values[name]).exists():
            raise UsageError(f"{name} is {values[name]}, and there is no such folder")
    adapts = any(name.startswith(("03_", "06_")) for name in notebooks)
    drawn = values.get("temperatures")
    if adapts and drawn and values.get(SAMPLED_AT, drawn[0]) not in drawn:
        raise UsageError(
            f"{SAMPLED_AT} is {values[SAMPLED_AT]:g}, and the samples that notebooks 03 and 06 "
            f"compare with are drawn at temperatures={drawn}: add it there"
        )
    check_device(values.get("device", "cpu"))


def check_device(device: str) -> None:
    """Raises UsageError unless `device` is cpu, or a CUDA device that torch sees here."""
    if device == "cpu":
        return
    kind, _, index = device.partition(":")
    if kind != "cuda" or (index and not index.isdigit()):
        raise UsageError(f"unknown device {device!r}: name cpu, cuda or cuda:1")
    import torch  # takes seconds

    there = torch.cuda.device_count()
    if int(index or 0) >= there:
        raise UsageError(
            f"device {device!r} was asked for, but torch sees {there} CUDA devices here: use "
            "device=cpu, or install a CUDA build of torch on a GPU machine (see `ttkit doctor`)"
        )
