"""Sweeps: the notebooks run at every point of a grid of parameters, the results in one table.

A point is a run folder like any other, `runs/<sweep>/<point>/`, so a killed sweep continues and
`ttkit status` reads it. A stage that another point or `runs/<profile>` (runs/demo) already holds,
with the same parameters, code and inputs (its manifest says so), is copied instead of executed.
"""

from __future__ import annotations

import contextlib
import io
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from ttkit.errors import UsageError
from ttkit.journal import acquire, release, sha256_of, to_json, write_atomic
from ttkit.parameters import Notebook, code_of, near
from ttkit.pipeline import GRACE_SECONDS, Console, Interrupted, clock, params_of
from ttkit.store import project_root, read_manifest, why_not_done
from ttkit.sweepfile import Sweep, slug

if TYPE_CHECKING:
    import pandas as pd

EXECUTORS = ("local", "ray")

# --- points -------------------------------------------------------------------------------------


@dataclass
class Point:
    """One point on its way: `todo` are the notebooks still to come, `error` what stopped it."""

    values: dict[str, Any]  # of the grid's parameters
    out: Path
    parameters: dict[str, Any]  # all of them
    todo: list[Notebook]
    executed: dict[str, float] = field(default_factory=dict)  # seconds by stage
    copied: dict[str, str] = field(default_factory=dict)  # stage: the run it came from
    error: str | None = None

    @property
    def label(self) -> str:
        return self.out.name


@dataclass(frozen=True)
class SweepResult:
    """What `sweep` did. `points` has for each label its values, the seconds of each executed
    stage, where each copied one came from, and the error, None if it is complete."""

    out: Path
    points: dict[str, dict[str, Any]]
    tables: list[str]
    figure: str | None
    findings: str | None
    failures: dict[str, str]
    seconds: float


def sweep(
    path: str | Path,
    out: str | Path | None = None,
    jobs: int = 1,
    executor: str = "local",
    notebooks_dir: Path | None = None,
    stream: TextIO | None = None,
) -> SweepResult:
    """Run every point of the sweep file `path`, at most `jobs` notebooks at a time.

    The folder `out` (default runs/<name>) gets one run folder a point and, for each entry of
    `collect`, one table as parquet and CSV, the grid's columns first; the figure; and what the
    sweep found of published claims (`findings.parquet`), which `ttkit claims` takes up for a run
    beside it. A notebook that fails stops its own point only; `failures` names it. Points side by
    side share the cores: the verifier's lock makes their timings take turns, but they are noisier,
    so `jobs` is 1 unless asked for.

    `executor` "ray" sends the same work to a Ray cluster whose nodes share this file system; on
    Ctrl-C a notebook that runs there is left to end by itself. Raises UsageError before anything
    starts for a wrong sweep file or when Ray is not installed, Interrupted on Ctrl-C.
    """
    began, console = time.monotonic(), Console(stream or sys.stdout)
    folder = (notebooks_dir or project_root() / "notebooks").absolute()
    root, plan = folder.parent, Sweep.load(path, folder)
    target = (root / (out or f"runs/{plan.name}")).absolute()
    points = [
        Point(values, target / label, {**plan.values, **values}, list(plan.notebooks))
        for label, values in plan.points().items()
    ]
    with _pool(executor, jobs) as pool:
        acquire(target / ".lock", f"the sweep {plan.name}")
        try:
            _run(points, [root / "runs" / plan.profile], root, pool, jobs, console)
            tables = _gather(plan, points, target)
            failures = {point.label: point.error for point in points if point.error}
            figure = _draw(plan, tables, target, failures)
            found = _find(plan, tables, target, failures)
            kept = ("values", "executed", "copied", "error")
            result = SweepResult(
                target,
                {point.label: {name: getattr(point, name) for name in kept} for point in points},
                [f"{name}.parquet" for name in tables],
                figure,
                found,
                failures,
                round(time.monotonic() - began, 3),
            )
            write_atomic(target / "sweep.json", to_json(asdict(result)))
        finally:
            release(target / ".lock")
    return result


def _run(
    points: list[Point], donors: list[Path], root: Path, pool: Any, jobs: int, console: Console
) -> None:
    """Bring every point to its end or its error.

    Two points in which a notebook would do the same work are not run at once: the second waits
    and then copies.
    """
    total = len(points) * max((len(point.todo) for point in points), default=0)
    running: dict[Future[str | None], tuple[Point, str, float]] = {}

    def say(point: Point, stage: str, what: str) -> None:
        left = sum(len(p.todo) for p in points)
        console.line(f"[{total - left}/{total}] {point.label} · {stage}: {what}")

    try:
        while True:
            busy = {id(point) for point, _, _ in running.values()}
            for point in points:
                if id(point) in busy or point.error:
                    continue
                _skip(point, [*donors, *(p.out for p in points if p is not point)], root, say)
                at_work = {work for _, work, _ in running.values()}
                if not point.todo or len(running) == jobs:
                    continue
                if (work := _work(point, point.todo[0])) not in at_work:
                    job = _job(point, point.todo[0], root)
                    running[pool.submit(run_stage, job)] = (point, work, time.monotonic())
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                point, _, since = running.pop(future)
                stage, seconds = point.todo[0].name, time.monotonic() - since
                try:
                    point.error = future.result()
                except Exception as error:  # of the executor: a node that is gone, for example
                    point.error = f"{stage} could not be run: {type(error).__name__}: {error}"
                if point.error is None:
                    point.executed[stage] = round(seconds, 3)
                    point.todo.pop(0)
                say(point, stage, point.error or f"done in {clock(seconds)}")
    except KeyboardInterrupt:
        console.line("stopping")
        _stop(running)
        raise Interrupted(
            "stopped as asked; what was done is kept, and the same command goes on from there"
        ) from None


def _job(point: Point, notebook: Notebook, root: Path) -> dict[str, str]:
    import yaml

    profile = point.out / "parameters.yaml"
    write_atomic(profile, yaml.safe_dump(point.parameters).encode())
    return {
        **{"root": str(root), "profile": str(profile)},
        **{"out": str(point.out), "stage": notebook.name},
    }


def run_stage(job: Mapping[str, str]) -> str | None:
    """Execute one notebook of one point by `ttkit run`; None, or the sentence that says why not.

    The worker of every executor. A process of its own, so that one that is killed for want of
    memory costs a point and not the sweep, in a session of its own, so that Ctrl-C reaches it once.
    """
    command = [sys.executable, "-m", "ttkit", "run", "--json", "--profile", job["profile"]]
    command += ["--out", job["out"], "--only", job["stage"]]
    done = subprocess.run(
        command, cwd=job["root"], capture_output=True, text=True, start_new_session=True
    )
    if done.returncode == 0:
        return None
    said = [line.strip() for line in done.stderr.splitlines() if line.strip()] or ["no message"]
    ours = [line.removeprefix("ttkit: ") for line in said if line.startswith("ttkit: ")]
    return ours[-1] if ours else f"{job['stage']} ended with status {done.returncode}: {said[-1]}"


def _stop(running: Mapping[Future[str | None], Any]) -> None:
    import psutil

    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if "ttkit" in child.cmdline() and "--only" in child.cmdline():
                child.send_signal(signal.SIGINT)
    with contextlib.suppress(KeyboardInterrupt):  # pressed again: do not wait
        wait(running, timeout=2 * GRACE_SECONDS)


@contextlib.contextmanager
def _pool(executor: str, jobs: int) -> Iterator[Any]:
    """What has `submit(run_stage, job)` and gives a future of concurrent.futures."""
    if jobs < 1:
        raise UsageError(f"--jobs {jobs}: at least one notebook has to run at a time")
    if executor == "local":
        with ThreadPoolExecutor(jobs) as pool:
            yield pool
    elif executor == "ray":
        try:
            import ray
        except ImportError:
            raise UsageError(
                "the executor ray needs Ray, which is not installed: pip install 'ttkit[cluster]'"
            ) from None
        mine = not ray.is_initialized()
        if mine:
            ray.init(log_to_driver=False)
        try:
            yield _RayPool()
        finally:
            if mine:
                ray.shutdown()
    else:
        raise UsageError(f"unknown executor {executor!r}: it is one of {', '.join(EXECUTORS)}")


class _RayPool:
    def submit(self, work: Any, job: Mapping[str, str]) -> Future[str | None]:
        import ray

        return ray.remote(work).remote(job).future()


# --- stages that need not run again -------------------------------------------------------------


def _skip(point: Point, donors: Sequence[Path], root: Path, say: Any) -> None:
    """Take off `todo` the stages that are complete, and those that a donor has."""
    while point.todo:
        stage = point.todo[0].name
        if _why_not(point.out, point, root) is not None:
            donor = next((d for d in donors if _fits(d, point, root)), None)
            if donor is None:
                return
            _copy(donor, point.out, stage)
            if _why_not(point.out, point, root) is not None:  # altered while it was read
                return
            point.copied[stage] = _shown(donor, root)
        point.todo.pop(0)
        if stage in point.copied:
            say(point, stage, f"as in {point.copied[stage]}, copied")


def _why_not(run: Path, point: Point, root: Path) -> str | None:
    """Why `run` does not hold this point's next stage complete, or None."""
    notebook = point.todo[0]
    params = params_of(notebook, point.parameters)
    return why_not_done(run, notebook.name, params, code_of(notebook), root)


def _fits(donor: Path, point: Point, root: Path) -> bool:
    """Whether the donor's stage is complete and was made from the inputs that this point has."""
    if _why_not(donor, point, root) is not None:
        return False
    inputs = (read_manifest(donor / point.todo[0].name) or {}).get("inputs", {})
    return all(
        (point.out / name).exists() and sha256_of(point.out / name) == item["sha256"]
        for name, item in inputs.items()
        if item["stage"]
    )


def _copy(donor: Path, run: Path, stage: str) -> None:
    """Copy a finished stage, DONE last. No links: a notebook may write into its files in place,
    and must not reach another run's. The verdicts behind its rows come with it."""
    target = run / stage
    acquire(target / ".lock", f"the stage {stage} of {run.name}", wait=GRACE_SECONDS)
    try:
        (target / "DONE").unlink(missing_ok=True)
        outputs = (read_manifest(donor / stage) or {}).get("outputs", {})
        for name in (*outputs, f"{stage}.ipynb", "manifest.json", "DONE"):
            source = donor / stage / name
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.rmtree(target / name, ignore_errors=True)
                shutil.copytree(source, target / name)
            elif source.exists():
                shutil.copyfile(source, target / name)
        verdicts = run / "verdicts.jsonl"
        if (donor / verdicts.name).is_file() and not verdicts.exists():
            shutil.copyfile(donor / verdicts.name, verdicts)
    finally:
        release(target / ".lock")


def _work(point: Point, notebook: Notebook) -> str:
    """The same text for two points where this notebook would do the same: its parameters, and the
    outputs of the stages that its cells name."""
    source = "\n".join(notebook.cells)
    inputs = {
        folder.name: (read_manifest(folder) or {}).get("outputs")
        for folder in sorted(point.out.iterdir() if point.out.is_dir() else ())
        if folder.name != notebook.name and f'"{folder.name}"' in source
    }
    return to_json([notebook.name, params_of(notebook, point.parameters), inputs]).decode()


def _shown(path: Path, root: Path) -> str:
    return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)


# --- results ------------------------------------------------------------------------------------


def _gather(plan: Sweep, points: Sequence[Point], target: Path) -> dict[str, pd.DataFrame]:
    """Write <stage>.<table>.parquet and .csv for each entry of `collect`, from the points that are
    complete; a list in the grid becomes text. A point without the table gets an error."""
    import pandas as pd

    found = {}
    for stage, name in plan.collect:
        frames = []
        for point in points:
            path = point.out / stage / f"{name}.parquet"
            if point.error is None and not path.is_file():
                names = [p.stem for p in path.parent.glob("*.parquet")]
                point.error = f"{stage} has left no table {name!r}{near(name, names)}"
            if point.error is None:
                frame = pd.read_parquet(path)
                ours = {n: slug(v) if isinstance(v, list) else v for n, v in point.values.items()}
                ours = {"point": point.label, **ours}
                frame = frame.rename(columns={n: f"table_{n}" for n in ours if n in frame})
                for place, (column, value) in enumerate(ours.items()):
                    frame.insert(place, column, value)
                frames.append(frame)
        if frames:
            table = found[f"{stage}.{name}"] = pd.concat(frames, ignore_index=True)
            buffer = io.BytesIO()
            table.to_parquet(buffer, index=False)
            write_atomic(target / f"{stage}.{name}.parquet", buffer.getvalue())
            csv = table.to_csv(index=False).encode()
            write_atomic(target / f"{stage}.{name}.csv", csv)
    return found


def _draw(
    plan: Sweep, tables: Mapping[str, pd.DataFrame], target: Path, failures: dict[str, str]
) -> str | None:
    """Write the sweep's figure, from its tables in the order of `collect`."""
    if plan.figure is None or len(tables) < len(plan.collect):
        return None
    from ttkit import plots_sweep

    buffer = io.BytesIO()
    try:
        figure = getattr(plots_sweep, plan.figure)(*tables.values())
    except UsageError as error:
        failures["figure"] = str(error)
        return None
    figure.savefig(buffer, format="png", dpi=150, bbox_inches="tight")
    write_atomic(target / f"{plan.figure}.png", buffer.getvalue())
    return f"{plan.figure}.png"


def _find(
    plan: Sweep, tables: Mapping[str, pd.DataFrame], target: Path, failures: dict[str, str]
) -> str | None:
    """Write the table `findings` of the sweep, from its tables in the order of `collect`."""
    path = target / "findings.parquet"
    path.unlink(missing_ok=True)
    if plan.findings is None or len(tables) < len(plan.collect):
        return None
    from ttkit import claims, findings_sweep

    buffer = io.BytesIO()
    try:
        found = claims.findings(getattr(findings_sweep, plan.findings)(*tables.values()))
    except UsageError as error:
        failures["findings"] = str(error)
        return None
    found.to_parquet(buffer, index=False)
    write_atomic(path, buffer.getvalue())
    return path.name
