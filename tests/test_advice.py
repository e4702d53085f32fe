"""`ttkit select`: anybody's samples, from file to picks, and everything that it refuses."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ttkit import select
from ttkit.advice import advise, read
from ttkit.errors import UsageError

REPOSITORY = Path(__file__).parent.parent
NAN = float("nan")


def samples(**columns):
    """Task a: rare is fast; task b: rare is slow, and its rarest sample is broken."""
    table = pd.DataFrame(
        {
            "task": ["a", "a", "a", "b", "b", "b"],
            "id": ["a0", "a1", "a2", "b0", "b1", "b2"],
            "nll_sum": [1.0, 2.0, 5.0, 9.0, 4.0, 1.0],
            "correct": [True, True, True, False, True, True],
            "speedup": [1.0, 1.1, 2.0, NAN, 0.5, 1.5],
        }
    )
    return table.assign(**columns)


def refused(table, *words, **options):
    with pytest.raises(UsageError) as caught:
        advise(table, **options)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def changed(column, value, row=2):
    table = samples()
    return table.assign(
        **{column: [value if i == row else v for i, v in enumerate(table[column].astype(object))]}
    )


# --- the picks ----------------------------------------------------------------------------------


def test_the_least_likely_correct_samples_in_order():
    advice = advise(samples(), k=2)
    assert advice.picks["id"].tolist() == ["a2", "a1", "b1", "b2"]
    assert advice.picks["rank"].tolist() == [1, 2, 1, 2]
    assert advice.counts == {
        "samples": 6,
        "correct": 5,
        "tasks": 2,
        "tasks_without_correct": 0,
        "candidates": 5,
        "picks": 4,
    }


def test_a_k_above_the_candidates_takes_all_of_them():
    assert advise(samples(), k=99).counts["picks"] == 5


def test_logprobs_of_other_tools_pick_the_same():
    for name in ("logprob_sum", "cumulative_logprob"):
        table = samples()
        table[name] = -table.pop("nll_sum")
        advice = advise(table, k=2, by=name)
        assert advice.by == "nll_sum" and advice.picks["id"].tolist() == ["a2", "a1", "b1", "b2"]


def test_copies_of_one_program_count_once():
    table = samples(code=["x", "y", "x", "z", "w", "v"])
    advice = advise(table, k=3)
    assert advice.unit == "distinct" and advice.counts["candidates"] == 4
    assert advice.picks["id"].tolist() == ["a1", "a0", "b1", "b2"]  # of the two x, the likelier


def test_ties_are_listed_by_row_and_counted():
    advice = advise(samples(nll_sum=[3.0] * 6), k=1)
    assert advice.picks["id"].tolist() == ["a0", "b1"]
    assert advice.picks["tied"].tolist() == [2, 1]
    assert any("does not vary" in note for note in advice.notes)


def test_the_expected_gain_is_that_of_the_selection():
    table = samples()
    advice = advise(table, k=2)
    truth = select.select(
        table.assign(index=table["id"], code_sha256=table["id"], speedup_lo=table["speedup"]),
        [1, 2],
        ["nll_sum"],
    ).set_index(["strategy", "k", "task"])
    mine, one, random = (
        truth.loc[key] for key in (("surprisal", 2), ("surprisal", 1), ("random", 2))
    )
    gains = advice.gains.set_index("against")
    assert gains.loc["1 pick", "fast_1_value"] == (mine.fast_1 - one.fast_1).mean()
    ratio = np.exp((mine.log_speedup - random.log_speedup).mean())
    assert gains.loc["2 at random", "speedup_value"] == pytest.approx(ratio)
    expected = advice.expected.set_index(["strategy", "k"])
    assert expected.loc[("surprisal", 1), "fast_1"] == 0.5
    assert expected.loc[("oracle", 1), "fast_1"] == 1.0


def test_the_gate_warns_where_log_probs_are_nearly_alike():
    notes = advise(samples(nll_sum=[1.0, 1.1, 1.2, 9.0, 4.0, 1.0])).notes
    assert [note for note in notes if "1 tasks (a)" in note and "std of nll_sum" in note]


def test_without_verdicts_all_are_ranked_and_it_says_what_that_is_worth():
    advice = advise(samples().drop(columns=["correct", "speedup"]), k=1)
    assert advice.picks["id"].tolist() == ["a2", "b0"]  # b0 is the broken one
    assert advice.expected is None and "correct" not in advice.counts
    assert any("verify first" in note for note in advice.notes)


def test_without_speedups_the_gain_is_unknown():
    advice = advise(samples().drop(columns="speedup"))
    assert advice.gains is None and any("gain is unknown" in note for note in advice.notes)


def test_tasks_without_a_choice_are_named_and_nothing_is_dropped():
    more = samples().iloc[[3]].assign(task="c", id="c0")
    alone = samples().iloc[[0]].assign(task="d", id="d0")
    advice = advise(pd.concat([samples(), more, alone], ignore_index=True), k=1)
    assert advice.counts["samples"] == 8 and advice.counts["tasks_without_correct"] == 1
    assert advice.picks["task"].tolist() == ["a", "b", "d"]
    assert any("no correct sample, so no pick: 1 tasks (c)" in note for note in advice.notes)
    assert any("one sample only, so no choice: 2 tasks (c, d)" in n for n in advice.notes)


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("nll_sum", NAN, "row 2 (task a) lacks nll_sum: it must be a finite number"),
        ("nll_sum", None, "row 2 (task a) lacks nll_sum: it must be a finite number"),
        ("nll_sum", float("inf"), "has nll_sum = inf: it must be a finite number"),
        ("nll_sum", "-3.2", "has nll_sum = '-3.2': it must be a number"),
        ("nll_sum", True, "has nll_sum = True: it must be a number"),
        ("nll_sum", [1.0], "has nll_sum = [1.0]: it must be a number"),
        ("nll_sum", -3.2, "has nll_sum = -3.2: it must be 0 or more (a log-probability goes into"),
        ("correct", "maybe", "has correct = 'maybe': it must be true or false"),
        ("correct", NAN, "lacks correct: it must be true or false"),
        ("correct", 2, "has correct = 2: it must be true or false"),
        ("speedup", "fast", "has speedup = 'fast': it must be positive where correct"),
        ("speedup", 0.0, "has speedup = 0.0: it must be positive where correct"),
        ("speedup", NAN, "lacks speedup: it must be positive where correct"),
        ("id", "a1", "has id = 'a1': it must be another one for each sample of a task"),
        ("id", None, "lacks id: it must be a name"),
        ("task", None, "lacks task: it must be a name"),
        ("task", "", "has task = '': it must be a name"),
        ("task", ["a"], "has task = ['a']: it must be a name"),
        ("id", {"a": 1}, "has id = {'a': 1}: it must be a name"),
        ("correct", [True], "has correct = [True]: it must be true or false"),
        ("nll_sum", 10**400, "it must be a finite number"),
        ("speedup", 10**400, "it must be positive where correct"),
        ("speedup", True, "has speedup = True: it must be positive where correct"),
        ("speedup", "1.5", "has speedup = '1.5': it must be positive where correct"),
    ],
)
def test_a_wrong_value_is_refused_with_its_row(column, value, said):
    refused(changed(column, value), "row 2", said, "1 of 6 rows are like it")


def test_log_probabilities_are_named_as_they_were_given():
    table = samples().rename(columns={"nll_sum": "logprob_sum"})
    refused(table, "row 0 (task a) has logprob_sum = 1.0", "it must be 0 or less")
    table["logprob_sum"] = [-1.0, "x", -1.0, -1.0, -1.0, -1.0]
    refused(table, "row 1 (task a) has logprob_sum = 'x': it must be a number")


def test_a_lower_end_above_the_speedup_is_refused():
    refused(samples(speedup_lo=1.05), "row 0 (task a) has speedup_lo = 1.05", "at most the speedup")


def test_a_score_that_is_given_twice_is_read_once_and_that_is_said():
    table = samples()
    both = advise(table.assign(logprob_sum=-np.arange(1.0, 7.0)))
    assert both.picks.equals(advise(table).picks)
    assert "logprob_sum is left aside, since there is nll_sum" in both.notes
    alone = table.drop(columns="nll_sum").assign(logprob_sum=-table["nll_sum"])
    assert advise(alone.assign(cumulative_logprob=-1.0)).picks.equals(advise(table).picks)


def test_few_tasks_are_said_to_be_few():
    assert any("with 2 of them say next to nothing" in note for note in advise(samples()).notes)


def test_a_speedup_of_an_incorrect_sample_means_nothing():
    assert advise(changed("speedup", -7.0, row=3)).counts["correct"] == 5


def test_a_table_without_a_choice_is_refused():
    refused(samples(correct=False), "none of the 6 samples is correct")
    refused(samples().head(1), "one sample: there is nothing to select from")
    refused(samples().head(0), "holds no samples")
    refused(samples().drop(columns="task"), "lacks the column task")
    refused(samples().drop(columns="nll_sum"), "no score of the samples: give one of nll_sum")
    refused(samples(), "no score 'nll_mean': it has nll_sum", by="nll_mean")
    refused(samples(), "whole number from 1 on, got 0", k=0)
    refused(samples(code=["x", 1, "x", "x", "x", "x"]), "row 1 (task a) has code = 1")


# --- files and the command ----------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_every_file_format_gives_the_same(ending, tmp_path):
    path = tmp_path / f"samples.{ending}"
    table = samples(id=["1", "2", "3", "1", "2", "3"])
    if ending == "jsonl":
        path.write_text(table.to_json(orient="records", lines=True) + "\n\n")
    elif ending == "csv":
        table.to_csv(path, index=False)
    else:
        table.to_parquet(path)
    advice = advise(read(path), k=1)
    assert advice.picks[["task", "row", "id"]].values.tolist() == [["a", 3, "3"], ["b", 5, "2"]]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("x.txt", "", "samples come as .jsonl, .csv or .parquet"),
        ("x.jsonl", '{"task": "a"}\n{"task"', "line 2 is not valid JSON"),
        ("x.jsonl", '{"task": "a"}\n[1]', "line 2 is not an object but '[1]'"),
        ("x.jsonl", "\n", "holds no samples"),
        ("x.csv", "", "cannot be read: No columns"),
        ("x.parquet", "nonsense", "cannot be read"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(name, text, said, tmp_path):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        read(path)
    assert said in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="there is no file"):
        read(tmp_path / f"none{path.suffix}" if path.suffix != ".txt" else tmp_path / "none.csv")


def test_the_command_prints_picks_counts_notes_and_gains(ttkit, tmp_path):  # noqa: F811
    path = tmp_path / "samples.csv"
    samples().to_csv(path, index=False)
    status, out, _ = ttkit("select", path, "--k", 2)
    assert status == 0
    for text in ("6 samples, 5 correct, 2 tasks", "2 picks against 2 at random", "note: without"):
        assert text in out
    status, out, _ = ttkit("select", path, "--k", 2, "--json")
    data = json.loads(out)
    assert [row["id"] for row in data["picks"]] == ["a2", "a1", "b1", "b2"]
    assert {"expected", "gains", "notes", "counts", "tasks"} <= set(data)
    changed("nll_sum", "x").to_csv(path, index=False)
    status, out, err = ttkit("select", path)
    assert status == 2 and "row 3 (task a) has nll_sum = 'x'" in err and out == ""


def test_it_works_where_torch_is_not_installed(tmp_path):
    path = tmp_path / "samples.jsonl"
    path.write_text(samples().to_json(orient="records", lines=True))
    code = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name.split('.')[0] in ('torch', 'transformers', 'trl', 'peft', 'tokenizers'):\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        f"sys.argv = ['ttkit', 'select', {str(path)!r}, '--k', '1', '--json']\n"
        "from ttkit.cli import main\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert [row["id"] for row in json.loads(done.stdout)["picks"]] == ["a2", "b1"]
