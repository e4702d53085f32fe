import json
import subprocess
import sys
from pathlib import Path

import pytest
from toy import make_project

from ttkit import headroom
from ttkit.tasks import load_split

REPOSITORY = Path(__file__).parent.parent
PAPER_EVAL = "4 5 12 14 15 18 28 29 30 32 36 55 65 70 76 82 87 89 95 98"


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(make_project(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    return tmp_path


def test_the_papers_split_and_its_file(ttkit, tmp_path):
    status, out, _ = ttkit("split", "--source", "kernelbench", "--level", 1, "--seed", 42)
    assert status == 0 and f"eval {PAPER_EVAL}\n" in out
    path = tmp_path / "split.json"
    status, out, _ = ttkit("split", "--source", "kernelbench", "-o", path, "--json")
    assert status == 0 and json.loads(out)["eval"] == list(load_split(path).eval)
    assert " ".join(map(str, load_split(path).eval)) == PAPER_EVAL


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("split --source kernelbanch", "unknown task source 'kernelbanch'"),
        ("split --level 4", "minibench has no level 4"),
        ("split --level x", "'--level'"),
        ("split --sede 1", "No such option: --sede"),
        ("nonsense", "No such command 'nonsense'"),
        ("tasks --source kernelbench", "kernelbench needs its task files"),
        ("tasks --out x.csv", "--out and --cache go with --headroom"),
        ("tasks --headroom --out none/x.csv", "--out none/x.csv: No such file or directory"),
        ("tasks --source kernelbench --headroom", "--headroom measures the forms of minibench"),
        ("verify minibench:1/400 x.py", "there is no task 400"),
        ("verify minibench:1/1 x.py", "the candidate x.py cannot be read: No such file"),
        ("verify nothing x.py", "unknown task 'nothing'"),
        ("aa --tasks 1,999", "--tasks: there is no task 999"),
        ("aa", "give either --tasks"),
        ("aa --tasks 2 --faster 1.1", "give either --tasks"),
        ("aa --faster 0.9", "a candidate 1 to 10 times faster"),
        ("sweep none.yaml", "there is no sweep file none.yaml"),
        ("run --set rowz=3", "no notebook has a parameter 'rowz'; did you mean rows?"),
        ("run --profile dmo", "did you mean demo?"),
        ("status runs/none", "runs/none holds no run"),
        ("claims runs/none", "runs/none holds no run"),
        ("select none.jsonl", "there is no file none.jsonl"),
        ("select x.txt", "samples come as .jsonl, .csv or .parquet"),
        ("select x.csv --k 0", "'--k'"),
    ],
)
def test_wrong_usage_is_status_2_and_one_plain_sentence(ttkit, project, args, message):
    status, out, err = ttkit(*args.split())
    assert status == 2 and out == ""
    assert message in err and "Traceback" not in err
    assert len([line for line in err.splitlines() if "rror" in line or "ttkit: " in line]) == 1
    assert not set("╭│╰") & set(err)


def test_a_defect_of_ours_is_status_3_not_the_answer_no(ttkit, monkeypatch):
    monkeypatch.setattr("ttkit.tasks.make_split", lambda *_: 1 / 0)
    status, _, err = ttkit("split")
    assert status == 3 and "ZeroDivisionError" in err


def test_help_comes_without_the_heavy_libraries():
    code = (
        "import sys; sys.argv = ['ttkit', '--help']\n"
        "from ttkit import cli\n"
        "try: cli.main()\n"
        "except SystemExit: print(sorted({'torch', 'pandas', 'papermill'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY
    )
    assert done.stdout.splitlines()[-1] == "[]"
    for command in ("run", "sweep", "status", "tasks", "split", "verify", "aa", "doctor"):
        assert f"\n  {command} " in done.stdout


def test_every_command_has_json(ttkit):
    for command in ("run", "sweep", "status", "tasks", "split", "verify", "aa", "doctor"):
        status, out, _ = ttkit(command, "-h")
        assert status == 0 and "--json" in out


def test_python_m_ttkit_is_the_same_command():
    done = subprocess.run(
        [sys.executable, "-m", "ttkit", "split", "--level", "9"],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
    )
    assert done.returncode == 2
    assert done.stderr == "ttkit: minibench has no level 9: it has 1, 2\n"


def test_tasks_are_listed(ttkit):
    status, out, _ = ttkit("tasks", "--level", 2)
    assert status == 0 and len(out.splitlines()) == 101
    status, out, _ = ttkit("tasks", "--level", 2, "--json")
    tasks = json.loads(out)
    assert [task["id"] for task in tasks] == list(range(1, 101))
    assert tasks[16]["key"] == "minibench:2/17" and "class Model" in tasks[16]["code"]


def test_run_and_status_as_json(ttkit, project):
    status, out, err = ttkit("run", "--json", "--set", "rows=3", "--only", "01")
    result = json.loads(out)
    assert status == 0 and list(result["executed"]) == ["01_draw"]
    assert result["summary"] == ["3 rows were drawn"] and "01_draw: running" in err
    status, out, _ = ttkit("status", "runs/demo", "--json")
    first, second = json.loads(out)
    assert (first["state"], first["rows"], second["state"]) == ("done", 3, "not started")
    status, out, _ = ttkit("status")
    assert status == 0 and out.splitlines()[1].split()[:3] == ["01_draw", "done", "3"]


def test_a_run_that_cannot_go_on_is_status_3(ttkit, project):
    folder = project / "runs/demo/01_draw/journal"
    status, *_ = ttkit("run", "--only", "01")
    path = next(folder.glob("*/rows.jsonl"))
    (project / "runs/demo/01_draw/DONE").unlink()
    path.write_text("damage\n" + path.read_text())
    status, _, err = ttkit("run", "--only", "01")
    assert status == 3 and "line 1 of the journal" in err and len(err.splitlines()) == 1


def test_headroom_measures_each_form_and_counts_shares(ttkit, tmp_path, monkeypatch):
    import pandas as pd

    from ttkit import minibench
    from ttkit.tasks import find_task
    from ttkit.verify import Verifier

    seen = []
    honest = headroom.prompts.candidate_source
    monkeypatch.setattr(
        headroom.prompts,
        "candidate_source",
        lambda task, body: "def" if len(body) == longest else honest(task, body),
    )
    longest = max(len(form.body) for form in minibench.forms(1, 2))
    with Verifier("fast-proxy") as verifier:
        table = headroom.measure(
            [find_task("minibench:1/2")], verifier, lambda *at: seen.append(at)
        )
    forms = minibench.forms(1, 2)
    assert list(table["form"]) == [form.name for form in forms]
    assert sorted(seen) == [(i, len(forms)) for i in range(1, len(forms) + 1)]
    assert table["speedup"].notna().equals(table["status"] == "correct")
    assert (table["reason"] == "").equals(table["status"] == "correct")
    assert table["reason"].str.contains("SyntaxError").any()
    made = pd.DataFrame(
        [("a", "correct", 1.5), ("a", "correct", 1.3), ("b", "correct", 1.1)]
        + [("c", "correct", 0.9), ("d", "incorrect", float("nan"))],
        columns=["task", "status", "speedup"],
    )
    assert list(headroom.best(made)["speedup"]) == [1.5, 1.1, 0.9]
    assert headroom.summarise(made) == {
        "tasks": 4,
        "faster": 1,
        "share_faster": 0.25,
        "none": 2,
        "share_none": 0.5,
    }


def test_doctor_says_what_works_and_what_does_not(ttkit, project, monkeypatch):
    status, out, err = ttkit("doctor", "--json")
    found = {finding["name"]: finding for finding in json.loads(out)}
    assert status == 0 and all(finding["ok"] for finding in found.values()), out
    assert "2 notebooks, 4 parameters" in found["project folder"]["text"]
    monkeypatch.chdir("/")
    monkeypatch.setattr("ttkit.doctor._verifier", lambda: 1 / 0)
    status, out, _ = ttkit("doctor")
    assert status == 3 and "FAIL project folder: no project folder" in out
    assert "FAIL verifier: division by zero" in out and "ok   torch: " in out


def test_claims_prints_the_ledger_its_counts_and_what_is_left_to_run(ttkit, tmp_path, monkeypatch):
    from ttkit import claims

    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "toy" / "04_selection"
    folder.mkdir(parents=True)
    rows = [claims.Finding("sel_gap", 0.2, 0.1, 0.4, 20), claims.Finding("cost_zero", 0.0)]
    claims.findings(rows).to_parquet(folder / "findings.parquet")
    (folder / "DONE").write_text("x")
    status, out, _ = ttkit("claims", "runs/toy")
    assert status == 0 and "2 HOLDS, 0 DIFFERS, 0 UNDERPOWERED, 35 NOT RUN" in out
    assert "0.2 [0.1, 0.4]" in out and "not run yet: ttkit run --only 03 --out runs/toy" in out
    status, out, _ = ttkit("claims", "runs/toy", "--json")
    data = json.loads(out)
    assert len(data["claims"]) == 37 and set(data["rules"]) == set(claims.RULES)
    gap = next(row for row in data["claims"] if row["claim"] == "sel_gap")
    assert gap["verdict"] == "HOLDS" and gap["region_hi"] is None and data["not_reproduced"]
