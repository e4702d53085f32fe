"""How much faster are many checkpoints scored together than one sequence at a time?"""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from ttkit import prompts
from ttkit.errors import UsageError
from ttkit.policy import load, prompt_ids
from ttkit.scoring import score_checkpoints, token_logprobs
from ttkit.store import project_root, read_samples
from ttkit.tasks import find_task

WANTED = 8.0  # times faster
WITHIN = 1e-4  # nats between the two ways, in float32


def bench_score(
    run: str | Path = "runs/demo",
    checkpoints: int = 9,
    samples: int = 320,
    singles: int = 64,
    device: str = "cpu",
    dtype: str = "float32",
    prompt_style: str = "compact",
    action: str = "body",
    scale: str = "cpu",
    kernelbench_dir: str | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Score the first `samples` of a run's notebook 02 under `checkpoints` adapters, both ways.

    The adapters are copies of that of notebook 01 with its B matrices scaled by 0 to 1, the paper's
    nine by default. One at a time is a forward pass for each sequence, prompt and completion, with
    the adapter on, token ids at hand; of it `singles` sequences, evenly spread, are timed under
    the last adapter, the others counted as as many. `score_checkpoints` is timed whole: loading,
    adapters, tokenising. Keys: seconds_together, seconds_one_at_a_time (for all, by that count),
    ratio, largest_difference (nats of nll_sum), ok (8x and 1e-4; in other dtypes than float32 the
    first only), and what was scored: samples, distinct, checkpoints, tokens, device, threads.

    Raises UsageError when the run has no complete notebooks 01 and 02.
    """
    root = project_root()
    base = root / run / "01_train_base_policy"
    for stage in (base, root / run / "02_best_of_n"):
        if not (stage / "DONE").is_file():
            raise UsageError(
                f"the benchmark needs {stage.name} of {run}: `ttkit run --only 01,02 --out {run}`"
            )
    if min(checkpoints, samples, singles) < 1:
        raise UsageError("the benchmark needs at least one checkpoint and one sample")
    table = read_samples(root / run / "02_best_of_n" / "samples.parquet")
    table = table[table["temperature"] == table["temperature"].max()]
    table = table.sort_values(["index", "task"]).head(samples)
    tasks = {key: find_task(key, scale, kernelbench_dir) for key in table["task"].unique()}
    chats = {key: prompts.messages(task, prompt_style, action) for key, task in tasks.items()}
    given = [chats[key] for key in table["task"]]
    ids = [[int(token) for token in row] for row in table["token_ids"]]
    with tempfile.TemporaryDirectory() as folder:
        adapters = _adapters(base / "adapter", Path(folder), checkpoints)
        model_dir = base / "model"
        _warm_up(model_dir, adapters, given, ids, device, dtype)
        began = time.perf_counter()
        found = score_checkpoints(model_dir, adapters, given, ids, device=device, dtype=dtype)
        together = time.perf_counter() - began

        model, tokenizer = load(model_dir, adapters[checkpoints - 1], device, dtype)
    chosen = range(0, len(ids), max(1, len(ids) // singles))
    pairs = [(prompt_ids(tokenizer, given[i]), ids[i]) for i in chosen]
    with torch.inference_mode():
        token_logprobs(model, pairs[:1], tokenizer.pad_token_id)
        began = time.perf_counter()
        alone = [_one(model, pair, tokenizer.pad_token_id) for pair in pairs]
        seconds = (time.perf_counter() - began) / len(pairs) * len(ids) * checkpoints
    ours = [found[checkpoints - 1][i].nll_sum for i in chosen]
    difference = max(abs(a - b) for a, b in zip(ours, alone, strict=True))
    ratio = seconds / together
    same = difference <= WITHIN or dtype != "float32"
    return {
        "seconds_together": round(together, 3),
        "seconds_one_at_a_time": round(seconds, 3),
        "ratio": round(ratio, 2),
        "largest_difference": difference,
        "ok": bool(ratio >= WANTED and same),
        "samples": len(ids),
        "distinct": len({(key, tuple(i)) for key, i in zip(table["task"], ids, strict=True)}),
        "checkpoints": checkpoints,
        "tokens": sum(map(len, ids)),
        "device": torch.cuda.get_device_name(device) if device != "cpu" else "cpu",
        "threads": torch.get_num_threads(),
    }


def _one(model: Any, pair: tuple[list[int], list[int]], pad: int) -> float:
    logps, _, mask = token_logprobs(model, [pair], pad)
    return -float(logps[mask].double().sum())


def _adapters(adapter: Path, folder: Path, count: int) -> dict[int, Path]:
    from safetensors.torch import load_file, save_file

    weights = load_file(adapter / "adapter_model.safetensors")
    found = {}
    for step in range(count):
        found[step] = folder / f"step_{step:02}"
        shutil.copytree(adapter, found[step])
        share = step / max(1, count - 1) if count > 1 else 1.0
        scaled = {n: w * share if "lora_B" in n else w for n, w in weights.items()}
        save_file(scaled, found[step] / "adapter_model.safetensors", metadata={"format": "pt"})
    return found


def _warm_up(
    model_dir: Path,
    adapters: dict[int, Path],
    given: list[Any],
    ids: list[list[int]],
    device: str,
    dtype: str,
) -> None:
    """Imports, and on a GPU its context: neither is part of a measurement."""
    score_checkpoints(
        model_dir, {0: adapters[max(adapters)]}, given[:1], ids[:1], device=device, dtype=dtype
    )
