"""Prompts, and what is made of a completion."""

import pytest
import torch

from ttkit.errors import UsageError
from ttkit.prompts import candidate_source, code_sha256, compact_text, extract, messages
from ttkit.tasks import Task

CODE = """import torch
import torch.nn as nn


class Model(nn.Module):
    def __init__(self, k: float):
        super().__init__()
        self.k = k

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x * self.k
        return y


def get_inputs():
    return [torch.ones(3)]


def get_init_inputs():
    return [2.0]
"""
TASK = Task("file", 0, 0, "t.py", CODE)


def test_messages():
    assert messages(TASK, "compact") == [
        {"role": "user", "content": compact_text(("x",), "y = x * self.k\nreturn y")}
    ]
    system, user = messages(TASK, "full", "module")
    assert system["role"] == "system" and CODE.strip() in user["content"]
    assert "ModelNew(nn.Module)" in user["content"]
    assert messages(TASK, "full", "body")[1]["content"] != user["content"]
    with pytest.raises(UsageError, match="prompt style"):
        messages(TASK, "short")
    with pytest.raises(UsageError, match="action format"):
        messages(TASK, "full", "patch")


@pytest.mark.parametrize(
    "text",
    [
        "return x + x",
        "```python\nreturn x + x\n```",
        "First I thought\n```python\nreturn x\n```\nbut\n```\nreturn x + x\n```\nis better.",
        "```python\nreturn x + x",
        "    return x + x\n",
        "def forward(self, x):\n    return x + x",
        "```python\nclass ModelNew(Model):\n    def forward(self, x):\n        return x + x\n```",
    ],
)
def test_a_body_is_found(text):
    assert extract(text) == "return x + x"


def test_broken_text_is_left_for_the_verifier():
    assert extract("def forward(self, x:\n  return") == "def forward(self, x:\n  return"


def test_a_body_makes_a_model_that_runs():
    source = candidate_source(TASK, "z = x + x\nreturn z")
    space: dict = {}
    exec(compile(source, "candidate", "exec"), space)
    model = space["ModelNew"](*space["get_init_inputs"]())
    assert torch.equal(model(torch.ones(3)), torch.full((3,), 2.0))


def test_an_empty_body_does_not_compile():
    with pytest.raises(SyntaxError):
        compile(candidate_source(TASK, ""), "candidate", "exec")


def test_a_module_stays_as_it_is():
    assert candidate_source(TASK, "class ModelNew: ...", "module") == "class ModelNew: ...\n"


def test_the_hash_ignores_layout_and_comments_only():
    assert code_sha256("return x+x  # fast") == code_sha256("return x + x\n")
    assert code_sha256("return x + x") != code_sha256("return x - x")
    assert code_sha256("return (x") != code_sha256("return (y")
    assert code_sha256("return (x  \n") == code_sha256("return (x")
