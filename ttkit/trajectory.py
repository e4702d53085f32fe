"""What a run of test-time training says: pure functions of its history and samples; no torch.

Two rates are kept apart here as in `ttkit.stats`: sample fast_1 (a share of samples) and task
success (a share of tasks with at least one fast sample, which grows with the rollouts spent).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import binomtest

from ttkit.errors import UsageError
from ttkit.stats import NOISE, fast


def choose(history: pd.DataFrame, patience: int = 0, metric: str = "sample_fast_1") -> int:
    """Best-of-Adaptation: the step with the highest in-batch `metric`, of equals the earliest.

    With `patience`, later steps are not looked at once `metric` has not risen for so many steps.
    """
    best, at = float("-inf"), 0
    for row in history.sort_values("step").itertuples():
        value, step = getattr(row, metric), int(row.step)
        if value > best:
            best, at = value, step
        elif patience and step - at >= patience:
            break
    return at


def stopped(history: pd.DataFrame, patience: int, metric: str = "sample_fast_1") -> bool:
    """Whether `metric` has not risen in the last `patience` steps (never with patience 0)."""
    if not patience or history.empty:
        return False
    return int(history["step"].max()) - choose(history, 0, metric) >= patience


@dataclass(frozen=True)
class NoLearning:
    """What sample fast_1 would do if the policy never changed from step 0.

    `lo` and `hi` hold 95 % of single steps; `maxima` are draws of the best of all steps.
    """

    base: float
    lo: float
    hi: float
    maxima: np.ndarray

    @property
    def expected_maximum(self) -> float:
        return float(self.maxima.mean())

    def p_at_least(self, value: float) -> float:
        """Probability that the best step reaches `value` with no learning at all."""
        return float((self.maxima >= value - 1e-12).mean())


def no_learning_band(
    samples: pd.DataFrame,
    steps: int,
    rollouts: int | None = None,
    draws: int = 2000,
    seed: int = 0,
) -> NoLearning:
    """Best-of-Adaptation takes a maximum over noisy steps: how high is it without any learning?

    `samples` are of the policy at step 0. Every task's share of fast ones is taken for its true
    rate, and `steps` + 1 steps of `rollouts` a task (default: as many as `samples` has) are drawn
    from it. The more samples the better: a task that was never fast in them never is in the draws.
    Raises UsageError for an empty table or a negative `steps`.
    """
    if samples.empty or steps < 0:
        raise UsageError("the no-learning band needs the rollouts of step 0, and steps >= 0")
    counts = fast(samples).groupby(samples["task"]).agg(["sum", "size"])
    shares = (counts["sum"] / counts["size"]).to_numpy(float)
    sizes = counts["size"].to_numpy(int) if rollouts is None else np.full(len(shares), rollouts)
    drawn = np.random.default_rng(seed).binomial(sizes, shares, (draws, steps + 1, len(sizes)))
    rates = drawn.sum(axis=2) / sizes.sum()
    lo, hi = np.quantile(rates, [0.025, 0.975])
    base = float(shares @ sizes / sizes.sum())
    return NoLearning(base, float(lo), float(hi), rates.max(axis=1))


def by_step(samples: pd.DataFrame) -> pd.DataFrame:
    """Sample fast_1 by step with the interval of its rollouts, and task success of all so far.

    Columns step, sample_fast_1, lo, hi (Wilson, 95 %; the tasks are given, its unit is a sample),
    n, rollouts (a task, so far) and task_success (share of tasks with a fast sample so far).
    """
    quick = samples.assign(fast=fast(samples))
    rows: list[dict[str, float]] = []
    solved: set[str] = set()
    spent = 0.0
    for step, part in quick.groupby("step"):
        spent += len(part) / part["task"].nunique()
        solved |= set(part["task"][part["fast"]])
        hits = int(part["fast"].sum())
        ci = binomtest(hits, len(part)).proportion_ci(method="wilson")
        rows.append(
            {
                "step": step,
                "sample_fast_1": hits / len(part),
                "lo": ci.low,
                "hi": ci.high,
                "n": len(part),
                "rollouts": spent,
                "task_success": len(solved) / quick["task"].nunique(),
            }
        )
    return pd.DataFrame(rows)


def peak_step(steps: pd.DataFrame, draws: int = 2000, seed: int = 0) -> dict[str, float]:
    """The step of the best checkpoint by sample fast_1, with its 95 % interval; keys value, lo, hi.

    From `by_step`, or a table with its columns step, sample_fast_1 and n (rollouts of a step); of
    equal steps the earliest is the best. See `peak_draws` for the interval.
    """
    ordered = steps.sort_values("step")
    seen = ordered["step"].to_numpy(float)[ordered["sample_fast_1"].to_numpy(float).argmax()]
    lo, hi = np.quantile(peak_draws(steps, draws, seed), [0.025, 0.975])
    return {"value": float(seen), "lo": float(lo), "hi": float(hi)}


def peak_draws(steps: pd.DataFrame, draws: int = 2000, seed: int = 0) -> np.ndarray:
    """`draws` steps that the best checkpoint may have been at, from a table as in `peak_step`.

    The rate of each step is drawn from what its rollouts leave possible (Jeffreys' Beta), the best
    step is that of the highest. Where no rollout is fast, every step is as likely as any other.
    """
    ordered = steps.sort_values("step")
    n = ordered["n"].to_numpy(float)
    hits = np.round(ordered["sample_fast_1"].to_numpy(float) * n)
    rng = np.random.default_rng(seed)
    rates = rng.beta(hits + 0.5, n - hits + 0.5, (draws, len(n)))
    return ordered["step"].to_numpy(float)[rates.argmax(axis=1)]


def after_peak(steps: pd.DataFrame, draws: int = 4000, seed: int = 0) -> dict[str, float]:
    """How far sample fast_1 at the last step lies from its best earlier step, and by what chance.

    From a table as in `peak_step`. Keys change, and p_fall and p_rise: how likely a change as low,
    or as high, is if nothing is learned, that is with one rate for all steps. The best of several
    noisy steps lies above the last one even then. Raises UsageError for fewer than two steps.
    """
    if len(steps) < 2:
        raise UsageError("a fall after the peak needs at least two steps")
    ordered = steps.sort_values("step")
    rates, n = (ordered[name].to_numpy(float) for name in ("sample_fast_1", "n"))
    rng = np.random.default_rng(seed)
    drawn = rng.binomial(n.astype(int), rates @ n / n.sum(), (draws, len(n))) / n
    change, chance = (r[..., -1] - r[..., :-1].max(axis=-1) for r in (rates, drawn))
    p_fall, p_rise = (chance <= change + NOISE).mean(), (chance >= change - NOISE).mean()
    return {"change": float(change), "p_fall": float(p_fall), "p_rise": float(p_rise)}


def equivalent_k(value: float, curve: pd.DataFrame) -> float:
    """The budget k at which the Best-of-N `curve` (columns k, value) of the *same* metric reaches
    `value`: interpolated between budgets, below 1 in proportion to the value at k = 1 (which is
    the meaning of the paper's "K < 1"), inf above the curve's end."""
    table = curve.sort_values("k")
    ks, values = (np.append(0.0, table[name].to_numpy(float)) for name in ("k", "value"))
    at = int(np.argmax(values >= value - 1e-12))
    if values[at] < value - 1e-12:
        return float("inf")
    if at == 0:
        return 0.0
    share = (value - values[at - 1]) / (values[at] - values[at - 1])
    return float(ks[at - 1] + min(share, 1.0) * (ks[at] - ks[at - 1]))


def placement(points: Sequence[tuple[str, float, float, int]], curve: pd.DataFrame) -> pd.DataFrame:
    """Other methods on the Best-of-N `curve` of the same tasks and metric (columns k, value).

    `points` are (name, rollouts a task, value, n units behind it), the value a share of the n.
    Columns name, rollouts, value with lo and hi (Wilson, 95 %), n, and equivalent_k with
    equivalent_lo and equivalent_hi, where the curve has these values (see `equivalent_k`).
    """
    rows = []
    for name, rollouts, value, n in points:
        ci = binomtest(round(value * n), n).proportion_ci(method="wilson")
        ends = {"value": value, "lo": ci.low, "hi": ci.high}
        ks = {
            f"equivalent_{end}": equivalent_k(ends[source], curve)
            for end, source in (("k", "value"), ("lo", "lo"), ("hi", "hi"))
        }
        rows.append({"name": name, "rollouts": rollouts, **ends, "n": n, **ks})
    return pd.DataFrame(rows)


def budget(
    histories: dict[str, pd.DataFrame], rollouts: dict[str, int], base: pd.DataFrame
) -> pd.DataFrame:
    """Tokens and seconds that each arm has spent, and Best-of-N on as many rollouts.

    `rollouts` counts the samples of each arm, `base` are samples of the unadapted policy on the
    same tasks. Columns arm, steps, rollouts; prompt, completion, teacher and total (tokens);
    best_of_n: the tokens of as many samples of `base`, which have the same prompts; and seconds of
    sampling, verification and update.
    """
    rows = []
    for arm, history in histories.items():
        tokens = {
            name: int(history[f"tokens_{name}"].fillna(0).sum())
            for name in ("prompt", "completion", "teacher")
        }
        seconds = {
            name: history[name].sum()
            for name in ("seconds_sampling", "seconds_verification", "seconds_update")
        }
        spent = {"steps": int(history["step"].max()), "rollouts": rollouts[arm]}
        search = tokens["prompt"] + base["n_tokens"].mean() * rollouts[arm]
        total = {"total": sum(tokens.values()), "best_of_n": round(search)}
        rows.append({"arm": arm, **spent, **tokens, **total, **seconds})
    return pd.DataFrame(rows)


def regime(base: pd.DataFrame, before: pd.DataFrame, after: pd.DataFrame) -> pd.DataFrame:
    """What adaptation gained on each task, against how often the base policy was fast there.

    `base` are samples of the base policy that are neither `before` nor `after`, fresh samples of
    the start and of the adapted policy: a task that was lucky in both would seem to regress.
    Columns task, coverage (share of `base` that is fast), before, after, gain with lo, hi
    (Newcombe's 95 % interval of a difference of two shares; the unit is a sample) and n (samples
    on each side, the smaller). Raises UsageError for a task that a table lacks.
    """
    tables = {"base": base, "before": before, "after": after}
    counts = {
        name: fast(table).groupby(table["task"]).agg(["sum", "size"])
        for name, table in tables.items()
    }
    rows = []
    for task in counts["after"].index:
        for name in ("base", "before"):
            if task not in counts[name].index:
                raise UsageError(f"the table {name!r} has no samples of {task}")
        share, low, high = {}, {}, {}
        for name, table in counts.items():
            hits, n = (int(value) for value in table.loc[task])
            ci = binomtest(hits, n).proportion_ci(method="wilson")
            share[name], low[name], high[name] = hits / n, ci.low, ci.high
        gain = share["after"] - share["before"]
        down = np.hypot(share["after"] - low["after"], high["before"] - share["before"])
        up = np.hypot(high["after"] - share["after"], share["before"] - low["before"])
        n = min(int(counts[name].loc[task, "size"]) for name in ("before", "after"))
        parts = {"coverage": share["base"], "before": share["before"], "after": share["after"]}
        rows.append(
            {"task": task, **parts, "gain": gain, "lo": gain - down, "hi": gain + up, "n": n}
        )
    return pd.DataFrame(rows)


def regime_contrast(
    table: pd.DataFrame, threshold: float = 0.3, bootstrap: int = 1000, seed: int = 0
) -> dict[str, float]:
    """Mean gain of the tasks whose coverage is above `threshold` minus that of the others.

    From `regime`; keys value, lo, hi (tasks resampled within each side) and above, the number of
    tasks above. nan where a side has no task.
    """
    is_above = table["coverage"] > threshold
    above, below = (table["gain"][side].to_numpy(float) for side in (is_above, ~is_above))
    if not (len(above) and len(below)):
        return {**dict.fromkeys(("value", "lo", "hi"), float("nan")), "above": len(above)}
    rng = np.random.default_rng(seed)
    means = [rng.choice(side, (bootstrap, len(side))).mean(axis=1) for side in (above, below)]
    lo, hi = np.quantile(means[0] - means[1], [0.025, 0.975])
    value = float(above.mean() - below.mean())
    return {"value": value, "lo": float(lo), "hi": float(hi), "above": len(above)}
