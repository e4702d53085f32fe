"""Which of the GPU's libraries a reference needs."""

from __future__ import annotations

import pytest
import torch

from ttkit.verify import libraries


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (torch.nn.Softmax(dim=1), []),
        (torch.nn.Linear(8, 8), ["product"]),
        (lambda x: torch.einsum("ij,kj->ik", x, x), ["product"]),
        (lambda x: torch.nn.Conv1d(8, 4, 1)(x[None]), ["convolution"]),
        (lambda x: torch.nn.ConvTranspose1d(8, 4, 1)(x[None]) @ x, ["product", "convolution"]),
    ],
)
def test_the_libraries_are_told_by_what_ran(call, expected):
    assert libraries.used(lambda: call(torch.ones(8, 8))) == expected
