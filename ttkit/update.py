"""One policy-gradient update of a LoRA adapter, from rollouts and their advantages.

The loss is dr_grpo's (arXiv 2503.20783), a sum over tokens with a constant normaliser:

    L = -1 / (B max_tokens) sum_i sum_t A_it pi(t) / pi_old(t)  -  w mean_t H(t)

All probabilities, and the entropy H of the bonus, are those of the sampling temperature; pi_old are
the sampler's own log-probs. Nothing is clipped: with one update a batch the ratio is 1, up to the
rounding by which sampler and trainer differ.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from ttkit.scoring import token_logprobs

Pair = tuple[list[int], list[int]]  # prompt ids, completion ids
MAX_NORM = 1.0  # gradients are clipped to it, as by TRL's default


def update(
    model: Any,
    optimizer: torch.optim.Optimizer,
    pairs: Sequence[Pair],
    old_logps: Sequence[np.ndarray],
    advantages: Sequence[np.ndarray],
    *,
    pad: int,
    temperature: float,
    max_tokens: int,
    entropy_weight: float = 0.0,
    batch_tokens: int = 8192,
) -> tuple[float, float]:
    """One optimiser step on the whole batch; returns the loss and the gradient's norm, unclipped.

    An item of `advantages` is one number, or one a token of its completion. The batch goes through
    the model in parts of like length, of about `batch_tokens` tokens with padding. Raises
    FloatingPointError, the weights as they were, when loss or gradient is not a number.
    """
    optimizer.zero_grad(set_to_none=True)
    tokens = sum(len(completion) for _, completion in pairs)
    total = 0.0
    for rows in buckets(pairs, batch_tokens):
        part = [pairs[i] for i in rows]
        logps, entropies, mask = token_logprobs(
            model, part, pad, temperature, entropy=entropy_weight > 0
        )
        old, credit = torch.zeros(2, *mask.shape, dtype=logps.dtype)
        for row, i in enumerate(rows):
            old[row, -len(pairs[i][1]) :] = torch.tensor(old_logps[i])
            credit[row, -len(pairs[i][1]) :] = torch.tensor(advantages[i])
        # padding has advantage 0; its log-probs must not overflow the ratio
        change = torch.where(mask, logps - old.to(logps.device), 0.0)
        gain = (change.exp() * credit.to(logps.device)).sum() / (len(pairs) * max_tokens)
        loss = -gain
        if entropy_weight > 0:
            loss = loss - entropy_weight * (entropies * mask).sum() / tokens
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.item()
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(weights, MAX_NORM).item()
    if not (math.isfinite(total) and math.isfinite(norm)):
        raise FloatingPointError(f"loss {total}, gradient norm {norm}")
    optimizer.step()
    return total, norm


def buckets(pairs: Sequence[Pair], batch_tokens: int) -> Iterator[list[int]]:
    """Indices of `pairs` in parts of like length: padded, a part has at most `batch_tokens` tokens,
    but always one pair."""
    order = sorted(range(len(pairs)), key=lambda i: sum(map(len, pairs[i])))
    part: list[int] = []
    for i in order:  # ascending, so that the newcomer is the longest
        if part and (len(part) + 1) * sum(map(len, pairs[i])) > batch_tokens:
            yield part
            part = []
        part.append(i)
    yield part
