"""Judging samples, and the second measurement of the winners, with verdicts made up for the test.

What the verifier itself says is in test_verify.py, the stage as a whole in test_smoke.py.
"""

import math

import pandas as pd
import pytest

from ttkit import prompts, stats
from ttkit.best_of_n import confirm_winners, judge, shrinkage
from ttkit.errors import InfraError
from ttkit.journal import Journal
from ttkit.tasks import load_tasks
from ttkit.verify import Verdict

TASKS = load_tasks("minibench", 2)[:4]
KEY = ("task", "code_sha256")
COLUMNS = [
    *("temperature", "task", "sample", "speedup", "speedup_lo"),
    *("again_speedup", "again_lo", "again_hi", "again_status"),
]


def fast(speedup):
    return Verdict(
        "correct", "correct", speedup=speedup, speedup_lo=speedup - 0.1, speedup_hi=speedup + 0.1
    )


class FakeVerifier:
    """Gives out `verdicts` one after another; notes what it was asked, dies after `survives`."""

    def __init__(self, *verdicts, survives=math.inf):
        self.verdicts, self.survives = list(verdicts), survives
        self.asked, self.fresh = [], []

    def verify_many(self, items, on_verdict, *, fresh=False):
        for index, (task, source) in enumerate(items):
            if len(self.asked) >= self.survives:
                raise KeyboardInterrupt
            self.asked.append((task.key, source))
            self.fresh.append(fresh)
            on_verdict(index, self.verdicts.pop(0))


def table(*rows):
    """Samples of temperature 1 as (task, index, correct, speedup, speedup_lo)."""
    made = pd.DataFrame(rows, columns=["task", "index", "correct", "speedup", "speedup_lo"])
    made["code"] = [f"return x + {number}" for number in range(len(made))]
    made["code_sha256"] = made["code"].map(prompts.code_sha256)
    return made.assign(task=[TASKS[number].key for number in made["task"]], temperature=1.0)


SAMPLES = table(
    (0, 0, True, 1.5, 1.2),
    (0, 1, True, 2.0, 1.8),
    (0, 2, False, math.nan, math.nan),
    (1, 0, True, 3.0, 0.9),  # the largest, but not surely faster
    (1, 1, True, 1.4, 1.3),
    (2, 0, False, math.nan, math.nan),
    (3, 5, True, 1.6, 1.1),
)


@pytest.fixture
def journal(tmp_path):
    return Journal(tmp_path / "winners.jsonl", KEY)


def test_the_oracles_picks_are_measured_again_and_reported_beside_the_first_figure(journal):
    verifier = FakeVerifier(fast(1.8), fast(1.05))
    winners = confirm_winners(SAMPLES, TASKS, verifier, journal)
    assert list(winners) == COLUMNS
    assert winners.to_dict("list") == {
        "temperature": [1.0, 1.0],
        "task": [TASKS[0].key, TASKS[3].key],
        "sample": [1, 5],
        "speedup": [2.0, 1.6],
        "speedup_lo": [1.8, 1.1],
        "again_speedup": [1.8, 1.05],
        "again_lo": pytest.approx([1.7, 0.95]),
        "again_hi": pytest.approx([1.9, 1.15]),
        "again_status": ["correct", "correct"],
    }
    assert verifier.fresh == [True, True]
    codes = [SAMPLES["code"][1], SAMPLES["code"][6]]
    assert verifier.asked == [
        (task.key, prompts.candidate_source(task, code, "body"))
        for task, code in zip((TASKS[0], TASKS[3]), codes, strict=True)
    ]
    ratio = stats.geometric_mean([1.8 / 2.0, 1.05 / 1.6])
    assert shrinkage(winners) == (
        f"Winners measured again: 1 of 2 are fast again; again over first {ratio:.2f} (geometric "
        "mean, n = 2)."
    )


def test_a_winner_that_fails_the_second_time_has_no_figure(journal):
    cheat = Verdict("rejected", "", speedup=9.0, speedup_lo=8.0, speedup_hi=10.0, flags=("late",))
    winners = confirm_winners(SAMPLES, TASKS, FakeVerifier(cheat, fast(1.6)), journal)
    assert list(winners["again_status"]) == ["rejected", "correct"]
    assert winners["again_speedup"].isna().tolist() == [True, False]
    assert "1 of 2 are fast again; again over first 1.00" in shrinkage(winners)
    assert "n = 1" in shrinkage(winners)


def test_a_killed_second_measurement_goes_on_where_it_was(tmp_path):
    path = tmp_path / "winners.jsonl"
    killed = FakeVerifier(fast(1.7), survives=1)
    with pytest.raises(KeyboardInterrupt):
        confirm_winners(SAMPLES, TASKS, killed, Journal(path, KEY))
    verifier = FakeVerifier(fast(1.5))
    winners = confirm_winners(SAMPLES, TASKS, verifier, Journal(path, KEY))
    assert list(winners["again_speedup"]) == [1.7, 1.5]
    assert [task for task, _ in verifier.asked] == [TASKS[3].key]
    nothing = FakeVerifier()
    pd.testing.assert_frame_equal(
        confirm_winners(SAMPLES, TASKS, nothing, Journal(path, KEY)), winners
    )


def test_a_failure_of_the_machine_is_tried_again(tmp_path):
    path = tmp_path / "winners.jsonl"
    broken = Verdict("infra_error", "no process could be started")
    first = confirm_winners(SAMPLES, TASKS, FakeVerifier(broken, fast(1.5)), Journal(path, KEY))
    assert list(first["again_status"]) == ["infra_error", "correct"]
    second = confirm_winners(SAMPLES, TASKS, FakeVerifier(fast(1.9)), Journal(path, KEY))
    assert list(second["again_speedup"]) == [1.9, 1.5]
    with pytest.raises(InfraError, match="none of the 2 candidates could be judged"):
        confirm_winners(
            SAMPLES, TASKS, FakeVerifier(broken, broken), Journal(tmp_path / "other.jsonl", KEY)
        )


@pytest.mark.parametrize("samples", [SAMPLES[3:6], SAMPLES[5:6], SAMPLES[:0]])
def test_without_a_winner_there_is_nothing_to_measure(journal, samples):
    winners = confirm_winners(samples, TASKS, FakeVerifier(), journal)
    assert winners.empty and list(winners) == COLUMNS
    assert shrinkage(winners).startswith("Winners measured again: none")


def test_the_speedup_of_a_rejected_sample_is_not_in_the_table(journal):
    cheat = Verdict("rejected", "", speedup=9.0, speedup_lo=8.0, speedup_hi=10.0, candidate_ms=1.0)
    verifier = FakeVerifier(cheat, fast(1.5))
    verdicts = judge(TASKS, SAMPLES[:2], verifier, journal).set_index("status")
    assert verdicts.loc["rejected", ["speedup", "speedup_lo", "speedup_hi"]].isna().all()
    assert verdicts.loc["rejected", "candidate_ms"] == 1.0
    assert verdicts.loc["correct", "speedup"] == 1.5 and verifier.fresh == [False, False]
