"""What is kept of verdicts, what is shared between identical candidates, and the A/A command."""

from __future__ import annotations

import dataclasses
import json
import math
import multiprocessing
from pathlib import Path

import pytest

from ttkit.errors import InfraError, UsageError
from ttkit.prompts import candidate_source
from ttkit.tasks import Task
from ttkit.verify import PROTOCOLS, Limits, Verdict, Verifier
from ttkit.verify.aa import aa
from ttkit.verify.cache import Cache, normalised, verdict_key

CODE = """
import torch
import torch.nn as nn

class Model(nn.Module):
    def forward(self, x):
        # A comment
        return torch.softmax(torch.sin(x) * 2, dim=1)

def get_inputs():
    return [torch.randn(128, 256)]

def get_init_inputs():
    return []
"""
TASK = Task("file", 0, 0, "softmax", CODE)
QUICK = dataclasses.replace(PROTOCOLS["rigorous"], looks=(10,), warmup=1, seconds=1.0)


def body(text: str) -> str:
    return candidate_source(TASK, text)


def test_identical_candidates_are_measured_once_in_order(tmp_path):
    same = body("return torch.softmax(torch.sin(x) * 2, dim=1)")
    commented = same.replace("dim=1)\n", "dim=1)  # to be fast\n")
    assert commented != same
    wrong = body("return x")
    seen = []
    file = tmp_path / "cache.jsonl"
    with Verifier(QUICK, cache=file) as v:
        verdicts = v.verify_many(
            [(TASK, same), (TASK, wrong), (TASK, commented), (TASK, same)],
            lambda index, verdict: seen.append((index, verdict.status)),
        )
    assert [x.status for x in verdicts] == ["correct", "rejected", "correct", "correct"]
    assert verdicts[0] is verdicts[2] is verdicts[3]
    assert sorted(seen) == [(0, "correct"), (1, "rejected"), (2, "correct"), (3, "correct")]
    assert len(file.read_text().splitlines()) == 2
    with Verifier(QUICK, cache=file) as v:
        again = v.verify(TASK, commented)
        assert again == verdicts[0]
        assert v._room.launcher._process is None, "a cached verdict needs no process"
        assert v.verify(TASK, same, fresh=True).pairs != verdicts[0].pairs
        assert v.verify(TASK, same) == verdicts[0], "a second figure never replaces the first"


def test_a_failing_reference_is_not_kept(tmp_path):
    broken = Task("file", 0, 1, "broken", CODE.replace("randn(128, 256)", "randn(128)"))
    file = tmp_path / "cache.jsonl"
    with Verifier(QUICK, cache=file) as v:
        assert v.verify(broken, body("return x")).status == "infra_error"
    assert not file.exists()


def test_the_key_covers_all_that_a_verdict_depends_on():
    def key(task=TASK, source="a = 1", protocol=QUICK, limits=None, device="cpu", workers=1):
        return verdict_key(task, source, protocol, limits or Limits(), device, workers)

    other = Task("file", 0, 0, "softmax", CODE + "\n")
    changed = [
        key(task=other),
        key(source="a = 2"),
        key(protocol=dataclasses.replace(QUICK, warmup=2)),
        key(limits=Limits(run_seconds=9)),
        key(device="cpu of another kind"),
        key(workers=4),
    ]
    assert len({key(), *changed}) == 7
    assert key(source="a = 1  # same") == key()
    assert key(source="'\ud800'") != key()  # no text that could be encoded


def test_what_is_run_is_what_the_key_is_made_of():
    """A program that does as its own comments say gets the verdict of one without comments."""
    source = "a = 1  # b = 2\n# c\ntext = '''  # no comment  \n'''\n"
    assert normalised(source) == "a = 1\n\ntext = '''  # no comment  \n'''\n"
    assert normalised("a = (  # open") == "a = (  # open"  # no program at all
    reads = body("return torch.softmax(torch.sin(x) * 2, dim=1)\n# out of order").replace(
        "class ModelNew",
        "if '# out' + ' of order' in open(__file__).read():\n    1 / 0\n\nclass ModelNew",
    )
    with Verifier(QUICK) as v:
        assert v.verify(TASK, reads).status == "correct"


def test_a_torn_last_line_is_ignored_and_repaired(tmp_path):
    file = tmp_path / "cache.jsonl"
    verdict = Verdict("correct", "ok", speedup=1.5, pairs=((1.0, 2.0),))
    Cache(file).put("one", verdict)
    with open(file, "a") as stream:
        stream.write('{"key": "two", "verd')
    cache = Cache(file)
    assert cache.get("one") == Verdict.from_dict(verdict.to_dict())
    assert cache.get("two") is None
    cache.put("three", verdict)
    assert Cache(file).get("three").speedup == 1.5
    assert cache.get("one").speedup == 1.5


def _write(path: str, name: str) -> None:
    cache = Cache(Path(path))
    for i in range(200):
        cache.put(f"{name}-{i}", Verdict("incorrect", "x" * 500))


def test_several_writers_lose_nothing(tmp_path):
    file = tmp_path / "cache.jsonl"
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write, args=(str(file), name)) for name in "abc"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert len({line["key"] for line in lines}) == len(lines) == 600


def test_a_cache_that_cannot_be_written_is_an_error_of_the_machine(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InfraError):
        Cache(tmp_path / "file" / "cache.jsonl").put("k", Verdict("correct", "ok"))


def test_verdicts_survive_json():
    verdict = Verdict("correct", "ok", speedup=2.0, speedup_lo=1.5, flags=("a",), pairs=((1, 2),))
    data = json.loads(json.dumps(verdict.to_dict()))
    back = Verdict.from_dict(data)
    assert back.fast() and back.fast(1.4) and not back.fast(1.5)
    assert back.flags == ("a",) and back.pairs == ((1, 2),)
    assert math.isnan(back.candidate_ms) and data["candidate_ms"] is None


def test_aa_counts_what_came_out_faster():
    progress = []
    results, summary = aa(
        [TASK],
        3,
        {"protocol": QUICK},
        on_run=lambda done, total, *_: progress.append((done, total)),
    )
    assert progress == [(1, 3), (2, 3), (3, 3)]
    assert summary.runs == summary.measured == len(results) == 3
    assert summary.fast_interval == sum(v.fast() for _, v in results)
    assert summary.largest_speedup == max(v.speedup for _, v in results)
    with pytest.raises(UsageError):
        aa([TASK], 0)
