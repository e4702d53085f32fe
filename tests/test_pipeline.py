import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest
from toy import DRAW, SUM, make_project, write_notebook

from ttkit import pipeline
from ttkit.errors import InfraError, UsageError
from ttkit.journal import acquire, release
from ttkit.parameters import Notebook, code_of, load_notebooks, resolve, union

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(make_project(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    return tmp_path


def run(**kwargs):
    """The result of a run in this process, and what it printed."""
    stream = io.StringIO()
    return pipeline.run(**kwargs, stream=stream), stream.getvalue()


def tables(out):
    return [pd.read_parquet(out / p) for p in ("01_draw/rows.parquet", "02_sum/total.parquet")]


def assert_same(a, b):
    for one, other in zip(a, b, strict=True):
        pd.testing.assert_frame_equal(one, other)


# --- parameters


def known(text="rate: float = 1.0e-5  # learning rate\nk: int = 64\nname: str | None = None"):
    return union([notebook(text)])


def notebook(text, name="01_a", cells=()):
    from ttkit.parameters import _declared

    return Notebook(Path(f"{name}.ipynb"), _declared(text, name), tuple(cells))


def test_all_types_are_read_with_their_comments():
    found = known(
        "a: int = -1  # first\nb: float = 1\nc: str = 'x # y'  # third\nd: bool = True\n"
        "e: str | None = None\nf: list[int] = [1]\ng: list[float] = [1, 2.5]\nh: list[str] = ['é']"
    )
    assert [p.default for p in found.values()] == [
        -1,
        1.0,
        "x # y",
        True,
        None,
        [1],
        [1, 2.5],
        ["é"],
    ]
    assert type(found["b"].default) is float and type(found["g"].default[0]) is float
    assert found["a"].comment == "first" and found["c"].comment == "third"


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("k = 3", "each line must be `name: type = default`"),
        ("k: int", "each line must be"),
        ("k: dict = {}", "has the type dict, which is not one of int, float"),
        ("k: int = 2.5", "must be int, not 2.5"),
        ("k: int = True", "must be int, not True"),
        ("k: int = n * 2", "must be a plain value"),
        ("k: int = (", "is not valid Python"),
    ],
)
def test_a_malformed_parameters_cell_is_refused(cell, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        notebook(cell)


def test_two_notebooks_must_agree_on_a_shared_parameter():
    with pytest.raises(UsageError, match="`int = 64` in 01_a but `int = 16` in 02_b"):
        union([notebook("k: int = 64"), notebook("k: int = 16", "02_b")])
    assert set(union([notebook("k: int = 64"), notebook("k: int = 64", "02_b")])) == {"k"}


@pytest.mark.parametrize(
    ("profile", "message"),
    [
        ("K: 4", "no notebook has a parameter 'K'; did you mean k?"),
        ("rte: 1.0", "did you mean rate?"),
        ("k: 4.5", "k must be int, not 4.5"),
        ("k: true", "k must be int, not True"),
        ("k: '4'", "k must be int, not '4'"),
        ("rate: 1e-5", "must be float, not '1e-5': YAML takes 1e-5 for text, write 1.0e-5"),
        ("k: 1\nk: 2", "gives k more than once"),
        ("- k", "must be a flat list"),
        ("k: [", "not valid YAML, line 2"),
        ("name: 5", "name must be str | None, not 5"),
    ],
)
def test_a_wrong_profile_is_refused_in_one_sentence(tmp_path, profile, message):
    path = tmp_path / "p.yaml"
    path.write_text(profile + "\n")
    with pytest.raises(UsageError) as error:
        resolve(known(), path, ())
    assert message in str(error.value) and "\n" not in str(error.value)


def test_overrides_win_and_are_read_by_the_declared_type(tmp_path):
    path = tmp_path / "p.yaml"
    path.write_text("rate: 1\nk: 4\n")
    values = resolve(known(), path, ["rate=1e-5", "name=7"])
    assert values == {"rate": 1e-5, "k": 4, "name": "7"}
    assert resolve(known(), None, ["name=none"]) == {"name": None}
    lists = known("a: list[float] = []\nb: list[str] = []\nc: list[int] = []")
    values = resolve(lists, None, ["a=1,1e-3", "b=x,2", "c=[1, 2]"])
    assert values == {"a": [1.0, 0.001], "b": ["x", "2"], "c": [1, 2]}
    for text, message in (
        ("k=four", "must be int, not 'four'"),
        ("k", "write it as name=value"),
        ("q=1", "no notebook has a parameter 'q'"),
        ("rate=x", "must be float"),
    ):
        with pytest.raises(UsageError, match=message):
            resolve(known(), None, [text])


def test_an_unknown_profile_names_the_nearest(project):
    with pytest.raises(UsageError, match="no profile 'dmo'; did you mean demo?"):
        run(profile="dmo")


# --- what counts as a change of code


def test_code_is_the_cells_and_the_modules_they_import():
    code = code_of(notebook("k: int = 1", cells=["from ttkit import prompts, select"]))
    names = {Path(name).name for name in code.files}
    assert {"prompts.py", "tasks.py", "errors.py", "01_a.ipynb"} <= names  # prompts imports tasks
    assert not {"cli.py", "pipeline.py", "store.py"} & names


def test_cells_after_the_journal_do_not_touch_it():
    cells = ["import ttkit.prompts", "j = stage.journal('rows')", "fill(j)", "show()"]
    first = code_of(notebook("k: int = 1", cells=cells))
    later = code_of(notebook("k: int = 1", cells=[*cells[:3], "show(better=True)"]))
    sooner = code_of(notebook("k: int = 1", cells=["import ttkit.tasks", *cells[1:]]))
    assert first.files != later.files and first.journal == later.journal
    assert first.journal != sooner.journal


def test_a_journal_is_followed_through_the_names_that_hold_it():
    cells = [
        "drawn = stage.journal('rows', ('index',))",
        "common = dict(run='x', j=drawn)",
        "before = fill(**common)",
        "adapter = train(rate=1)",
        "after = fill(adapter, **common)",
        "plot(after)",
    ]

    def key(position=None):
        edited = [c.replace(")", ", 5)") if i == position else c for i, c in enumerate(cells)]
        return code_of(notebook("k: int = 1", cells=edited)).journal

    assert [key(i) != key() for i in range(6)] == [True, True, True, True, True, False]
    def_cell = "def draw():\n    journal.append([1])"
    for tail, same in ((["draw()"], False), (["rows()"], True)):
        first = code_of(notebook("k: int = 1", cells=[def_cell, "a = 1", *tail]))
        other = code_of(notebook("k: int = 1", cells=[def_cell, "a = 2", *tail]))
        assert (first.journal == other.journal) == same


# --- running


def test_a_run_is_done_once_and_a_change_reruns_what_depends_on_it(project):
    result, said = run()
    assert list(result.executed) == ["01_draw", "02_sum"]
    first = tables(result.out)
    assert list(first[0]["value"]) == [i * i for i in range(12)]
    assert said.splitlines()[-3:] == ["12 rows were drawn", "the sum is 506", "it was easy"]
    assert "tables, figures and the executed notebooks are in runs/demo/" in said
    assert (result.out / "02_sum/02_sum.ipynb").is_file()
    assert [s.state for s in pipeline.status("runs/demo")] == ["done", "done"]
    assert [s.rows for s in pipeline.status("runs/demo")] == [12, 12]

    begun = {p: p.stat().st_mtime_ns for p in result.out.rglob("*.parquet")}
    result, said = run()
    assert not result.executed and result.unchanged == ["01_draw", "02_sum"]
    assert result.summary == ["12 rows were drawn", "the sum is 506", "it was easy"]
    assert begun == {p: p.stat().st_mtime_ns for p in result.out.rglob("*.parquet")}

    result, said = run(overrides=["power=2"])
    assert list(result.executed) == ["02_sum"] and "(power is 2, was 1)" in said

    result, said = run(overrides=["rows=5"], only=["01"])
    assert list(result.executed) == ["01_draw"]
    assert "[2/2] 02_sum: not asked for, though power is 1, was 2" in said
    assert [s.state for s in pipeline.status("runs/demo")] == ["done", "stale"]

    result, said = run(overrides=["rows=5", "power=2"])
    assert list(result.executed) == ["02_sum"]
    assert "(its input 01_draw/rows.parquet changed)" in said
    assert len(tables(result.out)[1]) == 5

    result, _ = run()
    assert_same(tables(result.out), first)


def test_an_unchanged_run_loads_nothing_heavy(project):
    out = project / "runs/demo"
    values = {"rows": 12, "pause": 0.0}, {"power": 1}
    for book, params in zip(load_notebooks(project / "notebooks"), values, strict=True):
        pipeline.Stage.open(out, book.name, params, code_of(book), project).done()
    code = (
        "import sys; from ttkit import pipeline; r = pipeline.run();"
        "print(r.executed, sorted({'torch', 'papermill', 'pandas'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "{} []"


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"overrides": ["rws=3"]}, "did you mean rows?"),
        ({"overrides": ["rows=x"]}, "rows .rows to draw. must be int, not 'x'"),
        ({"only": ["07"]}, "there is no notebook '07'"),
        ({"start_from": "03"}, "there is no notebook '03'"),
        ({"only": ["01"], "start_from": "01"}, "--only or --from, not both"),
    ],
)
def test_wrong_requests_start_nothing(project, kwargs, message):
    with pytest.raises(UsageError, match=message):
        run(**kwargs)
    assert not (project / "runs").exists()


def test_a_later_notebook_alone_asks_for_the_earlier_one(project):
    with pytest.raises(UsageError) as error:
        run(only=["02"])
    text = str(error.value)
    assert "02_sum, In [" in text and "`ttkit run --only 01 --out runs/demo`" in text
    assert "runs/demo/02_sum/02_sum.ipynb" in text and "\n" not in text


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("raise ValueError('no\\ngood')", r"02_sum, In \[5\]: ValueError: no good; the partly"),
        ("import os\nos.kill(os.getpid(), 9)", "the kernel of 02_sum died"),
        ("raise OSError(28, 'No space left on device')", r"02_sum, In \[5\]: the disk is full"),
        ("pass", r"02_sum ran through but its stage is not complete \(not finished\)"),
    ],
)
def test_a_notebook_that_fails_is_one_sentence_and_keeps_the_rest(project, cell, message):
    write_notebook(
        project / "notebooks/02_sum.ipynb", SUM["parameters"], [SUM["cells"][0], "1 + 1", cell]
    )
    out = project / "runs/demo"
    book = Notebook.load(project / "notebooks/01_draw.ipynb")
    params = {"rows": 12, "pause": 0.0}
    pipeline.Stage.open(out, "01_draw", params, code_of(book), project).done()
    with pytest.raises(InfraError, match=message) as error:
        run()
    assert "\n" not in str(error.value)
    assert [s.state for s in pipeline.status("runs/demo")] == ["done", "partial"]
    executed = json.loads((out / "02_sum/02_sum.ipynb").read_text())
    assert any(c.get("outputs") for c in executed["cells"])


def test_two_runs_of_one_folder_are_refused(project):
    code = (
        "import sys, time; from ttkit.journal import acquire; from pathlib import Path;"
        "acquire(Path('runs/demo/.lock'), 'x'); print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        holder.stdout.readline()
        with pytest.raises(InfraError, match=f"runs/demo is in use by process {holder.pid} "):
            run()
    finally:
        holder.kill()
        holder.communicate()


# --- the same notebook elsewhere


def test_jupyterlab_and_plain_papermill_give_the_same_tables(project):
    import nbformat
    import papermill
    from nbclient import NotebookClient

    run()
    expected = tables(project / "runs/demo")
    (project / "runs/demo").rename(project / "runs/first")
    # Run All in JupyterLab: the notebook's own defaults, a kernel started in notebooks/.
    for name in ("01_draw", "02_sum"):
        book = nbformat.read(project / f"notebooks/{name}.ipynb", as_version=4)
        where = {"metadata": {"path": str(project / "notebooks")}}
        NotebookClient(book, kernel_name="python3", resources=where).execute()
    assert_same(tables(project / "runs/demo"), expected)
    assert not run()[0].executed  # the runner takes them for its own

    source = str(project / "notebooks/01_draw.ipynb")
    settings = {"language": "python", "kernel_name": "python3", "progress_bar": False}
    profile = {"rows": 12, "power": 1}  # another notebook's names are in every profile
    out = {"run": "runs/papermill"}
    papermill.execute_notebook(source, "out.ipynb", {**profile, **out}, **settings)
    assert_same(tables(project / "runs/first")[:1], [read(project, "papermill")])
    wrong = {"rowz": 3, **out}  # papermill itself would only warn
    with pytest.raises(papermill.PapermillExecutionError, match="did you mean rows"):
        papermill.execute_notebook(source, "out.ipynb", wrong, **settings)


def read(project, name):
    return pd.read_parquet(project / "runs" / name / "01_draw/rows.parquet")


def test_begin_checks_what_the_notebook_holds(project):
    with pytest.raises(UsageError, match="there is no notebook 01_drw.ipynb; did you mean 01_draw"):
        pipeline.begin("01_drw", {})
    with pytest.raises(UsageError, match="rows has no value: run the parameters cell first"):
        pipeline.begin("01_draw", {"run": "runs/x"})
    with pytest.raises(UsageError, match="01_draw: rows .rows to draw. must be int, not '3'"):
        pipeline.begin("01_draw", {"run": "runs/x", "rows": "3", "pause": 1.0})
    namespace = {"run": "runs/x", "rows": 3, "pause": 1}
    stage = pipeline.begin("01_draw", namespace)
    assert stage.params == {"rows": 3, "pause": 1.0} and stage.dir == project / "runs/x/01_draw"
    assert type(namespace["pause"]) is float
    release(stage.dir / ".lock")


# --- kills


def start_run(project, *args):
    command = [sys.executable, "-m", "ttkit", "run", "--profile", "slow", *args]
    return subprocess.Popen(
        command,
        cwd=project,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for_rows(out, count, process):
    """Wait until the journal has `count` rows; returns the number it has."""
    while process.poll() is None:
        found = sum(p.read_bytes().count(b"\n") for p in out.glob("01_draw/journal/*/rows.jsonl"))
        if found >= count:
            return found
        time.sleep(0.02)
    raise AssertionError(process.stdout.read())


def kernels_of(process):
    children = psutil.Process(process.pid).children(recursive=True)
    return [child for child in children if "ipykernel_launcher" in " ".join(child.cmdline())]


def test_killed_at_any_moment_a_run_finishes_with_no_row_lost_or_doubled(project):
    out = project / "runs/slow"
    chance = random.Random(7)
    process = start_run(project)
    time.sleep(chance.uniform(0.1, 1.5))  # before there is a kernel
    process.kill()
    process.communicate()
    for kill in range(3):
        process = start_run(project)
        while process.poll() is None and not kernels_of(process):
            time.sleep(0.02)
        if kill == 0:
            wait_for_rows(out, 1, process)
        time.sleep(chance.uniform(0, 1.8))
        kernels = kernels_of(process)
        process.kill()  # the next run starts while the old kernel may still be about
        process.communicate()
    process = start_run(project)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 0, text
    gone, alive = psutil.wait_procs(kernels, timeout=20)
    assert not alive
    lines = [json.loads(x) for p in out.glob("01_draw/journal/*/*.jsonl") for x in p.open()]
    assert [row["index"] for line in lines for row in line] == list(range(40))
    assert "40 rows were drawn" in text
    manifest = json.loads((out / "01_draw/manifest.json").read_text())
    assert manifest["rows_resumed"] >= 1

    whole, _ = run(profile="slow", out="runs/whole", overrides=["pause=0.0"])
    assert_same(tables(out), tables(whole.out))


def test_ctrl_c_stops_the_kernel_keeps_the_rows_and_says_how_to_go_on(project):
    out = project / "runs/slow"
    process = start_run(project)
    wait_for_rows(out, 5, process)
    kernels = kernels_of(process)
    os.kill(process.pid, signal.SIGINT)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 130, text
    assert "stopped in 01_draw as asked" in text and "the same command goes on" in text
    assert "Traceback" not in text
    gone, alive = psutil.wait_procs(kernels, timeout=20)
    assert kernels and not alive
    acquire(out / "01_draw/.lock", "the stage")  # nobody holds it any more
    release(out / "01_draw/.lock")
    one, two = pipeline.status("runs/slow")
    assert one.state == "partial" and one.rows >= 5 and one.detail.endswith("/40")
    assert two.state == "not started"


def test_the_console_says_how_far_it_is(project):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    pipeline.run(profile="slow", only=["01"], stream=stream)
    assert re.search(r"\[1/2\] 01_draw: rows \d+/40", stream.getvalue())


def test_the_summary_has_ten_lines_at_most(project):
    for name, count in (("01_draw", 12), ("02_sum", 3)):
        (project / "runs/demo" / name).mkdir(parents=True)
        text = json.dumps([f"{name} {i}" for i in range(count)])
        (project / "runs/demo" / name / "summary.json").write_text(text)
    said = pipeline._summary(project / "runs/demo", ["01_draw", "02_sum"])
    assert said == [*(f"01_draw {i}" for i in range(6)), *(f"02_sum {i}" for i in range(3))]


def test_the_toy_notebooks_are_what_the_tests_think(project):
    first, second = load_notebooks(project / "notebooks")
    assert (first.name, second.name) == ("01_draw", "02_sum")
    assert list(first.cells) == DRAW["cells"] and set(first.parameters) == {"run", "rows", "pause"}
