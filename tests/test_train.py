"""GRPO on a toy policy, judged by running what it writes."""

import json
import logging
import math
import shutil
from dataclasses import dataclass
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GptOssConfig, GptOssForCausalLM

from ttkit.errors import UsageError
from ttkit.policy import load
from ttkit.pretrain import pretrain
from ttkit.prompts import candidate_source, compact_text, messages
from ttkit.scoring import score
from ttkit.tasks import Task
from ttkit.train import COLUMNS, GRPO, train_grpo

OPERATIONS = {"add": "x + a", "sub": "x - a", "mul": "x * a", "max": "torch.maximum(x, a)"}
MODULE = """import torch


class Model(torch.nn.Module):
    def forward(self, x, a):
        x = {expression} * 1.0
        return x + 0.0


def get_inputs():
    return [torch.linspace(-1, 1, 7), torch.linspace(2, 3, 7)]


def get_init_inputs():
    return []
"""
TASKS = [
    Task("file", 0, i, name, MODULE.format(expression=expression))
    for i, (name, expression) in enumerate(OPERATIONS.items())
]
SMALL = {"tasks_per_step": 2, "group": 6, "rank": 4, "max_tokens": 24, "baseline_samples": 4}
STEPS = 48
SECONDS = ["seconds_sampling", "seconds_verification", "seconds_update"]


def corpus():
    """Prompts with right and wrong answers, slow and fast: there is something to reinforce."""
    for task in TASKS:
        prompt = compact_text(task.forward_args, task.forward_body)
        right = OPERATIONS[task.name]
        for other in OPERATIONS.values():
            for answer in (right, f"{right} * 1.0", f"{right} * 1.0 + 0.0", other):
                yield SimpleNamespace(prompt=prompt, completion=f"return {answer}")


@dataclass
class Verdict:
    status: str
    correct: bool
    speedup: float


class Operations(TorchDispatchMode):
    """Counts tensor operations: a cost that is the same on every run."""

    def __init__(self):
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += 1
        return func(*args, **(kwargs or {}))


def run_and_count(source, name, inputs):
    namespace = {}
    exec(source, namespace)
    with Operations() as operations:
        value = namespace[name]()(*inputs)
    return value, operations.n


def judge(items):
    verdicts = []
    for task, code in items:
        inputs = [torch.linspace(-1, 1, 7), torch.linspace(2, 3, 7)]
        expected, reference = run_and_count(task.code, "Model", inputs)
        try:
            value, candidate = run_and_count(candidate_source(task, code), "ModelNew", inputs)
            right = torch.equal(value, expected)
            status = "correct" if right else "incorrect"
        except Exception:
            right, status = False, "runtime_error"
        speedup = reference / max(candidate, 1) if right else math.nan
        verdicts.append(Verdict(status, right, speedup))
    return verdicts


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return pretrain(
        tmp_path_factory.mktemp("policy"),
        examples=list(corpus()),
        n_examples=64,
        batch=8,
        epochs=30,
        hidden=32,
        layers=2,
        heads=2,
        vocab=400,
        on_step=lambda *_: None,
    )


@pytest.fixture(scope="module")
def trained(policy, tmp_path_factory):
    rows = []
    settings = {**SMALL, "steps": STEPS, "tasks_per_step": 4, "lr": 5e-3}
    out = tmp_path_factory.mktemp("trained")
    return out, rows, train_grpo(policy, TASKS, judge, out, on_step=rows.append, **settings)


def test_training_improves_what_is_rewarded(trained):
    _, rows, result = trained
    history = result.history
    assert tuple(history.columns) == COLUMNS
    assert history.step.tolist() == list(range(1, STEPS + 1)) == [row["step"] for row in rows]
    first, last = history.head(8), history.tail(8)
    assert last.reward_mean.mean() > first.reward_mean.mean() + 0.2
    assert last.correct_rate.mean() > first.correct_rate.mean() + 0.1
    everyone = sorted(t.key for t in TASKS)
    assert all(sorted(names.split()) == everyone for names in history.tasks)
    assert history.entropy.between(0, 6).all() and (history.grad_norm >= 0).all()
    assert history.n_tokens.between(1, 24).all() and history.distinct.between(1, 24).all()
    assert (history[SECONDS] >= 0).all(axis=None)
    correct = history.correct_rate > 0
    assert (history.speedup_mean >= history.speedup_gmean - 1e-9)[correct].all()


def test_the_adapter_changes_the_model_that_is_loaded(policy, trained):
    _, _, result = trained
    adapted, tokenizer = load(policy, result.adapter)
    base, _ = load(policy)
    chats = [messages(task, "compact") for task in TASKS]
    ids = [tokenizer.encode(f"return {OPERATIONS[t.name]}<|end|>") for t in TASKS]
    before, after = (score(m, tokenizer, chats, ids) for m in (base, adapted))
    # the rewarded answers have become likelier
    assert sum(a.nll_sum for a in after) < sum(b.nll_sum for b in before) - 0.1


def test_finished_runs_are_only_read(policy, trained):
    out, rows, result = trained
    settings = {**SMALL, "steps": STEPS, "tasks_per_step": 4, "lr": 5e-3}

    def untouched(items):
        raise AssertionError("nothing is left to judge")

    again = train_grpo(policy, TASKS, untouched, out, **settings)
    assert again.adapter == result.adapter and len(rows) == STEPS
    pd.testing.assert_frame_equal(again.history, result.history)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("baseline", ["fixed", "running_median"])
def test_a_killed_run_ends_as_if_it_had_not_been(policy, tmp_path, baseline):
    settings = {**SMALL, "steps": 5, "save_steps": 2, "baseline": baseline, "seed": 3}
    whole = train_grpo(policy, TASKS, judge, tmp_path / "a", on_step=lambda _: None, **settings)
    steps = []

    def stop(row):
        steps.append(row["step"])
        if len(steps) == 4:
            raise Killed

    out = tmp_path / "b"
    with pytest.raises(Killed):
        train_grpo(policy, TASKS, judge, out, on_step=stop, **settings)
    # as if the kill had come in the middle of a later save
    shutil.copytree(out / "checkpoint-2", out / "checkpoint-4")
    (out / "checkpoint-4" / "ttkit.json").unlink()
    resumed = train_grpo(policy, TASKS, judge, out, on_step=stop, **settings)
    assert steps == [1, 2, 3, 4, 3, 4, 5]
    pd.testing.assert_frame_equal(
        whole.history.drop(columns=SECONDS), resumed.history.drop(columns=SECONDS)
    )
    a, b = ((r.adapter / "adapter_model.safetensors").read_bytes() for r in (whole, resumed))
    assert a == b
    # other settings do not continue from these checkpoints
    train_grpo(policy, TASKS, judge, out, on_step=stop, **{**settings, "seed": 4, "steps": 2})
    assert steps[7:] == [1, 2]


def test_diverging_stops_and_keeps_the_last_checkpoint(policy, tmp_path):
    settings = {**SMALL, "steps": 6, "save_steps": 1, "lr": 1e30}
    with pytest.raises(UsageError, match=r"training diverged.*lower lr.*last checkpoint is kept"):
        train_grpo(policy, TASKS, judge, tmp_path, on_step=lambda _: None, **settings)
    assert list(tmp_path.glob("checkpoint-*/ttkit.json"))
    assert not (tmp_path / "grpo.json").exists()


def test_equal_rewards_are_said_to_teach_nothing(policy, tmp_path, caplog):
    def never(items):
        return [Verdict("incorrect", False, math.nan) for _ in items]

    settings = {**SMALL, "steps": 2}
    with caplog.at_level(logging.WARNING, logger="ttkit.train"):
        result = train_grpo(policy, TASKS, never, tmp_path, on_step=lambda _: None, **settings)
    said = [record.getMessage() for record in caplog.records]
    assert [line.split(":")[0] for line in said[:2]] == ["step 1", "step 2"]
    assert "nothing was learned" in said[2]
    base, tokenizer = load(policy)
    adapted, _ = load(policy, result.adapter)
    chats = [messages(task, "compact") for task in TASKS]
    ids = [tokenizer.encode(f"return {OPERATIONS[t.name]}<|end|>") for t in TASKS]
    before, after = (score(m, tokenizer, chats, ids) for m in (base, adapted))
    assert [s.nll_sum for s in after] == pytest.approx([s.nll_sum for s in before])


def test_gpt_oss_experts_are_trained(policy, tmp_path):
    """The path of the paper's model, on a tiny random one, in two parts of a batch."""
    _, tokenizer = load(policy)
    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    GptOssForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")

    def shorter_is_better(items):
        return [Verdict("correct", True, 1 + 1 / (1 + len(code))) for _, code in items]

    settings = {**SMALL, "steps": 1, "micro_batch": 6, "max_tokens": 6}
    result = train_grpo(
        tmp_path / "model",
        TASKS,
        shorter_is_better,
        tmp_path / "out",
        on_step=lambda _: None,
        **settings,
    )
    saved = json.loads((result.adapter / "adapter_config.json").read_text())
    assert set(saved["target_parameters"]) == {
        "mlp.experts.gate_up_proj",
        "mlp.experts.down_proj",
    }
    assert result.history.correct_rate.tolist() == [1.0]


def test_bad_settings(policy, tmp_path):
    for bad, match in (
        ({"group": 1}, "group = 1"),
        ({"steps": 0}, "steps = 0"),
        ({"baseline": "median"}, "unknown baseline 'median': it is one of fixed, running_median"),
        ({"reward_transform": "sqrt"}, "unknown reward transform 'sqrt'"),
        ({"micro_batch": 5}, "micro_batch = 5 does not divide the 12 samples"),
        ({"temperature": 0}, "temperature"),
        ({"tasks_per_step": 5}, "tasks_per_step = 5 of only 4 training tasks"),
    ):
        with pytest.raises(UsageError, match=match):
            train_grpo(policy, TASKS, judge, tmp_path, **{**SMALL, **bad})
    assert GRPO().samples_per_step == 64
