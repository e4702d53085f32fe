"""The least time in which a task's inputs can be read."""

from __future__ import annotations

import pytest
import torch
from case_makers import maker

from ttkit.verify import physics

SHAPE, BYTES = (64, 256), 4 * 64 * 256


def task(answer):
    class Model(torch.nn.Module):
        def forward(self, x):
            return answer(x)

    return maker(Model, SHAPE).draws


@pytest.mark.parametrize(
    ("answer", "needed"),
    [
        (lambda x: x * 2, BYTES),
        (lambda x: x[:16] * 2, BYTES // 4),
        (lambda x: x.clone(), BYTES),
        (lambda x: torch.ones_like(x), 0),
        (lambda x: (x > 0).long(), 0),
        # A view is made without reading what it shows.
        (lambda x: x, 0),
        (lambda x: x.t(), 0),
        (lambda x: (x.t(), x[:16].sum()), BYTES // 4),
    ],
)
def test_only_what_an_output_is_computed_from_has_to_be_read(answer, needed):
    draws = task(answer)
    assert physics.needed_bytes(draws.reference, draws.inputs()) == needed


def test_the_limit_is_the_time_of_the_faster_memory_that_holds_the_inputs():
    draws = task(lambda x: x + 1)
    rates = {"cached": 3e3, "memory": 1e3}
    for cache, rate in ((BYTES, 3e3), (BYTES / 2 - 1, 1e3)):
        limit = physics.limit_ms(draws, draws.inputs(), {**rates, "cache_bytes": cache})
        assert limit == pytest.approx(BYTES / (rate * physics.SAFETY))
