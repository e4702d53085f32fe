"""The commands that judge candidates, and those that try the judge: verify, aa, bench verify."""

import contextlib
import dataclasses
import json
import re

import pytest

from ttkit.verify import Verdict

TASK = """
import torch
import torch.nn as nn

class Model(nn.Module):
    def __init__(self):
        super().__init__()

    def forward(self, x):
        return torch.relu(x) + 1

def get_inputs():
    return [torch.randn(64, 512)]

def get_init_inputs():
    return []
"""
MODULE = TASK.split("def get_inputs")[0].replace("class Model(", "class ModelNew(")


@pytest.fixture
def candidate(tmp_path):
    """Writes the task and a candidate; the command that judges it."""

    def write(text, task=TASK):
        (tmp_path / "task.py").write_text(task)
        (tmp_path / "candidate.py").write_text(text)
        return "verify", tmp_path / "task.py", tmp_path / "candidate.py"

    return write


def facts(out):
    """The labelled lines of `ttkit verify` as a dictionary, and the first line as `status`."""
    first, *lines = out.splitlines()
    found, label = {"status": first.rpartition(": ")[2]}, ""
    for line in lines:
        assert len(line) <= 80, line
        if line[:2].strip():
            label = line[:16].strip()
            found[label] = line[16:]
        else:
            found[label] += f" {line.strip()}"
    return found


@pytest.mark.parametrize(
    ("text", "status", "says"),
    [
        ("return x.clamp(min=0) + 1\n", 0, "correct"),
        (MODULE, 0, "correct"),
        ("```python\nreturn x.clamp(min=0) + 2\n```\n", 1, "incorrect"),
    ],
)
def test_verify_judges_a_body_or_a_module(ttkit, candidate, text, status, says):
    code, out, _ = ttkit(*candidate(text), "--protocol", "fast-proxy")
    found = facts(out)
    assert (code, found["status"]) == (status, says), out
    assert found["measured by"] == "protocol fast-proxy on cpu"
    if says == "correct":
        assert "this protocol cannot tell" in found["meaning"]
        assert "without an interval" in found["speedup"] and found["measured"] == "5 runs of each"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "holds no code"),
        ("# nothing", "holds no code"),
        ("import torch\nclass New: pass", "defines no ModelNew"),
        ("def fast(x):\n    return x", "defines no ModelNew"),
        (b"\xff\xfe\x00", "is not UTF-8 text"),
    ],
)
def test_verify_refuses_a_file_that_can_be_no_candidate(ttkit, tmp_path, text, says):
    file = tmp_path / "candidate.py"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    status, out, err = ttkit("verify", "minibench:1/1", str(file))
    assert (status, out) == (2, "") and f"the candidate {file} {says}" in err


def test_verify_numbers_the_lines_of_a_body_as_its_file_does(ttkit, candidate):
    status, out, _ = ttkit(*candidate("y = x\nreturn y +\n"), "--json")
    assert status == 1 and "(line 2)" in json.loads(out)["reason"]


def test_a_task_file_that_is_no_text_is_wrong_usage(ttkit, tmp_path):
    (tmp_path / "candidate.py").write_text("return x")
    for content, says in ((b"\xff\xfe", "is not UTF-8 text"), (b"x = '\x00'", "not valid Python")):
        (tmp_path / "task.py").write_bytes(content)
        files = (str(tmp_path / name) for name in ("task.py", "candidate.py"))
        status, _, err = ttkit("verify", *files)
        assert status == 2 and says in err and "None" not in err


LONG = TASK.replace("torch.relu(x) + 1", "[torch.sin(x * x) for _ in range(40)][0]")


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("return torch.sin(x * x)\n", "faster: the whole interval is above 1"),
        (
            "return [torch.sin(x * x) for _ in range(90)][0]\n",
            "slower: the whole interval is below",
        ),
    ],
)
def test_verify_says_how_fast_a_correct_candidate_is_and_why_that_is_known(
    ttkit, candidate, text, meaning
):
    call = candidate(text, LONG)
    code, out, _ = ttkit(*call)
    found = facts(out)
    assert code == 0 and found["status"] == "correct" and meaning in found["meaning"], out
    value, lo, hi = map(float, re.findall(r"([0-9.]+)x", found["speedup"]))
    assert lo <= value <= hi and (lo > 1 or hi < 1)
    assert re.fullmatch(r"[0-9]+ pairs of runs", found["measured"])
    reference, own, limit = (
        float(found[name].split()[0]) for name in ("reference", "candidate", "physical limit")
    )
    assert (own < reference) == (lo > 1) and 0 < limit < own
    assert found["KernelBench"].startswith("within its tolerance")
    assert found["device shared"].startswith("load average")
    assert "read-only files" in found["guards on"] + found.get("guards off", "")
    assert "values_negated        right values on inputs with the sign changed" in found["checks"]
    assert "failed" not in out and "evidence" not in found


WRONG = {
    "incorrect": (
        "out = torch.relu(x) + 1\nreturn out if x.mean() < 1 else out * 2\n",
        "values_shifted",
        "wrong values on inputs shifted: its error is",
    ),
    "rejected": (
        "return super().forward(x)\n",
        "calls_reference",
        "the reference's own forward ran in place of a program of its own",
    ),
    "compile_error": ("x = 2\nreturn x.clamp(min=0\n", "compile", "SyntaxError: '(' was never"),
}


@pytest.mark.parametrize("status", WRONG)
def test_verify_names_the_check_that_failed_and_the_evidence(ttkit, candidate, status):
    text, check, evidence = WRONG[status]
    code, out, _ = ttkit(*candidate(text))
    found = facts(out)
    assert (code, found["status"]) == (1, status), out
    assert found["failed check"] == check and found["evidence"].startswith(evidence)
    assert found["required"] and found["speedup"] == "not measured"
    assert f"{check} failed" in found["checks"] and found["guards on"]
    assert found.get("that line") == ("return x.clamp(min=0" if check == "compile" else None)


def test_verify_as_json_is_the_whole_verdict(ttkit, candidate):
    names = {field.name for field in dataclasses.fields(Verdict)}
    code, out, _ = ttkit(*candidate("return x.clamp(min=0) + 1\n"), "--json")
    verdict = json.loads(out)
    assert code == 0 and set(verdict) == names | {"task", "correct"}
    # Pairs after the last look that the time allowed are kept, but decide nothing.
    assert len(verdict["pairs"]) >= verdict["n_pairs"] > 0 and verdict["guards"]
    assert all(reference > 0 and own > 0 for reference, own in verdict["pairs"])
    code, out, _ = ttkit(*candidate("return x * 1\n"), "--json")
    verdict = json.loads(out)
    assert code == 1 and set(verdict) == names | {"task", "correct"}
    assert verdict["status"] == "incorrect" and verdict["speedup"] is None


def test_a_verdict_of_infrastructure_is_status_3(ttkit, tmp_path, monkeypatch):
    from ttkit import verify

    broken = verify.Verdict("infra_error", "the worker could not be started")
    monkeypatch.setattr(verify.Verifier, "verify", lambda *_: broken)
    (tmp_path / "task.py").write_text(TASK)
    (tmp_path / "candidate.py").write_text("return x\n")
    status, out, _ = ttkit("verify", tmp_path / "task.py", tmp_path / "candidate.py")
    found = facts(out)
    assert (status, found["status"]) == (3, "infra_error")
    assert found["evidence"] == "the worker could not be started"
    assert "says nothing of the candidate" in found["meaning"]


def test_power_is_the_share_of_runs_in_which_a_faster_candidate_is_seen(ttkit):
    code, out, _ = ttkit("aa", "--faster", "3", "--runs", "2", "--json")
    summary = json.loads(out)["summary"]
    assert code == 0 and summary["measured"] == summary["fast_interval"] == 2
    assert 1.5 < summary["largest_speedup"] < 6


def test_aa_reports_rates_and_every_run(ttkit, tmp_path):
    out_file = tmp_path / "aa.csv"
    args = ["aa", "--tasks", "2", "--runs", 2, "--protocol", "fast-proxy", "--out", out_file]
    status, out, _ = ttkit(*args, "--json")
    data = json.loads(out)
    assert status == 0 and data["summary"]["runs"] == 2 == len(data["runs"])
    assert len(out_file.read_text().splitlines()) == 3
    status, _, err = ttkit("aa", "--tasks", "2", "--out", tmp_path / "nowhere" / "aa.csv")
    assert status == 2 and "aa.csv: No such file or directory" in err


def test_aa_keeps_the_runs_that_it_made_before_it_was_stopped(ttkit, tmp_path, monkeypatch):
    from ttkit.verify.verifier import Verifier

    def stopped(self, items, on_verdict, **_):
        honest(self, items[:1], on_verdict, fresh=True)
        raise KeyboardInterrupt

    honest = Verifier.verify_many
    monkeypatch.setattr(Verifier, "verify_many", stopped)
    args = ["aa", "--tasks", "2", "--runs", 2, "--protocol", "fast-proxy"]
    with contextlib.suppress(KeyboardInterrupt):
        ttkit(*args, "--out", tmp_path / "aa.csv")
    assert len((tmp_path / "aa.csv").read_text().splitlines()) == 2


def test_an_aa_run_that_cannot_be_measured_says_why(ttkit, monkeypatch):
    from ttkit.verify.verifier import Verifier

    honest = Verifier.verify_many

    def failing_second(self, items, on_verdict, **options):
        def pass_on(number, verdict):
            fails = {"status": "infra_error", "reason": "no room", "speedup": float("nan")}
            on_verdict(number, dataclasses.replace(verdict, **fails) if number == 1 else verdict)

        return honest(self, items, pass_on, **options)

    monkeypatch.setattr(Verifier, "verify_many", failing_second)
    status, out, err = ttkit("aa", "--tasks", "2", "--runs", 3, "--protocol", "fast-proxy")
    assert status == 0 and re.search(r"^measured +2$", out, re.M)
    assert len(re.findall(r"not measured, infra_error: no room", err)) == 1


def test_bench_verify_keeps_what_it_found(ttkit, tmp_path):
    path = tmp_path / "bench.json"
    args = ["bench", "verify", "--tasks", "2", "--candidates", 1, "--protocol", "fast-proxy"]
    status, out, _ = ttkit(*args, "--json", "--out", path)
    assert status == 0 and json.loads(path.read_text()) == json.loads(out)
    assert [f.name for f in tmp_path.iterdir()] == ["bench.json"]
    status, _, err = ttkit(*args, "--out", tmp_path / "nowhere" / "bench.json")
    assert status == 2 and "bench.json: No such file or directory" in err
