"""Many checkpoints against one sequence at a time."""

import itertools
import threading

import pytest
import torch
from peft import get_peft_model
from test_sampling import EXAMPLES, PROMPTS, gpt_oss, qwen3

from ttkit import scoring
from ttkit.errors import InfraError, UsageError
from ttkit.policy import load, lora_config
from ttkit.pretrain import pretrain
from ttkit.scoring import score, score_checkpoints

# Lengths 1 to 40, some completions twice, some of several prompts.
GIVEN = [(p, [7 + (i * k) % 90 for i in range(k)]) for p in PROMPTS for k in (1, 3, 9, 9, 40)]
CHATS, IDS = [p for p, _ in GIVEN], [ids for _, ids in GIVEN]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    out = tmp_path_factory.mktemp("policy")
    sizes = {"hidden": 32, "layers": 2, "heads": 2, "vocab": 300}
    return pretrain(
        out, examples=EXAMPLES, n_examples=64, batch=16, on_step=lambda *_: None, **sizes
    )


def make_adapter(model_dir, path, seed, size=0.3):
    """A PEFT adapter that changes the model: LoRA's B starts at 0 and would not."""
    torch.manual_seed(seed)
    model, _ = load(model_dir)
    peft = get_peft_model(model, lora_config(model, rank=2))
    with torch.no_grad():
        for name, weight in peft.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, size)
    peft.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def adapters(model_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return {i: make_adapter(model_dir, folder / f"step_{i:02}", i) for i in range(2)}


def one_at_a_time(model_dir, adapter, temperature=1.0, dtype="float32"):
    model, tokenizer = load(model_dir, adapter, dtype=dtype)
    pairs = zip(CHATS, IDS, strict=True)
    return [score(model, tokenizer, [p], [c], temperature, batch_size=1)[0] for p, c in pairs]


def assert_equal(scores, expected, within=1e-4):
    for got, wanted in zip(scores, expected, strict=True):
        for name in ("nll_sum", "nll_mean", "nll_max", "entropy_mean"):
            assert getattr(got, name) == pytest.approx(getattr(wanted, name), abs=within)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_every_checkpoint_scores_as_one_sequence_at_a_time(model_dir, adapters, temperature):
    paths = {"base": None, **adapters, "base again": None}
    seen = []
    found = score_checkpoints(
        model_dir,
        paths,
        CHATS,
        IDS,
        temperature=temperature,
        batch_size=3,
        on_checkpoint=lambda *at: seen.append(at),
    )
    assert list(found) == list(paths) and seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    for label, path in paths.items():
        assert_equal(found[label], one_at_a_time(model_dir, path, temperature))
    assert found["base"] == found["base again"]  # no adapter has left a trace
    for one, other in itertools.combinations(("base", 0, 1), 2):
        pairs = zip(found[one], found[other], strict=True)
        assert max(abs(a.nll_sum - b.nll_sum) for a, b in pairs) > 0.1


@pytest.mark.parametrize("architecture", [gpt_oss, qwen3])  # the first has a window of 16 tokens
def test_other_architectures(model_dir, tmp_path, architecture):
    _, tokenizer = load(model_dir)
    torch.manual_seed(0)
    architecture(tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    adapter = make_adapter(tmp_path / "model", tmp_path / "adapter", 1)
    found = score_checkpoints(tmp_path / "model", {0: None, 1: adapter}, CHATS, IDS)
    for label, path in ((0, None), (1, adapter)):
        assert_equal(found[label], one_at_a_time(tmp_path / "model", path))


def test_fewer_bits_stay_as_they_are(model_dir, adapters):
    """In bfloat16 an adapter is not merged, and comes off whole."""
    found = score_checkpoints(
        model_dir, {"base": None, **adapters, "again": None}, CHATS, IDS, dtype="bfloat16"
    )
    assert found["base"] == found["again"] != found[1]
    assert_equal(found[1], one_at_a_time(model_dir, adapters[1], dtype="bfloat16"), within=1.0)


def test_what_is_scored_twice_is_read_once(model_dir, monkeypatch):
    sizes = []
    original = scoring._continue

    def spy(model, prompts, cache, mask, rows, *rest):
        sizes.append(len(rows))
        return original(model, prompts, cache, mask, rows, *rest)

    monkeypatch.setattr(scoring, "_continue", spy)
    scores = score_checkpoints(model_dir, {0: None}, CHATS * 3, IDS * 3)[0]
    assert sum(sizes) == len(PROMPTS) * 4  # of five completions, two are the same
    assert scores[: len(CHATS)] == scores[len(CHATS) : 2 * len(CHATS)]


def test_a_large_model_is_held_once(model_dir, adapters, monkeypatch):
    threads, seen = torch.get_num_threads(), set()
    original = scoring._score_distinct

    def spy(*given):
        seen.add((threading.get_ident(), torch.get_num_threads()))
        return original(*given)

    monkeypatch.setattr(scoring, "_score_distinct", spy)
    found = {}
    for most in (scoring.SMALL_PARAMETERS, 100):
        monkeypatch.setattr(scoring, "SMALL_PARAMETERS", most)
        seen.clear()
        found[most] = score_checkpoints(model_dir, {**adapters, 2: None}, CHATS, IDS)
        if most == 100:
            assert len(seen) == 1
            assert {n for _, n in seen} == {threads}
        else:
            assert {n for _, n in seen} == {max(1, threads // scoring.WORKERS)}
        assert torch.get_num_threads() == threads
    small, large = found.values()
    for label in small:
        assert_equal(small[label], large[label])


def test_a_batch_shrinks_where_logits_would_not_fit():
    rows = [(0, (1,) * n) for n in (2, 1 << 10, 1 << 10, 3)]
    vocab = scoring.LOGITS_AT_ONCE >> 10
    assert [len(b) for b in scoring._batches(rows, 64, vocab)] == [1, 1, 2]
    assert [len(b) for b in scoring._batches(rows, 64, 10 * vocab)] == [1, 1, 2]
    assert [len(b) for b in scoring._batches(rows, 3, 10)] == [3, 1]


def test_bad_samples_and_checkpoints(model_dir, adapters, tmp_path):
    with pytest.raises(UsageError, match="no checkpoint to score under"):
        score_checkpoints(model_dir, {}, CHATS, IDS)
    with pytest.raises(UsageError, match="no complete LoRA adapter"):
        score_checkpoints(model_dir, {0: tmp_path / "step_00"}, CHATS, IDS)
    for bad, message in (
        (None, "sample 1 has no token ids"),
        ([], "sample 1 has no token ids"),
        ([5, 9999], "sample 1 has the token 9999 and the model only"),
        ([5] * 5000, "sample 1 has .* tokens with its prompt, the model .* positions"),
    ):
        with pytest.raises(UsageError, match=message):
            score_checkpoints(model_dir, adapters, PROMPTS[:2], [[5], bad])
    with pytest.raises(ValueError, match="2 prompts for 1 completions"):
        score_checkpoints(model_dir, adapters, PROMPTS[:2], [[5]])
    with pytest.raises(ValueError, match="temperature 0"):
        score_checkpoints(model_dir, adapters, PROMPTS[:1], [[5]], temperature=0)


def test_an_adapter_that_is_not_put_on_is_an_error(model_dir, adapters, tmp_path, monkeypatch):
    same = {0: adapters[0], 1: adapters[0]}  # a step without a gradient: no error
    found = score_checkpoints(model_dir, same, CHATS, IDS)
    assert found[0] == found[1]
    original = scoring.load_adapter
    monkeypatch.setattr(scoring, "load_adapter", lambda model, _: original(model, adapters[0]))
    with pytest.raises(InfraError, match="step_00 and .*step_01 differ, but every score"):
        score_checkpoints(model_dir, adapters, CHATS, IDS)


@pytest.mark.gpu
def test_a_gpu_gives_the_same(model_dir, adapters):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    here = score_checkpoints(model_dir, adapters, CHATS, IDS)
    there = score_checkpoints(model_dir, adapters, CHATS, IDS, device="cuda")
    for label in adapters:
        assert_equal(there[label], here[label], within=1e-3)
