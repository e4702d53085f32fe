"""The same verifier on a CUDA device."""

from __future__ import annotations

import pytest
import torch

from ttkit.prompts import candidate_source
from ttkit.tasks import Task
from ttkit.verify import Verifier

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CODE = """
import torch
import torch.nn as nn

class Model(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.layer = nn.Linear(n, n)
    def forward(self, x):
        return torch.relu(self.layer(x)) * 2 + 1

def get_inputs():
    return [torch.randn(2048, 1024)]

def get_init_inputs():
    return [1024]
"""
TASK = Task("file", 0, 0, "layer", CODE)


@pytest.fixture(scope="module")
def verifier():
    with Verifier("rigorous", device="cuda") as v:
        yield v


def test_the_reference_against_itself_is_correct_and_near_one(verifier):
    verdict = verifier.verify(TASK, candidate_source(TASK, TASK.forward_body))
    assert verdict.status == "correct", verdict.reason
    assert 0.8 < verdict.speedup < 1.25
    assert verdict.limit_ms < verdict.candidate_ms


def test_slower_is_slower_and_faster_is_fast(verifier):
    slow = TASK.forward_body.replace("return", "for _ in range(8): self.layer(x)\nreturn")
    assert verifier.verify(TASK, candidate_source(TASK, slow)).speedup_hi < 1
    slow_task = Task(
        "file",
        0,
        1,
        "slow",
        CODE.replace(
            "return torch.relu",
            ("for _ in range(4): x = x + 0.0 * self.layer(x)\n        return torch.relu"),
        ),
    )
    fast = verifier.verify(slow_task, candidate_source(slow_task, TASK.forward_body))
    assert fast.status == "correct", fast.reason
    assert fast.fast(1.5)


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("return x", "rejected"),
        ("return x + 1", "incorrect"),
        ("return torch.empty_like(x)", "incorrect"),
        ("x.mul_(2)\nreturn torch.relu(self.layer(x)) * 2 + 1", "rejected"),
        ("return torch.ones(10**13, device=x.device)", "runtime_error"),
        ("raise ValueError('boom')", "runtime_error"),
        ("return torch.relu(self.layer(x)).cpu()", "rejected"),
    ],
)
def test_failures_on_the_device(verifier, text, status):
    verdict = verifier.verify(TASK, candidate_source(TASK, text))
    assert verdict.status == status, verdict


def test_work_on_another_stream_never_counts_as_saved(verifier):
    text = (
        "stream = torch.cuda.Stream()\n"
        "out = torch.empty(2048, 1024, device=x.device)\n"
        "with torch.cuda.stream(stream):\n"
        "    for _ in range(50): self.layer(x)\n"
        "    out.copy_(torch.relu(self.layer(x)) * 2 + 1)\n"
        "return out"
    )
    verdict = verifier.verify(TASK, candidate_source(TASK, text))
    assert not verdict.fast(), verdict


def test_a_kernel_that_corrupts_its_context_costs_one_verdict(verifier):
    text = "i = torch.full((4,), 10**9, device=x.device)\nreturn x[i] + x"
    assert verifier.verify(TASK, candidate_source(TASK, text)).status in (
        "runtime_error",
        "incorrect",
    )
    assert verifier.verify(TASK, candidate_source(TASK, "return x + 1")).status == "incorrect"
