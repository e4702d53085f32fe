"""Rewards and advantages, against values worked out by hand."""

import math

import numpy as np
import pytest

from ttkit.advantages import global_, group, leave_one_out
from ttkit.errors import UsageError
from ttkit.rewards import (
    FixedBaseline,
    RunningMedian,
    rewards,
    speedup_reward,
    threshold_reward,
    transform,
)

NAN = math.nan


def test_speedup_reward():
    assert speedup_reward(True, 3.0, 1.5) == 2.0
    assert speedup_reward(False, 3.0, 1.5) == 0.0
    assert speedup_reward(False, NAN) == 0.0
    assert speedup_reward(True, NAN) == 0.0


def test_threshold_reward():
    assert [threshold_reward(True, 1.3, p) for p in (1.0, 1.3, 2.0)] == [1.0, 0.0, 0.0]
    assert threshold_reward(False, 9.0) == threshold_reward(True, NAN) == 0.0


def test_running_median_depends_on_order():
    tasks, right = ["a"] * 4, [True] * 4
    up = rewards(tasks, right, [1.0, 2.0, 4.0, 8.0], RunningMedian())
    assert up == [1.0, 2.0 / 1.0, 4.0 / 1.5, 8.0 / 2.0]
    down = rewards(tasks, right, [8.0, 4.0, 2.0, 1.0], RunningMedian())
    assert down == [8.0, 4.0 / 8.0, 2.0 / 6.0, 1.0 / 4.0]


def test_running_median_forgets_and_keeps_tasks_apart():
    baseline = RunningMedian(window=2)
    tasks = ["a", "b", "a", "a", "b", "a"]
    speedups = [2.0, 5.0, 4.0, 8.0, 10.0, 6.0]
    assert rewards(tasks, [True] * 6, speedups, baseline) == [2, 5, 4 / 2, 8 / 3, 10 / 5, 6 / 6]


def test_incorrect_samples_do_not_move_a_baseline():
    baseline = RunningMedian()
    assert rewards(["a"] * 3, [False, True, True], [NAN, 2.0, 3.0], baseline) == [0, 2.0, 1.5]


def test_fixed_baseline_does_not_depend_on_order():
    before = [("a", True, 1.0), ("a", True, 3.0), ("a", False, NAN), ("b", False, NAN)]
    baseline = FixedBaseline.of(before)
    tasks, right, speedups = ["a", "b", "a", "c"], [True, True, False, True], [4.0, 4.0, NAN, 5.0]
    assert rewards(tasks, right, speedups, baseline) == [2.0, 4.0, 0.0, 5.0]
    assert rewards(tasks[::-1], right[::-1], speedups[::-1], baseline) == [5.0, 0.0, 4.0, 2.0]


def test_transforms_keep_zero_and_order():
    values = [0.0, 0.3, 1.0, 3.0, 30.0]
    for name in ("none", "log1p", "clip"):
        out = [transform(name)(v) for v in values]
        assert out[0] == 0 and out == sorted(out) and len(set(out)) == len(out)
    assert transform("none")(30.0) == 30.0
    assert transform("log1p")(30.0) == pytest.approx(3.43399)
    assert transform("clip")(30.0) == 4.0
    with pytest.raises(UsageError, match="none, log1p, clip"):
        transform("log")


def test_group_advantages():
    r = np.array([[1.0, 3.0], [5.0, 5.0]])
    assert group(r).tolist() == [[-1.0, 1.0], [0.0, 0.0]]
    assert group(10 * r, scale=True).tolist() == [[-1.0, 1.0], [0.0, 0.0]]


def test_global_advantages():
    # mean 3.5, squared deviations 6.25, 0.25, 2.25, 2.25: variance 2.75
    r = np.array([[1.0, 3.0], [5.0, 5.0]])
    expected = np.array([[-2.5, -0.5], [1.5, 1.5]]) / 2.75**0.5
    assert np.allclose(global_(r), expected)
    assert global_(np.full((2, 3), 0.1)).tolist() == [[0.0] * 3] * 2


def test_leave_one_out():
    # each reward minus the mean of the two others
    assert np.allclose(leave_one_out(np.array([[1.0, 2.0, 6.0]])), [[-3.0, -1.5, 4.5]])
    with pytest.raises(ValueError, match="two samples"):
        leave_one_out(np.ones((2, 1)))
