"""Prompts, and what is made of a completion."""

import pytest
import torch

from ttkit.errors import UsageError
from ttkit.prompts import (
    action_of,
    candidate_source,
    code_sha256,
    compact_text,
    extract,
    messages,
)
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


@pytest.mark.parametrize(
    ("text", "action"),
    [
        ("class ModelNew(Model):\n    pass", "module"),
        ("ModelNew = Fast", "module"),
        ("from fast import Fast as ModelNew", "module"),
        ("```python\nimport torch\nclass ModelNew: pass\n```", "module"),
        ("class ModelNew(Model:\n    pass", "module"),  # that it does not parse is its verdict
        ("return x", "body"),
        ("import math\nreturn x * math.pi", "body"),
        ("def half(v):\n    return v / 2\nif x.sum() > 0:\n    return half(x)\nreturn x", "body"),
        ("def forward(self, x):\n    return x", "body"),
        ("y = x", "body"),
        ("return x +", "body"),
    ],
)
def test_what_a_file_of_source_is_meant_as(text, action):
    assert action_of(text) == action


@pytest.mark.parametrize("text", ["", "# nothing", "import torch", "def f(x):\n    return x"])
def test_source_that_is_neither_module_nor_body(text):
    with pytest.raises(UsageError, match="holds no code|defines no ModelNew"):
        action_of(text)
