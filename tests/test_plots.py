import io
import warnings

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure

from ttkit import plots, stats
from ttkit.errors import UsageError

STRATEGIES = ("oracle", "random", "confidence", "surprisal")
RNG = np.random.default_rng(0)


def history(n=12):
    steps = np.arange(1, n + 1)
    names = ("reward_mean", "correct_rate", "entropy", "speedup_gmean")
    return pd.DataFrame({"step": steps, **{name: RNG.uniform(0.2, 1.0, n) for name in names}})


def samples(tasks=5, n=8):
    """Task t has t correct bodies (of speedups 1 + t/2, ...), each drawn at least once."""
    rows = []
    for t in range(tasks):
        for i in range(n):
            body = i % (t + 1)
            right = body < t
            speedup = 1 + t / 2 - body / 4 if right else np.nan
            rows.append(
                {
                    "task": f"minibench:2/{t + 1}",
                    "index": i,
                    "temperature": (0.25, 1.0)[i % 2],
                    "code_sha256": f"{t}-{body}",
                    "correct": right,
                    "status": "correct" if right else ("incorrect", "timeout")[i % 2],
                    "speedup": speedup,
                    "speedup_lo": speedup * 0.95,
                    "speedup_hi": speedup * 1.05,
                }
            )
    return pd.DataFrame(rows)


def curves(metric, labels=("T = 0.25", "T = 1")):
    return {label: stats.scaling_curve(samples(), metric, bootstrap=50) for label in labels}


def summary(ks=(1, 2, 3), keys=("nll_sum", "nll_mean")):
    rows = []
    for strategy in STRATEGIES:
        for key in [""] if strategy in ("oracle", "random") else keys:
            for k in ks:
                rate, speedup = RNG.uniform(0.2, 0.9), RNG.uniform(1.0, 3.0)
                row = {"strategy": strategy, "key": key, "k": k, "tasks": 17}
                row |= {"fast_1": rate, "fast_1_lo": rate - 0.1, "fast_1_hi": rate + 0.1}
                row |= {"speedup_gmean": speedup, "speedup_gmean_lo": speedup * 0.8}
                rows.append(row | {"speedup_gmean_hi": speedup * 1.3})
    return pd.DataFrame(rows)


def comparisons():
    rows = [
        ("surprisal", "confidence", "nll_sum", 1, 17, 0.3, 0.1, 0.5),
        ("surprisal", "confidence", "nll_mean", 1, 17, -0.1, -0.3, 0.1),
        ("surprisal", "confidence", "nll_sum", 3, 17, 0.9, 0.8, 1.0),
        ("surprisal", "random", "nll_sum", 1, 17, 0.2, 0.0, 0.4),
    ]
    names = "first second key k n difference difference_lo difference_hi"
    return pd.DataFrame(rows, columns=names.split())


def gate():
    return pd.DataFrame({"task": ["a", "b", "c", "d"], "std": [0.4, 2.0, 1.2, np.nan]})


def quarters():
    table = pd.DataFrame({"quartile": ["Q1", "Q2", "Q3", "Q4"], "n": 10, "fast_1": 0.4})
    table["speedup_gmean"] = [1.6, 1.3, 1.1, 0.98]
    table["lowest"], table["highest"] = [9.0, 6.0, 3.0, 1.0], [12.0, 9.0, 6.0, 3.0]
    return table.assign(fast_1_lo=0.3, fast_1_hi=0.5)


def ranked():
    rows = [
        (strategy, m, rate, rate - 0.1, rate + 0.1, 20)
        for strategy in ("surprisal", "confidence", "random")
        for m in range(1, 33)
        for rate in [m / 40]
    ]
    return pd.DataFrame(rows, columns=["strategy", "m", "task_success", "lo", "hi", "tasks"])


def best_forms(n=20):
    speedup = np.linspace(0.99, 6.0, n)[::-1]
    return pd.DataFrame(
        {
            "task": [f"minibench:2/{i + 1}" for i in range(n)],
            "reference_ms": np.linspace(0.5, 9.0, n),
            "form": "fused",
            "speedup": speedup,
            "speedup_lo": speedup * 0.97,
            "speedup_hi": speedup * 1.03,
        }
    )


def unchanged():
    rows = [("rigorous", "t:1/1", 1.0 + i / 100, 0.9, 1.1, False) for i in range(-4, 4)]
    rows += [("fast-proxy", "t:1/2", 1.0 + i / 10, np.nan, np.nan, i > 0) for i in range(-4, 4)]
    rows += [("fast-proxy", "t:1/2", np.nan, np.nan, np.nan, False)]
    names = ["protocol", "task", "speedup", "speedup_lo", "speedup_hi", "fast"]
    return pd.DataFrame(rows, columns=names)


# name: the table, and the numbers of axes
FIGURES = {
    "training": (history, 4),
    "selection": (summary, 2),
    "conventions": (comparisons, 1),
    "top_k": (summary, 2),
    "tasks": (samples, 1),
    "variance_gate": (gate, 1),
    "outcomes": (samples, 1),
    "quartiles": (quarters, 2),
    "prefilter": (ranked, 1),
    "headroom": (best_forms, 1),
    "aa": (unchanged, 2),
}


def texts(ax):
    return [text.get_text() for text in ax.texts]


def markers(ax):
    """(x, y) of everything drawn as single marks, line by line."""
    lines = [line for line in ax.lines if line.get_linestyle() == "None"]
    return [(float(x), float(y)) for line in lines for x, y in line.get_xydata()]


def segments(ax):
    """The intervals drawn: arrays [2, 2] of two ends, each x and y."""
    parts = [c.get_segments() for c in ax.collections if hasattr(c, "get_segments")]
    return np.array([ends for part in parts for ends in part])


def check_readable(fig):
    """It is 800 pixels wide, drawn without a warning, in letters of 8 points, captioned in full."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fig.savefig(buffer, format="png", bbox_inches="tight")
    assert 760 <= int.from_bytes(buffer.getvalue()[16:20], "big") <= 880
    written = [text for text in fig.findobj(mpl.text.Text) if text.get_text()]
    assert min(text.get_fontsize() for text in written) >= 8
    caption = next(text for text in written if text.get_text() == fig.get_supxlabel())
    box = caption.get_window_extent()
    assert box.x0 >= 0 and box.x1 <= fig.bbox.width and fig.get_suptitle()


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_closed_and_readable_and_changes_neither_settings_nor_table(name):
    make, axes = FIGURES[name]
    table, before = make(), dict(mpl.rcParams)
    copy = table.copy()
    fig = getattr(plots, name)(table)
    pd.testing.assert_frame_equal(table, copy)
    assert isinstance(fig, Figure) and len(fig.axes) == axes
    assert plt.get_fignums() == [] and dict(mpl.rcParams) == before
    check_readable(fig)


NEEDED = {
    "training": "entropy",
    "selection": "speedup_gmean_lo",
    "conventions": "difference_hi",
    "top_k": "tasks",
    "tasks": "code_sha256",
    "variance_gate": "std",
    "outcomes": "status",
    "quartiles": "lowest",
    "prefilter": "task_success",
    "headroom": "form",
    "aa": "fast",
}


@pytest.mark.parametrize("name", FIGURES)
def test_a_missing_column_is_named(name):
    table = FIGURES[name][0]().drop(columns=NEEDED[name])
    with pytest.raises(UsageError, match=f"{name}.*{NEEDED[name]}"):
        getattr(plots, name)(table)


@pytest.mark.parametrize("name", FIGURES)
def test_an_empty_table_is_refused(name):
    with pytest.raises(UsageError, match=f"{name} needs rows"):
        getattr(plots, name)(FIGURES[name][0]().head(0))


def test_training_draws_every_step_and_its_running_mean():
    table = history()
    dots, line = plots.training(table.sample(frac=1, random_state=0), window=3).axes[0].lines
    assert list(dots.get_xdata()) == list(table["step"])
    assert np.allclose(dots.get_ydata(), table["reward_mean"])
    assert line.get_ydata()[1] == pytest.approx(table["reward_mean"][:3].mean())


def test_scaling_draws_curves_bands_and_saturation():
    success, speedup = curves("task_success"), curves("speedup_gmean")
    marks = {"T = 1": {"k": 3.0, "lo": 2.0, "hi": 5.0}}
    fig = plots.scaling(success, speedup, marks)
    left, right = fig.axes
    for ax, group in ((left, success), (right, speedup)):
        for name, curve in group.items():
            line = next(line for line in ax.lines if line.get_label() == name)
            assert np.allclose(line.get_ydata(), curve.table["value"])
            assert name in texts(ax)
        bands = [c for c in ax.collections if isinstance(c, PolyCollection)]
        for band, curve in zip(bands, group.values(), strict=True):
            heights = band.get_paths()[0].vertices[:, 1]
            assert heights.min() == pytest.approx(curve.table["lo"].min())
            assert heights.max() == pytest.approx(curve.table["hi"].max())
    assert np.allclose(segments(left)[0][:, 0], [2, 5])
    assert markers(left)[0][0] == 3 and markers(left)[0][1] < 0
    assert left.get_ylim()[0] < markers(left)[0][1]
    assert "5 tasks" in fig.get_supxlabel() and "99 %" in fig.get_supxlabel()
    check_readable(fig)


def test_scaling_alone_has_one_panel_and_nothing_below_zero():
    fig = plots.scaling(curves("task_correct"))
    assert len(fig.axes) == 1 and "99 %" not in fig.get_supxlabel()
    assert "correct sample" in fig.axes[0].get_ylabel()
    assert fig.axes[0].get_ylim()[0] == pytest.approx(-0.03)


@pytest.mark.parametrize(
    ("success", "speedup", "saturation"),
    [
        ({}, None, None),
        (curves("speedup_gmean"), None, None),
        (curves("task_success"), curves("task_correct"), None),
        (curves("task_success"), None, {"T = 2": {"k": 1.0, "lo": 1.0, "hi": 1.0}}),
    ],
)
def test_scaling_refuses_curves_in_the_wrong_place(success, speedup, saturation):
    with pytest.raises(UsageError, match="scaling takes"):
        plots.scaling(success, speedup, saturation)


def test_selection_draws_the_summary_at_k_and_at_3():
    table = summary()
    fig = plots.selection(table)
    for ax, value in zip(fig.axes, ("fast_1", "speedup_gmean"), strict=True):
        wanted = table[table["key"].isin(["", "nll_sum"]) & table["k"].isin([1, 3])]
        assert sorted(x for x, _ in markers(ax)) == pytest.approx(sorted(wanted[value]))
        bars = [line.get_xdata() for line in ax.lines if len(line.get_xdata()) == 2]
        bars = [bar for bar in bars if bar[0] != bar[1]]  # without the line at 1
        assert sorted(bar[0] for bar in bars) == pytest.approx(sorted(wanted[f"{value}_lo"]))
        assert sorted(bar[1] for bar in bars) == pytest.approx(sorted(wanted[f"{value}_hi"]))
    rows = [label.get_text() for label in fig.axes[0].get_yticklabels()]
    assert rows == ["oracle", "surprisal", "random", "confidence"]
    assert "17 tasks" in fig.get_supxlabel() and "top 3" in fig.get_supxlabel()


def test_selection_at_another_k_and_key():
    table = summary(ks=(1, 2))
    fig = plots.selection(table, k=2, key="nll_mean")
    wanted = table[table["key"].isin(["", "nll_mean"]) & (table["k"] == 2)]
    assert sorted(x for x, _ in markers(fig.axes[0])) == pytest.approx(sorted(wanted["fast_1"]))
    assert "nll_mean" in fig.get_supxlabel()
    for wrong in ({"k": 9}, {"key": "nll_max"}):
        with pytest.raises(UsageError, match="the summary has no"):
            plots.selection(table, **wrong)


def test_conventions_draws_the_paired_differences_at_one_pick():
    fig = plots.conventions(comparisons())
    (ax,) = fig.axes
    assert markers(ax) == [(30, 0), (-10, 1)]
    assert np.allclose(segments(ax)[:, :, 0], [[10, 50], [-30, 10]])
    assert texts(ax) == ["+30", "-10"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["nll_sum", "nll_mean"]


def test_conventions_from_a_summary_gives_no_interval():
    table = summary()
    fig = plots.conventions(table)
    one = table[table["k"] == 1].set_index(["strategy", "key"])["fast_1"]
    gaps = [100 * (one["surprisal", k] - one["confidence", k]) for k in ("nll_sum", "nll_mean")]
    assert [x for x, _ in markers(fig.axes[0])] == pytest.approx(gaps)
    assert "No interval" in fig.get_supxlabel()
    with pytest.raises(UsageError, match="needs rows"):
        plots.conventions(table[table["k"] > 1])


def test_top_k_draws_each_strategy_over_k():
    table = summary(ks=(3, 1, 2))
    fig = plots.top_k(table)
    for ax, value in zip(fig.axes, ("fast_1", "speedup_gmean"), strict=True):
        for strategy in STRATEGIES:
            key = "" if strategy in ("oracle", "random") else "nll_sum"
            part = table[(table.strategy == strategy) & (table.key == key)].sort_values("k")
            line = next(line for line in ax.lines if line.get_label() == strategy)
            assert list(line.get_xdata()) == [1, 2, 3]
            assert np.allclose(line.get_ydata(), part[value])
        assert sorted(texts(ax)) == sorted(STRATEGIES)


def test_tasks_draws_each_distinct_correct_candidate_once_best_task_first():
    table = samples()
    fig = plots.tasks(table)
    (ax,) = fig.axes
    right = table[table["correct"]].drop_duplicates("code_sha256")
    drawn = markers(ax)
    assert sorted(x for x, _ in drawn) == pytest.approx(sorted(right["speedup"]))
    order = [label.get_text() for label in ax.get_yticklabels()]
    assert order == [f"minibench:2/{t}" for t in (5, 4, 3, 2, 1)]
    assert len(segments(ax)) == len(right)
    for x, y in drawn:
        tied = [order.index(t) for t in right["task"][np.isclose(right["speedup"], x)]]
        assert round(y) in tied
    shares = table.groupby("task")["correct"].mean()
    assert texts(ax) == [f"{shares[task]:.0%}" for task in order]
    assert ax.get_xscale() == "log" and "10 distinct" in fig.get_supxlabel()


def test_tasks_without_any_correct_sample_are_still_listed():
    table = samples().assign(correct=False, speedup=np.nan, speedup_lo=np.nan, speedup_hi=np.nan)
    fig = plots.tasks(table)
    assert texts(fig.axes[0]) == ["0%"] * 5
    check_readable(fig)


def test_variance_gate_colours_by_the_threshold_and_counts_the_open():
    fig = plots.variance_gate(gate(), 1.0)
    bars = {bar.get_y() + bar.get_height() / 2: bar for bar in fig.axes[0].patches}
    assert [bars[y].get_width() for y in (0, 1, 2)] == [2.0, 1.2, 0.4]
    first, second, third = (bars[y].get_facecolor() for y in (0, 1, 2))
    assert first == second != third
    assert "2 of n = 4" in fig.get_supxlabel()
    assert "3 of n = 4" in plots.variance_gate(gate(), 0.3).get_supxlabel()


@pytest.mark.parametrize(("by", "rows"), [("temperature", 2), ("task", 5)])
def test_outcomes_are_shares_that_add_up(by, rows):
    table = samples()
    (ax,) = plots.outcomes(table, by).axes
    assert [c.get_label() for c in ax.containers] == ["correct", "incorrect", "timeout"]
    labels = [label.get_text() for label in ax.get_yticklabels()]
    widths = np.array([[bar.get_width() for bar in c] for c in ax.containers])
    assert widths.shape == (3, rows) and np.allclose(widths.sum(axis=0), 1)
    correct = table.groupby(table[by].astype(str))["correct"].mean()
    assert widths[0] == pytest.approx([correct[label] for label in labels])
    with pytest.raises(UsageError, match="arm"):
        plots.outcomes(table, "arm")


def test_every_status_of_the_verifier_has_its_own_colour():
    statuses = ["correct", "incorrect", "compile_error", "runtime_error", "timeout"]
    statuses += ["rejected", "infra_error"]
    table = pd.DataFrame({"status": statuses, "task": "a", "temperature": 1.0})
    (ax,) = plots.outcomes(table).axes
    assert [c.get_label() for c in ax.containers] == statuses
    assert len({c[0].get_facecolor() for c in ax.containers}) == len(statuses)


def test_an_unknown_status_is_drawn_last_rather_than_left_out():
    table = samples()
    table.loc[0, "status"] = "mystery"
    (ax,) = plots.outcomes(table).axes
    assert [c.get_label() for c in ax.containers][-1] == "mystery"
    assert sum(c[0].get_width() for c in ax.containers) == pytest.approx(1)


def test_quartiles_draws_values_and_the_intervals_there_are():
    table = quarters()
    left, right = plots.quartiles(table).axes
    assert [x for x, _ in markers(left)] == pytest.approx(table["fast_1"])
    assert [x for x, _ in markers(right)] == pytest.approx(table["speedup_gmean"])
    bars = [list(line.get_xdata()) for line in left.lines if len(line.get_xdata()) == 2]
    assert bars == [[0.3, 0.5]] * 4
    assert texts(right) == ["1.60×", "1.30×", "1.10×", "0.98×"]


def test_prefilter_draws_three_strategies_on_a_log_axis():
    table = ranked()
    (ax,) = plots.prefilter(table.sample(frac=1, random_state=0)).axes
    line = next(line for line in ax.lines if line.get_label() == "surprisal")
    assert list(line.get_xdata()) == list(range(1, 33))
    assert line.get_ydata()[-1] == pytest.approx(0.8)
    assert ax.get_xscale() == "log"
    assert [label.get_text() for label in ax.get_xticklabels()] == ["1", "2", "4", "8", "16", "32"]


def test_equal_ends_get_labels_that_do_not_overlap():
    (ax,) = plots.prefilter(ranked()).axes
    heights = sorted(text.get_position()[1] for text in ax.texts)
    assert len(heights) == 3 and min(np.diff(heights)) > 0.06 and heights[-1] <= 1


def test_headroom_is_sorted_and_says_the_shares_and_the_level():
    table = best_forms()
    fig = plots.headroom(table)
    (ax,) = fig.axes
    dots = next(c for c in ax.collections if len(c.get_offsets()) == len(table))
    assert np.allclose(dots.get_offsets()[:, 1], sorted(table["speedup"]))
    assert np.allclose(np.sort(segments(ax)[:, 0, 1]), np.sort(table["speedup_lo"]))
    share = (table["speedup"] >= 1.2).mean()
    assert f"{share:.0%} have a form of 1.2×" in " ".join(fig.get_supxlabel().split())
    assert "level 2" in fig.get_suptitle()
    assert "minibench:2/1  fused" in texts(ax) and "minibench:2/9  fused" not in texts(ax)
    check_readable(plots.headroom(best_forms(100)))
    check_readable(plots.headroom(best_forms(1)))


def test_aa_counts_what_was_measured_by_protocol_in_their_order():
    fig = plots.aa(unchanged())
    titles = [ax.get_title(loc="left") for ax in fig.axes]
    assert titles[0].startswith("rigorous: 0 of 8 runs called faster, 0.0% (0.0% to 36.9%)")
    assert titles[1].startswith("fast-proxy: 3 of 8 runs called faster, 37.5%")
    dots = [c for c in fig.axes[1].collections if len(c.get_offsets()) == 8][-1]
    assert np.allclose(dots.get_offsets()[:, 0], 1 + np.arange(-4, 4) / 10)
    assert "16 measured runs of 2 tasks" in fig.get_supxlabel()
    with pytest.raises(UsageError, match="needs rows"):
        plots.aa(unchanged().assign(speedup=np.nan))


def test_dual_loop_shows_both_loops_and_the_evaluator():
    fig = plots.dual_loop()
    words = " ".join(texts(fig.axes[0]))
    for word in ("Outer loop", "Inner loop", "80 training", "Best-of-N", "selection", "evaluator"):
        assert word in words
    check_readable(fig)


def test_produced_by_adds_a_line_to_the_caption():
    fig = plots.dual_loop()
    before = fig.get_supxlabel()
    assert plots.produced_by(fig, "ttkit run --only 02") is fig
    assert fig.get_supxlabel() == before + "\nttkit run --only 02"


@pytest.mark.parametrize("spread", [1.001, 1.5, 30.0, 5000.0])
def test_speedup_axes_have_ticks_that_include_one(spread):
    table = best_forms(6)
    table["speedup"] = np.geomspace(1, spread, 6)
    table["speedup_lo"], table["speedup_hi"] = table["speedup"] * 0.999, table["speedup"] * 1.001
    (ax,) = plots.headroom(table).axes
    low, high = ax.get_ylim()
    ticks = [tick for tick in ax.get_yticks() if low <= tick <= high]
    assert 2 <= len(ticks) <= 12 and any(np.isclose(ticks, 1.0))
    assert low < table["speedup_lo"].min() and high > table["speedup_hi"].max()


NOTEBOOK = """
from ttkit import plots
plots.dual_loop()
"""


def test_a_notebook_cell_shows_its_figure_exactly_once():
    import nbclient
    import nbformat

    notebook = nbformat.v4.new_notebook()
    cells = [NOTEBOOK, "figure = plots.dual_loop()\nfigure.axes[0].get_title()\nfigure"]
    notebook.cells = [nbformat.v4.new_code_cell(cell) for cell in cells]
    nbclient.NotebookClient(notebook, kernel_name="python3", timeout=120).execute()
    for cell in notebook.cells:
        pictures = [out for out in cell.outputs if "image/png" in out.get("data", {})]
        assert len(pictures) == 1 == len(cell.outputs)
