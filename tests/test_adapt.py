"""Test-time training and SDPO on a toy policy, judged by running what it writes."""

import errno
import json
import logging
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from test_train import TASKS, Killed, Verdict, judge, policy  # noqa: F401  (a fixture)
from transformers import GptOssConfig, GptOssForCausalLM, Qwen3Config, Qwen3ForCausalLM

from ttkit import adapt, advantages, rollouts
from ttkit.adapt import batch_ttt, isolated_ttt, rescore
from ttkit.errors import InfraError, UsageError
from ttkit.policy import load, lora_config, prompt_ids
from ttkit.prompts import messages
from ttkit.rollouts import TTT
from ttkit.sdpo import SDPO, best_peer, outcome, sdpo, teacher_gaps
from ttkit.sdpo import messages as teacher_messages
from ttkit.store import check_samples
from ttkit.update import buckets, update

SMALL = {"steps": 2, "rollouts": 8, "max_tokens": 24, "lr": 1e-2, "rank": 4}
TIMES = ["seconds_sampling", "seconds_verification", "seconds_update"]


def weights(folder):
    return load_file(Path(folder) / "adapter_model.safetensors")


def same(a, b):
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def adapted(policy, tmp_path_factory):  # noqa: F811
    settings = {**SMALL, "steps": 12, "rollouts": 16, "objective": "leave_one_out"}
    return batch_ttt(policy, None, TASKS, judge, tmp_path_factory.mktemp("ttt"), **settings)


def test_it_improves_what_is_rewarded(adapted):
    history = adapted.history
    assert history.step.tolist() == list(range(13)) and len(adapted.checkpoints) == 13
    assert history.reward_mean.tail(4).mean() > history.reward_mean.head(4).mean() + 0.2
    last = history.iloc[-1]
    assert math.isnan(last.loss) and math.isnan(last.grad_norm)
    assert (history.grad_norm[:-1] > 0).all() and history.entropy.between(0, 6).all()


def test_the_history_follows_from_the_samples(adapted):
    table = check_samples(adapted.samples.assign(run="test"))
    assert len(table) == 13 * 16 * len(TASKS)
    for row in adapted.history.itertuples():
        part = table[table.step == row.step]
        assert row.correct_rate == pytest.approx(part.correct.mean())
        assert row.sample_fast_1 == pytest.approx((part.speedup_lo > 1).mean())
        assert row.tokens_completion == part.n_tokens.sum()
        assert row.distinct == len(part.drop_duplicates(["task", "code_sha256"]))
    assert table.groupby("step").seed.nunique().eq(1).all() and table.seed.nunique() == 13


def test_each_different_program_is_judged_once_and_a_finished_run_is_only_read(policy, tmp_path):  # noqa: F811
    asked = []

    def counting(items):
        asked.append([(task.key, code) for task, code in items])
        return judge(items)

    first = batch_ttt(policy, None, TASKS, counting, tmp_path, **SMALL)
    assert len(asked) == 3 and all(len(set(items)) == len(items) for items in asked)
    again = batch_ttt(policy, None, TASKS, counting, tmp_path, **SMALL)
    assert len(asked) == 3
    pd.testing.assert_frame_equal(first.history, again.history)
    assert not list(tmp_path.glob("step_*/optimizer.pt"))


@pytest.mark.parametrize("where", ["judging", "saved"])
def test_a_killed_run_ends_as_if_it_had_not_been(policy, tmp_path, where):  # noqa: F811
    settings = {**SMALL, "steps": 3, "seed": 5}
    whole = batch_ttt(policy, None, TASKS, judge, tmp_path / "a", **settings)
    calls = []

    def dies(items):
        calls.append(1)
        if where == "judging" and len(calls) == 3:
            raise Killed
        return judge(items)

    def stop(row):
        if where == "saved" and row["step"] == 1:
            raise Killed

    with pytest.raises(Killed):
        batch_ttt(policy, None, TASKS, dies, tmp_path / "b", on_step=stop, **settings)
    (tmp_path / "b" / ".partial").mkdir()  # as if the kill had come in the middle of a later save
    resumed = batch_ttt(policy, None, TASKS, judge, tmp_path / "b", **settings)
    pd.testing.assert_frame_equal(
        whole.history.drop(columns=TIMES), resumed.history.drop(columns=TIMES)
    )
    assert all(map(same, whole.checkpoints, resumed.checkpoints))
    # other settings do not continue from these steps
    other = batch_ttt(policy, None, TASKS, judge, tmp_path / "b", **{**settings, "steps": 1})
    assert len(other.history) == 2 and len(other.checkpoints) == 2


def test_it_goes_on_from_an_adapter(policy, adapted, tmp_path):  # noqa: F811
    start = adapted.checkpoints[-1]
    result = batch_ttt(policy, start, TASKS[:2], judge, tmp_path, **{**SMALL, "steps": 1})
    assert same(result.checkpoints[0], start) and not same(result.checkpoints[1], start)


def test_loss_and_gradient_agree_with_trl(policy, tmp_path):  # noqa: F811
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    run = TTT(rollouts=6, max_tokens=24, temperature=0.8, objective="group")
    model, tokenizer = load(policy)
    torch.manual_seed(0)
    model = get_peft_model(model, lora_config(model, 4, init_lora_weights=False)).eval()
    rows = rollouts.draw(model, tokenizer, TASKS, run, "t", 0, 0)
    heads = {t.key: prompt_ids(tokenizer, messages(t, "compact")) for t in TASKS}
    pairs = [(heads[r["task"]], r["token_ids"]) for r in rows]
    values = advantages.group(np.random.default_rng(0).exponential(size=(4, 6))).ravel()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=0.0)
    loss, norm = update(
        model,
        optimizer,
        pairs,
        [r["logps"] for r in rows],
        list(values),
        pad=tokenizer.pad_token_id,
        temperature=0.8,
        max_tokens=24,
        batch_tokens=200,  # in several parts
    )
    scale = max(1.0, norm)  # the gradients lie there clipped at 1
    ours = {name: p.grad.clone() * scale for name, p in trained.items()}

    config = GRPOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=len(rows),
        num_generations=6,
        max_completion_length=24,
        temperature=0.8,
        beta=0.0,
        loss_type="dr_grpo",
        scale_rewards="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
    )
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=lambda **_: [],
        args=config,
        train_dataset=Dataset.from_dict({"prompt": [messages(t, "compact") for t in TASKS]}),
        processing_class=tokenizer,
    )
    width = max(len(p) for p, _ in pairs)
    longest = max(len(c) for _, c in pairs)
    pad = tokenizer.pad_token_id
    inputs = {
        "prompt_ids": [[pad] * (width - len(p)) + p for p, _ in pairs],
        "prompt_mask": [[0] * (width - len(p)) + [1] * len(p) for p, _ in pairs],
        "completion_ids": [c + [pad] * (longest - len(c)) for _, c in pairs],
        "completion_mask": [[1] * len(c) + [0] * (longest - len(c)) for _, c in pairs],
    }
    inputs = {name: torch.tensor(value) for name, value in inputs.items()}
    old = [list(r["logps"]) + [0.0] * (longest - len(r["logps"])) for r in rows]
    inputs |= {"old_per_token_logps": torch.tensor(old), "advantages": torch.tensor(values).float()}
    model.zero_grad()
    trainer.current_gradient_accumulation_steps = 1
    theirs = trainer.compute_loss(trainer.model, inputs)
    theirs.backward()
    assert loss == pytest.approx(theirs.item(), abs=1e-4) and loss != 0
    largest = max(p.grad.abs().max().item() for p in trained.values())
    for name, p in trained.items():
        assert (p.grad - ours[name]).abs().max().item() <= 1e-4 * largest, name


def test_a_number_a_token_weights_tokens_and_parts_do_not_matter(policy):  # noqa: F811
    model, tokenizer = load(policy)
    torch.manual_seed(0)
    model = get_peft_model(model, lora_config(model, 4, init_lora_weights=False)).eval()
    run = TTT(rollouts=4, max_tokens=24)
    rows = rollouts.draw(model, tokenizer, TASKS[:2], run, "t", 0, 0)
    heads = {t.key: prompt_ids(tokenizer, messages(t, "compact")) for t in TASKS}
    pairs = [(heads[r["task"]], r["token_ids"]) for r in rows]
    logps = [r["logps"] for r in rows]
    trained = [p for p in model.parameters() if p.requires_grad]
    common = {"pad": tokenizer.pad_token_id, "temperature": 1.0, "max_tokens": 24}

    def gradient(values, **options):
        loss, norm = update(
            model, torch.optim.SGD(trained, lr=0.0), pairs, logps, values, **common, **options
        )
        scale = max(1.0, norm)
        return loss, torch.cat([p.grad.flatten() * scale for p in trained])

    one = [np.float64(i - 3) for i in range(8)]
    loss, whole = gradient(one)
    assert loss == pytest.approx(
        -sum(v * r["n_tokens"] for v, r in zip(one, rows, strict=True)) / (8 * 24), abs=1e-5
    )
    again, spread = gradient(
        [np.full(r["n_tokens"], v) for v, r in zip(one, rows, strict=True)], batch_tokens=1
    )
    assert again == pytest.approx(loss, abs=1e-6)
    torch.testing.assert_close(whole, spread, atol=1e-6, rtol=1e-4)
    # the bonus alone: going with the gradient raises the entropy
    zero = [np.float64(0)] * 8
    loss, bonus = gradient(zero, entropy_weight=0.5)
    assert loss < 0 and bonus.abs().max() > 0
    step = 1e-2 * bonus / bonus.norm()
    with torch.no_grad():
        for p, change in zip(trained, step.split([p.numel() for p in trained]), strict=True):
            p -= change.view_as(p)
    assert gradient(zero, entropy_weight=0.5)[0] < loss


def test_buckets_hold_everything_once_and_keep_to_the_limit():
    rng = np.random.default_rng(0)
    pairs = [([0] * a, [0] * b) for a, b in rng.integers(1, 30, (50, 2))]
    parts = list(buckets(pairs, 120))
    assert sorted(i for part in parts for i in part) == list(range(50))
    for part in parts:
        width = max(sum(map(len, pairs[i])) for i in part)
        assert len(part) == 1 or len(part) * width <= 120
    assert list(buckets(pairs[:1], 1)) == [[0]]


# --- bad input ----------------------------------------------------------------------------------


def test_zero_correct_samples_in_a_task_is_no_error(policy, tmp_path):  # noqa: F811
    def never_the_first(items):
        return [
            Verdict("incorrect", False, math.nan) if task is TASKS[0] else verdict
            for (task, _), verdict in zip(items, judge(items), strict=True)
        ]

    result = batch_ttt(policy, None, TASKS, never_the_first, tmp_path, **SMALL)
    mine = result.samples[result.samples.task == TASKS[0].key]
    assert not mine.correct.any() and mine.speedup.isna().all()
    assert not same(result.checkpoints[0], result.checkpoints[1])


@pytest.mark.parametrize("objective", ["global", "group", "leave_one_out", "entropic"])
def test_equal_rewards_change_nothing_and_say_so(policy, tmp_path, caplog, objective):  # noqa: F811
    calls = []

    def later_never(items):  # a first step with a gradient fills Adam's moments
        calls.append(1)
        return (
            judge(items)
            if len(calls) == 1
            else [Verdict("incorrect", False, math.nan)] * len(items)
        )

    with caplog.at_level(logging.WARNING, logger="ttkit.adapt"):
        result = batch_ttt(
            policy, None, TASKS, later_never, tmp_path, **{**SMALL, "objective": objective}
        )
    assert "step 1: all advantages are 0, no gradient" in caplog.text
    assert not same(result.checkpoints[0], result.checkpoints[1])
    assert same(result.checkpoints[1], result.checkpoints[2])
    assert result.history.grad_norm.tolist()[1] == 0


def test_divergence_stops_and_keeps_the_last_good_checkpoint(policy, tmp_path):  # noqa: F811
    with pytest.raises(UsageError, match=r"diverged.*lower lr, now 1e\+30; the last good"):
        batch_ttt(policy, None, TASKS, judge, tmp_path, **{**SMALL, "lr": 1e30})
    assert [path.name for path in sorted(tmp_path.glob("step_*"))] == ["step_00"]
    load(policy, tmp_path / "step_00")


def test_a_loss_that_is_no_number_leaves_the_weights(policy):  # noqa: F811
    model, tokenizer = load(policy)
    model = get_peft_model(model, lora_config(model, 4))
    trained = [p for p in model.parameters() if p.requires_grad]
    before = [p.clone() for p in trained]
    head = prompt_ids(tokenizer, messages(TASKS[0], "compact"))
    with pytest.raises(FloatingPointError):
        update(
            model,
            torch.optim.AdamW(trained),
            [(head, [5, 6])],
            [np.zeros(2)],
            [np.float64("nan")],
            pad=0,
            temperature=1.0,
            max_tokens=8,
        )
    assert all(map(torch.equal, before, trained))


def test_an_adapter_that_did_not_take_is_an_error(policy, tmp_path, monkeypatch):  # noqa: F811
    save = PeftModel.save_pretrained
    kept = {}

    def forgets(self, folder, **options):
        state = kept.setdefault("state", {n: p.clone() for n, p in self.state_dict().items()})
        save(self, folder, state_dict={n: v for n, v in state.items() if "lora_" in n}, **options)

    monkeypatch.setattr(PeftModel, "save_pretrained", forgets)
    with pytest.raises(InfraError, match="the adapter did not take: .*step_01 equal"):
        batch_ttt(policy, None, TASKS, judge, tmp_path, **SMALL)
    assert not (tmp_path / "step_01").exists()


def test_a_full_disk_keeps_the_last_complete_checkpoint(policy, tmp_path, monkeypatch):  # noqa: F811
    save, saved = PeftModel.save_pretrained, []

    def fills(self, folder, **options):
        save(self, folder, **options)
        saved.append(folder)
        if len(saved) == 3:
            (Path(folder) / "adapter_model.safetensors").write_bytes(b"torn")
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(PeftModel, "save_pretrained", fills)
        with pytest.raises(InfraError, match="the disk is full: .*step_02"):
            batch_ttt(policy, None, TASKS, judge, tmp_path, **SMALL)
    assert [p.name for p in sorted(tmp_path.glob("step_*"))] == ["step_00", "step_01"]
    assert not (tmp_path / ".partial").exists()
    load(policy, tmp_path / "step_01")
    assert len(batch_ttt(policy, None, TASKS, judge, tmp_path, **SMALL).history) == 3


def test_a_failed_verifier_is_no_fault_of_a_sample(policy, tmp_path):  # noqa: F811
    def half(items):
        return [
            Verdict("infra_error", False, math.nan) if i % 2 else verdict
            for i, verdict in enumerate(judge(items))
        ]

    result = batch_ttt(policy, None, TASKS, half, tmp_path / "a", **{**SMALL, "steps": 1})
    known = result.samples[(result.samples.step == 0) & (result.samples.status != "infra_error")]
    assert result.history.correct_rate[0] == pytest.approx(known.correct.mean())

    def broken(items):
        return [Verdict("infra_error", False, math.nan)] * len(items)

    with pytest.raises(InfraError, match="no rollout of add could be measured"):
        batch_ttt(policy, None, TASKS, broken, tmp_path / "b", **SMALL)
    assert len(batch_ttt(policy, None, TASKS, judge, tmp_path / "b", **SMALL).history) == 3


def test_bad_settings(policy, tmp_path):  # noqa: F811
    for bad, match in (
        ({"objective": "ppo"}, "unknown objective 'ppo': it is one of global, group"),
        ({"reward": "tokens"}, "unknown reward 'tokens'"),
        ({"steps": 0}, "steps = 0"),
        ({"rollouts": 1, "objective": "group"}, "rollouts = 1: the objective group"),
        ({"temperature": 0}, "temperature"),
        ({"patience": -1}, "cannot be negative"),
    ):
        with pytest.raises(UsageError, match=match):
            batch_ttt(policy, None, TASKS, judge, tmp_path, **{**SMALL, **bad})
    with pytest.raises(UsageError, match="at least one task"):
        batch_ttt(policy, None, [], judge, tmp_path, **SMALL)
    with pytest.raises(UsageError, match="unknown feedback 'hint'"):
        SDPO(feedback="hint")


# --- options ------------------------------------------------------------------------------------


def test_patience_ends_a_run(policy, tmp_path):  # noqa: F811
    settings = {**SMALL, "steps": 9, "patience": 2, "lr": 1e-9}

    def slow(items):
        return [replace(v, speedup=0.5 if v.correct else math.nan) for v in judge(items)]

    result = batch_ttt(policy, None, TASKS, slow, tmp_path, **settings)
    assert result.history.step.tolist() == [0, 1, 2] and len(result.checkpoints) == 3


def test_threshold_rewards_are_zero_or_one(policy, tmp_path):  # noqa: F811
    settings = {**SMALL, "steps": 1, "reward": "threshold", "threshold": 1.5}
    result = batch_ttt(policy, None, TASKS, judge, tmp_path, **settings)
    first = result.samples[result.samples.step == 0]
    assert result.history.reward_mean[0] == pytest.approx((first.speedup_lo > 1.5).mean())


def test_isolated_runs_are_those_of_their_tasks(policy, tmp_path):  # noqa: F811
    settings = {**SMALL, "steps": 1}
    alone = isolated_ttt(policy, None, TASKS[:2], judge, tmp_path / "all", **settings)
    assert list(alone) == ["add", "sub"]
    one = batch_ttt(policy, None, [TASKS[1]], judge, tmp_path / "one", **settings)
    assert same(alone["sub"].checkpoints[1], one.checkpoints[1])
    assert set(alone["add"].samples.task) == {"add"}


def test_rescoring_is_fresh_and_paired(policy, adapted):  # noqa: F811
    paths = {0: adapted.checkpoints[0], 12: adapted.checkpoints[12]}
    settings = {**SMALL, "rollouts": 16, "steps": 12}
    fresh = rescore(policy, paths, TASKS, judge, **settings)
    assert fresh.groupby("step").size().to_dict() == {0: 64, 12: 64}
    assert fresh.seed.nunique() == 1 and not set(fresh.seed) & set(adapted.samples.seed)
    rate = fresh.groupby("step").speedup.apply(lambda s: s.fillna(0).mean())
    assert rate[12] > rate[0]


# --- SDPO ---------------------------------------------------------------------------------------


def test_sdpo_shares_step_0_counts_its_teacher_and_learns(policy, tmp_path):  # noqa: F811
    ttt = batch_ttt(policy, None, TASKS, judge, tmp_path / "ttt", **SMALL)
    arms = {}
    for name, words in (("none", {}), ("outcome", {"feedback": "outcome", "peer": True})):
        arms[name] = sdpo(policy, None, TASKS, judge, tmp_path / name, **words, **SMALL)
        first = arms[name].samples.query("step == 0").code.tolist()
        assert first == ttt.samples.query("step == 0").code.tolist()
        assert not same(arms[name].checkpoints[0], arms[name].checkpoints[1])
        assert np.isfinite(arms[name].history.teacher_gap[:-1]).all()
    read = {name: arm.history.tokens_teacher[0] for name, arm in arms.items()}
    own = ttt.history.tokens_prompt[0] + ttt.history.tokens_completion[0]
    assert own < read["none"] < read["outcome"]


def test_a_teacher_that_reads_nothing_new_teaches_nothing(policy, tmp_path, monkeypatch):  # noqa: F811
    run = SDPO(rollouts=4, max_tokens=24, temperature=0.7)
    model, tokenizer = load(policy)
    rows = rollouts.judged(rollouts.draw(model, tokenizer, TASKS, run, "t", 0, 0), TASKS, judge)
    heads = {t.key: prompt_ids(tokenizer, messages(t, "compact")) for t in TASKS}
    batch = rollouts.Rollouts(TASKS, rows, [(heads[r["task"]], r["token_ids"]) for r in rows])
    gaps, _ = teacher_gaps(model, tokenizer, batch, run)
    assert max(np.abs(g).max() for g in gaps) > 0.05
    monkeypatch.setattr("ttkit.sdpo.messages", lambda task, *_: messages(task, "compact"))
    gaps, read = teacher_gaps(model, tokenizer, batch, run)
    # the same distribution at the same temperature: nothing but rounding is left
    assert max(np.abs(g).max() for g in gaps) < 1e-4
    assert read == sum(len(p) + len(c) for p, c in batch.pairs)


def test_feedback_is_worded_by_the_outcome_or_as_in_the_paper():
    row = {
        "correct": True,
        "speedup": 2.0,
        "speedup_lo": 1.8,
        "speedup_hi": 2.1,
        "status": "correct",
    }
    wrong = {"correct": False, "status": "incorrect", "reason": "its error is 3"}
    assert outcome(row) == "It is correct and faster: its speedup over the reference is 2.00."
    assert "not measurably faster" in outcome({**row, "speedup_lo": 0.9})
    assert "slower" in outcome({**row, "speedup": 0.5, "speedup_lo": 0.4, "speedup_hi": 0.6})
    assert outcome(wrong) == "It returns wrong values: its error is 3."
    ask = TASKS[0]
    for feedback, said, unsaid in (
        ("none", "Correctly solve", "feedback"),
        ("outcome", "It is correct and faster", "unsuccessful"),
        ("paper", "unsuccessful earlier attempt", "your earlier attempt"),
    ):
        text = teacher_messages(ask, row, None, SDPO(feedback=feedback))[-1]["content"]
        assert text.startswith(messages(ask, "compact")[-1]["content"])
        assert said in text and unsaid not in text
    text = teacher_messages(ask, row, "return x", SDPO(peer=True))[-1]["content"]
    assert "Correct solution:\n\nreturn x\n" in text


def test_a_peer_is_the_fastest_other_correct_program():
    rows = [
        {"task": t, "correct": c, "code_sha256": sha, "speedup": s, "code": sha}
        for t, c, sha, s in (
            ("a", True, "p", 1.0),
            ("a", True, "q", 3.0),
            ("a", False, "r", math.nan),
            ("b", True, "s", 9.0),
        )
    ]
    assert [best_peer(row, rows) for row in rows] == ["q", "p", "q", None]


# --- other architectures ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["qwen3", "gpt_oss"])
def test_other_architectures(policy, tmp_path, kind):  # noqa: F811
    _, tokenizer = load(policy)
    torch.manual_seed(0)
    common = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if kind == "qwen3":
        network = Qwen3ForCausalLM(Qwen3Config(**common))
    else:
        config = GptOssConfig(**common, num_local_experts=4, num_experts_per_tok=2)
        network = GptOssForCausalLM(config)
    network.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")

    def shorter_is_better(items):
        return [Verdict("correct", True, 1 + 1 / (1 + len(code))) for _, code in items]

    settings = {**SMALL, "max_tokens": 6, "rollouts": 4}
    where = tmp_path / "model"
    result = batch_ttt(where, None, TASKS[:2], shorter_is_better, tmp_path / "out", **settings)
    assert (result.history.grad_norm[:-1] > 0).all()
    names = weights(result.checkpoints[2])
    assert kind != "gpt_oss" or any("experts" in name for name in names)
    # what is on disk is the policy that drew the step's rollouts
    model, _ = load(where, result.checkpoints[2])
    rows = rollouts.draw(model, tokenizer, TASKS[:2], TTT(**settings), "ttt", 2, 2)
    assert [r["token_ids"] for r in rows] == [
        list(ids) for ids in result.samples.query("step == 2").token_ids
    ]
    first = json.loads((result.checkpoints[1] / adapt.STATE).read_text())
    assert [row["step"] for row in first] == [0]
