"""What sweeps measure of the claims, on tables with known answers."""

import math

import pandas as pd
import pytest

from ttkit import claims, findings_sweep
from ttkit.errors import UsageError

CLAIMS = claims.load_claims().set_index("id", drop=False)
FALL, RISE, FLAT = [0.1, 0.5, 0.1], [0.1, 0.2, 0.6], [0.2, 0.2, 0.2]


def history(runs, n=80):
    """{values of the grid: sample fast_1 by step} as the gathered table `history`."""
    rows = [
        {"point": str(values), **dict(values), "step": step, "sample_fast_1": rate, "n": n}
        for values, rates in runs.items()
        for step, rate in enumerate(rates)
    ]
    return pd.DataFrame(rows)


def rates(**runs):
    return history({(("ttt_lr", float(lr.lstrip("lr"))),): found for lr, found in runs.items()})


def judged(finding):
    claims.findings([finding])
    return claims.judge(CLAIMS.loc[finding.claim], finding).verdict


def test_a_learning_rate_counts_where_it_moves_by_more_than_chance():
    (found,) = findings_sweep.learning_rates(rates(lr1=FALL, lr2=FALL, lr3=FALL, lr4=FLAT))
    assert (found.claim, found.value, found.n) == ("ttt_lr", 3.0, 3)
    assert "not settled: 4 (+0.0%)" in found.note and "falls: 1 (-40.0%), 2 (" in found.note
    assert judged(found) == claims.HOLDS


def test_one_learning_rate_that_rises_to_the_end_is_an_exception():
    (found,) = findings_sweep.learning_rates(rates(lr1=FALL, lr2=FALL, lr3=RISE))
    assert (found.value, found.n) == (2.0, 3) and "rises: 3 (+40.0%)" in found.note
    assert judged(found) == claims.DIFFERS


def test_learning_rates_at_which_nothing_is_fast_settle_nothing():
    (found,) = findings_sweep.learning_rates(rates(lr1=[0.0] * 3, lr2=[0.0] * 3, lr3=[0.0] * 3))
    assert (found.value, found.n) == (0.0, 0) and judged(found) == claims.UNDERPOWERED


def rewards(dense, *sparse, n=2000):
    runs = {(("ttt_reward", "speedup"), ("ttt_threshold", 1.0)): dense}
    for p, found in zip((1.0, 1.2, 1.5), sparse, strict=False):
        runs[("ttt_reward", "threshold"), ("ttt_threshold", p)] = found
    return history(runs, n)


def test_steps_to_the_best_checkpoint_dense_minus_sparse():
    late, later = [0.1, 0.2, 0.3, 0.6], [0.1, 0.2, 0.6, 0.3]
    (found,) = findings_sweep.reward_density(rewards([0.1, 0.6, 0.2, 0.1], late, later))
    assert (found.claim, found.value, found.lo, found.hi) == ("density", -1.5, -1.5, -1.5)
    assert found.n == 2000 and judged(found) == claims.HOLDS
    assert found.note.startswith("best step, dense: 1; sparse, p = 1, 1.2: 3, 2; one run each")
    (found,) = findings_sweep.reward_density(rewards(late, [0.1, 0.6, 0.2, 0.1]))
    assert found.value == 2.0 and judged(found) == claims.DIFFERS


def test_rewards_under_which_nothing_is_fast_settle_nothing():
    (found,) = findings_sweep.reward_density(rewards([0.0] * 4, [0.0] * 4, [0.0] * 4, n=80))
    assert found.lo < 0 < found.hi and judged(found) == claims.UNDERPOWERED
    dense = rewards([0.1, 0.2])
    (found,) = findings_sweep.reward_density(dense)
    assert math.isnan(found.value) and judged(found) == claims.NOT_RUN


def test_subset_2_is_taken_as_notebook_03_measured_it():
    measured = claims.findings(
        [claims.Finding("ttt_vs_bon_s2", -0.2, -0.4, -0.1, 5, "task", "task success")]
    )
    other = claims.findings([claims.Finding("ttt_vs_bon_s1", 0.1, 0.0, 0.2, 5)])
    table = pd.concat([other.assign(point="ttt_subset=1"), measured.assign(point="ttt_subset=2")])
    (found,) = findings_sweep.isolated(pd.DataFrame(), table)
    assert (found.value, found.lo, found.hi, found.n) == (-0.2, -0.4, -0.1, 5)
    assert found.note == "task success; point ttt_subset=2" and judged(found) == claims.HOLDS
    (found,) = findings_sweep.isolated(pd.DataFrame(), other.assign(point="ttt_subset=1"))
    assert judged(found) == claims.NOT_RUN and "subset 2 is not complete" in found.note


@pytest.mark.parametrize("name", ["learning_rates", "reward_density"])
def test_a_table_without_its_columns_is_refused(name):
    with pytest.raises(UsageError, match="need the columns .*sample_fast_1, n"):
        getattr(findings_sweep, name)(pd.DataFrame({"step": [0]}))
