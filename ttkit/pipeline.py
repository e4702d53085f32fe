"""Running the notebooks: `begin` inside a notebook, `run` and `status` around them.

A notebook gives the same tables whether `ttkit run`, plain papermill or JupyterLab executes it:
`begin` checks its parameters and opens its stage in all three.
"""

from __future__ import annotations

import ast
import contextlib
import errno
import json
import logging
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from ttkit.domains import check_together
from ttkit.errors import InfraError, TtkitError, UsageError
from ttkit.journal import acquire, count_rows, disk, release, to_json, write_atomic
from ttkit.parameters import Notebook, code_of, load_notebooks, near, resolve, union
from ttkit.store import Stage, project_root, read_manifest, why_not_done

SUMMARY_LINES = 9  # with the line that says where the results are: ten
GRACE_SECONDS = 10.0  # a kernel's time to end its cell after Ctrl-C


class Interrupted(TtkitError):
    """The user pressed Ctrl-C (exit status 130)."""

    exit_status = 130


def begin(stage: str, namespace: dict[str, Any]) -> Stage:
    """Open the stage of the notebook `stage`; call it as `begin("02_best_of_n", globals())` in the
    cell after `parameters`.

    The parameters in `namespace` are checked against the notebook's own declarations, and the
    working directory becomes the project folder, so that paths mean the same in JupyterLab.
    Raises UsageError for a wrong, missing or unknown parameter, InfraError if the stage is in use.
    """
    root = project_root()
    os.chdir(root)
    notebook = Notebook.load(root / "notebooks" / f"{stage}.ipynb")
    _check_injected(namespace.get("In", ()), notebook)
    values = {}
    for name, parameter in notebook.parameters.items():
        if name not in namespace:
            raise UsageError(f"{stage}: {name} has no value: run the parameters cell first")
        values[name] = parameter.check(namespace[name], stage)
    if "run" not in values:
        raise UsageError(f'the parameters cell of {stage} needs `run: str = "runs/demo"`')
    namespace.update(values)
    return Stage.open(values.pop("run"), stage, values, code_of(notebook), root)


def _check_injected(executed: Sequence[str], notebook: Notebook) -> None:
    """Refuse the names that papermill, with no more than a warning, has set without their being
    declared anywhere. Other notebooks' names are fine: they share a profile."""
    names = set()
    for cell in executed:
        if cell.startswith("# Parameters\n"):
            for node in ast.parse(cell).body:
                if isinstance(node, ast.Assign):
                    names |= {t.id for t in node.targets if isinstance(t, ast.Name)}
    if names - set(notebook.parameters):
        known = union(load_notebooks(notebook.path.parent))
        for name in sorted(names - set(known)):
            raise UsageError(f"no notebook has a parameter {name!r}{near(name, known)}")


# --- run ----------------------------------------------------------------------------------------


class Console:
    """Lines for people: one that is rewritten on a terminal, an occasional one elsewhere."""

    def __init__(self, stream: TextIO, every: float = 15.0) -> None:
        self.stream, self.every = stream, every
        self._tty, self._last = stream.isatty(), (time.monotonic(), "")

    def line(self, text: str) -> None:
        print(("\r\x1b[K" if self._tty else "") + text, file=self.stream, flush=True)
        self._last = (time.monotonic(), "")

    def update(self, text: str, clock: str) -> None:
        at, old = self._last
        if self._tty:
            shown = f"{text}  {clock}"[: _columns() - 1]
            print(f"\r\x1b[K{shown}", end="", file=self.stream, flush=True)
        elif text != old and time.monotonic() - at >= self.every:
            print(f"{text}  {clock}", file=self.stream, flush=True)
            self._last = (time.monotonic(), text)


def _columns() -> int:
    with contextlib.suppress(OSError):
        return os.get_terminal_size().columns
    return 80


@dataclass(frozen=True)
class RunResult:
    """What `run` did: seconds by executed stage, the stages that were complete, the sentences."""

    out: Path
    executed: dict[str, float]
    unchanged: list[str]
    summary: list[str]
    seconds: float


def run(
    profile: str = "demo",
    out: str | Path | None = None,
    overrides: Sequence[str] = (),
    only: Sequence[str] = (),
    start_from: str | None = None,
    notebooks_dir: Path | None = None,
    stream: TextIO | None = None,
) -> RunResult:
    """Execute the numbered notebooks in order, leaving out those that are complete.

    `profile` is a name in notebooks/profiles or the path of a YAML file; `overrides` are
    "name=value" and win over it. `out` defaults to the parameter `run` if the profile gives it,
    else to runs/<profile>. `only` and `start_from` name notebooks by number ("04") or in full.
    A notebook is executed again when its parameters, inputs or code have changed.

    Raises UsageError before anything starts for wrong parameters or names, InfraError when a cell
    fails or another process uses the folder, and Interrupted on Ctrl-C. What was done is kept.
    """
    began = time.monotonic()
    console = Console(stream or sys.stdout)
    folder = (notebooks_dir or project_root() / "notebooks").absolute()
    root = folder.parent
    notebooks = load_notebooks(folder)
    path = Path(profile) if "/" in profile else folder / "profiles" / f"{profile}.yaml"
    declared = union(notebooks)
    values = resolve(declared, path, overrides)
    chosen = choose(notebooks, only, start_from)
    defaults = {name: parameter.default for name, parameter in declared.items()}
    check_together(defaults | values, [notebook.name for notebook in chosen], root)
    given = values.pop("run", None)
    out = root / (out or given or f"runs/{path.stem}")
    shown = _relative(out)
    try:
        acquire(out / ".lock", f"the run {shown}")
    except OSError as error:
        raise UsageError(f"{shown} cannot be the folder of a run: {error.strerror}") from None
    try:
        write_atomic(out / "run.json", to_json({"profile": profile, "parameters": values}))
        executed: dict[str, float] = {}
        for number, notebook in enumerate(notebooks, 1):
            params = params_of(notebook, values)
            reason = why_not_done(out, notebook.name, params, code_of(notebook), root)
            head = f"[{number}/{len(notebooks)}] {notebook.name}"
            if notebook not in chosen:
                if reason and (out / notebook.name / "DONE").exists():
                    console.line(f"{head}: not asked for, though {reason}")
            elif reason is None:
                console.line(f"{head}: complete, nothing changed")
            else:
                known = (out / notebook.name / "manifest.json").exists()
                console.line(f"{head}: running" + (f" ({reason})" if known else ""))
                start = time.monotonic()
                _execute(notebook, {**params, "run": str(out)}, out, root, console, head)
                _check_done(notebook, params, out, root)
                executed[notebook.name] = time.monotonic() - start
                console.line(f"{head}: done in {clock(executed[notebook.name])}")
    finally:
        release(out / ".lock")
    seconds = time.monotonic() - began
    summary = _summary(out, [n.name for n in chosen])
    console.line(
        f"{shown}: {len(executed)} of {len(chosen)} notebooks executed in {clock(seconds)}; "
        f"tables, figures and the executed notebooks are in {shown}/<notebook>/"
    )
    for sentence in summary:
        console.line(sentence)
    unchanged = [n.name for n in chosen if n.name not in executed]
    return RunResult(out, executed, unchanged, summary, seconds)


def params_of(notebook: Notebook, values: dict[str, Any]) -> dict[str, Any]:
    return {
        name: values.get(name, parameter.default)
        for name, parameter in notebook.parameters.items()
        if name != "run"
    }


def choose(
    notebooks: list[Notebook], only: Sequence[str], start_from: str | None
) -> list[Notebook]:
    def find(text: str) -> Notebook:
        for notebook in notebooks:
            if text in (notebook.name, notebook.name.split("_")[0]) or (
                text.isdigit() and int(text) == int(notebook.name.split("_")[0])
            ):
                return notebook
        raise UsageError(f"there is no notebook {text!r}{near(text, [n.name for n in notebooks])}")

    if only and start_from:
        raise UsageError("give --only or --from, not both")
    if only:
        wanted = [find(text) for text in only]
        return [notebook for notebook in notebooks if notebook in wanted]
    return notebooks[notebooks.index(find(start_from)) :] if start_from else notebooks


def _execute(
    notebook: Notebook,
    values: dict[str, Any],
    out: Path,
    root: Path,
    console: Console,
    head: str,
) -> None:
    """Execute one notebook in a kernel of its own, papermill in a thread, so that this thread can
    show the progress and take Ctrl-C. A kernel ends by itself when this process is gone."""
    stage = out / notebook.name
    executed = stage / notebook.path.name
    with disk(executed):
        stage.mkdir(parents=True, exist_ok=True)
        (stage / "progress.json").unlink(missing_ok=True)
    parameters = {k: v for k, v in values.items() if k in notebook.parameters}
    errors: list[BaseException] = []

    def work() -> None:
        try:
            import papermill

            # It reads `str | None = None` as no parameter and warns; ours are checked already.
            logging.getLogger("papermill").setLevel(logging.ERROR)
            # A frozen standard library makes each kernel print a warning without this.
            os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")
            papermill.execute_notebook(
                str(notebook.path),
                str(executed),
                parameters=parameters,
                kernel_name="python3",
                language="python",
                extra_arguments=["--log-level=CRITICAL"],
                cwd=str(root),
                progress_bar=False,
                coalesce_streams=True,
                store_widget_state=False,
            )
        except BaseException as error:
            errors.append(error)

    cwd = Path.cwd()
    thread = threading.Thread(target=work, daemon=True)
    start = time.monotonic()
    thread.start()
    try:
        while thread.is_alive():
            thread.join(0.3)
            console.update(head + _progress(stage), clock(time.monotonic() - start))
    except KeyboardInterrupt:
        console.line(f"{head}: stopping")
        _stop_kernel(thread)
        raise Interrupted(
            f"stopped in {notebook.name} as asked; what was done is kept in {_relative(out)}, and "
            "the same command goes on from there"
        ) from None
    finally:
        os.chdir(cwd)
    if errors:
        raise _explain(errors[0], notebook, executed) from None


def _progress(stage: Path) -> str:
    with contextlib.suppress(OSError, ValueError):
        at = json.loads((stage / "progress.json").read_text())
        return f": {at['label']} {at['done']}/{at['total']}"
    return ": running"


def _stop_kernel(thread: threading.Thread) -> None:
    """Interrupt the cell, as the stop button does, and kill what has not ended in time."""
    import psutil

    kernels = [
        child
        for child in psutil.Process().children()
        if "ipykernel_launcher" in " ".join(child.cmdline())
    ]
    if not kernels:  # papermill is still loading; a kernel that it starts ends with this process
        return
    deadline = time.monotonic() + GRACE_SECONDS
    with contextlib.suppress(KeyboardInterrupt):  # pressed again: do not wait
        while thread.is_alive() and time.monotonic() < deadline:
            for kernel in kernels:
                with contextlib.suppress(psutil.NoSuchProcess):
                    kernel.send_signal(signal.SIGINT)
            thread.join(1.0)
    for kernel in kernels:
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            if kernel.is_running() and thread.is_alive():
                os.killpg(kernel.pid, signal.SIGKILL)  # a kernel leads a session of its own


def _explain(error: BaseException, notebook: Notebook, executed: Path) -> TtkitError:
    """One sentence for what stopped a notebook, with the exit status of its cause."""
    kept = "nothing was executed"
    if executed.exists():
        kept = f"the partly executed notebook is {_relative(executed)}"
    text = str(error).strip()
    name = type(error).__name__
    where = notebook.name
    if name == "PapermillExecutionError":
        where += f", In [{error.exec_count}]"  # type: ignore[attr-defined]
        ename, text = error.ename, error.evalue  # type: ignore[attr-defined]
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in text:
        return InfraError(
            f"{where}: the disk is full; what was recorded is kept, so free some space and give "
            "the same command again"
        )
    if name == "PapermillExecutionError":
        kind = UsageError if ename == "UsageError" else InfraError
        said = text if ename in ("UsageError", "InfraError") else f"{ename}: {text}"
        said = re.sub(r"\s+", " ", said).strip().rstrip(".:")
        return kind(f"{where}: {said}; {kept}")
    if name == "DeadKernelError":
        return InfraError(
            f"the kernel of {notebook.name} died (killed, or out of memory); what was journaled is "
            f"kept and the same command goes on from there; {kept}"
        )
    first = text.splitlines()[0] if text else ""
    return InfraError(f"{notebook.name} could not be executed: {name}: {first}; {kept}")


def _check_done(notebook: Notebook, params: dict[str, Any], out: Path, root: Path) -> None:
    """Papermill's word is not enough: a kernel that dies can leave its cells marked completed."""
    if not any("begin(" in cell for cell in notebook.cells):
        Stage.open(out, notebook.name, params, code_of(notebook), root).done()
    reason = why_not_done(out, notebook.name, params, None, root)
    if reason:
        raise InfraError(
            f"{notebook.name} ran through but its stage is not complete ({reason}): its last cell "
            "must call stage.done()"
        )


def _summary(out: Path, stages: Sequence[str]) -> list[str]:
    """At most SUMMARY_LINES sentences: every stage's first, then the seconds, while there is room;
    in the order of the notebooks."""
    said = []
    for stage in stages:
        with contextlib.suppress(OSError, ValueError):
            said.append(json.loads((out / stage / "summary.json").read_text()))
    ranked = sorted(
        (rank, position, sentence)
        for position, sentences in enumerate(said)
        for rank, sentence in enumerate(sentences)
    )[:SUMMARY_LINES]
    return [text for _, _, text in sorted(ranked, key=lambda item: (item[1], item[0]))]


def _relative(path: Path) -> str:
    cwd = Path.cwd()
    return str(path.relative_to(cwd)) if path.is_relative_to(cwd) else str(path)


def clock(seconds: float) -> str:
    whole = int(seconds)
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{seconds:.1f} s"


# --- status -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StageStatus:
    """One line of `ttkit status`; `state` is done, partial, stale or not started."""

    stage: str
    state: str
    detail: str
    rows: int | None
    seconds: float | None
    mib: float


def status(out: str | Path, notebooks_dir: Path | None = None) -> list[StageStatus]:
    """How far the stages of a run are. Raises UsageError if the folder is not a run.

    A stage is stale if its parameters (those of the last `ttkit run`), inputs, outputs or code
    have changed since it was done, or if a stage that it reads is itself not done.
    """
    folder = (notebooks_dir or project_root() / "notebooks").absolute()
    root = folder.parent
    out = (root / out).absolute()
    notebooks = load_notebooks(folder)
    if not any((out / n.name).is_dir() for n in notebooks):
        raise UsageError(f"{_relative(out)} holds no run: `ttkit run` makes one")
    values: dict[str, Any] | None = None
    with contextlib.suppress(OSError, ValueError, KeyError):
        values = json.loads((out / "run.json").read_text())["parameters"]
    found: list[StageStatus] = []
    waiting: set[str] = set()
    for notebook in notebooks:
        one = _stage_status(notebook, values, waiting, out, root)
        if one.state != "done":
            waiting.add(notebook.name)
        found.append(one)
    return found


def _stage_status(
    notebook: Notebook, values: dict[str, Any] | None, waiting: set[str], out: Path, root: Path
) -> StageStatus:
    stage = out / notebook.name
    if not stage.is_dir():
        return StageStatus(notebook.name, "not started", "", None, None, 0.0)
    files = [path for path in stage.rglob("*") if path.is_file()]
    mib = round(sum(path.stat().st_size for path in files) / 2**20, 2)
    params = None if values is None else params_of(notebook, values)
    reason = why_not_done(out, notebook.name, params, code_of(notebook), root)
    manifest = read_manifest(stage) or {}
    if not (stage / "DONE").exists():
        at = _progress(stage).removeprefix(": ").removesuffix("running")
        # The journal written to last is the one that the next run takes up.
        journals = sorted(stage.glob("journal/*/*.jsonl"), key=lambda p: p.stat().st_mtime)
        rows = count_rows(journals[-1]) if journals else None
        return StageStatus(notebook.name, "partial", at, rows, None, mib)
    outputs = manifest.get("outputs", {})
    counts = [item["rows"] for item in outputs.values() if item["rows"] is not None]
    rows = outputs.get("samples.parquet", {}).get("rows") or max(counts, default=None)
    upstream = {item["stage"] for item in manifest.get("inputs", {}).values()} & waiting
    if reason is None and upstream:
        reason = f"waits for {min(upstream)}"
    seconds = manifest.get("seconds")
    return StageStatus(
        notebook.name, "stale" if reason else "done", reason or "", rows, seconds, mib
    )
