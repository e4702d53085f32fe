"""Policies: load a model directory with or without an adapter, and set up LoRA.

Any Hugging Face causal language model serves; the scratch policy of `ttkit.pretrain` is one.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ttkit.domains import check_device
from ttkit.errors import UsageError

TINY_PARAMETERS = 1_000_000
DTYPES = ("float32", "bfloat16", "float16")


def prompt_ids(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    """Token ids of chat messages, up to where the assistant's answer begins."""
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def stop_ids(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end a completion: the model's and the tokenizer's own."""
    own = model.generation_config.eos_token_id
    ids = own if isinstance(own, list) else [own]
    return sorted({i for i in [*ids, tokenizer.eos_token_id] if i is not None})


@contextlib.contextmanager
def threads_that_pay(model: Any) -> Iterator[None]:
    """Meanwhile torch has one thread, if `model` is tiny and on the CPU.

    Two at its small products mostly wait for each other: 320 completions of the scratch policy take
    as long on one core as on two and, while another program runs, a third as long or less.
    """
    threads = torch.get_num_threads()
    tiny = model.device.type == "cpu" and model.num_parameters() <= TINY_PARAMETERS
    if tiny:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def load(
    model_dir: str | Path,
    adapter: str | Path | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    trainable: bool = False,
) -> tuple[Any, Any]:
    """A (model, tokenizer) from a local Hugging Face directory, with a PEFT adapter if named.

    The adapter's weights take gradients if `trainable`. The model is in eval mode; the tokenizer
    pads on the left and has a padding token. Nothing is downloaded. Raises UsageError for a
    directory that is missing or incomplete, an adapter that does not fit, an unknown dtype, or a
    device this machine lacks.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = Path(model_dir)
    if dtype not in DTYPES:
        raise UsageError(f"unknown dtype {dtype!r}: it is one of {', '.join(DTYPES)}")
    check_device(device)
    _check_model_dir(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        model: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=getattr(torch, dtype), local_files_only=True
        )
    except Exception as error:  # the libraries raise a dozen kinds here, all about this directory
        raise UsageError(
            f"the model directory {path} cannot be loaded ({_first_line(error)}): "
            "download it again, whole, or pretrain it again"
        ) from error
    if tokenizer.chat_template is None:
        raise UsageError(
            f"the model in {path} has no chat template: use an instruction-tuned model, "
            "or put a chat_template.jinja beside its tokenizer"
        )
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if adapter is not None:
        model = _with_adapter(model, Path(adapter), path, trainable)
    return model.to(device).eval(), tokenizer


def _with_adapter(model: Any, adapter: Path, path: Path, trainable: bool) -> Any:
    from peft import PeftModel

    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (adapter / name).is_file():
            raise UsageError(f"{adapter} is no complete LoRA adapter: it has no {name}")
    try:
        return PeftModel.from_pretrained(model, str(adapter), is_trainable=trainable)
    except Exception as error:
        raise UsageError(
            f"the adapter {adapter} does not fit the model in {path} ({_first_line(error)}): "
            "train it again on this model"
        ) from error


def load_adapter(model: Any, adapter: str | Path) -> Any:
    """`model` with the PEFT directory `adapter` on it; `.unload()` takes it off again.

    Raises UsageError for a directory that is incomplete or of another model.
    """
    wrapped = _with_adapter(model, Path(adapter), Path(model.config.name_or_path), False)
    return wrapped.to(model.device).eval()


@contextlib.contextmanager
def lean(model: Any) -> Iterator[None]:
    """While it lasts, a LoRA adapter costs as little as it may; then weights are back to the bit.

    Token by token, an adapter's many small products take longer than the work they do. In float32
    it is added to the weights that it adapts, the same policy to 1e-5 of a log-prob. In fewer
    digits that would be another policy than is trained; there the adapter, which is kept in
    float32, takes the model's own type, and nothing has to be converted on the way. Anything but
    plain LoRA on linear layers is left as it is.
    """
    layers = _plain_lora(model)
    bases = [layer.get_base_layer().weight for layer in layers]
    parts = [part for layer in layers for part in (layer.lora_A, layer.lora_B)]
    exact = all(weight.dtype == torch.float32 for weight in bases)
    folded = layers if exact else []
    changed = bases if exact else [linear.weight for part in parts for linear in part.values()]
    kept = [weight.data for weight in changed]
    try:
        for weight in changed:
            weight.data = weight.data.clone() if exact else weight.data.to(model.dtype)
        for layer in folded:
            layer.merge()
        yield
    finally:
        for layer in folded:
            layer.merged_adapters.clear()
        for weight, data in zip(changed, kept, strict=True):
            weight.data = data


def _plain_lora(model: Any) -> list[Any]:
    """The layers of `model` with an active LoRA adapter, if all its adapters are of that kind."""
    if not hasattr(model, "peft_config"):
        return []
    from peft.tuners.lora import Linear
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    for layer in layers:
        if not isinstance(layer, Linear) or layer.merged or layer.disable_adapters:
            return []
    return layers


def _check_model_dir(path: Path) -> None:
    if not path.is_dir():
        raise UsageError(
            f"there is no model directory {path}: pretrain the scratch policy there (notebook 01), "
            "or download a Hugging Face model into it, for example with "
            f"`hf download openai/gpt-oss-20b --local-dir {path}`"
        )
    wanted = {
        "config.json": ["config.json"],
        "its weights (*.safetensors)": ["*.safetensors", "pytorch_model*.bin"],
        "its tokenizer (tokenizer.json)": ["tokenizer.json", "tokenizer.model", "vocab.json"],
    }
    missing = [name for name, globs in wanted.items() if not any(any(path.glob(g)) for g in globs)]
    index = path / "model.safetensors.index.json"
    if index.is_file():
        shards = set(json.loads(index.read_text())["weight_map"].values())
        missing += sorted(s for s in shards if not (path / s).is_file())
    if missing:
        raise UsageError(
            f"the model directory {path} is incomplete, it lacks {', '.join(missing)}: "
            f"finish the download (`hf download <model> --local-dir {path}`) or the pretraining"
        )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def lora_config(model: Any, rank: int = 16, alpha: float | None = None, **options: Any) -> Any:
    """A PEFT LoraConfig on every linear layer but the head; `alpha` defaults to 2 * rank.

    gpt-oss keeps its experts in plain parameters, which LoRA reaches by name only and without
    dropout; attention projections are adapted as elsewhere.
    """
    from peft import LoraConfig

    if rank < 1:
        raise UsageError(f"a LoRA rank of {rank} trains nothing: it has to be at least 1")
    settings: dict[str, Any] = {
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank if alpha is None else alpha,
        "lora_dropout": 0.0,
        "target_modules": "all-linear",
    }
    if model.config.model_type == "gpt_oss":
        settings["target_modules"] = ["q_proj", "k_proj", "v_proj", "o_proj"]
        settings["target_parameters"] = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    return LoraConfig(**{**settings, **options})
