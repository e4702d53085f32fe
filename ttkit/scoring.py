"""Log-probabilities of given completions, teacher-forced: under a model, or under many adapters.

Both give the same numbers in float32, to about 1e-5. `score_checkpoints` is the faster one where
prompts are shared: each is read once a checkpoint, and each different completion of it once.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import DynamicCache

from ttkit.errors import InfraError, UsageError
from ttkit.journal import sha256_of
from ttkit.policy import load, load_adapter, prompt_ids

Label = TypeVar("Label", bound=Hashable)
Ids = tuple[int, ...]

PROMPTS_AT_ONCE = 16
WORKERS = 8  # at most, of a model of at most 50 million parameters: 0.2 GB each
SMALL_PARAMETERS = 50_000_000
LOGITS_AT_ONCE = 1 << 27  # elements: 0.5 GiB in float32, whatever the vocabulary


@dataclass(frozen=True)
class Score:
    """NLLs (nats) of one completion's tokens, its stop token included if it has one.

    `entropy_mean` is the mean entropy (nats) of the next-token distributions along it. All belong
    to the distribution at the temperature that was asked for.
    """

    nll_sum: float
    nll_mean: float
    nll_max: float
    entropy_mean: float


def score(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[dict[str, str]]],
    completions_token_ids: Sequence[Sequence[int]],
    temperature: float = 1.0,
    batch_size: int = 64,
) -> list[Score]:
    """Score completion i after prompt i (chat messages), in float32, in batches of like length.

    With the `token_ids` of a `Completion` this gives back its `nll_sum` (temperature 1) or its
    `nll_sum_temp` (the sampling temperature). Raises ValueError for lists of unequal lengths, an
    empty completion, or a temperature that is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"cannot score at temperature {temperature}: it has to be positive")
    if not all(map(len, completions_token_ids)):
        raise ValueError("cannot score an empty completion")
    prompt_cache = {id(p): prompt_ids(tokenizer, p) for p in prompts}
    pairs = [
        (prompt_cache[id(prompt)], list(ids))
        for prompt, ids in zip(prompts, completions_token_ids, strict=True)
    ]
    # by completion length first: the head, the dearest part of a large vocabulary, runs over it
    order = sorted(range(len(pairs)), key=lambda i: (len(pairs[i][1]), len(pairs[i][0])))
    results: dict[int, Score] = {}
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for first in range(0, len(order), batch_size):
                rows = order[first : first + batch_size]
                logps, entropies, mask = token_logprobs(
                    model, [pairs[i] for i in rows], tokenizer.pad_token_id, temperature
                )
                for i, logp, entropy, kept in zip(
                    rows, logps.cpu(), entropies.cpu(), mask.cpu(), strict=True
                ):
                    nll = -logp[kept].double()
                    results[i] = Score(
                        nll.sum().item(),
                        nll.mean().item(),
                        nll.max().item(),
                        entropy[kept].double().mean().item(),
                    )
    finally:
        model.train(training)
    return [results[i] for i in range(len(pairs))]


def token_logprobs(
    model: Any,
    pairs: Sequence[tuple[list[int], list[int]]],
    pad: int,
    temperature: float = 1.0,
    entropy: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(log-probs, entropies, mask) of the completions in (prompt ids, completion ids) pairs.

    Each is (pairs, longest completion), aligned on the right; the mask is False on padding.
    Differentiable when gradients are on. Without `entropy`, which costs as much as the log-probs,
    the entropies are 0.
    """
    device = model.device
    width = max(len(p) + len(c) for p, c in pairs)
    longest = max(len(c) for _, c in pairs)
    ids = torch.tensor([[pad] * (width - len(p) - len(c)) + p + c for p, c in pairs], device=device)
    lengths = torch.tensor([[len(p) + len(c), len(c)] for p, c in pairs], device=device)
    places = torch.arange(width, device=device)
    attention = (places >= width - lengths[:, :1]).long()
    logits = model(
        input_ids=ids,
        attention_mask=attention,
        position_ids=(attention.cumsum(1) - 1).clamp(min=0),
        logits_to_keep=longest + 1,
        use_cache=False,
    ).logits[:, :-1]
    logps = (logits.float() / temperature).log_softmax(-1)
    mask = places[-longest:] >= width - lengths[:, 1:]
    taken = logps.gather(2, ids[:, -longest:, None])[..., 0]
    if not entropy:
        return taken, torch.zeros_like(taken), mask
    # a clamp keeps 0 * -inf, of tokens the model rules out, from becoming nan
    entropies = -(logps.exp() * logps.clamp(min=-1e4)).sum(-1)
    return taken, entropies, mask


def check_adapter(
    model: Any, tokenizer: Any, prompts: Sequence[list[dict[str, str]]], texts: Sequence[str]
) -> float:
    """The largest change in NLL (nats) of `texts` that the PEFT model's active adapter makes.

    Raises InfraError when it makes none: more than one library has dropped adapters without a
    word, and everything after would measure the base model.
    """
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    adapted = score(model, tokenizer, prompts, ids)
    with model.disable_adapter():
        base = score(model, tokenizer, prompts, ids)
    change = max(abs(a.nll_sum - b.nll_sum) for a, b in zip(adapted, base, strict=True))
    if not change > 0:
        raise InfraError(
            "the adapter did not take: log-probs with it equal those of the base model (if the "
            "rewards of every step were equal, it had nothing to learn from)"
        )
    return change


# --- many checkpoints ---------------------------------------------------------------------------


def score_checkpoints(
    model_dir: str | Path,
    checkpoints: Mapping[Label, str | Path | None],
    prompts: Sequence[list[dict[str, str]]],
    completions_token_ids: Sequence[Sequence[int] | None],
    *,
    device: str = "cpu",
    dtype: str = "float32",
    temperature: float = 1.0,
    batch_size: int = 32,
    on_checkpoint: Callable[[int, int], None] = lambda done, total: None,
) -> dict[Label, list[Score]]:
    """Score completion i after prompt i under each PEFT directory; None is the bare model.

    For each label, the scores in the order of the completions, equal to those of `score`. The model
    is loaded once and takes one adapter at a time. `batch_size` completions at most go through
    it together. `on_checkpoint(done, total)` is called after each checkpoint.

    Raises UsageError for a checkpoint that is missing or does not fit, for a completion without
    token ids, with ids that the model does not have, or longer with its prompt than the model's
    positions; InfraError when two different adapters give equal scores throughout: the second has
    then not been put on.
    """
    if not checkpoints:
        raise UsageError("there is no checkpoint to score under: run notebook 03 first")
    if len(prompts) != len(completions_token_ids):
        raise ValueError(f"{len(prompts)} prompts for {len(completions_token_ids)} completions")
    if not temperature > 0:
        raise ValueError(f"cannot score at temperature {temperature}: it has to be positive")
    base, tokenizer = load(model_dir, None, device, dtype)
    read = {id(prompt): tuple(prompt_ids(tokenizer, prompt)) for prompt in prompts}
    pairs = [
        (read[id(prompt)], _checked(ids, i, len(read[id(prompt)]), base.config))
        for i, (prompt, ids) in enumerate(zip(prompts, completions_token_ids, strict=True))
    ]
    found: dict[Label, list[Score]] = {}
    models = _under(base, checkpoints.values(), merge=dtype == "float32")
    with _side_by_side(base) as (pool, workers):
        labels = iter(checkpoints)
        while together := list(itertools.islice(models, workers)):
            scored = [
                pool.submit(
                    _score_distinct,
                    *(model, set(pairs), tokenizer.pad_token_id, temperature, batch_size),
                )
                for model in together
            ]
            for future in scored:
                scores = future.result()
                found[next(labels)] = [scores[pair] for pair in pairs]
                on_checkpoint(len(found), len(checkpoints))
    _check_taken(checkpoints, found)
    return found


def _under(base: Any, paths: Iterable[str | Path | None], merge: bool) -> Iterator[Any]:
    """`base` with each adapter on it, and bare for None; a model that was not merged is good until
    the next is asked for.

    Merged into a copy, an adapter costs no time of its own (a fifth of a small model's); weights of
    fewer bits would be rounded by that.
    """
    for path in paths:
        if path is None:
            yield base
        elif merge:
            yield load_adapter(copy.deepcopy(base), path).merge_and_unload()
        else:
            model = load_adapter(base, path)
            yield model
            model.unload()


@contextlib.contextmanager
def _side_by_side(model: Any) -> Iterator[tuple[ThreadPoolExecutor, int]]:
    """A pool of threads that share the cores, and their number: 1 unless the model is small, on the
    CPU, and in float32.

    Two cores at one small matrix product spend much of their time waiting for each other.
    """
    threads, size = torch.get_num_threads(), sum(p.numel() for p in model.parameters())
    alone = size > SMALL_PARAMETERS or model.device.type != "cpu" or model.dtype != torch.float32
    workers = 1 if alone else min(threads, WORKERS)
    share = threads // workers
    try:
        with ThreadPoolExecutor(workers, "score", torch.set_num_threads, (share,)) as pool:
            yield pool, workers
    finally:
        torch.set_num_threads(threads)


def _checked(ids: Any, i: int, prompt: int, config: Any) -> Ids:
    if ids is None or len(ids) == 0:
        raise UsageError(
            f"sample {i} has no token ids, so its log-probability under another checkpoint cannot "
            "be taken: sample again with a back end that gives them"
        )
    known, most = config.vocab_size, getattr(config, "max_position_embeddings", None)
    if max(ids) >= known:
        raise UsageError(
            f"sample {i} has the token {max(ids)} and the model only {known}: the sample was drawn "
            "with another model"
        )
    if most and prompt + len(ids) > most:
        raise UsageError(
            f"sample {i} has {prompt + len(ids)} tokens with its prompt, the model {most} "
            "positions: leave it out, or sample with a smaller max_tokens"
        )
    return tuple(int(token) for token in ids)


def _check_taken(
    checkpoints: Mapping[Label, str | Path | None], found: Mapping[Label, list[Score]]
) -> None:
    labels = [label for label, path in checkpoints.items() if path is not None]
    for one, other in zip(labels, labels[1:], strict=False):
        if found[one] == found[other] and found[one]:
            paths = [Path(checkpoints[label] or "") for label in (one, other)]
            files = {sha256_of(path / "adapter_model.safetensors") for path in paths}
            if len(files) > 1:
                raise InfraError(
                    f"the adapters {paths[0]} and {paths[1]} differ, but every score under them is "
                    "the same: the second was not put on the model"
                )


def _score_distinct(
    model: Any, pairs: set[tuple[Ids, Ids]], pad: int, temperature: float, batch_size: int
) -> dict[tuple[Ids, Ids], Score]:
    """The scores of different (prompt, completion) pairs, each prompt read once."""
    by_prompt: dict[Ids, list[Ids]] = {}
    for prompt, completion in sorted(pairs):
        by_prompt.setdefault(prompt, []).append(completion)
    prompts = sorted(by_prompt, key=len)  # of like length, for little padding
    found = {}
    with torch.inference_mode():
        for first in range(0, len(prompts), PROMPTS_AT_ONCE):
            group = prompts[first : first + PROMPTS_AT_ONCE]
            rows = [(place, c) for place, p in enumerate(group) for c in by_prompt[p]]
            cache, mask = _read_prompts(model, group, pad)
            for batch in _batches(rows, batch_size, model.config.vocab_size):
                values = _continue(model, group, cache, mask, batch, pad, temperature)
                for (place, completion), score in zip(batch, values, strict=True):
                    found[group[place], completion] = score
    return found


def _read_prompts(model: Any, prompts: Sequence[Ids], pad: int) -> tuple[Any, torch.Tensor]:
    """The cache of the prompts but for their last tokens, padded on the left, and its mask."""
    width = max(map(len, prompts))
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    mask = mask.to(model.device)[:, :-1]
    cache = DynamicCache(config=model.config)
    if width > 1:
        ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts])
        model(
            input_ids=ids.to(model.device)[:, :-1],
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            past_key_values=cache,
            logits_to_keep=1,
        )
    return cache, mask


def _batches(
    rows: list[tuple[int, Ids]], batch_size: int, vocab: int
) -> Iterator[list[tuple[int, Ids]]]:
    """Rows of like length, the longest first, so that a lack of memory shows at once."""
    rows = sorted(rows, key=lambda row: len(row[1]), reverse=True)
    while rows:
        size = min(batch_size, max(1, LOGITS_AT_ONCE // (len(rows[0][1]) * vocab)))
        yield rows[:size]
        rows = rows[size:]


def _continue(
    model: Any,
    prompts: Sequence[Ids],
    cache: Any,
    mask: torch.Tensor,
    rows: Sequence[tuple[int, Ids]],
    pad: int,
    temperature: float,
) -> list[Score]:
    """Score (place of the prompt, completion) rows on copies of the prompts' cache."""
    device = model.device
    places = torch.tensor([place for place, _ in rows], device=device)
    lengths = torch.tensor([len(completion) for _, completion in rows], device=device)
    longest = int(lengths.max())
    own = copy.deepcopy(cache)
    if mask.shape[1]:
        own.batch_select_indices(places)
    # A prompt's last token comes with the completion, so that its logits are of the first token of
    # that. Padding is on the right, where causal attention does not see it.
    padded = [[prompts[p][-1], *c] + [pad] * (longest - len(c)) for p, c in rows]
    ids = torch.tensor(padded, device=device)
    starts = mask[places].sum(1, keepdim=True)
    logits = model(
        input_ids=ids[:, :-1],
        attention_mask=torch.cat([mask[places], torch.ones_like(ids[:, :-1])], 1),
        position_ids=starts + torch.arange(longest, device=device),
        past_key_values=own,
    ).logits
    # the clamp keeps 0 * -inf, of tokens the model rules out, from becoming nan
    scaled = logits.float() if temperature == 1 else logits.float() / temperature
    logps = scaled.log_softmax(-1).clamp_(min=-1e4)
    taken = logps.gather(2, ids[:, 1:, None])[..., 0].double()
    entropies = -logps.exp().mul_(logps).sum(-1).double()
    kept = torch.arange(longest, device=device) < lengths[:, None]
    nll = torch.where(kept, -taken, 0.0)
    sums = nll.sum(1)
    entropy = torch.where(kept, entropies, 0.0).sum(1) / lengths
    columns = torch.stack([sums, sums / lengths, nll.max(1).values, entropy], 1).cpu()
    return [Score(*values) for values in columns.tolist()]
