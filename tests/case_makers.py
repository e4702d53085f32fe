"""Small tasks for the tests of a referee's cases."""

from __future__ import annotations

import types

import torch

from ttkit.verify import casemaker, draws, reference
from ttkit.verify.casemaker import CaseMaker
from ttkit.verify.cases import judge
from ttkit.verify.draws import Draws
from ttkit.verify.reference import Reference
from ttkit.verify.runner import Runner, values_of


class Softmax(torch.nn.Module):
    def forward(self, x):
        return torch.softmax(x, dim=1)


class Conv(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 5, 3)

    def forward(self, x):
        return self.conv(x)


class Log(torch.nn.Module):
    def forward(self, x):
        return torch.log(x)


def case_maker(task, model, keep_bytes=1 << 30):
    """For a task that only has inputs."""
    reference = Reference(Runner(model, task, 0, "cpu"))
    return CaseMaker(Draws(task, reference, "cpu"), keep_bytes)


def maker(model=Softmax, shape=(64, 256), keep_bytes=1 << 30, draw=torch.randn):
    task = types.SimpleNamespace(get_inputs=lambda: [draw(*shape)], get_init_inputs=lambda: [])
    return case_maker(task, model, keep_bytes)


def answer(case, change=lambda y: y):
    return judge(case, [change(y) for y in case.outputs], [], values_of(case.tree))


def call_large(monkeypatch, size):
    """From here on, tensors of more than `size` bytes are large."""
    for module in (casemaker, draws, reference):
        monkeypatch.setattr(module, "LARGE_BYTES", size)
