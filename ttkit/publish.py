"""Publishing a run: the executed notebooks, figures and their data go where readers find them.

Only a complete run of the default parameters is published, so that what is committed is what
`make demo` gives.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from ttkit.errors import UsageError
from ttkit.journal import sha256_of, to_json, write_atomic
from ttkit.parameters import Notebook, code_of, load_notebooks
from ttkit.store import project_root, read_manifest, why_not_done


def publish(run: str | Path, notebooks_dir: Path | None = None) -> list[Path]:
    """Copy the executed notebooks of `run` over the source ones, and its figures to `figures/`.

    Each figure keeps the table it was drawn from beside it, and `figures/manifest.json` says which
    run, stage and code made it. Returns the files written. Raises UsageError for a stage that is
    not complete or was run with other parameters than the notebook's own.
    """
    folder = (notebooks_dir or project_root() / "notebooks").absolute()
    root = folder.parent
    run_dir = (root / run).absolute()
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
            figures[target.name] = {
                "sha256": sha256_of(target),
                "run": Path(run).name,
                "stage": notebook.name,
                "command": f"ttkit run --only {notebook.name[:2]}",
                "finished": manifest["finished"],
                "device": manifest.get("device"),
                "cpu": manifest.get("cpu"),
            }
    for old in (root / "figures").glob("[0-9][0-9]_*"):
        if old.name not in figures:
            old.unlink()
    write_atomic(root / "figures" / "manifest.json", to_json(figures))
    return [*written, root / "figures" / "manifest.json"]


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
