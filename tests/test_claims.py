"""The ledger: each rule on constructed findings, what it refuses, and a constructed run."""

import json
import math
from pathlib import Path

import pandas as pd
import pytest

from ttkit import claims
from ttkit.claims import DIFFERS, HOLDS, NOT_RUN, UNDERPOWERED, Finding
from ttkit.errors import UsageError
from ttkit.sweepfile import Sweep

NAN = float("nan")
CLAIMS = claims.load_claims().set_index("id", drop=False)


def judged(claim, value, lo=NAN, hi=NAN, n=20, **more):
    return claims.judge(CLAIMS.loc[claim], Finding(claim, value, lo, hi, n, **more))


# --- the data -----------------------------------------------------------------------------------


def test_every_published_claim_has_a_rule_a_measure_and_a_command():
    assert len(CLAIMS) == 37
    assert set(CLAIMS["rule"]) == set(claims.RULES)
    assert CLAIMS[["target", "measured", "notebook", "command"]].notna().all().all()
    alone = CLAIMS["sweep"].isna()
    assert CLAIMS["command"][alone].str.contains("--out {run}", regex=False).all()
    assert not CLAIMS["measured"].duplicated().any()


def test_every_band_has_a_margin_that_is_named_with_its_reason():
    banded = CLAIMS["rule"].isin(["level", "count"])
    assert (CLAIMS["margin"].notna() == banded).all()
    assert set(CLAIMS["margin"].dropna()) == set(claims.MARGINS)
    assert set(CLAIMS["margin"][["rlvr_correct", "bon_k16", "sel_surprisal_top3"]]) == {0.05}
    assert "0.7 to 0.9 (0.8 ± 0.1)" in judged("sel_surprisal", 0.8, 0.75, 0.85).reason


def test_a_claim_of_a_sweep_names_a_sweep_that_measures_it():
    root = Path(claims.__file__).parent.parent
    swept = CLAIMS[CLAIMS["sweep"].notna()]
    assert list(swept.index) == ["ttt_lr", "ttt_vs_bon_s2", "density"]
    for claim in swept.itertuples():
        plan = Sweep.load(root / f"notebooks/sweeps/{claim.sweep}.yaml", root / "notebooks")
        assert plan.name == claim.sweep and plan.findings
        assert claim.command == f"ttkit sweep notebooks/sweeps/{claim.sweep}.yaml"


def test_levels_aim_at_the_published_number_where_they_measure_the_same():
    level = CLAIMS[CLAIMS["rule"] == "level"]
    other = level[level["target"] != level["published"]]
    # A difference from the oracle; and no correlation, where 0.003 was published.
    assert list(other["id"]) == ["sel_surprisal_top3", "len_partial"]


def test_what_is_not_reproduced_has_a_reason():
    table = claims.not_reproduced()
    assert len(table) >= 5 and table.notna().all().all()


# --- every rule, every branch -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("claim", "value", "lo", "hi", "verdict"),
    [
        ("sel_surprisal", 0.8, 0.71, 0.89, HOLDS),  # level, 0.8 ± 0.1
        ("sel_surprisal", 0.8, 0.7, 0.9, HOLDS),
        ("sel_surprisal", 0.8, 0.6, 0.9, UNDERPOWERED),
        ("sel_surprisal", 0.5, 0.2, 1.0, UNDERPOWERED),
        ("sel_surprisal", 0.25, 0.05, 0.69, DIFFERS),
        ("sel_surprisal", 0.95, 0.91, 0.99, DIFFERS),
        ("sel_gap", 0.2, 0.05, 0.4, HOLDS),  # sign, positive
        ("sel_gap", 0.2, 0.0, 0.4, UNDERPOWERED),
        ("sel_gap", 0.2, -0.1, 0.4, UNDERPOWERED),
        ("sel_gap", -0.2, -0.4, -0.1, DIFFERS),
        ("transfer_12", -0.1, -0.2, -0.01, HOLDS),  # sign, negative
        ("transfer_12", -0.1, -0.2, 0.01, UNDERPOWERED),
        ("transfer_12", 0.1, 0.01, 0.2, DIFFERS),
        ("ttt_equiv_k", 0.5, 0.2, 0.9, HOLDS),  # below 1
        ("ttt_equiv_k", 0.5, 0.2, 1.0, UNDERPOWERED),
        ("ttt_equiv_k", 3.0, 1.0, 5.0, DIFFERS),
        ("ttt_peak_step", 1.0, 1.0, 2.0, HOLDS),  # at most 2
        ("ttt_peak_step", 2.0, 1.0, 3.0, UNDERPOWERED),
        ("ttt_peak_step", 5.0, 3.0, 8.0, DIFFERS),
        ("quartile_shape", 0.95, NAN, NAN, HOLDS),  # shape
        ("quartile_shape", 0.94, NAN, NAN, UNDERPOWERED),
        ("quartile_shape", 0.06, NAN, NAN, UNDERPOWERED),
        ("quartile_shape", 0.05, NAN, NAN, DIFFERS),
        ("cost_zero", 0.0, NAN, NAN, HOLDS),  # exact
        ("cost_zero", 12.0, NAN, NAN, DIFFERS),
    ],
)
def test_the_verdict_by_rule(claim, value, lo, hi, verdict):
    found = judged(claim, value, lo, hi)
    assert found.verdict == verdict
    assert found.reason and "\n" not in found.reason


def test_all_of_needs_as_many_as_were_claimed_and_one_exception_differs():
    assert judged("ttt_lr", 3, n=3, unit="learning rate").verdict == HOLDS
    assert judged("ttt_lr", 4, n=4, unit="learning rate").verdict == HOLDS
    assert judged("ttt_lr", 2, n=2, unit="learning rate").verdict == UNDERPOWERED
    assert judged("ttt_lr", 1, n=2, unit="learning rate") == claims.Verdict(
        DIFFERS, "1 of 2 learning rates: not all"
    )


def test_a_count_is_judged_by_the_exact_interval_of_its_share():
    assert judged("logprob_std", 9, n=20).verdict == UNDERPOWERED  # [0.23, 0.68]
    assert judged("logprob_std", 450, n=1000).verdict == HOLDS
    assert judged("logprob_std", 20, n=20).verdict == DIFFERS  # [0.83, 1]
    assert judged("logprob_std", 0, n=20).verdict == DIFFERS  # [0, 0.17]
    assert judged("logprob_std", 21, n=20).verdict == UNDERPOWERED  # no such share


def test_agreement_of_all_units_is_not_certainty():
    """20 of 20 tasks: the bootstrap says [1, 1], the rule of three [0.85, 1]."""
    assert judged("sel_oracle", 1.0, 1.0, 1.0, n=20).verdict == UNDERPOWERED
    assert "[0.85, 1]" in judged("sel_oracle", 1.0, 1.0, 1.0, n=20).reason
    assert judged("sel_oracle", 1.0, 1.0, 1.0, n=100).verdict == HOLDS
    assert judged("sel_gap", 0.0, 0.0, 0.0, n=20).verdict == UNDERPOWERED
    assert judged("sel_surprisal_top3", 0.0, 0.0, 0.0, n=100).verdict == HOLDS  # within ± 0.03
    assert judged("sel_surprisal", 0.0, 0.0, 0.0, n=20).verdict == DIFFERS


@pytest.mark.parametrize("claim", ["sel_gap", "quartile_shape", "ttt_peak_step"])
def test_few_units_settle_nothing(claim):
    lo, hi = (NAN, NAN) if claim == "quartile_shape" else (0.9, 1.1)
    assert judged(claim, 1.0, lo, hi, n=claims.MIN_UNITS).verdict == HOLDS
    few = judged(claim, 1.0, lo, hi, n=claims.MIN_UNITS - 1)
    assert few.verdict == UNDERPOWERED and "n = 4" in few.reason


def test_without_an_interval_nothing_is_settled():
    assert judged("sel_gap", 0.3) == claims.Verdict(UNDERPOWERED, "its value has no interval")


def test_what_could_not_be_measured_was_not_run_and_says_why():
    note = "no task has a correct sample"
    assert judged("sel_gap", NAN, note=note) == claims.Verdict(NOT_RUN, note)


def test_every_rule_has_a_region_and_another_is_refused():
    for rule in claims.RULES:
        low, high = claims.region(rule, 1.0, 0.1)
        assert low <= high and not math.isnan(low)
    assert claims.region("level", 0.5, 0.1) == (0.4, 0.6)
    with pytest.raises(UsageError, match="unknown rule 'about'"):
        claims.region("about", 1.0)


# --- findings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("bon_k3", 0.5), "no claim is called 'bon_k3'; did you mean bon_k"),
        (("bon_k1", "0.5"), "value = '0.5'"),
        (("bon_k1", True), "value = True"),
        (("bon_k1", math.inf), "value = inf"),
        (("bon_k1", 0.5, 0.6, 0.4), "an interval from 0.6 to 0.4"),
        (("bon_k1", 0.5, 0.4, 0.6, -1), "n = -1"),
        (("bon_k1", NAN), "no value and no note"),
    ],
)
def test_a_malformed_finding_is_refused(args, message):
    with pytest.raises(UsageError) as caught:
        Finding(*args)
    assert message in str(caught.value)


def test_findings_are_a_table_of_fixed_types_and_name_each_claim_once():
    table = claims.findings([Finding("bon_k1", 1, n=5), Finding("bon_k2", 0.5, 0.4, 0.6, 5)])
    assert tuple(table) == claims.FINDING_COLUMNS
    assert table["value"].dtype == "float64" and table["n"].dtype == "int64"
    assert claims.findings([]).empty
    with pytest.raises(UsageError, match="bon_k1 is measured twice"):
        claims.findings([Finding("bon_k1", 1.0), Finding("bon_k1", 0.0)])


# --- a run --------------------------------------------------------------------------------------


def write(run, stage, rows, done=True):
    folder = run / stage
    folder.mkdir(parents=True, exist_ok=True)
    claims.findings(rows).to_parquet(folder / "findings.parquet")
    if done:
        (folder / "DONE").write_text("x")


@pytest.fixture
def run(tmp_path):
    run = tmp_path / "runs" / "toy"
    write(run, "02_best_of_n", [Finding("bon_k1", 0.5, 0.45, 0.6, 20)])
    write(run, "03_test_time_training", [Finding("ttt_boa", 0.3, 0.25, 0.35, 20)], done=False)
    write(run, "04_selection", [Finding("sel_gap", 0.2, -0.1, 0.4, 20, note="at temperature 1")])
    return run


def test_the_ledger_has_every_claim_once_in_the_published_order(run):
    table = claims.ledger(run).set_index("claim")
    assert list(table.index) == list(CLAIMS.index)
    assert table.loc["bon_k1", "verdict"] == HOLDS and table.loc["bon_k1", "value"] == 0.5
    assert table.loc["sel_gap", "verdict"] == UNDERPOWERED
    assert table.loc["sel_gap", ["stage", "note"]].tolist() == ["04_selection", "at temperature 1"]
    assert (table.drop(["bon_k1", "sel_gap"])["verdict"] == NOT_RUN).all()


def test_not_run_says_why_and_which_command_would_run_it(run, monkeypatch):
    monkeypatch.chdir(run.parent.parent)
    table = claims.ledger(run).set_index("claim")
    assert table.loc["ttt_boa", "reason"] == "notebook 03 is not complete in this run"
    assert table.loc["transfer_12", "reason"] == "notebook 06 is not complete in this run"
    assert "did not measure it" in table.loc["sel_oracle", "reason"]
    assert table.loc["ttt_boa", "command"] == "ttkit run --only 03 --out runs/toy"


def test_the_stage_that_owns_a_claim_counts(run):
    write(run, "06_transfer", [Finding("sel_gap", 0.9, 0.8, 0.95, 20)])
    row = claims.ledger(run).set_index("claim").loc["sel_gap"]
    assert row["stage"] == "04_selection" and row["value"] == 0.2
    (run / "04_selection" / "DONE").unlink()
    assert claims.ledger(run).set_index("claim").loc["sel_gap", "stage"] == "06_transfer"


def policy(folder, adapter):
    stage = folder / claims.BASE_POLICY
    stage.mkdir(parents=True)
    manifest = {"outputs": {"adapter": {"sha256": adapter, "rows": None}}}
    (stage / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture
def swept(run):
    """A sweep beside the run, of the run's policy; its old point is none of its points now."""
    folder = run.parent / "learning_rates"
    policy(run, "a")
    for point, adapter in (("ttt_lr=1", "a"), ("ttt_lr=2", "a"), ("old", "b")):
        policy(folder / point, adapter)
    (folder / "sweep.json").write_text(json.dumps({"points": {"ttt_lr=1": {}, "ttt_lr=2": {}}}))
    found = [Finding("ttt_lr", 3.0, n=3, unit="learning rate")]
    claims.findings(found).to_parquet(folder / "findings.parquet")
    return folder


def test_a_sweep_of_the_same_policy_beside_the_run_is_taken_up(run, swept):
    row = claims.ledger(run).set_index("claim").loc["ttt_lr"]
    assert row[["verdict", "stage"]].tolist() == [HOLDS, "sweep learning_rates"]
    row = claims.ledger(run).set_index("claim").loc["density"]
    assert row["verdict"] == NOT_RUN
    assert row["reason"] == "the sweep reward_density has not been run beside this run"
    assert row["command"] == "ttkit sweep notebooks/sweeps/reward_density.yaml"


def test_a_sweep_of_another_policy_is_not(run, swept):
    manifest = swept / "ttt_lr=2" / claims.BASE_POLICY / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"a"', '"b"'))
    row = claims.ledger(run).set_index("claim").loc["ttt_lr"]
    assert row["verdict"] == NOT_RUN
    assert row["reason"] == "the sweep learning_rates beside this run started from another policy"


def test_the_run_itself_counts_before_a_sweep(run, swept):
    write(run, "03_test_time_training", [Finding("ttt_lr", 1.0, n=3, unit="learning rate")])
    row = claims.ledger(run).set_index("claim").loc["ttt_lr"]
    assert row[["verdict", "stage"]].tolist() == [DIFFERS, "03_test_time_training"]


def test_a_malformed_table_and_a_folder_that_is_no_run_are_refused(run, tmp_path):
    pd.DataFrame({"claim": ["bon_k1"]}).to_parquet(run / "02_best_of_n" / "findings.parquet")
    with pytest.raises(UsageError, match="must have the columns claim, value"):
        claims.ledger(run)
    with pytest.raises(UsageError, match="holds no run"):
        claims.gather(tmp_path / "nothing")


def test_the_packaged_tables_are_installed():
    assert Path(claims.__file__).with_name("data").joinpath("paper_claims.csv").is_file()
    text = (Path(claims.__file__).parent.parent / "pyproject.toml").read_text()
    assert 'ttkit = ["data/*.csv"]' in text
