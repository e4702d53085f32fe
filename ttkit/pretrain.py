"""Pretraining of the scratch policy.

A small Llama with a byte-level BPE tokenizer of its own, trained from random weights on the
minibench corpus and saved in Hugging Face format: everything after it (LoRA, TRL, log-probs,
adapters) treats it like any other model directory.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from ttkit.domains import check_device
from ttkit.errors import UsageError
from ttkit.journal import disk, to_json, write_atomic

PAD, SYSTEM, USER, ASSISTANT, END = "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
DONE, CHECKPOINT = "pretrain.json", "checkpoint.pt"


@dataclass(frozen=True)
class Pretraining:
    """What a pretraining run depends on; written beside the model, and compared on resume.

    `n_examples` chains of at most `max_links` are drawn from the corpus, each read `epochs` times.
    Sizes: `hidden`, `layers`, `heads` (query heads; keys and values have half as many), `vocab` (an
    upper bound: BPE stops where no pair repeats). `lr` is Muon's, for the weight matrices;
    `lr_embed` is Adam's, for embeddings and norms.
    """

    n_examples: int = 52_000
    epochs: int = 1
    expert_share: float = 0.12
    max_links: int = 3
    seed: int = 0
    vocab: int = 1024
    hidden: int = 64
    layers: int = 4
    heads: int = 4
    batch: int = 32
    lr: float = 0.02
    lr_embed: float = 0.01

    def __post_init__(self) -> None:
        if min(self.n_examples // self.batch, self.epochs, self.layers, self.heads // 2) < 1:
            raise UsageError(
                "pretraining needs at least a batch of examples, an epoch, a layer and two heads: "
                f"got n_examples={self.n_examples}, batch={self.batch}, epochs={self.epochs}, "
                f"layers={self.layers}, heads={self.heads}"
            )
        if self.heads % 2 or self.hidden % (2 * self.heads):
            raise UsageError(
                f"hidden={self.hidden} and heads={self.heads} do not go together: "
                "heads has to be even, and hidden a multiple of twice the heads"
            )

    @property
    def steps(self) -> int:
        return self.epochs * (self.n_examples // self.batch)


def pretrain(
    out: str | Path,
    *,
    exclude: Collection[Any] = (),
    only: Collection[str] | None = None,
    examples: Sequence[Any] | None = None,
    device: str = "cpu",
    checkpoint_every: int = 100,
    on_step: Callable[[int, int, float], None] | None = None,
    **settings: Any,
) -> Path:
    """Train the scratch policy into the directory `out` and return it.

    `settings` are the fields of `Pretraining`; `exclude` are chains kept out of the corpus (those
    of the evaluation tasks). `examples` (with `.prompt` and `.completion`) replaces the corpus.
    `on_step(step, steps, loss)` is called after every step; without it a progress bar is shown.
    Deterministic for the settings on one machine with one number of threads. Killed and called
    again, it continues from the last checkpoint to the same weights; finished, it does nothing.
    """
    run = Pretraining(**settings)
    out = Path(out)
    if examples is None:
        from ttkit.minibench.corpus import corpus

        drawn = corpus(
            run.n_examples,
            expert_share=run.expert_share,
            exclude=exclude,
            seed=run.seed,
            max_links=run.max_links,
            only=only,
        )
        examples = list(drawn)
    record = {**asdict(run), "examples_sha256": _hash_examples(examples)}
    if (out / DONE).is_file() and json.loads((out / DONE).read_text()) == record:
        return out
    check_device(device)
    out.mkdir(parents=True, exist_ok=True)
    (out / DONE).unlink(missing_ok=True)

    tokenizer = build_tokenizer(examples, run.vocab)
    batches = _Batches(tokenizer, examples, run)
    model = _scratch_model(tokenizer, run).to(device)
    optimizers = _optimizers(model, run)
    start = _restore(out / CHECKPOINT, record, model, optimizers)
    report = on_step or _progress_bar(run.steps, start)
    for step, (ids, labels) in enumerate(batches.after(start), start=start + 1):
        loss = _train_step(model, optimizers, ids.to(device), labels.to(device), step, run)
        if step % checkpoint_every == 0 and step < run.steps:
            _checkpoint(out / CHECKPOINT, record, step, model, optimizers)
        report(step, run.steps, loss)
    with disk(out):
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
    (out / CHECKPOINT).unlink(missing_ok=True)
    write_atomic(out / DONE, to_json(record))
    return out


def build_tokenizer(examples: Sequence[Any], vocab: int) -> Any:
    """A byte-level BPE tokenizer learnt from the examples, with the chat template.

    A unit may span whatever repeats within a line, such as `torch.softmax(`, except that variables
    and decimal numbers stand alone: they are what the model has to copy from the prompt.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    words = (
        "torch|F|nn|math|self|return|for|in|range|if|else|not|and|or|True|False|None|dim|keepdim"
    )
    copied = rf"(?<![\w.])(?!(?:{words})\b)[A-Za-z_]\w*(?![\w(=])|\d+\.\d+"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(copied), "isolated"),
            pre_tokenizers.Split("\n", "merged_with_previous"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[PAD, SYSTEM, USER, ASSISTANT, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    sample = examples[:5000]
    tokenizer.train_from_iterator((t for e in sample for t in (e.prompt, e.completion)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def _scratch_model(tokenizer: Any, run: Pretraining) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=run.hidden,
        intermediate_size=run.hidden * 5 // 2,
        num_hidden_layers=run.layers,
        num_attention_heads=run.heads,
        num_key_value_heads=run.heads // 2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        return LlamaForCausalLM(config)


class _Batches:
    """Padded (ids, labels) of about equal lengths; the loss is on the completion's tokens."""

    def __init__(self, tokenizer: Any, examples: Sequence[Any], run: Pretraining) -> None:
        user, end, assistant = tokenizer.convert_tokens_to_ids([USER, END, ASSISTANT])
        encode = tokenizer.backend_tokenizer.encode_batch
        prompts = encode([e.prompt for e in examples], add_special_tokens=False)
        completions = encode([e.completion for e in examples], add_special_tokens=False)
        self.heads = [[user, *p.ids, end, assistant] for p in prompts]
        self.tails = [[*c.ids, end] for c in completions]
        self.pad, self.run = tokenizer.pad_token_id, run

    def after(self, step: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The batches that follow the first `step` ones, drawn from the run's seed."""
        order = [
            b
            for e in range(self.run.epochs)
            for b in self._epoch(random.Random(f"{self.run.seed}/{e}"))
        ]
        for rows in order[step:]:
            sequences = [self.heads[i] + self.tails[i] for i in rows]
            width = max(map(len, sequences))
            ids = torch.full((len(rows), width), self.pad)
            labels = torch.full((len(rows), width), -100)
            for r, (i, sequence) in enumerate(zip(rows, sequences, strict=True)):
                ids[r, : len(sequence)] = torch.tensor(sequence)
                labels[r, len(self.heads[i]) : len(sequence)] = torch.tensor(self.tails[i])
            yield ids, labels

    def _epoch(self, rng: random.Random) -> list[list[int]]:
        size = self.run.batch
        rows = list(range(len(self.heads)))
        rng.shuffle(rows)
        rows = rows[: len(rows) // size * size]
        batches = []
        for first in range(0, len(rows), 16 * size):
            pool = rows[first : first + 16 * size]
            pool.sort(key=lambda i: len(self.heads[i]) + len(self.tails[i]))
            batches += [pool[k : k + size] for k in range(0, len(pool), size)]
        rng.shuffle(batches)
        return batches


def _train_step(
    model: Any, optimizers: list[Any], ids: torch.Tensor, labels: torch.Tensor, step: int, run: Any
) -> float:
    warmup = max(1, run.steps // 20)
    decay = 1 - (step - 1) / run.steps  # linear to zero: measured better than a cosine here
    # padding is on the right and attention causal, so no mask is needed and the fast kernel runs;
    # the head, a fifth of the work, is applied to the completions' positions only
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    targets = labels[:, 1:]
    kept = targets != -100
    loss = F.cross_entropy(model.lm_head(hidden[kept]), targets[kept])
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * min(1.0, step / warmup) * decay
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024): momentum, orthogonalised by five Newton-Schulz steps, in float32.

    `torch.optim.Muon` iterates in bfloat16, which CPUs without such instructions emulate about
    fifteen times slower.
    """

    def __init__(self, params: Any, lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(p)
                momentum = state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                update = _orthogonalise(p.grad.lerp(momentum, group["momentum"]))
                p.sub_(update, alpha=group["lr"] * max(1.0, p.shape[0] / p.shape[1]) ** 0.5)


def _orthogonalise(matrix: torch.Tensor) -> torch.Tensor:
    flip = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if flip else matrix) / (matrix.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return x.T if flip else x


def _optimizers(model: Any, run: Pretraining) -> list[Any]:
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers = [Muon(matrices, run.lr), torch.optim.Adam(others, run.lr_embed, (0.9, 0.99))]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def _checkpoint(path: Path, record: dict, step: int, model: Any, optimizers: list[Any]) -> None:
    partial = path.with_suffix(".partial")
    state = [optimizer.state_dict() for optimizer in optimizers]
    saved = {"record": record, "step": step, "model": model.state_dict(), "optimizers": state}
    with disk(path):
        torch.save(saved, partial)
        os.replace(partial, path)


def _restore(path: Path, record: dict, model: Any, optimizers: list[Any]) -> int:
    """The step to continue after: 0 without a checkpoint, or with one of other settings."""
    if not path.is_file():
        return 0
    saved = torch.load(path, weights_only=True)
    if saved["record"] != record:
        return 0
    model.load_state_dict(saved["model"])
    for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
        optimizer.load_state_dict(state)
    return saved["step"]


def _hash_examples(examples: Sequence[Any]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        digest.update(f"{example.prompt}\0{example.completion}\0".encode())
    return digest.hexdigest()


def _progress_bar(steps: int, start: int) -> Callable[[int, int, float], None]:
    from tqdm.auto import tqdm

    bar = tqdm(total=steps, initial=start, desc="pretraining", unit="step", mininterval=1.0)

    def report(step: int, steps: int, loss: float) -> None:
        bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        bar.update()
        if step == steps:
            bar.close()

    return report
