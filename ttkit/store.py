"""Run folders: journals that survive a kill, tables, figures, and the manifest of how they arose.

A run is `runs/<name>/<stage>/`, one stage a notebook. Rows are journaled as they come (append-only
JSON lines), tables are written whole, and DONE is written last. A stage is complete only while
DONE, `manifest.json` and the hashes of everything named there agree.
"""

from __future__ import annotations

import datetime
import hashlib
import io
import json
import os
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ttkit
from ttkit import provenance
from ttkit.errors import UsageError
from ttkit.journal import Journal, acquire, disk, release, sha256_of, to_json, write_atomic

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from ttkit.tasks import Split

# One row a sample; the order here is the order in the file.
SAMPLE_DTYPES = {
    **dict.fromkeys(("run", "arm"), "str"),
    "step": "int64",
    "task": "str",
    **dict.fromkeys(("index", "seed"), "int64"),
    "temperature": "float64",
    **dict.fromkeys(("text", "code", "code_sha256"), "str"),
    "token_ids": "object",
    "n_tokens": "int64",
    **dict.fromkeys(("nll_sum", "nll_mean", "nll_sum_temp", "nll_mean_temp"), "float64"),
    **dict.fromkeys(("nll_max", "entropy_mean"), "float64"),
    **dict.fromkeys(("finish_reason", "status"), "str"),
    "correct": "bool",
    **dict.fromkeys(("speedup", "speedup_lo", "speedup_hi"), "float64"),
    **dict.fromkeys(("candidate_ms", "reference_ms"), "float64"),
    "n_pairs": "int64",
    **dict.fromkeys(("flags", "reason", "protocol"), "str"),
}
SAMPLE_KEY = ("arm", "step", "task", "temperature", "index")


def project_root(start: Path | None = None) -> Path:
    """The folder at or above `start` (default: the working directory) that holds `notebooks/` and
    `pyproject.toml`; "runs/demo" means the same from there, from JupyterLab and from papermill.

    Raises UsageError when there is none.
    """
    start = (start or Path.cwd()).resolve()
    for folder in (start, *start.parents):
        if (folder / "pyproject.toml").is_file() and (folder / "notebooks").is_dir():
            return folder
    raise UsageError(
        f"no project folder (with notebooks/ and pyproject.toml) at or above {start}: "
        "change into your clone of ttkit first"
    )


# --- stages -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Code:
    """Hashes of the code behind a stage: by file, and of what its journaled rows depend on."""

    files: dict[str, str] = field(default_factory=dict)
    journal: str = ""


@dataclass
class Stage:
    """One stage of a run, open for work. Get one from `ttkit.pipeline.begin` in a notebook."""

    run_dir: Path
    name: str
    params: dict[str, Any]
    code: Code
    root: Path
    started: float = field(default_factory=time.time)
    inputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    outputs: dict[str, int | None] = field(default_factory=dict)  # relative path: rows of a table
    journals: list[Journal] = field(default_factory=list)
    resumed: int = 0
    _progress_at: float = 0.0

    @classmethod
    def open(
        cls,
        run_dir: str | Path,
        name: str,
        params: dict[str, Any],
        code: Code | None = None,
        root: Path | None = None,
    ) -> Stage:
        """Open the folder `run_dir/name`, making it if need be. Raises InfraError if it is in use.

        A complete stage stays complete until something is written to it.
        """
        root = root or project_root()
        stage = cls((root / run_dir).absolute(), name, params, code or Code(), root)
        stage._lock()
        (stage.dir / "progress.json").unlink(missing_ok=True)
        return stage

    @property
    def dir(self) -> Path:
        return self.run_dir / self.name

    @property
    def key(self) -> str:
        """Names the journals: they are only taken up again by the same parameters, inputs, code."""
        hashes = {name: item["sha256"] for name, item in self.inputs.items()}
        return hashlib.sha256(to_json([self.params, hashes, self.code.journal])).hexdigest()[:16]

    def input(self, stage: str, *parts: str) -> Path:
        """The path of an output of an earlier stage, noted as an input of this one.

        Raises UsageError if that stage is not complete, or if a journal is open already, since
        what is journaled must be tied to all inputs. Warns when a parameter of the same name had
        another value there.
        """
        folder = self.run_dir / stage
        only = f"`ttkit run --only {stage.split('_')[0]} --out {_shown(self.run_dir, self.root)}`"
        if not (folder / "DONE").is_file():
            raise UsageError(
                f"{self.name} needs the results of {stage}, which is not complete in "
                f"{_shown(self.run_dir, self.root)}: run it first, {only}"
            )
        path = folder.joinpath(*parts)
        if not path.exists():
            raise UsageError(f"{stage} has left no {'/'.join(parts)}: run it again, {only}")
        manifest = read_manifest(folder) or {}
        for name, theirs in manifest.get("parameters", {}).items():
            if name in self.params and self.params[name] != theirs:
                warnings.warn(
                    f"{stage} was run with {name}={theirs!r}, this notebook has "
                    f"{name}={self.params[name]!r}",
                    stacklevel=2,
                )
        self._note_input("/".join((stage, *parts)), {"stage": stage, "sha256": sha256_of(path)})
        return path

    def external(self, path: str | Path, optional: bool = False) -> Path:
        """A file or folder from outside the run (a split, a model), noted as an input.

        Relative paths start at the project folder. Raises UsageError if there is none such, unless
        it is `optional`: its absence is noted then, and the stage is out of date once it is there.
        """
        full = self.root / path
        if not (full.exists() or optional):
            raise UsageError(f"{self.name} needs {path}, and there is no such file or folder")
        name = _shown(full, self.root)
        found = sha256_of(full, whole=False) if full.exists() else None
        self._note_input(name, {"stage": None, "sha256": found})
        return full

    def _note_input(self, name: str, item: dict[str, Any]) -> None:
        if self.journals and self.inputs.get(name) != item:
            raise UsageError(f"{self.name}: name the input {name} before opening a journal")
        self.inputs[name] = item

    def journal(self, name: str, key: Sequence[str]) -> Journal:
        """The journal `name` for these parameters, inputs and code, with the rows it has.

        `key` are the columns that identify a row. Rows journaled under other parameters lie in
        another folder: they are never mixed in, and found again when the parameters come back.
        """
        journal = Journal(self.dir / "journal" / self.key / f"{name}.jsonl", key)
        self.resumed += len(journal)
        self.journals.append(journal)
        return journal

    def folder(self, name: str, make: Callable[[Path], object]) -> Path:
        """The output folder `name` (a model, an adapter), filled by `make(folder)` if need be.

        A folder finished under the same parameters, inputs and code is not made again. After a
        kill, `make` gets the folder with what the killed call left in it, and may go on from there.
        """
        target, made = self.path(name), self.dir / "journal" / self.key / f"{name}.made.json"
        if made.is_file() and target.is_dir() and json.loads(made.read_text()) == sha256_of(target):
            return target
        partial = made.with_name(f"{name}.partial")
        with disk(partial):
            partial.mkdir(parents=True, exist_ok=True)
            make(partial)
        if target.exists():
            shutil.rmtree(target)
        os.replace(partial, target)
        write_atomic(made, to_json(sha256_of(target)))
        return target

    def scratch(self, name: str) -> Path:
        """A working folder (checkpoints) that outlives a kill but is no output. As a journal, it is
        met again only under the same parameters, inputs and code."""
        path = self.dir / "journal" / self.key / name
        with disk(path):
            path.mkdir(parents=True, exist_ok=True)
        return path

    def path(self, name: str) -> Path:
        """Where to write an output that is neither a table nor a figure; it joins the manifest."""
        self._unmark()
        self.outputs[name] = None
        return self.dir / name

    def write_table(self, name: str, table: pd.DataFrame) -> Path:
        """Write `name`.parquet, whole or not at all."""
        buffer = io.BytesIO()
        table.to_parquet(buffer, index=False)
        path = self.path(f"{name}.parquet")
        write_atomic(path, buffer.getvalue())
        self.outputs[f"{name}.parquet"] = len(table)
        return path

    def figure(self, fig: Figure, table: pd.DataFrame, name: str) -> Path:
        """Write figures/`name`.png and, beside it, the table it was drawn from as CSV."""
        buffer = io.BytesIO()
        fig.savefig(buffer, format="png", dpi=150, bbox_inches="tight")
        write_atomic(self.path(f"figures/{name}.csv"), table.to_csv(index=False).encode())
        path = self.path(f"figures/{name}.png")
        write_atomic(path, buffer.getvalue())
        return path

    def progress(self, label: str, done: int, total: int) -> None:
        """Say how far the work is; cheap enough to be called for every row."""
        now = time.monotonic()
        if done < total and now - self._progress_at < 0.3:
            return
        self._progress_at = now
        path = self.dir / "progress.json"
        temporary = path.with_suffix(f".{threading.get_ident()}.tmp")
        with disk(path):
            temporary.write_text(json.dumps({"label": label, "done": done, "total": total}))
            os.replace(temporary, path)

    def _lock(self) -> None:
        # A kernel whose runner was killed looks for its parent once a second; a busy machine may
        # take it longer to go.
        where = _shown(self.run_dir, self.root)
        acquire(self.dir / ".lock", f"the stage {self.name} in {where}", wait=10.0)

    def _unmark(self) -> None:
        self._lock()
        (self.dir / "DONE").unlink(missing_ok=True)

    def done(
        self,
        inputs: Iterable[str | Path] = (),
        summary: Sequence[str] = (),
        split: Split | None = None,
    ) -> None:
        """Close the stage: write summary.json and manifest.json, and DONE last.

        `inputs` are further external files; `summary` are sentences on what was found, the most
        telling first, which `ttkit run` prints at its end. Files that an earlier run of this stage
        wrote and this one did not are removed.
        """
        self._unmark()
        for path in inputs:
            full = self.root / path
            item = {"stage": None, "sha256": sha256_of(full, whole=False)}
            self.inputs[_shown(full, self.root)] = item
        write_atomic(self.path("summary.json"), to_json(list(summary)))
        for name in set((read_manifest(self.dir) or {}).get("outputs", {})) - set(self.outputs):
            old = self.dir / name
            shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
        now = time.time()
        manifest = {
            "stage": self.name,
            "parameters": self.params,
            "inputs": self.inputs,
            "outputs": {
                name: {"sha256": sha256_of(self.dir / name), "rows": rows}
                for name, rows in self.outputs.items()
            },
            "split_sha256": split.sha256 if split else None,
            "code": {"files": self.code.files, **provenance.git_version()},
            "versions": {"ttkit": ttkit.__version__, **provenance.library_versions()},
            **provenance.machine(),
            "started": _utc(self.started),
            "finished": _utc(now),
            "seconds": round(now - self.started, 3),
            "rows_resumed": self.resumed,
        }
        data = to_json(manifest)
        write_atomic(self.dir / "manifest.json", data)
        write_atomic(self.dir / "DONE", hashlib.sha256(data).hexdigest().encode())
        for journal in self.journals:
            journal.close()
        release(self.dir / ".lock")


def read_manifest(stage_dir: Path) -> dict[str, Any] | None:
    """The manifest of a stage folder, or None when there is none that can be read."""
    try:
        return json.loads((stage_dir / "manifest.json").read_text())
    except (OSError, ValueError):
        return None


def why_not_done(
    run_dir: Path, name: str, params: dict[str, Any] | None, code: Code | None, root: Path
) -> str | None:
    """None for a complete stage, else the reason in a few words ("k is 64, was 16").

    `params` and `code` are compared where given; inputs and outputs are hashed afresh.
    """
    folder = run_dir / name
    try:
        recorded = (folder / "DONE").read_text()
        data = (folder / "manifest.json").read_bytes()
    except FileNotFoundError:
        return "not finished"
    manifest = read_manifest(folder)
    if manifest is None or recorded != hashlib.sha256(data).hexdigest():
        return "its manifest was altered"
    if params is not None and params != manifest["parameters"]:
        old = manifest["parameters"]
        for key in sorted({*params, *old}):
            if params.get(key) != old.get(key) or (key in params) != (key in old):
                return f"{key} is {params.get(key)!r}, was {old.get(key)!r}"
    if code is not None and code.files != manifest["code"]["files"]:
        old = manifest["code"]["files"]
        names = sorted(n for n in {*code.files, *old} if code.files.get(n) != old.get(n))
        return f"{names[0]} changed" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
    for item, record in manifest["inputs"].items():
        path = (run_dir if record["stage"] else root) / item
        found = sha256_of(path, bool(record["stage"])) if path.exists() else None
        if found != record["sha256"]:
            return f"its input {item} changed"
    for item, record in manifest["outputs"].items():
        path = folder / item
        if not path.exists() or sha256_of(path) != record["sha256"]:
            return f"its output {item} was altered"
    return None


def _shown(path: Path, root: Path) -> str:
    """`path` as seen from the project folder, when it lies in it."""
    return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)


def _utc(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="seconds")


# --- the samples table --------------------------------------------------------------------------


def check_samples(table: pd.DataFrame) -> pd.DataFrame:
    """The table with the columns, order and types of `SAMPLE_DTYPES`, sorted by `SAMPLE_KEY`.

    Lists in `flags` become text joined by commas. Raises UsageError for missing or unknown
    columns, values of a wrong type, a key that occurs twice, or a speedup of an incorrect sample.
    """
    missing = [name for name in SAMPLE_DTYPES if name not in table.columns]
    unknown = [name for name in table.columns if name not in SAMPLE_DTYPES]
    if missing or unknown:
        raise UsageError(
            "a samples table "
            + " and ".join(
                text
                for names, text in (
                    (missing, f"lacks the columns {', '.join(missing)}"),
                    (unknown, f"has the unknown columns {', '.join(map(str, unknown))}"),
                )
                if names
            )
        )
    table = table[list(SAMPLE_DTYPES)].copy()
    table["flags"] = [v if isinstance(v, str) else ",".join(v or ()) for v in table["flags"]]
    for name, dtype in SAMPLE_DTYPES.items():
        column = table[name].fillna("") if dtype == "str" else table[name]
        try:
            table[name] = column.astype(dtype)
        except (ValueError, TypeError) as error:
            raise UsageError(f"the samples column {name} must be {dtype}: {error}") from None
    twice = table[table.duplicated(list(SAMPLE_KEY))]
    if len(twice):
        raise UsageError(
            f"the samples table has {len(twice)} rows whose key ({', '.join(SAMPLE_KEY)}) occurs "
            f"twice, first {tuple(twice.iloc[0][list(SAMPLE_KEY)])}"
        )
    if (table["speedup"].notna() & ~table["correct"]).any():
        raise UsageError("the samples table has a speedup for a sample that is not correct")
    return table.sort_values(list(SAMPLE_KEY), ignore_index=True)


def write_samples(stage: Stage, table: pd.DataFrame, name: str = "samples") -> pd.DataFrame:
    """Check the table, write it as `name`.parquet of the stage, and return it as written."""
    table = check_samples(table)
    stage.write_table(name, table)
    return table


def read_samples(path: str | Path) -> pd.DataFrame:
    """Read and check a samples table; raises UsageError for one that is missing or malformed."""
    import pandas as pd

    if not Path(path).is_file():
        raise UsageError(f"there is no samples table {path}")
    try:
        table = pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise UsageError(f"the samples table {path} cannot be read: {error}") from None
    return check_samples(table)


def at_temperature(samples: pd.DataFrame, temperature: float) -> pd.DataFrame:
    """The rows that were sampled at `temperature`; raises UsageError where there is none."""
    rows = samples[samples["temperature"] == temperature]
    if rows.empty:
        known = ", ".join(f"{t:g}" for t in sorted(samples["temperature"].unique()))
        raise UsageError(
            f"there are no samples at temperature {temperature:g}, only at {known or 'none'}: run "
            "notebook 02 again with the same `temperatures`"
        )
    return rows
