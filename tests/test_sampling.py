"""The transformers sampler and the scorer, against plain forward passes of one sequence."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import GptOssConfig, GptOssForCausalLM, Qwen3Config, Qwen3ForCausalLM

from ttkit.errors import InfraError, UsageError
from ttkit.policy import load, lora_config, prompt_ids, stop_ids
from ttkit.pretrain import pretrain
from ttkit.sampling import SamplingParams, TransformersSampler, make_sampler, uniforms
from ttkit.scoring import check_adapter, score

EXAMPLES = [
    SimpleNamespace(prompt=f"x, b\n{body}return x", completion=f"return x * b{tail}")
    for body in ("", "x = x * b\n", "x = x * b\n" * 3, "y = b.flatten()\nx = x * y + 0 * b\n" * 2)
    for tail in ("", " + 0", " * 1.0", " / 1.0")
] * 4
PROMPTS = [[{"role": "user", "content": EXAMPLES[i].prompt}] for i in (0, 4, 8, 12)]
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """A Llama trained just enough to end some of its completions."""
    out = tmp_path_factory.mktemp("policy")
    sizes = {"hidden": 32, "layers": 2, "heads": 2, "vocab": 300}
    pretrain(
        out,
        examples=EXAMPLES,
        n_examples=64,
        batch=16,
        epochs=12,
        on_step=lambda *_: None,
        **sizes,
    )
    return load(out)


def gpt_oss(tokenizer):
    config = GptOssConfig(
        vocab_size=len(tokenizer),
        intermediate_size=32,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=16,
        **TINY,
    )
    return GptOssForCausalLM(config)


def qwen3(tokenizer):
    config = Qwen3Config(
        vocab_size=len(tokenizer), intermediate_size=64, num_key_value_heads=2, **TINY
    )
    return Qwen3ForCausalLM(config)


def reference(model, prompt, ids, temperature):
    """Log-probs and entropies of one completion from one unpadded forward pass."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1].double()
    raw, scaled = logits.log_softmax(-1), (logits / temperature).log_softmax(-1)
    taken = torch.tensor(ids)[:, None]
    entropy = -(raw.exp() * raw).sum(-1)
    return raw.gather(1, taken)[:, 0], scaled.gather(1, taken)[:, 0], entropy


@pytest.mark.parametrize("architecture", ["llama", "gpt_oss", "qwen3"])
def test_log_probs_agree_with_a_forward_pass(policy, architecture):
    model, tokenizer = policy
    if architecture != "llama":
        torch.manual_seed(0)
        model = {"gpt_oss": gpt_oss, "qwen3": qwen3}[architecture](tokenizer).eval()
    lengths = {len(prompt_ids(tokenizer, p)) for p in PROMPTS}
    assert len(lengths) > 2  # so that most prompts of the batch are padded
    params = SamplingParams(n=5, temperature=0.7, top_p=0.95, max_tokens=40, seed=3)
    drawn = TransformersSampler(model, tokenizer, batch_size=20).sample(PROMPTS, params)
    stops = stop_ids(model, tokenizer)
    for prompt, completions in zip(PROMPTS, drawn, strict=True):
        assert len(completions) == 5
        ids = prompt_ids(tokenizer, prompt)
        for c in completions:
            raw, scaled, entropy = reference(model, ids, c.token_ids, 0.7)
            assert c.nll_sum == pytest.approx(-raw.sum().item(), abs=1e-4)
            assert c.nll_sum_temp == pytest.approx(-scaled.sum().item(), abs=1e-4)
            assert c.nll_mean == pytest.approx(-raw.mean().item(), abs=1e-4)
            assert c.nll_mean_temp == pytest.approx(-scaled.mean().item(), abs=1e-4)
            assert c.nll_max == pytest.approx(-raw.min().item(), abs=1e-4)
            assert c.entropy_mean == pytest.approx(entropy.mean().item(), abs=1e-4)
            assert c.n_tokens == len(c.token_ids) <= 40
            assert (c.token_ids[-1] in stops) == (c.finish_reason == "stop")
            assert c.finish_reason == "stop" or c.n_tokens == 40
            assert not any(i in stops for i in c.token_ids[:-1])
            assert "<|" not in c.text

    flat = [(p, c) for p, completions in zip(PROMPTS, drawn, strict=True) for c in completions]
    for temperature, name in ((1.0, "nll_sum"), (0.7, "nll_sum_temp")):
        scores = score(
            model,
            tokenizer,
            [p for p, _ in flat],
            [c.token_ids for _, c in flat],
            temperature,
            batch_size=7,
        )
        for (_, c), s in zip(flat, scores, strict=True):
            assert s.nll_sum == pytest.approx(getattr(c, name), abs=1e-4)
            assert s.nll_mean == pytest.approx(s.nll_sum / c.n_tokens)
            if temperature == 1.0:
                assert s.nll_max == pytest.approx(c.nll_max, abs=1e-4)
                assert s.entropy_mean == pytest.approx(c.entropy_mean, abs=1e-4)


def test_both_ways_of_ending_occur(policy):
    drawn = TransformersSampler(*policy).sample(PROMPTS, SamplingParams(n=16, max_tokens=12))
    assert {c.finish_reason for completions in drawn for c in completions} == {"stop", "length"}


def test_samples_do_not_depend_on_what_else_is_drawn(policy):
    params = SamplingParams(n=6, max_tokens=24, seed=5)

    def ids(prompts, params, batch_size=64):
        drawn = TransformersSampler(*policy, batch_size=batch_size).sample(prompts, params)
        return [[c.token_ids for c in completions] for completions in drawn]

    once = ids(PROMPTS, params)
    assert once == ids(PROMPTS, params)
    assert once[2:] == ids(PROMPTS[2:], params)  # a run resumed after two tasks
    for batch_size in (1, 4, 7):
        assert once == ids(PROMPTS, params, batch_size)
    assert [c[:3] for c in once] == ids(PROMPTS, SamplingParams(n=3, max_tokens=24, seed=5))
    assert once != ids(PROMPTS, SamplingParams(n=6, max_tokens=24, seed=6))
    assert len(set(once[0])) > 1


def test_uniforms_are_distinct():
    table = uniforms(PROMPTS[0], SamplingParams(n=50, max_tokens=40))
    assert table.shape == (50, 40) and table.min() >= 0 and table.max() < 1
    assert len(np.unique(table)) > 1990
    assert not np.intersect1d(table, uniforms(PROMPTS[1], SamplingParams(n=50))[:, :4]).size > 2


def next_token_probs(policy, prompt):
    model, tokenizer = policy
    with torch.no_grad():
        return model(torch.tensor([prompt_ids(tokenizer, prompt)])).logits[0, -1].softmax(-1)


def test_frequencies_are_the_model_s(policy):
    for temperature, top_p in ((1.0, 1.0), (0.5, 1.0), (1.0, 0.6)):
        params = SamplingParams(2000, temperature, top_p, max_tokens=1)
        drawn = TransformersSampler(*policy, batch_size=2000).sample(PROMPTS[:1], params)[0]
        probs = next_token_probs(policy, PROMPTS[0]).double() ** (1 / temperature)
        probs = probs / probs.sum()
        if top_p < 1:
            order = probs.argsort(descending=True)
            kept = int((probs[order].cumsum(0) < top_p).sum()) + 1
            nucleus = torch.zeros_like(probs)
            nucleus[order[:kept]] = probs[order[:kept]]
            probs = nucleus / nucleus.sum()
        counts = torch.bincount(torch.tensor([c.token_ids[0] for c in drawn]), minlength=len(probs))
        error = (probs * (1 - probs) / 2000).sqrt()
        assert ((counts / 2000 - probs).abs() <= 5 * error + 1e-3).all()
        assert not counts[probs == 0].any()
        # what is recorded is the distribution before top-p
        raw = next_token_probs(policy, PROMPTS[0])[drawn[0].token_ids[0]]
        assert drawn[0].nll_sum == pytest.approx(-raw.log().item(), abs=1e-4)


def test_temperature_zero_is_greedy(policy):
    drawn = TransformersSampler(*policy).sample(PROMPTS, SamplingParams(3, 0.0, max_tokens=8))
    for prompt, completions in zip(PROMPTS, drawn, strict=True):
        assert len({c.token_ids for c in completions}) == 1
        assert completions[0].token_ids[0] == next_token_probs(policy, prompt).argmax().item()
        assert completions[0].nll_sum > 0 and completions[0].nll_sum_temp == 0


def test_generation_defaults_of_a_model_are_not_its_distribution(policy):
    model, tokenizer = policy
    params = SamplingParams(n=4, max_tokens=16)
    plain = TransformersSampler(model, tokenizer).sample(PROMPTS, params)
    settings = {"repetition_penalty": 1.5, "temperature": 0.2, "top_k": 2, "do_sample": True}
    before = {name: getattr(model.generation_config, name) for name in settings}
    model.generation_config.update(**settings)
    try:
        assert TransformersSampler(model, tokenizer).sample(PROMPTS, params) == plain
    finally:
        model.generation_config.update(**before)


def test_progress_and_mode(policy):
    model, tokenizer = policy
    seen = []
    sampler = make_sampler(
        model=model, tokenizer=tokenizer, batch_size=4, on_batch=lambda *at: seen.append(at)
    )
    model.train()
    sampler.sample(PROMPTS[:3], SamplingParams(n=2, max_tokens=4))
    assert seen == [(4, 6), (6, 6)]
    assert model.training
    model.eval()
    assert sampler.sample([], SamplingParams(n=2)) == []


def test_an_adapter_that_does_nothing_is_an_error(policy, tmp_path):
    from peft import get_peft_model

    model, tokenizer = policy
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    copy, _ = load(tmp_path)
    peft = get_peft_model(copy, lora_config(copy, rank=2)).eval()
    texts = [e.completion for e in EXAMPLES[:4]]
    with pytest.raises(InfraError, match="did not take"):
        check_adapter(peft, tokenizer, PROMPTS, texts)
    with torch.no_grad():
        for name, weight in peft.named_parameters():
            if "lora_B" in name:
                weight.fill_(0.05)
    assert check_adapter(peft, tokenizer, PROMPTS, texts) > 0.01


def test_bad_requests(policy):
    for bad in ({"n": 0}, {"temperature": -1}, {"top_p": 0}, {"top_p": 1.1}, {"max_tokens": 0}):
        with pytest.raises(UsageError, match=next(iter(bad))):
            SamplingParams(**{"n": 1, **bad})
    with pytest.raises(UsageError, match="unknown sampler back end 'vlm': it is one of transf"):
        make_sampler("vlm")
    with pytest.raises(UsageError, match="batch_size"):
        TransformersSampler(*policy, batch_size=0)
    with pytest.raises(ValueError, match="empty completion"):
        score(*policy, PROMPTS[:1], [[]])
    with pytest.raises(ValueError, match="positive"):
        score(*policy, PROMPTS[:1], [[5]], temperature=0)
    with pytest.raises(ValueError):
        score(*policy, PROMPTS, [[5]])
