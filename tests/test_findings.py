"""What the notebooks measure of the claims: complete, right by hand, and honest where it fails."""

import numpy as np
import pandas as pd
import pytest
from test_select import random_table, table

from ttkit import claims, findings, select, stats

OWN = claims.load_claims().query("notebook == '02'")["id"]
SELECTION = claims.load_claims().query("notebook == '04'")["id"]


def by_claim(rows):
    claims.findings(rows)  # each once
    return {row.claim: row for row in rows}


def many(seed=3, tasks=7, n=64):
    samples = random_table(seed, tasks, n, ties=False)
    return samples, [f"t{t}" for t in range(tasks)]


def test_best_of_n_measures_every_claim_of_its_notebook():
    samples, tasks = many()
    found = by_claim(findings.best_of_n(samples, tasks, 100))
    assert set(found) == set(OWN)
    curve = stats.scaling_curve(samples, "task_success", 100).table.set_index("k")["value"]
    assert found["bon_k4"].value == curve[4] and found["bon_k4"].n == 7
    assert found["bon_k16"].value == pytest.approx(curve[16] / curve[64])
    assert found["bon_k64_all"].value == curve[64]
    assert found["bon_k64"].n == 5
    assert found["logprob_std"].value == select.variance_gate(samples)["open"].sum()
    assert found["rlvr_correct"].value == pytest.approx(samples["correct"].mean())


def test_subset_1_is_the_first_five_of_the_split():
    samples = table({f"t{t}": [(1, 2.0 if t in (0, 6) else 0.5)] * 64 for t in range(7)})
    order = ["t6", "t0", "t1", "t2", "t3", "t4", "t5"]
    assert by_claim(findings.best_of_n(samples, order, 50))["bon_k64"].value == pytest.approx(0.4)


def test_a_smaller_k_leaves_the_larger_claims_without_a_value():
    found = by_claim(findings.best_of_n(random_table(1), [f"t{t}" for t in range(5)], 50))
    assert np.isnan(found["bon_k64"].value) and "8 samples a task" in found["bon_k16"].note
    assert not np.isnan(found["bon_k8"].value) and set(found) == set(OWN)


def test_selection_measures_every_claim_of_its_notebook():
    samples, _ = many(n=12)
    picks = select.select(samples, [1, 3], ["nll_sum"])
    found = by_claim(findings.selection(samples, picks, bootstrap=50))
    assert set(found) == set(SELECTION)
    gap = select.compare(picks)
    assert found["sel_gap"].value == pytest.approx(gap["difference"])
    three = select.compare(picks, "surprisal", "oracle", k=3)
    assert found["sel_surprisal_top3"].value == pytest.approx(three["difference"])
    random = select.compare(picks, "random", "oracle", k=3)["fast_1_first"]
    assert f"random top 3 {random:.0%}" in found["sel_surprisal_top3"].note
    right = samples[samples["correct"]]
    rho = stats.partial_spearman(-right["nll_sum"], right["speedup"], right["n_tokens"])["rho"]
    assert found["len_partial"].value == pytest.approx(rho)
    assert found["cost_zero"].value == 0
    assert "Q1" in found["quartile_shape"].note


def test_hardly_any_correct_sample_says_so_in_every_finding():
    samples = table({"a": [(1, 2.0), (2, 0)], "b": [(1, 0), (2, 0)]})
    found = by_claim(findings.selection(samples, select.select(samples, [1, 3])))
    assert set(found) == set(SELECTION)
    assert np.isnan(found["sel_gap"].value) and "1 correct samples" in found["sel_gap"].note


def probed(changes, tasks=6):
    """A table of `probe.by_step` whose rho of each subset goes from -0.2 by `changes`."""
    rows = [
        {
            **{"step": step, "subset": subset, "value": -0.2 + change, "lo": -0.4, "hi": 0.0},
            **{"change": change, "change_lo": change - 0.1, "change_hi": change + 0.1},
            **{"undefined": 0.0, "n": 96, "tasks": tasks},
        }
        for subset in ("all", "Q1")
        for step, change in enumerate(changes)
    ]
    return pd.DataFrame(rows)


def verdicts(found):
    rules = claims.load_claims().set_index("id", drop=False)
    return {f.claim: claims.judge(rules.loc[f.claim], f).verdict for f in found}


def test_the_probe_claims_of_a_change_are_judged_by_the_change():
    """That rho is negative at the last step says nothing of whether it fell."""
    found = {f.claim: f for f in findings.over_sharpening(probed([0.0, -0.05, -0.02]))}
    assert (found["probe_rho8"].value, found["probe_rho0"].value) == (-0.02, -0.2)
    assert found["probe_q3"].value == -0.05 and "step 1 of 2" in found["probe_q3"].note
    assert {f.n for f in found.values()} == {6} and {f.unit for f in found.values()} == {"task"}
    said = verdicts(found.values())
    assert (said["probe_rho8"], said["probe_q3"]) == ("UNDERPOWERED", "UNDERPOWERED")
    assert verdicts(findings.over_sharpening(probed([0.0, -0.3])))["probe_rho8"] == "HOLDS"
    assert verdicts(findings.over_sharpening(probed([0.0, 0.3])))["probe_rho8"] == "DIFFERS"
    few = verdicts(findings.over_sharpening(probed([0.0, -0.3], tasks=2)))
    assert few["probe_rho8"] == "UNDERPOWERED"  # two tasks are no sample, however many rows


def test_the_transfer_claims_are_judged_by_the_paired_difference():
    def pair(policy, place, difference):
        return {
            **{"policy": f"adapted on {policy}", "evaluated": place, "metric": "sample fast_1"},
            **{"adapted": 0.1, "unadapted": 0.1 - difference, "difference": difference, "p": 0.1},
            **{"lo": difference - 0.05, "hi": difference + 0.05, "tasks": 5, "n": 12, "k": 64},
        }

    pairs = pd.DataFrame([pair("B", "A", -0.1), pair("A", "B", 0.2), pair("level 1", "B", 0.5)])
    found = findings.transfer(pairs, ["A", "B"], 3)
    assert [(f.claim, f.value, f.n) for f in found] == [
        ("transfer_12", 0.2, 5),
        ("transfer_21", -0.1, 5),
    ]
    assert verdicts(found) == {"transfer_12": "DIFFERS", "transfer_21": "HOLDS"}
