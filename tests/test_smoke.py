"""The whole pipeline at profile `smoke`, in a folder of its own: real training, real verdicts."""

import io
import json

import pandas as pd
import pytest

from ttkit import claims, pipeline, stats, store


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "smoke"
    return pipeline.run("smoke", out, stream=io.StringIO())


def test_every_notebook_runs_and_says_what_it_found(run):
    assert list(run.executed) == [
        "00_start_here",
        "01_train_base_policy",
        "02_best_of_n",
        "03_test_time_training",
        "04_selection",
        "05_over_sharpening_probe",
        "06_transfer",
        "07_claims",
    ]
    assert 4 <= len(run.summary) <= 9
    assert {status.state for status in pipeline.status(run.out)} == {"done"}


def test_the_samples_are_whole_and_partly_correct(run):
    samples = store.read_samples(run.out / "02_best_of_n" / "samples.parquet")
    assert len(samples) == 4 * 8 * 2  # tasks, samples, temperatures
    assert samples.groupby(["task", "temperature"]).size().eq(8).all()
    assert samples["correct"].any() and not samples["correct"].all()
    assert (samples["status"] != "infra_error").all()
    right = samples[samples["correct"]]
    assert (right["speedup_lo"] <= right["speedup"]).all()
    assert (right["speedup"] <= right["speedup_hi"]).all()


def test_the_tables_follow_from_the_samples(run):
    samples = store.read_samples(run.out / "02_best_of_n" / "samples.parquet")
    curves = pd.read_parquet(run.out / "02_best_of_n" / "curves.parquet")
    hot = samples[samples["temperature"] == 1.0]
    curve = curves[(curves["arm"] == "temperature 1") & (curves["metric"] == "task_success")]
    by_task = stats.fast(hot).groupby(hot["task"])
    assert curve["value"].iloc[0] == pytest.approx(by_task.mean().mean())
    assert curve["value"].iloc[-1] == pytest.approx(by_task.any().mean())
    picks = pd.read_parquet(run.out / "04_selection" / "picks.parquet")
    oracle = picks[(picks["strategy"] == "oracle") & (picks["k"] == 1)].set_index("task")["speedup"]
    best = hot[hot["correct"]].groupby("task")["speedup"].max()
    pd.testing.assert_series_equal(oracle.dropna(), best, check_names=False)
    winners = pd.read_parquet(run.out / "02_best_of_n" / "winners.parquet")
    sure = hot.loc[hot[hot["correct"]].groupby("task")["speedup"].idxmax()]
    sure = sure[sure["speedup_lo"] > 1]
    assert list(winners["task"]) == list(sure["task"])
    assert list(winners["sample"]) == list(sure["index"])
    assert list(winners["speedup"]) == list(sure["speedup"])
    assert not set(winners["again_status"]) & {"", "infra_error"}


def test_the_ledger_has_every_claim_and_the_findings_of_the_run(run):
    ledger = pd.read_parquet(run.out / "07_claims" / "ledger.parquet").set_index("claim")
    assert len(ledger) == 37 and set(ledger["verdict"]) <= set(claims.VERDICTS)
    measured = ledger[ledger["stage"] != ""]
    assert {"bon_k1", "logprob_std", "sel_gap", "cost_zero"} <= set(measured.index)
    # Four tasks settle no share, whatever it is.
    assert not ledger.loc[["sel_gap", "bon_k1"], "verdict"].isin(["HOLDS", "DIFFERS"]).any()
    again = claims.ledger(run.out).set_index("claim")
    pd.testing.assert_series_equal(again["verdict"], ledger["verdict"])


def test_both_evaluators_judged_the_same_samples(run):
    table = pd.read_parquet(run.out / "07_claims" / "evaluators.parquet")
    counts = table[table["number"] == "sample fast_1"].set_index("evaluator")["n"]
    assert counts.to_dict() == {"rigorous": 4, "fast-proxy": 4}


def test_training_left_a_history_and_an_adapter(run):
    history = pd.read_parquet(run.out / "01_train_base_policy" / "history.parquet")
    assert list(history["step"]) == [1, 2]
    assert history[["reward_mean", "correct_rate", "entropy"]].notna().all().all()
    assert (run.out / "01_train_base_policy" / "adapter" / "adapter_model.safetensors").is_file()


def test_the_probe_scores_the_same_samples_under_every_checkpoint(run):
    scores = pd.read_parquet(run.out / "05_over_sharpening_probe" / "scores.parquet")
    steps = sorted(p.name for p in (run.out / "03_test_time_training" / "checkpoints").iterdir())
    assert sorted(scores["step"].unique()) == list(range(len(steps))) and len(steps) > 1
    samples = store.read_samples(run.out / "02_best_of_n" / "samples.parquet")
    first = scores[scores["step"] == 0].merge(
        samples[samples["temperature"] == 1.0], on=["task", "index"], suffixes=("", "_drawn")
    )
    assert (first["nll_sum"] - first["nll_sum_drawn"]).abs().max() < 1e-3
    found = pd.read_parquet(run.out / "05_over_sharpening_probe" / "findings.parquet")
    assert list(found["claim"]) == ["probe_rho0", "probe_rho8", "probe_q0", "probe_q3"]


def test_transfer_measures_every_policy_on_the_other_tasks(run):
    table = pd.read_parquet(run.out / "06_transfer" / "matrix.parquet")
    away = table[table["policy"] == "adapted on subset 1"].set_index("evaluated")
    assert away.loc["subset 2", "n"] == 2 * 4  # tasks, samples
    pairs = pd.read_parquet(run.out / "06_transfer" / "paired.parquet")
    assert set(pairs["metric"]) == {"sample fast_1", "task success"}
    found = pd.read_parquet(run.out / "06_transfer" / "findings.parquet")
    assert list(found["claim"]) == ["transfer_12", "transfer_21"]


def test_each_figure_has_the_table_it_was_drawn_from(run):
    figures = list(run.out.glob("*/figures/*.png"))
    assert len(figures) >= 10
    assert all(figure.with_suffix(".csv").is_file() for figure in figures)


def test_a_second_run_does_nothing(run):
    before = {p: p.stat().st_mtime_ns for p in run.out.glob("*/manifest.json")}
    again = pipeline.run("smoke", run.out, stream=io.StringIO())
    assert again.executed == {} and len(again.unchanged) == 8
    assert {p: p.stat().st_mtime_ns for p in run.out.glob("*/manifest.json")} == before


def test_a_changed_parameter_redoes_what_depends_on_it(run):
    changed = pipeline.run("smoke", run.out, overrides=["top_k=[1, 2]"], stream=io.StringIO())
    # Notebook 07 reads the findings of 04 and follows where they are other ones.
    assert list(changed.executed)[0] == "04_selection"
    assert set(changed.executed) <= {"04_selection", "07_claims"}
    manifest = json.loads((run.out / "04_selection" / "manifest.json").read_text())
    assert manifest["parameters"]["top_k"] == [1, 2]
