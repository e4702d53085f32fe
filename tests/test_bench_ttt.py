"""The benchmark of test-time training: what it reports, not how fast this machine is."""

import pytest
import torch
from test_train import TASKS, policy  # noqa: F401  (a fixture)

from ttkit.bench_ttt import bench

SETTINGS = {"repeats": 1, "rollouts": 4, "max_tokens": 12, "rank": 4}


def test_it_reports_positive_times_and_their_ratios(policy):  # noqa: F811
    found = bench(policy, TASKS, **SETTINGS)
    assert found["samples"] == 16 and found["tokens"] > 16
    assert min(found["step_tokens"], found["trl_tokens"]) >= 16
    assert max(found["step_tokens"], found["trl_tokens"]) <= 16 * 12
    ratio = found["update_seconds"] / found["bare_seconds"]
    assert found["update_ratio"] == pytest.approx(ratio) and ratio > 0
    assert found["step_ratio"] == pytest.approx(found["step_seconds"] / found["trl_seconds"])


@pytest.mark.gpu
def test_the_same_on_a_gpu(policy):  # noqa: F811
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    found = bench(policy, TASKS, device="cuda", **SETTINGS)
    assert found["device"] != "cpu" and found["update_ratio"] > 0
