"""Advantages from rewards: pure functions of arrays.

`rewards` is (tasks, samples of a task); so is what is returned. A set of equal rewards has
advantage 0 everywhere: it carries no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from scipy import optimize, special, stats


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


def entropic(rewards: np.ndarray, kl: float = math.log(2)) -> np.ndarray:
    """The entropic objective of TTT-Discover (arXiv 2601.16175): weights exp(beta r), minus 1.

    By task, beta is such that the normalised weights q of the samples are `kl` nats (KL
    divergence) from uniform: the paper's ln 2. A weight is then measured against the mean of the
    task's *other* samples: A_i = exp(beta r_i) / mean_{j != i} exp(beta r_j) - 1.
    When as many as half of the samples share the best reward no beta is large enough, and its
    limit, infinity, is taken: q is uniform over the m best of n. Their advantage is (n - m) /
    (m - 1), all others' is -1; a single best of two has no such limit and gets 1. Equal rewards,
    and a single sample, have advantage 0.
    """
    return np.array([_entropic(row, kl) for row in np.asarray(rewards, dtype=float)])


def _entropic(rewards: np.ndarray, kl: float) -> np.ndarray:
    n, spread = len(rewards), float(np.ptp(rewards))
    if spread <= 1e-12:
        return np.zeros(n)
    below = (rewards - rewards.max()) / spread  # in units of the spread, beta has no unit
    best = below > -1e-9
    if math.log(n / best.sum()) <= kl:
        weights = best.astype(float)
    else:
        upper = 1.0
        while _kl_from_uniform(upper * below) < kl:
            upper *= 2
        weights = np.exp(
            optimize.brentq(lambda b: _kl_from_uniform(b * below) - kl, 0, upper) * below
        )
    others = (weights.sum() - weights) / (n - 1)
    alone = others <= 1e-12  # the single best of two
    return np.where(alone, 1.0, weights / np.where(alone, 1.0, others) - 1)


def _kl_from_uniform(logits: np.ndarray) -> float:
    """KL(q || uniform) in nats of q = softmax(logits)."""
    return float(math.log(len(logits)) - stats.entropy(special.softmax(logits)))


OBJECTIVES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "global": global_,
    "group": group,
    "leave_one_out": leave_one_out,
    "entropic": entropic,
    "entropy_bonus": global_,  # and the policy's entropy in the loss: see ttkit.adapt
}


def _over(centred: np.ndarray, std: np.ndarray) -> np.ndarray:
    """centred / std, and 0 where std is 0 up to rounding."""
    flat = std <= 1e-12
    return np.where(flat, 0.0, centred / np.where(flat, 1.0, std))
