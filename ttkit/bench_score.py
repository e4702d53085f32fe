"""How much faster are many checkpoints scored together than one sequence at a time?"""

from __future__ import annotations

import shutil
import statistics
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
    repeats: int = 5,
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
    adapters, tokenising. The two take turns, `repeats` times. Keys: seconds_together and
    seconds_one_at_a_time (for all, by that count; medians), ratio (median of the turns' own) with
    ratio_lowest and ratio_highest, largest_difference (nats of nll_sum), ok (8x and 1e-4; in other
    dtypes than float32 the first only), and what was scored: samples, distinct, checkpoints,
    tokens, device, threads.

    Raises UsageError when the run has no complete notebooks 01 and 02.
    """
    root = project_root()
    base = root / run / "01_train_base_policy"
    for stage in (base, root / run / "02_best_of_n"):
        if not (stage / "DONE").is_file():
            raise UsageError(
                f"the benchmark needs {stage.name} of {run}: `ttkit run --only 01,02 --out {run}`"
            )
    if min(checkpoints, samples, singles, repeats) < 1:
        raise UsageError("the benchmark needs at least one checkpoint, sample and repeat")
    table = read_samples(root / run / "02_best_of_n" / "samples.parquet")
    table = table[table["temperature"] == table["temperature"].max()]
    table = table.sort_values(["index", "task"]).head(samples)
    tasks = {key: find_task(key, scale, kernelbench_dir) for key in table["task"].unique()}
    chats = {key: prompts.messages(task, prompt_style, action) for key, task in tasks.items()}
    given = [chats[key] for key in table["task"]]
    ids = [[int(token) for token in row] for row in table["token_ids"]]
    together, alone = [], []
    with tempfile.TemporaryDirectory() as folder:
        adapters = _adapters(base / "adapter", Path(folder), checkpoints)
        last, model_dir = adapters[checkpoints - 1], base / "model"
        model, tokenizer = load(model_dir, last, device, dtype)
        chosen = range(0, len(ids), max(1, len(ids) // singles))
        pairs = [(prompt_ids(tokenizer, given[i]), ids[i]) for i in chosen]
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        score_checkpoints(model_dir, {0: last}, given[:1], ids[:1], **place)  # imports, a context
        for _ in range(repeats):
            began = time.perf_counter()
            found = score_checkpoints(model_dir, adapters, given, ids, **place)
            together.append(time.perf_counter() - began)
            with torch.inference_mode():
                _one(model, pairs[0], tokenizer.pad_token_id)
                began = time.perf_counter()
                single = [_one(model, pair, tokenizer.pad_token_id) for pair in pairs]
                seconds = (time.perf_counter() - began) / len(pairs)
            alone.append(seconds * len(ids) * checkpoints)
    ours = [found[checkpoints - 1][i].nll_sum for i in chosen]
    difference = max(abs(a - b) for a, b in zip(ours, single, strict=True))
    ratios = [a / b for a, b in zip(alone, together, strict=True)]
    ratio = statistics.median(ratios)
    same = difference <= WITHIN or dtype != "float32"
    return {
        "seconds_together": round(statistics.median(together), 3),
        "seconds_one_at_a_time": round(statistics.median(alone), 3),
        "ratio": round(ratio, 2),
        "ratio_lowest": round(min(ratios), 2),
        "ratio_highest": round(max(ratios), 2),
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
