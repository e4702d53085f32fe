import errno
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from ttkit import journal as journal_module
from ttkit import store
from ttkit.errors import InfraError, UsageError
from ttkit.journal import Journal, acquire, release, sha256_of, write_atomic
from ttkit.store import SAMPLE_DTYPES, Code, Stage, read_samples, why_not_done, write_samples

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture
def project(tmp_path, monkeypatch):
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "pyproject.toml").touch()
    monkeypatch.chdir(tmp_path / "notebooks")
    return tmp_path


def rows(*indices):
    return [{"index": i, "value": i * 0.5} for i in indices]


def finish(project, name="01_a", params=None, values=(1, 2), code=None, upstream=None):
    stage = Stage.open("runs/x", name, params or {"k": 1}, code)
    if upstream:
        stage.input(upstream, "table.parquet")
    journal = stage.journal("rows", key=("index",))
    journal.append(rows(*values))
    stage.write_table("table", journal.frame())
    stage.done(summary=["a sentence"])
    return stage


def reason(project, name="01_a", params=None, code=None):
    return why_not_done(project / "runs/x", name, params or {"k": 1}, code, project)


# --- the journal


def test_rows_survive_and_come_back_sorted(tmp_path):
    journal = Journal(tmp_path / "j.jsonl", key=("index",))
    assert journal.append(rows(3, 1)) == 2
    assert journal.append(rows(2)) == 1
    journal.close()
    again = Journal(tmp_path / "j.jsonl", key=("index",))
    assert [row["index"] for row in again.rows] == [3, 1, 2]
    assert list(again.frame()["index"]) == [1, 2, 3]
    assert (2,) in again and (4,) not in again and len(again) == 3


def test_the_first_of_two_rows_with_one_key_stays(tmp_path):
    journal = Journal(tmp_path / "j.jsonl", key=("index",))
    assert journal.append([{"index": 1, "v": "first"}, {"index": 1, "v": "second"}]) == 1
    assert journal.append([{"index": 1, "v": "third"}]) == 0
    journal.close()
    assert Journal(tmp_path / "j.jsonl", key=("index",)).rows == [{"index": 1, "v": "first"}]


def test_a_file_cut_anywhere_keeps_its_whole_batches_and_goes_on(tmp_path):
    path = tmp_path / "j.jsonl"
    journal = Journal(path, key=("index",))
    batches = [rows(3 * i, 3 * i + 1, 3 * i + 2) for i in range(8)]
    for batch in batches:
        journal.append(batch)
    journal.close()
    data = path.read_bytes()
    for cut in random.Random(0).sample(range(len(data)), 40):
        path.write_bytes(data[:cut])
        journal = Journal(path, key=("index",))
        assert len(journal) == 3 * data[:cut].count(b"\n")  # of a batch all rows or none
        for batch in batches:
            journal.append(batch)
        journal.close()
        assert path.read_bytes() == data


def test_damage_in_the_middle_is_named_not_passed_over(tmp_path):
    path = tmp_path / "j.jsonl"
    path.write_text('[{"index": 1}]\nnonsense\n[{"index": 2}]\n')
    with pytest.raises(InfraError, match="line 2 of the journal"):
        Journal(path, key=("index",))


def test_numpy_and_nan_values_read_back_as_they_went_in(tmp_path):
    import numpy as np

    journal = Journal(tmp_path / "j.jsonl", key=("index",))
    journal.append([{"index": np.int64(1), "a": np.float64(0.1), "b": float("nan"), "c": (1, 2)}])
    before = repr(journal.rows)
    journal.close()
    assert repr(Journal(tmp_path / "j.jsonl", key=("index",)).rows) == before
    assert "nan" in before


def test_a_row_without_its_key_is_refused_and_nothing_is_written(tmp_path):
    journal = Journal(tmp_path / "j.jsonl", key=("task", "index"))
    with pytest.raises(UsageError, match="lacks task"):
        journal.append([{"task": "a", "index": 1}, {"index": 2}])
    assert journal.path.read_bytes() == b"" and len(journal) == 0


def test_a_second_process_is_refused_by_the_first_ones_number(tmp_path):
    code = (
        "import sys, time; from ttkit.journal import acquire; from pathlib import Path;"
        "acquire(Path(sys.argv[1]), 'x'); print('held', flush=True); time.sleep(60)"
    )
    lock = tmp_path / ".lock"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, lock], stdout=subprocess.PIPE, cwd=REPOSITORY
    )
    try:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(InfraError, match=rf"the run x is in use by process {holder.pid} "):
            acquire(lock, "the run x")
    finally:
        holder.kill()
        holder.communicate()
    acquire(lock, "the run x")  # a killed holder leaves nothing to clean up
    release(lock)


def test_opening_a_journal_again_in_one_process_closes_the_older_handle(tmp_path):
    first = Journal(tmp_path / "j.jsonl", key=("index",))
    second = Journal(tmp_path / "j.jsonl", key=("index",))
    with pytest.raises(UsageError, match="first cell"):
        first.append(rows(1))
    assert second.append(rows(1)) == 1


# --- a full disk


@pytest.fixture(params=["injected", "real"])
def small_disk(request, tmp_path, monkeypatch):
    """A folder on a disk of 64 KiB. The real one takes mount rights; where these lack, the error
    is raised at the write call as in the other case."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(folder)]
    if request.param == "real" and subprocess.run(mount, capture_output=True).returncode == 0:
        yield folder
        subprocess.run(["umount", "-l", str(folder)], check=True)
        return
    left = [64 << 10]

    def write_all(fd, data):
        part = bytes(data)[: left[0]]
        left[0] -= os.write(fd, part)
        if len(part) < len(data):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(journal_module, "_write_all", write_all)
    yield folder


def test_a_full_disk_is_one_sentence_and_keeps_what_was_journaled(small_disk):
    journal = Journal(small_disk / "j.jsonl", key=("index",))
    kept = 0
    with pytest.raises(InfraError, match="^the disk is full: .*j.jsonl could not be written"):
        for index in range(1000):
            journal.append([{"index": index, "text": "x" * 1500}])
            kept += 1
    assert kept > 10
    journal.close()
    assert [r["index"] for r in Journal(small_disk / "j.jsonl", key=("index",)).rows] == list(
        range(kept)
    )


def test_a_full_disk_leaves_the_old_file_and_no_litter(small_disk):
    write_atomic(small_disk / "a", b"old")
    with pytest.raises(InfraError, match="the disk is full"):
        write_atomic(small_disk / "a", bytes(80 << 10))
    assert [p.name for p in small_disk.iterdir()] == ["a"]
    assert (small_disk / "a").read_bytes() == b"old"


def test_a_full_disk_met_by_another_library_reads_the_same(project):
    def make(folder):
        raise RuntimeError("Error while serializing: No space left on device (os error 28)")

    stage = Stage.open("runs/x", "01_a", {})
    with pytest.raises(InfraError, match="the disk is full"):
        stage.folder("model", make)


# --- stages


def test_the_project_folder_is_found_from_below_and_named_when_missing(project):
    assert store.project_root() == project
    with pytest.raises(UsageError, match="no project folder"):
        store.project_root(Path("/"))


def test_a_finished_stage_is_done_until_something_changes(project):
    stage = finish(project, code=Code({"ttkit/a.py": "1"}))
    code = Code({"ttkit/a.py": "1"})
    assert reason(project, code=code) is None
    assert reason(project, params={"k": 2}) == "k is 2, was 1"
    assert reason(project, params={"k": 1, "new": 0}) == "new is 0, was None"
    assert reason(project, code=Code({"ttkit/a.py": "2"})) == "ttkit/a.py changed"
    data = (stage.dir / "table.parquet").read_bytes()
    (stage.dir / "table.parquet").write_bytes(data[:-1] + b"?")
    assert reason(project) == "its output table.parquet was altered"
    (stage.dir / "table.parquet").write_bytes(data)
    assert reason(project) is None
    manifest = stage.dir / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"k": 1', '"k": 2'))
    assert reason(project, params={"k": 2}) == "its manifest was altered"
    (stage.dir / "DONE").unlink()
    assert reason(project) == "not finished"


def test_the_manifest_says_where_the_results_came_from(project):
    from ttkit.tasks import make_split

    split = make_split("minibench", 1, 42)
    (project / "split.json").write_text(split.dump())
    stage = Stage.open("runs/x", "01_a", {"k": 1})
    stage.external("split.json")
    stage.write_table("table", pd.DataFrame(rows(1, 2)))
    stage.done(split=split, summary=["so it is"])
    manifest = store.read_manifest(stage.dir)
    assert manifest["parameters"] == {"k": 1} and manifest["split_sha256"] == split.sha256
    assert manifest["inputs"]["split.json"]["sha256"] == sha256_of(project / "split.json")
    table = manifest["outputs"]["table.parquet"]
    assert table == {"sha256": sha256_of(stage.dir / "table.parquet"), "rows": 2}
    assert manifest["versions"]["pandas"] == pd.__version__ and manifest["cpu"]
    assert json.loads((stage.dir / "summary.json").read_text()) == ["so it is"]
    (project / "split.json").write_text("{}")
    assert reason(project) == "its input split.json changed"


def test_an_input_needs_its_stage_to_be_done_and_is_watched(project):
    stage = Stage.open("runs/x", "02_b", {"k": 1})
    with pytest.raises(UsageError, match="run it first, `ttkit run --only 01 --out runs/x`"):
        stage.input("01_a", "table.parquet")
    finish(project)
    with pytest.raises(UsageError, match="01_a has left no other.parquet"):
        stage.input("01_a", "other.parquet")
    finish(project, "02_b", upstream="01_a")
    assert reason(project, "02_b") is None
    finish(project, values=(1, 2, 3))
    assert reason(project, "02_b") == "its input 01_a/table.parquet changed"


def test_an_optional_file_is_watched_before_it_is_there(project):
    def look():
        stage = Stage.open("runs/x", "01_a", {"k": 1})
        stage.external("runs/other/table.csv", optional=True)
        stage.done()

    look()
    assert reason(project) is None
    (project / "runs/other").mkdir()
    (project / "runs/other/table.csv").write_text("x")
    assert reason(project) == "its input runs/other/table.csv changed"
    look()
    assert reason(project) is None
    (project / "runs/other/table.csv").unlink()
    assert reason(project) == "its input runs/other/table.csv changed"
    with pytest.raises(UsageError, match="there is no such file"):
        Stage.open("runs/x", "01_a", {"k": 1}).external("runs/other/table.csv")


def test_an_input_made_with_another_value_of_a_shared_parameter_is_told(project):
    finish(project, params={"seed": 42})
    stage = Stage.open("runs/x", "02_b", {"seed": 43})
    with pytest.warns(UserWarning, match="01_a was run with seed=42, this notebook has seed=43"):
        stage.input("01_a", "table.parquet")


def test_journals_of_other_parameters_inputs_or_code_are_never_mixed(project):
    def open_rows(k=1, code="", upstream=False):
        stage = Stage.open("runs/x", "02_b", {"k": k}, Code(journal=code))
        if upstream:
            stage.input("01_a", "table.parquet")
        return stage.journal("rows", key=("index",))

    finish(project)
    open_rows().append(rows(1))
    for other in ({"k": 2}, {"code": "edited"}, {"upstream": True}):
        assert len(open_rows(**other)) == 0
        open_rows(**other).append(rows(5, 6))
    finish(project, values=(1, 2, 3))
    assert len(open_rows(upstream=True)) == 0
    assert open_rows().rows == rows(1)


def test_inputs_come_before_journals(project):
    finish(project)
    stage = Stage.open("runs/x", "02_b", {})
    stage.journal("rows", key=("index",))
    with pytest.raises(UsageError, match="before opening a journal"):
        stage.input("01_a", "table.parquet")


def test_looking_leaves_a_stage_done_and_writing_does_not(project):
    stage = finish(project)
    stage = Stage.open("runs/x", "01_a", {"k": 1})
    assert len(stage.journal("rows", key=("index",))) == 2
    assert reason(project) is None
    stage.write_table("table", pd.DataFrame(rows(1)))
    assert reason(project) == "not finished"


def test_what_an_earlier_run_of_a_stage_left_is_removed(project):
    stage = Stage.open("runs/x", "01_a", {"k": 1})
    stage.write_table("old", pd.DataFrame(rows(1)))
    (stage.dir / "mine.txt").write_text("put there by a person")
    stage.done()
    stage = finish(project)
    assert not (stage.dir / "old.parquet").exists()
    assert (stage.dir / "mine.txt").exists()


def test_a_folder_is_made_once_and_again_after_a_kill_or_a_change(project):
    calls = []

    def make(folder):
        calls.append(sorted(p.name for p in folder.iterdir()))
        (folder / "config.json").write_text("{}")
        if len(calls) == 1:
            raise KeyboardInterrupt
        (folder / "weights").write_text("w")

    def stage(k=1):
        return Stage.open("runs/x", "01_a", {"k": k})

    with pytest.raises(KeyboardInterrupt):
        stage().folder("model", make)
    assert not (stage().dir / "model").exists()
    model = stage().folder("model", make)
    assert sorted(p.name for p in model.iterdir()) == ["config.json", "weights"]
    stage().folder("model", make)
    assert calls == [[], ["config.json"]]
    stage(k=2).folder("model", make)
    assert len(calls) == 3
    (model / "weights").write_text("altered")
    stage(k=2).folder("model", make)
    assert len(calls) == 4


def test_a_working_folder_is_met_again_only_under_the_same_parameters(project):
    folder = Stage.open("runs/x", "01_a", {"k": 1}).scratch("checkpoints")
    (folder / "step-1").touch()
    assert Stage.open("runs/x", "01_a", {"k": 1}).scratch("checkpoints") == folder
    assert not list(Stage.open("runs/x", "01_a", {"k": 2}).scratch("checkpoints").iterdir())


def test_figures_have_their_numbers_beside_them(project):
    from matplotlib.figure import Figure

    fig = Figure()
    fig.subplots().plot([1, 2])
    stage = Stage.open("runs/x", "01_a", {})
    path = stage.figure(fig, pd.DataFrame({"x": [1, 2]}), "curve")
    stage.done()
    assert path.read_bytes().startswith(b"\x89PNG")
    assert (stage.dir / "figures/curve.csv").read_text() == "x\n1\n2\n"
    outputs = store.read_manifest(stage.dir)["outputs"]
    assert {"figures/curve.png", "figures/curve.csv"} <= set(outputs)


def test_large_external_files_are_known_by_size_and_ends(tmp_path):
    path = tmp_path / "weights"
    with path.open("wb") as file:
        file.truncate(65 << 20)
    first, whole = sha256_of(path, whole=False), sha256_of(path)
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")
    assert sha256_of(path, whole=False) != first and sha256_of(path) != whole


# --- the samples table


def samples(n=4):
    values = {"str": "t", "int64": 1, "float64": 0.5, "bool": True, "object": [5, 7]}
    table = pd.DataFrame([{c: values[d] for c, d in SAMPLE_DTYPES.items()} for _ in range(n)])
    return table.assign(index=range(n)[::-1], flags=[("a", "b")] * n)


def test_samples_are_checked_sorted_and_read_back(project):
    stage = Stage.open("runs/x", "02_b", {})
    written = write_samples(stage, samples())
    read = read_samples(stage.dir / "samples.parquet")
    pd.testing.assert_frame_equal(read, written)
    assert list(read.columns) == list(SAMPLE_DTYPES)
    assert list(read["index"]) == [0, 1, 2, 3] and set(read["flags"]) == {"a,b"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.drop(columns="nll_sum"), "lacks the columns nll_sum"),
        (lambda t: t.assign(confidence=1.0), "unknown columns confidence"),
        (lambda t: t.assign(index=0), "3 rows whose key .* occurs twice"),
        (lambda t: t.assign(correct=False), "a speedup for a sample that is not correct"),
        (lambda t: t.assign(n_tokens="many"), "n_tokens must be int64"),
    ],
)
def test_a_malformed_samples_table_is_refused(project, change, message):
    stage = Stage.open("runs/x", "02_b", {})
    with pytest.raises(UsageError, match=message):
        write_samples(stage, change(samples()))
    assert not (stage.dir / "samples.parquet").exists()


def test_a_samples_file_that_is_missing_or_no_parquet_is_named(tmp_path):
    with pytest.raises(UsageError, match="no samples table"):
        read_samples(tmp_path / "none.parquet")
    (tmp_path / "bad.parquet").write_text("text")
    with pytest.raises(UsageError, match="cannot be read"):
        read_samples(tmp_path / "bad.parquet")
