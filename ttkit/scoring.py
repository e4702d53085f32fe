"""Log-probabilities of given completions under a model, teacher-forced."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ttkit.errors import InfraError
from ttkit.policy import prompt_ids


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
