import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import psutil
import pytest
import yaml
from matplotlib.figure import Figure
from toy import DRAW, SUM, make_project, write_notebook

from ttkit import claims, cli, pipeline, sweep
from ttkit.errors import UsageError
from ttkit.journal import sha256_of
from ttkit.publish import publish

REPOSITORY = Path(__file__).parent.parent
COLLECT = [{"stage": "02", "table": "total"}]


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(make_project(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    return tmp_path


def write(project, **keys):
    path = project / "notebooks/toy.yaml"
    path.write_text(yaml.safe_dump({"collect": COLLECT, **keys}, sort_keys=False))
    return path


def executed(result):
    return sorted(stage for point in result.points.values() for stage in point["executed"])


def test_a_stage_that_the_grid_does_not_touch_is_executed_once(project, capsys):
    path = write(project, grid={"power": [1, 2]})
    result = sweep.sweep(path, jobs=2)
    assert executed(result) == ["01_draw", "02_sum", "02_sum"] and not result.failures
    (copied,) = [p["copied"] for p in result.points.values() if p["copied"]]
    assert copied["01_draw"].startswith("runs/toy/power=")

    table = pd.read_parquet(result.out / "02_sum.total.parquet")
    assert list(table) == ["point", "power", "index", "value"]
    assert table.groupby("power")["value"].sum().to_dict() == {
        power: sum((i * i) ** power for i in range(12)) for power in (1, 2)
    }
    pd.testing.assert_frame_equal(table, pd.read_csv(result.out / "02_sum.total.csv"))
    assert [s.state for s in pipeline.status("runs/toy/power=2")] == ["done", "done"]

    again = sweep.sweep(path)
    assert executed(again) == [] and not again.failures
    assert json.loads((result.out / "sweep.json").read_text())["failures"] == {}
    assert "01_draw: as in runs/toy/power=" in capsys.readouterr().out


def test_what_was_made_from_other_inputs_is_not_copied(project):
    pipeline.run(profile="demo")
    result = sweep.sweep(write(project, grid={"rows": [12, 5]}))
    # demo has rows = 12, so both its stages serve; for rows = 5 nothing does
    assert result.points["rows=12"]["copied"] == dict.fromkeys(("01_draw", "02_sum"), "runs/demo")
    assert list(result.points["rows=5"]["executed"]) == ["01_draw", "02_sum"]
    table = pd.read_parquet(result.out / "02_sum.total.parquet")
    assert table.groupby("rows")["value"].sum().to_dict() == {12: 506, 5: 30}


def test_an_altered_result_is_not_copied(project):
    pipeline.run(profile="demo")
    with (project / "runs/demo/01_draw/rows.parquet").open("ab") as file:
        file.write(b"x")
    result = sweep.sweep(write(project, only=[1], collect=[], grid={"power": [1]}))
    assert executed(result) == ["01_draw"]


def test_a_copy_shares_no_file_with_its_source(project):
    pipeline.run(profile="demo")
    result = sweep.sweep(write(project, only=["01"], collect=[], grid={"rows": [12]}))
    mine, theirs = result.out / "rows=12/01_draw", project / "runs/demo/01_draw"
    names = {str(p.relative_to(mine)) for p in mine.rglob("*") if p.is_file() and p.name != ".lock"}
    assert {"DONE", "manifest.json", "rows.parquet", "01_draw.ipynb"} <= names
    assert not any((mine / name).samefile(theirs / name) for name in names)


def test_points_that_fail_are_named_and_the_others_kept(project, monkeypatch, capsys):
    cells = [*SUM["cells"]]
    cells[3] = (
        "import os\nif power == 2:\n    raise ValueError('no squares')\n"
        "if power == 3:\n    os.kill(os.getppid(), 9)\n" + cells[3]
    )
    write_notebook(project / "notebooks/02_sum.ipynb", SUM["parameters"], cells)
    path = write(project, grid={"power": [1, 2, 3]})
    monkeypatch.setattr(sys, "argv", ["ttkit", "sweep", str(path), "--json"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    said = json.loads(capsys.readouterr().out)
    assert stop.value.code == 3 and set(said["failures"]) == {"power=2", "power=3"}
    assert "ValueError: no squares; the partly executed" in said["failures"]["power=2"]
    assert "02_sum ended with status -9" in said["failures"]["power=3"]
    table = pd.read_parquet(project / "runs/toy/02_sum.total.parquet")
    assert table["power"].unique().tolist() == [1]

    write_notebook(project / "notebooks/02_sum.ipynb", **SUM)
    repaired = sweep.sweep(path)
    assert executed(repaired) == ["02_sum"] * 3 and not repaired.failures  # its code changed


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"grid": {"rws": [1]}}, "no notebook has a parameter 'rws'; did you mean rows?"),
        ({"grid": {"rows": [1, "x"]}}, "rows (rows to draw) must be int, not 'x'"),
        ({"grid": {"rows": 3}}, "the grid of rows must be a list of values"),
        ({"grid": {"rows": []}}, "the grid of rows must be a list of values"),
        ({"grid": {"rows": [1, 1]}}, "two points would be called rows=1"),
        ({"grid": {}}, "needs a `grid`"),
        ({"gird": {"rows": [1]}, "grid": {"rows": [1]}}, "no key 'gird'; did you mean grid?"),
        ({"grid": {"rows": [1]}, "set": {"powr": 2}}, "did you mean power?"),
        ({"grid": {"run": ["a"]}}, "each point has a folder of its own"),
        ({"grid": {"rows": [1]}, "profile": "dmo"}, "did you mean demo?"),
        ({"grid": {"rows": [1]}, "only": ["07"]}, "there is no notebook '07'"),
        ({"grid": {"rows": [1]}, "only": ["01"]}, "there is no notebook '02'"),  # of collect
        ({"grid": {"rows": [1]}, "only": "01"}, "only must be a list"),
        ({"grid": {"rows": [1]}, "collect": [{"stage": "02"}]}, "each must be {stage: ..., table"),
        (
            {"grid": {"rows": [1]}, "figure": "historys"},
            "no figure 'historys'; did you mean histories?",
        ),
        (
            {"grid": {"rows": [1]}, "findings": "rates"},
            "ttkit.findings_sweep has no findings 'rates'; did you mean learning_rates?",
        ),
        ({"grid": {"rows": [1]}, "name": "../x"}, "has to serve as a folder's name"),
    ],
)
def test_a_wrong_sweep_starts_nothing(project, keys, message):
    with pytest.raises(UsageError) as error:
        sweep.sweep(write(project, **keys))
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (project / "runs").exists()


def test_other_wrong_requests(project):
    with pytest.raises(UsageError, match="there is no sweep file .*; did you mean toy"):
        write(project, grid={"rows": [1]})
        sweep.sweep(project / "notebooks/toi.yaml")
    (project / "notebooks/bad.yaml").write_text("grid: [\n")
    with pytest.raises(UsageError, match="bad.yaml is not valid YAML, line 2"):
        sweep.sweep(project / "notebooks/bad.yaml")
    path = write(project, grid={"rows": [1]})
    with pytest.raises(UsageError, match="unknown executor 'slurm': it is one of local, ray"):
        sweep.sweep(path, executor="slurm")
    with pytest.raises(UsageError, match="--jobs 0"):
        sweep.sweep(path, jobs=0)


def test_a_table_that_is_not_there_and_a_figure_that_cannot_be_drawn(project):
    collect = [{"stage": "02", "table": "totl"}]
    result = sweep.sweep(write(project, grid={"rows": [3]}, collect=collect))
    assert "02_sum has left no table 'totl'; did you mean total?" in result.failures["rows=3"]
    result = sweep.sweep(write(project, grid={"rows": [3]}, figure="histories"))
    assert result.tables == ["02_sum.total.parquet"] and result.figure is None
    assert "the figure histories needs the columns" in result.failures["figure"]


def spread(monkeypatch):
    """A figure and findings of sweeps, for the table that the toy notebooks leave."""
    from ttkit import findings_sweep, plots_sweep
    from ttkit.claims import Finding

    def total(table):
        figure = Figure()
        figure.subplots().plot(table["power"], table["value"], "o")
        return figure

    def found(table):
        return [Finding("ttt_lr", float(table["power"].nunique()), n=3, note="toy")]

    for module, name, function in ((plots_sweep, "t", total), (findings_sweep, "f", found)):
        function.__module__ = module.__name__
        monkeypatch.setattr(module, name, function, raising=False)


def test_a_sweep_draws_its_figure_and_says_what_it_found(project, monkeypatch):
    spread(monkeypatch)
    result = sweep.sweep(write(project, grid={"power": [1, 2]}, figure="t", findings="f"))
    assert (result.figure, result.findings) == ("t.png", "findings.parquet")
    assert (result.out / "t.png").read_bytes().startswith(b"\x89PNG")
    found = pd.read_parquet(result.out / "findings.parquet")
    assert tuple(found) == claims.FINDING_COLUMNS and found["value"].tolist() == [2.0]
    # what cannot be found of these tables is named, and nothing old is left in its place
    path = write(project, grid={"power": [1, 2]}, findings="learning_rates")
    result = sweep.sweep(path)
    assert result.findings is None and not (result.out / "findings.parquet").exists()
    assert "need the columns ttt_lr" in result.failures["findings"]


def test_a_complete_sweep_is_published_beside_the_figures_of_the_run(project, monkeypatch):
    spread(monkeypatch)
    (project / "notebooks/sweeps").mkdir()
    keys = {"grid": {"power": [1, 2]}, "collect": COLLECT, "figure": "t"}
    path = project / "notebooks/sweeps/toy.yaml"
    path.write_text(yaml.safe_dump(keys))
    sweep.sweep(path)
    figures = project / "figures"
    figures.mkdir()
    row = {"run": "demo", "command": "ttkit run --only 01"}
    (figures / "manifest.json").write_text(json.dumps({"01_a.png": row}))

    written = publish("runs/toy")
    assert [p.name for p in written] == ["toy.png", "toy.csv", "manifest.json"]
    table = pd.read_csv(figures / "toy.csv")
    assert list(table) == ["point", "power", "index", "value"]
    manifest = json.loads((figures / "manifest.json").read_text())
    assert manifest["01_a.png"] == row and set(manifest) == {"01_a.png", "toy.png", "toy.csv"}
    assert manifest["toy.csv"]["command"] == "ttkit sweep notebooks/sweeps/toy.yaml"
    assert manifest["toy.csv"]["sha256"] == sha256_of(figures / "toy.csv")

    (project / "runs/toy/power=2/02_sum/DONE").unlink()
    with pytest.raises(UsageError, match="02_sum of toy/power=2 cannot be published: not finished"):
        publish("runs/toy")


def test_publishing_a_run_keeps_the_rows_of_sweeps(project):
    pipeline.run(profile="demo", stream=io.StringIO())
    (project / "figures").mkdir()
    rows = {
        "toy.png": {"run": "toy", "command": "ttkit sweep notebooks/sweeps/toy.yaml"},
        "01_old.png": {"run": "demo", "command": "ttkit run --only 01"},
    }
    (project / "figures/manifest.json").write_text(json.dumps(rows))
    publish("runs/demo")
    manifest = json.loads((project / "figures/manifest.json").read_text())
    assert manifest == {"toy.png": rows["toy.png"]}


def test_grid_values_reach_the_notebook_in_their_types(project):
    draw = {**DRAW, "parameters": DRAW["parameters"] + "\nnames: list[str] = []  # of the rows"}
    draw["cells"] = [*DRAW["cells"][:3], 'print(f"{pause:.0e} {names}")', *DRAW["cells"][3:]]
    write_notebook(project / "notebooks/01_draw.ipynb", **draw)
    path = write(
        project,
        grid={"pause": [1.0e-5], "names": [["1", "b"]]},
        only=[1],
        collect=[{"stage": "01_draw", "table": "rows"}],
    )
    result = sweep.sweep(path)
    (label,) = result.points
    assert label == "pause=1e-05,names=1+b" and not result.failures
    notebook = (result.out / label / "01_draw/01_draw.ipynb").read_text()
    assert "1e-05 ['1', 'b']" in notebook
    table = pd.read_parquet(result.out / "01_draw.rows.parquet")
    assert set(table["pause"]) == {1.0e-5} and set(table["names"]) == {"1+b"}


def test_ctrl_c_stops_the_points_and_a_second_start_goes_on(project):
    path = write(project, profile="slow", grid={"power": [1, 2]}, only=["01"], collect=[])
    command = [sys.executable, "-m", "ttkit", "sweep", str(path), "--jobs", "2"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=project
    )
    journal = "runs/toy/*/01_draw/journal/*/rows.jsonl"
    while process.poll() is None and not any(p.stat().st_size for p in project.glob(journal)):
        time.sleep(0.02)
    family = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGINT)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in text, text
    _, alive = psutil.wait_procs(family, timeout=30)
    assert family and not alive
    result = sweep.sweep(path)
    assert executed(result) == ["01_draw"] and not result.failures
    (point,) = [name for name, p in result.points.items() if p["executed"]]
    manifest = json.loads((result.out / point / "01_draw/manifest.json").read_text())
    assert manifest["rows_resumed"] >= 1


def test_ray_runs_the_same_worker_or_is_asked_for_in_one_sentence(project, monkeypatch):
    path = write(project, grid={"rows": [3]}, only=["01"], collect=[])
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"pip install 'ttkit\[cluster\]'"):
        sweep.sweep(path, executor="ray")

    # Ray's own API in so far as it is used: what is sent to it, and that it is shut down.
    sent, pool = [], ThreadPoolExecutor(1)

    def remote(work):
        def submit(job):
            sent.append(work)
            return types.SimpleNamespace(future=lambda: pool.submit(work, job))

        return types.SimpleNamespace(remote=submit)

    up = []
    ray = types.SimpleNamespace(remote=remote, is_initialized=lambda: bool(up))
    ray.init, ray.shutdown = lambda **_: up.append(1), up.clear
    monkeypatch.setitem(sys.modules, "ray", ray)
    result = sweep.sweep(path, executor="ray")
    assert sent == [sweep.run_stage] and executed(result) == ["01_draw"] and not up


@pytest.mark.parametrize("path", sorted((REPOSITORY / "notebooks/sweeps").glob("*.yaml")))
def test_the_sweeps_of_the_project_are_sound(path):
    assert re.search(r"^# .*2 cores", path.read_text(), flags=re.MULTILINE)
    plan = sweep.Sweep.load(path, REPOSITORY / "notebooks")
    assert plan.name == path.stem and len(plan.points()) > 1 and plan.collect and plan.figure
    written = "\n".join(cell for notebook in plan.notebooks for cell in notebook.cells)
    for _, table in plan.collect:
        assert f'"{table}"' in written
