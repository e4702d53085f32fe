"""Pretraining, loading and LoRA set-up."""

from types import SimpleNamespace

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from ttkit.domains import check_device
from ttkit.errors import UsageError
from ttkit.minibench.corpus import contains_excluded, corpus, evaluation_chains
from ttkit.policy import lean, load, lora_config, prompt_ids, stop_ids
from ttkit.pretrain import CHECKPOINT, DONE, Pretraining, build_tokenizer, pretrain

SIZES = {"hidden": 16, "layers": 1, "heads": 2, "vocab": 400}
RUN = {"n_examples": 64, "batch": 8, "seed": 1, **SIZES}
MESSAGES = [{"role": "user", "content": "x, a\nx = torch.exp(x - a)\nreturn x"}]


def quiet(step, steps, loss):
    pass


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return pretrain(tmp_path_factory.mktemp("policy") / "base", on_step=quiet, **RUN)


def test_a_model_directory_like_any_other(policy):
    tokenizer = AutoTokenizer.from_pretrained(policy)
    model = AutoModelForCausalLM.from_pretrained(policy)
    text = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False)
    assert text == f"<|user|>{MESSAGES[0]['content']}<|end|><|assistant|>"
    ids = prompt_ids(tokenizer, MESSAGES)
    assert tokenizer.decode(ids) == text
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert stop_ids(model, tokenizer) == [tokenizer.convert_tokens_to_ids("<|end|>")]
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert len(tokenizer) == model.config.vocab_size
    for odd in ("def f(x):\n\treturn 'é ∑ 漢字'  # \U0001f600\n", "  x  =  1", "<|en", ""):
        assert tokenizer.decode(tokenizer.encode(odd, add_special_tokens=False)) == odd


def test_variables_and_numbers_are_tokens_of_their_own():
    lines = "x = torch.softmax(x * 0.25, dim=-1)\nlong_name = x.sum(dim=-1, keepdim=True)\n"
    examples = [SimpleNamespace(prompt=lines, completion=lines)] * 50
    tokenizer = build_tokenizer(examples, 1000)
    units = [tokenizer.decode([i]) for i in tokenizer.encode(lines, add_special_tokens=False)]
    assert "".join(units) == lines
    assert units.count("x") == 3 and "0.25" in units and "long_name" in units
    assert " = torch.softmax(" in units and ", dim=-1)\n" in units


def test_deterministic_and_seeded(policy, tmp_path):
    again = pretrain(tmp_path / "again", on_step=quiet, **RUN)
    other = pretrain(tmp_path / "other", on_step=quiet, **{**RUN, "seed": 2})
    assert same(weights(policy), weights(again))
    assert not same(weights(policy), weights(other))


class Killed(BaseException):
    pass


def test_resumes_to_the_same_weights(policy, tmp_path):
    done = []

    def stop(step, steps, loss):
        done.append(step)
        if step == 6:
            raise Killed

    out = tmp_path / "base"
    with pytest.raises(Killed):
        pretrain(out, on_step=stop, checkpoint_every=4, **RUN)
    assert (out / CHECKPOINT).is_file() and not (out / DONE).exists()
    with pytest.raises(UsageError, match="incomplete"):
        load(out)
    pretrain(out, on_step=lambda step, *_: done.append(step), checkpoint_every=4, **RUN)
    assert done == [1, 2, 3, 4, 5, 6, 5, 6, 7, 8]
    assert same(weights(policy), weights(out))
    pretrain(out, on_step=stop, **RUN)
    assert len(done) == 10  # finished: nothing is done again
    # other settings start from nothing, and do not mix with what is there
    pretrain(out, on_step=lambda step, *_: done.append(step), **{**RUN, "seed": 2})
    assert done[10:] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert not same(weights(policy), weights(out))


def test_a_checkpoint_of_other_settings_is_not_used(tmp_path):
    def stop(step, steps, loss):
        if step == 6:
            raise Killed

    with pytest.raises(Killed):
        pretrain(tmp_path, on_step=stop, checkpoint_every=4, **RUN)
    done = []
    pretrain(tmp_path, on_step=lambda step, *_: done.append(step), **{**RUN, "lr": 0.01})
    assert done[0] == 1


def test_learns(tmp_path):
    losses = []
    settings = {**RUN, "n_examples": 400, "hidden": 32}
    pretrain(tmp_path, on_step=lambda *at: losses.append(at[2]), **settings)
    assert sum(losses[-5:]) < 0.75 * sum(losses[:5])


def test_excluded_chains_stay_out(tmp_path, monkeypatch):
    """The corpus that `pretrain` trains on, not only the one that it could have drawn."""
    from ttkit import pretrain as module

    seen = []
    build = module.build_tokenizer

    def spy(examples, vocab):
        seen.extend(examples)
        return build(examples, vocab)

    monkeypatch.setattr(module, "build_tokenizer", spy)
    chains = evaluation_chains(2, range(1, 101))
    pretrain(tmp_path, exclude=chains, on_step=quiet, **RUN)
    assert len(seen) == 64
    assert not any(contains_excluded(example.chain, chains) for example in seen)
    without = list(corpus(64, expert_share=Pretraining().expert_share, seed=1))
    assert any(contains_excluded(example.chain, chains) for example in without)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_oss"])
def test_lora_trains_the_layers_it_names(family):
    from peft import get_peft_model

    common = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    if family == "llama":
        model = LlamaForCausalLM(LlamaConfig(**common, **heads))
    elif family == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**common, **heads))
    else:
        experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
        model = GptOssForCausalLM(GptOssConfig(**common, **heads, **experts))
    before = {name: p.clone() for name, p in model.named_parameters()}
    config = lora_config(model, rank=2)
    assert config.r == 2 and config.lora_alpha == 4 and config.lora_dropout == 0
    peft = get_peft_model(model, config)
    trained = {name for name, p in peft.named_parameters() if p.requires_grad}
    assert trained and all("lora" in name for name in trained)
    assert any("q_proj" in name for name in trained)
    assert any(
        "experts" in name if family == "gpt_oss" else "down_proj" in name for name in trained
    )
    assert not any("lm_head" in name or "router" in name for name in trained)

    ids = torch.randint(0, 64, (2, 12))
    optimizer = torch.optim.Adam([p for p in peft.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(4):
        loss = peft(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    after = {name.replace("base_model.model.", ""): p for name, p in peft.named_parameters()}
    for name, p in before.items():
        kept = [q for n, q in after.items() if n.replace(".base_layer", "") == name]
        assert len(kept) == 1 and torch.equal(kept[0], p), name


def adapted_model(policy, dtype):
    from peft import get_peft_model

    model, tokenizer = load(policy, dtype=dtype)
    torch.manual_seed(0)
    peft = get_peft_model(model, lora_config(model, rank=2)).eval()
    with torch.no_grad():
        for name, weight in peft.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.05)
    return peft, torch.tensor([prompt_ids(tokenizer, MESSAGES)])


def test_adapter_round_trip(policy, tmp_path):
    base, _ = load(policy)
    peft, ids = adapted_model(policy, "float32")
    peft.save_pretrained(tmp_path)
    adapted, tokenizer = load(policy, tmp_path)
    assert not adapted.training and tokenizer.padding_side == "left"
    with torch.no_grad():
        assert torch.allclose(adapted(ids).logits, peft(ids).logits, atol=1e-6)
        assert (adapted(ids).logits - base(ids).logits).abs().max() > 1e-3
    with pytest.raises(UsageError, match="no adapter_model.safetensors"):
        (tmp_path / "adapter_model.safetensors").unlink()
        load(policy, tmp_path)


@pytest.mark.parametrize(("dtype", "within"), [("float32", 1e-5), ("bfloat16", 5e-2)])
def test_a_lean_adapter_is_the_same_policy_and_comes_back_to_the_bit(policy, dtype, within):
    peft, ids = adapted_model(policy, dtype)
    before = {name: value.clone() for name, value in peft.state_dict().items()}
    with torch.no_grad():
        usual = peft(ids).logits
        with lean(peft):
            now = peft(ids).logits
            changed = [n for n, v in peft.state_dict().items() if not torch.equal(v, before[n])]
            types = {v.dtype for n, v in peft.state_dict().items() if "lora_" in n}
        assert torch.equal(peft(ids).logits, usual)
    assert (now - usual).abs().max() < within
    assert changed and all(("base_layer" in n) == (dtype == "float32") for n in changed)
    assert types == {torch.float32 if dtype == "float32" else torch.bfloat16}
    with pytest.raises(RuntimeError, match="stopped"), lean(peft):
        raise RuntimeError("stopped")
    after = peft.state_dict()
    assert all(v.dtype == after[n].dtype and torch.equal(v, after[n]) for n, v in before.items())


def test_lean_leaves_alone_what_it_does_not_know(policy):
    plain, _ = load(policy)
    peft, ids = adapted_model(policy, "float32")
    before = {name: value.clone() for name, value in peft.state_dict().items()}
    with peft.disable_adapter(), torch.no_grad():
        base = peft(ids).logits
        with lean(peft), lean(plain):
            assert torch.equal(peft(ids).logits, base)
            assert same(peft.state_dict(), before)
    peft.merge_adapter()
    merged = {name: value.clone() for name, value in peft.state_dict().items()}
    with lean(peft):
        assert same(peft.state_dict(), merged)
    assert same(peft.state_dict(), merged)


def test_an_adapter_of_another_model(policy, tmp_path):
    from peft import get_peft_model

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=1,
        intermediate_size=32,
        num_attention_heads=4,
    )
    other = LlamaForCausalLM(config)
    get_peft_model(other, lora_config(other, rank=2)).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="does not fit the model"):
        load(policy, tmp_path)


def test_incomplete_directories(policy, tmp_path):
    with pytest.raises(UsageError, match="no model directory .*nowhere.*download"):
        load(tmp_path / "nowhere")
    with pytest.raises(UsageError, match=r"lacks config.json, its weights .*, its tokenizer"):
        load(tmp_path)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((policy / name).read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(UsageError, match="cannot be loaded"):
        load(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "part-2.st"}}')
    with pytest.raises(UsageError, match="lacks part-2.st"):
        load(tmp_path)


def test_a_model_without_a_chat_template(policy, tmp_path):
    for item in policy.iterdir():
        if item.name != "chat_template.jinja":
            (tmp_path / item.name).write_bytes(item.read_bytes())
    with pytest.raises(UsageError, match="no chat template"):
        load(tmp_path)


def test_bad_settings(policy, tmp_path):
    with pytest.raises(UsageError, match="unknown dtype 'float23'"):
        load(policy, dtype="float23")
    with pytest.raises(UsageError, match="unknown device 'gpu'"):
        load(policy, device="gpu")
    with pytest.raises(UsageError, match="unknown device 'meta'"):
        check_device("meta")
    with pytest.raises(UsageError, match="torch sees"):
        check_device(f"cuda:{torch.cuda.device_count()}")
    for bad in ({"heads": 3}, {"hidden": 20, "heads": 4}, {"n_examples": 3}, {"layers": 0}):
        with pytest.raises(UsageError, match=next(iter(bad))):
            pretrain(tmp_path, **{**RUN, **bad})
    model, _ = load(policy)
    with pytest.raises(UsageError, match="rank of 0"):
        lora_config(model, rank=0)
