"""The published numbers looked at again: arithmetic on what was published, and nothing else.

Each function takes published inputs and gives what follows from them. None says that a method is
wrong: they say how much a number can carry.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy import stats

from ttkit import hypothesis
from ttkit.claims import read_data
from ttkit.errors import UsageError

SELECTED = {4: 859.8, 5: 191.7, 12: 23.8, 14: 15.6, 15: 13.6}  # Best-of-N winners by task, K = 64
TRAJECTORY = (0.375, 0.400, 0.425, 0.363, 0.363, 0.413)  # sample fast_1 of TTT, steps 0 to 5
BEST_OF_N = {1: 0.533, 2: 0.724, 4: 0.895, 8: 0.982, 16: 0.999}  # task success by K
RANDOM_CORRECT = 0.592  # fast_1 of a random correct sample
ROLLOUTS = (5, 32)  # tasks of a TTT step, and samples for each


def implied_traffic(problem: int, speedup: float) -> dict[str, float]:
    """Memory traffic (TB/s) that a speedup on a KernelBench level-1 problem would need.

    The operation has to move `gbyte` once; the reference takes `eager_ms_h100`. Keys traffic_tb_s,
    peak_tb_s (what the roofline of that GPU assumes) and ceiling, the largest possible speedup.
    Source: data/kernelbench_l1_limits.csv. Raises UsageError for a problem that is not there.
    """
    limits = read_data("kernelbench_l1_limits").set_index("problem_id")
    if problem not in limits.index:
        raise UsageError(f"there are no limits for problem {problem} of level 1")
    row = limits.loc[problem]
    seconds = row["eager_ms_h100"] / 1e3 / speedup
    return {
        "traffic_tb_s": row["gbyte"] / seconds / 1e3,
        "peak_tb_s": row["gbyte"] / row["roofline_ms_h100_fp32"],
        "ceiling": row["max_speedup_fp32"],
    }


def wilcoxon_p(statistic: int, n: int) -> float:
    """Exact two-sided p of Wilcoxon's signed-rank statistic (the smaller rank sum) of n pairs.

    Counts the subsets of the ranks 1..n by their sum: each is equally likely under no difference.
    """
    counts = np.zeros(n * (n + 1) // 2 + 1)
    counts[0] = 1
    for rank in range(1, n + 1):
        counts[rank:] += counts[:-rank].copy()
    return float(min(1.0, 2 * counts[: statistic + 1].sum() / 2**n))


def noisy_maximum(
    rate: float, steps: int, always: int = 1, rollouts: tuple[int, int] = ROLLOUTS
) -> tuple[np.ndarray, np.ndarray]:
    """The best of `steps` measurements of one policy that does not learn: values, probabilities.

    `rate` is its sample fast_1 over `rollouts` = (tasks, samples each), of which `always` tasks
    succeed every time (published: task 12) and the others at one common rate. Task by task is the
    smaller spread: a pooled binomial would be wider.
    """
    tasks, each = rollouts
    sure, open_ = always * each, (tasks - always) * each
    share = (rate * tasks * each - sure) / open_
    if not 0 <= share <= 1:
        raise UsageError(f"a rate of {rate} does not go with {always} of {tasks} tasks always fast")
    hits = np.arange(open_ + 1)
    below = stats.binom.cdf(hits, open_, share) ** steps
    return (sure + hits) / (tasks * each), np.diff(below, prepend=0)


def expected_gain_of_maximum(rate: float, steps: int) -> float:
    """What taking the best of `steps` noisy measurements adds to `rate` without any learning."""
    values, chances = noisy_maximum(rate, steps)
    return float(values @ chances - rate)


def chance_of_maximum(rate: float, steps: int, at_least: float) -> float:
    """Probability that the best of `steps` measurements without learning reaches `at_least`."""
    values, chances = noisy_maximum(rate, steps)
    return float(chances[values >= at_least - 1e-9].sum())


def random_top3() -> tuple[float, float]:
    """fast_1 of three random correct samples, from the published rates: (lowest, highest).

    Highest: tasks alike, 1 - (1 - r)^3 with the published r. Lowest: tasks as unlike as the
    Best-of-N curve says. With u = 1 - (a task's sample rate), the curve gives E[u], E[u^2] and
    E[u^4]; E[u^3] lies between E[u^2]^2 / E[u] and sqrt(E[u^2] E[u^4]) (moments are log-convex).
    A share c = 0.533 / 0.592 of the samples is correct, so three correct ones all fail with
    probability E[((u - 1 + c) / c)^3].
    """
    one, two, four = (1 - BEST_OF_N[k] for k in (1, 2, 4))
    three = np.sqrt(two * four)
    share = BEST_OF_N[1] / RANDOM_CORRECT
    d = 1 - share
    failing = (three - 3 * d * two + 3 * d**2 * one - d**3) / share**3
    return float(1 - failing), float(1 - (1 - RANDOM_CORRECT) ** 3)


def recomputed() -> pd.DataFrame:
    """Every point with its arithmetic: columns point, published, recomputed, how."""
    h = hypothesis.cohens_h(0.8, 0.5)["h"]
    sign = hypothesis.sign_test(3, 0)
    four, five = (implied_traffic(task, SELECTED[task]) for task in (4, 5))
    speeds = np.array(list(SELECTED.values()))
    mean_rate = float(np.mean(TRAJECTORY))
    low, high = random_top3()
    rows = [
        ("effect size of 80 % against 50 %", "0.64", f"{h:.4f}", "2 asin √0.8 - 2 asin √0.5"),
        (
            "sign test of 3 wins, 0 losses",
            "0.125",
            f"{sign['p_one_sided']:.3f} one-sided, {sign['p_two_sided']:.2f} two-sided",
            "(1/2)³, and twice that",
        ),
        (
            "Wilcoxon test",
            "0.084",
            f"{wilcoxon_p(10, 10):.3f}",
            "rank sum 10 of n = 10 pairs, exact; 5 tasks x 2 sweeps taken as independent",
        ),
        (
            "the same test with one pair a task",
            "not given",
            f"at best {wilcoxon_p(0, 5):.4f}",
            "2 / 2⁵: all 5 tasks one way",
        ),
        (
            "speedup selected for task 4",
            "859.8x",
            f"needs {four['traffic_tb_s']:,.0f} TB/s; ceiling {four['ceiling']:.2f}x",
            f"8.59 GB in 2.77 ms / 859.8; the GPU moves {four['peak_tb_s']:.2f} TB/s",
        ),
        (
            "speedup selected for task 5",
            "191.7x",
            f"needs {five['traffic_tb_s']:,.0f} TB/s; ceiling {five['ceiling']:.2f}x",
            "8.59 GB in 2.85 ms / 191.7",
        ),
        (
            "mean of the five selected speedups",
            "226.9x",
            f"{speeds.mean():.0f}x; geometric mean {np.exp(np.log(speeds).mean()):.0f}x, "
            f"median {np.median(speeds):.1f}x",
            f"task 4 alone is {speeds.max() / speeds.sum():.0%} of the sum",
        ),
        (
            "best checkpoint of a trajectory without learning",
            "37.5 % to 42.5 %",
            f"{100 * expected_gain_of_maximum(TRAJECTORY[0], 6):+.1f} points expected; "
            f"P(42.5 % or more) = {chance_of_maximum(mean_rate, 6, 0.425):.2f}",
            "best of 6 steps of 160 rollouts, task 12 always fast; P at the mean rate, 39.0 %",
        ),
        (
            "three random correct samples",
            "not run",
            f"{low:.0%} to {high:.0%}",
            "tasks as unlike as the Best-of-N curve says; tasks alike, 1 - (1 - 0.592)³",
        ),
        (
            "bottom-quartile rho -0.442, p = 9.8e-17",
            "9.8e-17",
            f"n = 320: {hypothesis.correlation_p(-0.442, 320):.1e}; "
            f"n = 80: {hypothesis.correlation_p(-0.442, 80):.1e}",
            "Student's t; a quartile of 320 samples has 80",
        ),
        (
            "partial correlation 0.003",
            "p 0.95",
            f"{hypothesis.correlation_p(0.003, 550, 1):.2f}",
            "Student's t, n = 550 samples taken as independent",
        ),
        (
            "fast_1 by quartile of surprisal, highest first",
            "47.4, 81.0, 72.3, 43.9 %",
            "highest minus lowest: +3.5 points",
            "not monotone: the most surprising quarter is next to last",
        ),
    ]
    return pd.DataFrame(rows, columns=["point", "published", "recomputed", "how"])
