"""Publishing a run or a sweep: notebooks, figures and their data go where readers find them.

Only a complete run of the default parameters, or a complete sweep of `notebooks/sweeps`, is
published, so that what is committed is what `make demo`, or the sweep's command, gives.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from ttkit.errors import UsageError
from ttkit.journal import sha256_of, to_json, write_atomic
from ttkit.parameters import Notebook, code_of, load_notebooks
from ttkit.pipeline import params_of
from ttkit.store import project_root, read_manifest, why_not_done
from ttkit.sweepfile import Sweep


def publish(run: str | Path, notebooks_dir: Path | None = None) -> list[Path]:
    """Copy the executed notebooks of `run` over the source ones, and its figures to `figures/`; of
    a sweep, its figure and tables (see `_publish_sweep`).

    Each figure keeps the table it was drawn from beside it, and `figures/manifest.json` says which
    run, stage and code made it. Returns the files written. Raises UsageError for a stage that is
    not complete or was run with other parameters than the notebook's own, or the sweep's.
    """
    folder = (notebooks_dir or project_root() / "notebooks").absolute()
    root = folder.parent
    run_dir = (root / run).absolute()
    if (run_dir / "sweep.json").is_file():
        return _publish_sweep(run_dir, folder)
    written: list[Path] = []
    figures: dict[str, dict[str, Any]] = {}
    for notebook in load_notebooks(folder):
        defaults = {n: p.default for n, p in notebook.parameters.items() if n != "run"}
        reason = why_not_done(run_dir, notebook.name, defaults, code_of(notebook), root)
        if reason:
            raise UsageError(
                f"{notebook.name} of {run} cannot be published: {reason}; run `ttkit run` first"
            )
        stage = run_dir / notebook.name
        clean = _clean(json.loads((stage / notebook.path.name).read_text()), notebook, root)
        write_atomic(
            notebook.path, (json.dumps(clean, indent=1, ensure_ascii=False) + "\n").encode()
        )
        written.append(notebook.path)
        manifest = read_manifest(stage) or {}
        for source in sorted((stage / "figures").glob("*")):
            target = root / "figures" / f"{notebook.name[:2]}_{source.name}"
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(source, target)
            written.append(target)
            command = f"ttkit run --only {notebook.name[:2]}"
            figures[target.name] = _row(target, Path(run).name, notebook.name, command, manifest)
    for old in (root / "figures").glob("[0-9][0-9]_*"):
        if old.name not in figures:
            old.unlink()
    swept = {name: row for name, row in _manifest(root).items() if "sweep" in row["command"]}
    write_atomic(root / "figures" / "manifest.json", to_json(swept | figures))
    return [*written, root / "figures" / "manifest.json"]


def _publish_sweep(run_dir: Path, folder: Path) -> list[Path]:
    """Copy a sweep's figure to `figures/<sweep>.png` and its tables beside it: `<sweep>.csv`, or
    where there are several `<sweep>_<stage's number>_<table>.csv`.

    Raises UsageError unless every point is complete with the parameters of the sweep file.
    """
    root, sweep = folder.parent, run_dir.name
    plan = Sweep.load(folder / "sweeps" / f"{sweep}.yaml", folder)
    last: dict[str, Any] = {"finished": ""}
    for label, values in plan.points().items():
        for notebook in plan.notebooks:
            params = params_of(notebook, {**plan.values, **values})
            point = run_dir / label
            reason = why_not_done(point, notebook.name, params, code_of(notebook), root)
            if reason:
                raise UsageError(
                    f"{notebook.name} of {sweep}/{label} cannot be published: {reason}; "
                    f"run `ttkit sweep notebooks/sweeps/{sweep}.yaml` first"
                )
            manifest = read_manifest(point / notebook.name) or {}
            last = max(last, manifest, key=lambda item: item["finished"])
    sources = {} if plan.figure is None else {f"{sweep}.png": run_dir / f"{plan.figure}.png"}
    for stage, table in plan.collect:
        name = f"{sweep}.csv" if len(plan.collect) == 1 else f"{sweep}_{stage[:2]}_{table}.csv"
        sources[name] = run_dir / f"{stage}.{table}.csv"
    if missing := [source.name for source in sources.values() if not source.is_file()]:
        raise UsageError(f"the sweep {sweep} cannot be published: it has left no {missing[0]}")
    rows = {name: row for name, row in _manifest(root).items() if row["run"] != sweep}
    for name, source in sources.items():
        target = root / "figures" / name
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(source, target)
        command = f"ttkit sweep notebooks/sweeps/{sweep}.yaml"
        rows[name] = _row(target, sweep, plan.notebooks[-1].name, command, last)
    write_atomic(root / "figures" / "manifest.json", to_json(rows))
    return [root / "figures" / name for name in (*sources, "manifest.json")]


def _manifest(root: Path) -> dict[str, dict[str, Any]]:
    path = root / "figures" / "manifest.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def _row(
    target: Path, run: str, stage: str, command: str, manifest: dict[str, Any]
) -> dict[str, Any]:
    return {
        "sha256": sha256_of(target),
        "run": run,
        "stage": stage,
        "command": command,
        "finished": manifest["finished"],
        "device": manifest.get("device"),
        "cpu": manifest.get("cpu"),
    }


def _clean(executed: dict[str, Any], notebook: Notebook, root: Path) -> dict[str, Any]:
    """The source notebook with the outputs of the executed one: no injected cell, no trace of
    papermill or of where this machine keeps the project."""
    cells = [
        cell
        for cell in executed["cells"]
        if "injected-parameters" not in cell["metadata"].get("tags", [])
    ]
    source = json.loads(notebook.path.read_text())
    if ["".join(c["source"]) for c in cells] != ["".join(c["source"]) for c in source["cells"]]:
        raise UsageError(f"{notebook.name} was edited since it was run: run it again")
    count = 0
    for old, new in zip(source["cells"], cells, strict=True):
        if old["cell_type"] != "code":
            continue
        count += 1
        text = json.dumps(new["outputs"]).replace(str(root) + "/", "").replace(str(root), ".")
        old["outputs"] = json.loads(text)
        old["execution_count"] = count
        for output in old["outputs"]:
            if "execution_count" in output:
                output["execution_count"] = count
    source["metadata"].pop("widgets", None)
    return source
