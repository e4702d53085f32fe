"""Advantages from rewards: pure functions of arrays.

`rewards` is (tasks, samples of a task); so is what is returned. A set of equal rewards has
advantage 0 everywhere: it carries no gradient.
"""

from __future__ import annotations

import numpy as np


def group(rewards: np.ndarray, scale: bool = False) -> np.ndarray:
    """Reward minus its task's mean (GRPO); `scale` divides by the task's standard deviation."""
    centred = np.asarray(rewards, dtype=float)
    centred = centred - centred.mean(axis=1, keepdims=True)
    return _over(centred, centred.std(axis=1, keepdims=True)) if scale else centred


def global_(rewards: np.ndarray) -> np.ndarray:
    """(r - mean) / std over all samples of all tasks (the paper's inner loop).

    A task that is merely easier or faster than the others gets positive advantages throughout.
    """
    centred = np.asarray(rewards, dtype=float)
    centred = centred - centred.mean()
    return _over(centred, np.asarray(centred.std()))


def leave_one_out(rewards: np.ndarray) -> np.ndarray:
    """Reward minus the mean of the task's other samples (RLOO): n / (n - 1) times `group`.

    Raises ValueError for a single sample a task, which has no others.
    """
    n = np.shape(rewards)[1]
    if n < 2:
        raise ValueError("leave-one-out needs at least two samples a task")
    return group(rewards) * (n / (n - 1))


def _over(centred: np.ndarray, std: np.ndarray) -> np.ndarray:
    """centred / std, and 0 where std is 0 up to rounding."""
    flat = std <= 1e-12
    return np.where(flat, 0.0, centred / np.where(flat, 1.0, std))
