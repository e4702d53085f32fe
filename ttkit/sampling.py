"""Samplers: K completions a prompt, with the log-probabilities of what was sampled.

Both log-prob conventions are recorded, raw (temperature 1) and temperature-scaled, each as a sum
and a mean, since they rank samples differently. All are computed in float32 and before top-p.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList

from ttkit.errors import UsageError
from ttkit.policy import lean, prompt_ids, stop_ids, threads_that_pay

Messages = list[dict[str, str]]

# Tokens between two sweeps that drop the finished sequences of a batch. A GPU hardly notices them
# where it waits for launches, but does notice the sweep.
SEGMENT = {"cpu": 16, "cuda": 64}


@dataclass(frozen=True)
class SamplingParams:
    """`n` completions a prompt; `temperature` 0 is greedy; `seed` decides every sample."""

    n: int
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, good in (
            ("n", self.n, self.n >= 1),
            ("temperature", self.temperature, 0 <= self.temperature < float("inf")),
            ("top_p", self.top_p, 0 < self.top_p <= 1),
            ("max_tokens", self.max_tokens, self.max_tokens >= 1),
        ):
            if not good:
                raise UsageError(
                    f"{name} = {value} cannot be sampled with: n and max_tokens are at least 1, "
                    "temperature is finite and not negative, top_p is in (0, 1]"
                )


@dataclass(frozen=True)
class Completion:
    """One sampled completion. Log-probs are natural logarithms; an NLL is their negative.

    The stop token is part of `token_ids`, `n_tokens` and every NLL, but not of `text`. A completion
    cut off at `max_tokens` has no stop token and `finish_reason` "length" (otherwise "stop").
    `nll_sum`, `nll_mean`, `nll_max` (the least likely token) and `entropy_mean` (nats) belong to
    the raw distribution, temperature 1; `nll_sum_temp`, `nll_mean_temp` to the temperature-scaled
    one. Neither knows of top-p. At temperature 0 the scaled distribution has all its mass on the
    token that was taken, so both scaled values are 0. `logps` are the scaled log-probs token by
    token, for importance ratios; tables of samples keep the sums only.
    """

    text: str
    token_ids: tuple[int, ...]
    n_tokens: int
    finish_reason: str
    nll_sum: float
    nll_mean: float
    nll_sum_temp: float
    nll_mean_temp: float
    nll_max: float
    entropy_mean: float
    logps: tuple[float, ...] = field(default=(), repr=False)


class Sampler(Protocol):
    """What every back end offers: `params.n` completions for each prompt, in order."""

    def sample(
        self, prompts: Sequence[Messages], params: SamplingParams
    ) -> list[list[Completion]]: ...


def uniforms(prompt: Messages, params: SamplingParams) -> np.ndarray:
    """The random numbers behind a prompt's samples: (n, max_tokens), uniform on [0, 1).

    Row i depends on the seed, the prompt's text and i alone. Sample i is therefore the same
    whatever else is in the batch, for any K > i, and in a run that was killed and resumed.
    """
    digest = hashlib.sha256(json.dumps(prompt, sort_keys=True).encode()).digest()
    key = [params.seed, *np.frombuffer(digest, dtype=np.uint32).tolist()]
    rows = [
        np.random.default_rng([*key, i]).random(params.max_tokens, dtype=np.float32)
        for i in range(params.n)
    ]
    return np.stack(rows)


@dataclass
class _Draw(LogitsProcessor):
    """Chooses each next token by inverting the cumulative distribution, and records it.

    `generate` runs in greedy mode and sees only the choice, so that randomness is a fixed table
    of uniforms (rows, max_tokens) and logits need not be kept: memory is one step's logits.
    """

    table: torch.Tensor
    temperature: float
    top_p: float
    stops: torch.Tensor
    rows: torch.Tensor  # which row of the batch each row of the current segment is
    step: int = 0
    tokens: list[tuple[torch.Tensor, ...]] = field(default_factory=list)
    done: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.done = torch.zeros(len(self.rows), dtype=torch.bool, device=self.rows.device)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        raw = scores.float().log_softmax(-1)
        scaled = raw if self.temperature == 1 else self._scale(raw)
        if self.temperature == 0:
            token = raw.argmax(-1, keepdim=True)
        else:
            token = self._invert(scaled.exp())
        values = [raw.gather(1, token), scaled.gather(1, token), self._entropy(raw)]
        # All rows, finished ones too: to leave those out here would wait for the device each time.
        self.tokens.append((~self.done, self.rows, token[:, 0], torch.cat(values, 1)))
        self.done = self.done | torch.isin(token[:, 0], self.stops)
        self.step += 1
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)

    def _scale(self, raw: torch.Tensor) -> torch.Tensor:
        if self.temperature == 0:
            return torch.zeros_like(raw)
        return (raw / self.temperature).log_softmax(-1)

    @staticmethod
    def _entropy(raw: torch.Tensor) -> torch.Tensor:
        # exp(-inf) * -inf is nan for the tokens a model rules out; they add nothing
        return -(raw.exp() * raw.clamp(min=-1e4)).sum(-1, keepdim=True)

    def _invert(self, probs: torch.Tensor) -> torch.Tensor:
        if self.top_p < 1:
            sorted_probs, order = probs.sort(-1, descending=True)
            outside = sorted_probs.cumsum(-1) - sorted_probs >= self.top_p
            probs = torch.zeros_like(probs).scatter_(
                1, order, sorted_probs.masked_fill(outside, 0.0)
            )
        # float64: over a vocabulary of 200,000 a float32 running sum loses the rare tokens
        total = probs.cumsum(-1, dtype=torch.float64)
        target = self.table[self.rows, self.step, None].double() * total[:, -1:]
        # right=True steps over tokens of probability 0, which leave the sum where it was
        return torch.searchsorted(total, target, right=True).clamp(max=probs.shape[1] - 1)


class TransformersSampler:
    """Sampling with Hugging Face `generate`.

    A batch holds at most `batch_size` sequences: several prompts when `n` is small, a part of one
    prompt's when `n` is large. Prompts are left-padded; each prompt is read once and its cache
    shared out among its n sequences; finished sequences leave the batch now and then. With equal
    batches samples are identical to the bit; with others (a resumed run) the log-probs differ in
    the last digits and a token only where a random number falls into that gap.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        batch_size: int = 64,
        device: str | torch.device | None = None,
        on_batch: Callable[[int, int], None] | None = None,
    ) -> None:
        """`on_batch(finished, total)`, in completions, is called after each batch."""
        if batch_size < 1:
            raise UsageError(f"the sampler's batch_size is {batch_size}: it has to be at least 1")
        self.model = model if device is None else model.to(device)
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.on_batch = on_batch

    def sample(self, prompts: Sequence[Messages], params: SamplingParams) -> list[list[Completion]]:
        """`params.n` completions for each prompt, in the order of `prompts`."""
        ids = [prompt_ids(self.tokenizer, prompt) for prompt in prompts]
        tables = [uniforms(prompt, params) for prompt in prompts]
        results: list[list[Completion]] = [[] for _ in prompts]
        training = self.model.training
        self.model.eval()
        try:
            with lean(self.model), torch.inference_mode(), threads_that_pay(self.model):
                for batch in self._batches(len(prompts), params.n):
                    parts = [(ids[i], tables[i][rows]) for i, rows in batch]
                    for (i, _), found in zip(batch, self._generate(parts, params), strict=True):
                        results[i].extend(found)
                    if self.on_batch:
                        self.on_batch(sum(map(len, results)), len(prompts) * params.n)
        finally:
            self.model.train(training)
        return results

    def _batches(self, n_prompts: int, n: int) -> Iterator[list[tuple[int, slice]]]:
        """Groups of (prompt, its rows), with equally many rows a prompt: the cache fans out."""
        size = min(n, self.batch_size)
        prompts_per_batch = max(1, self.batch_size // size)
        for first in range(0, n_prompts, prompts_per_batch):
            group = range(first, min(first + prompts_per_batch, n_prompts))
            for start in range(0, n, size):
                yield [(i, slice(start, min(start + size, n))) for i in group]

    def _generate(
        self, parts: list[tuple[list[int], np.ndarray]], params: SamplingParams
    ) -> list[list[Completion]]:
        device = self.model.device
        copies = len(parts[0][1])
        width = max(len(ids) for ids, _ in parts)
        pad = self.tokenizer.pad_token_id
        padded = torch.tensor([[pad] * (width - len(i)) + i for i, _ in parts], device=device)
        mask = torch.tensor(
            [[0] * (width - len(i)) + [1] * len(i) for i, _ in parts], device=device
        )
        cache = DynamicCache(config=self.model.config)
        if width > 1:
            # the last prompt token is left to `generate`, which needs one token to start from
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            self.model(
                input_ids=padded[:, :-1],
                attention_mask=mask[:, :-1],
                position_ids=positions[:, :-1],
                past_key_values=cache,
                logits_to_keep=1,
            )
            cache.batch_repeat_interleave(copies)
        sequences = padded.repeat_interleave(copies, 0)
        mask = mask.repeat_interleave(copies, 0)

        stops = torch.tensor(stop_ids(self.model, self.tokenizer), device=device)
        draw = _Draw(
            table=torch.from_numpy(np.concatenate([table for _, table in parts])).to(device),
            temperature=params.temperature,
            top_p=params.top_p,
            stops=stops,
            rows=torch.arange(len(sequences), device=device),
        )
        segment = SEGMENT["cpu" if device.type == "cpu" else "cuda"]
        while draw.step < params.max_tokens and len(sequences):
            before = sequences.shape[1]
            sequences = self.model.generate(
                sequences,
                attention_mask=mask,
                past_key_values=cache,
                logits_processor=LogitsProcessorList([draw]),
                generation_config=_greedy(
                    min(segment, params.max_tokens - draw.step), stops.tolist(), pad
                ),
            )
            mask = torch.nn.functional.pad(mask, (0, sequences.shape[1] - before), value=1)
            if draw.done.any():
                alive = (~draw.done).nonzero()[:, 0]
                sequences, mask = sequences[alive], mask[alive]
                draw.rows, draw.done = draw.rows[alive], draw.done[alive]
                if len(alive):
                    cache.batch_select_indices(alive)
        return self._completions(draw, len(parts), copies, set(stops.tolist()))

    def _completions(
        self, draw: _Draw, n_parts: int, copies: int, stops: set[int]
    ) -> list[list[Completion]]:
        alive, *found = (torch.cat(part).cpu().numpy() for part in zip(*draw.tokens, strict=True))
        row, token, values = (part[alive] for part in found)
        order = np.argsort(row, kind="stable")
        ends = np.cumsum(np.bincount(row, minlength=n_parts * copies))[:-1]
        pairs = zip(np.split(token[order], ends), np.split(values[order], ends), strict=True)
        done = [self._completion(ids, rows.astype(np.float64), stops) for ids, rows in pairs]
        return [done[i : i + copies] for i in range(0, len(done), copies)]

    def _completion(self, ids: np.ndarray, values: np.ndarray, stops: set[int]) -> Completion:
        raw, scaled, entropy = values.T
        stopped = int(ids[-1]) in stops
        return Completion(
            text=self.tokenizer.decode(ids[:-1] if stopped else ids, skip_special_tokens=True),
            token_ids=tuple(ids.tolist()),
            n_tokens=len(ids),
            finish_reason="stop" if stopped else "length",
            nll_sum=float(-raw.sum()),
            nll_mean=float(-raw.mean()),
            nll_sum_temp=float(-scaled.sum()),
            nll_mean_temp=float(-scaled.mean()),
            nll_max=float(-raw.min()),
            entropy_mean=float(entropy.mean()),
            logps=tuple(scaled.tolist()),
        )


def _greedy(new_tokens: int, stops: list[int], pad: int) -> GenerationConfig:
    """Settings under which `generate` changes no logit before `_Draw` sees them.

    A model's own generation_config fills what is left unset, and some (Qwen2.5) ship a repetition
    penalty, which would be taken for the model's distribution.
    """
    return GenerationConfig(
        max_new_tokens=new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        encoder_repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        eos_token_id=stops,
        pad_token_id=pad,
    )


BACKENDS = {"transformers": TransformersSampler}


def make_sampler(backend: str = "transformers", **options: Any) -> Sampler:
    """The sampler of a back end; `options` are its constructor's. UsageError for an unknown one."""
    if backend not in BACKENDS:
        raise UsageError(
            f"unknown sampler back end {backend!r}: it is one of {', '.join(sorted(BACKENDS))}"
        )
    return BACKENDS[backend](**options)
