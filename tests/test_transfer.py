import numpy as np
import pandas as pd
import pytest

from ttkit import plots_probe, probe, transfer
from ttkit.errors import UsageError


def samples(fast_by_task, n=10, policy="unadapted", evaluated="subset 2"):
    rows = []
    for task, fast in fast_by_task.items():
        for i in range(n):
            quick = i < fast
            speedup = 2.0 if quick else (0.9 if i % 2 else np.nan)
            rows.append(
                {
                    "policy": policy,
                    "evaluated": evaluated,
                    "task": task,
                    "index": i,
                    "correct": np.isfinite(speedup),
                    "speedup": speedup,
                    "speedup_lo": 0.95 * speedup,
                    "code_sha256": f"{task}{speedup}",
                }
            )
    return pd.DataFrame(rows)


BASE = {"a": 5, "b": 2, "c": 0, "d": 1}
WORSE = {"a": 1, "b": 1, "c": 0, "d": 0}


def test_the_matrix_keeps_the_two_success_rates_apart():
    both = pd.concat([samples(BASE), samples(WORSE, policy="adapted on subset 1")])
    table = transfer.matrix(both, 200)
    assert list(table["policy"]) == ["unadapted", "adapted on subset 1"]
    assert list(table["sample_fast_1"]) == [8 / 40, 2 / 40]
    assert list(table["task_success"]) == [0.75, 0.5]
    assert (table["lo"] <= table["sample_fast_1"]).all() and list(table["n"]) == [40, 40]


def test_pairs_and_equal_budget():
    table = transfer.paired(samples(WORSE, n=5), samples(BASE), spent=3, bootstrap=500)
    rate, same, budget = (row for _, row in table.iterrows())
    assert rate["difference"] == pytest.approx(np.mean([-0.3, 0, 0, -0.1]))
    assert (rate["tasks"], rate["n"], rate["k"]) == (4, 5, 10)
    assert (same["k"], budget["k"]) == (5, 8)
    assert same["adapted"] == 0.5  # a and b
    # chance that 5, and 8, of 10 samples hold one of the 5, 2, 0, 1 fast ones
    assert same["unadapted"] == pytest.approx(np.mean([1 - 1 / 252, 1 - 56 / 252, 0, 0.5]))
    assert budget["unadapted"] == pytest.approx(np.mean([1, 1 - 1 / 45, 0, 0.8]))
    assert budget["difference"] < same["difference"] < 0
    assert 0 < rate["p"] <= 1


def test_a_budget_above_what_was_sampled_is_cut_and_said():
    table = transfer.paired(samples(WORSE), samples(BASE), spent=500, bootstrap=50)
    assert list(table["k"]) == [10, 10, 10]


def test_no_difference_is_zero():
    table = transfer.paired(samples(BASE), samples(BASE), spent=0, bootstrap=50)
    assert (table["difference"].abs() < 1e-12).all() and (table["p"] == 1).all()


def test_other_tasks_are_refused():
    with pytest.raises(UsageError, match="the same tasks under both"):
        transfer.paired(samples({"a": 1}), samples({"b": 1}), 0)


def test_figures_say_n_and_refuse_what_they_cannot_draw():
    from test_probe import fixed

    table = probe.by_step(fixed(), bootstrap=50)
    figure = plots_probe.rho_by_step(table)
    assert "8 tasks" in figure.get_supxlabel() and "low NLL" in " ".join(
        figure.get_supxlabel().split()
    )
    labels = [t.get_text() for ax in figure.axes for t in ax.get_legend().get_texts()]
    assert "all (n = 80)" in labels and "Q1 (n = 20)" in labels
    flat = probe.by_step(fixed().assign(correct=True, speedup=1.0), bootstrap=20)
    figure = plots_probe.rho_by_step(flat)  # nothing to draw, and said so
    labels = [t.get_text() for ax in figure.axes for t in ax.get_legend().get_texts()]
    assert "Q1: undefined" in labels
    assert plots_probe.likelihood(probe.likelihood(fixed(), bootstrap=20)).axes

    both = pd.concat([samples(BASE), samples(WORSE, policy="adapted on subset 1")])
    figure = plots_probe.transfer(transfer.matrix(both, 50))
    assert any(text.get_text().startswith("20%\n[") for text in figure.axes[0].texts)
    pairs = transfer.paired(samples(WORSE, n=5), samples(BASE), 3, 50)
    pairs = pairs.assign(policy="adapted on subset 1", evaluated="subset 2")
    assert len(plots_probe.transfer_differences(pairs).axes[0].get_yticks()) == 3
    with pytest.raises(UsageError, match="needs the columns subset"):
        plots_probe.rho_by_step(table.drop(columns="subset"))
    with pytest.raises(UsageError, match="its table has none"):
        plots_probe.transfer(transfer.matrix(both, 50).iloc[:0])
