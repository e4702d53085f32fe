"""The command line: `ttkit COMMAND`, also `python -m ttkit`. Every command has `--json`.

Exit status: 0 done, 1 the answer is no, 2 wrong usage, 3 infrastructure failed.
"""

from __future__ import annotations

import re
import sys
import traceback
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ttkit import cli_bench
from ttkit.cli_common import (
    Device,
    Json,
    KernelBench,
    Level,
    ProtocolName,
    Scale,
    Source,
    Workers,
    cell,
    check_writable,
    csv_rows,
    print_json,
    print_table,
    tasks_named,
)
from ttkit.errors import InfraError, TtkitError, UsageError

if TYPE_CHECKING:
    from ttkit.tasks import Task
    from ttkit.verify import Verdict

AA_COLUMNS = (
    "task",
    "status",
    "speedup",
    "speedup_lo",
    "speedup_hi",
    "n_pairs",
    "seconds",
    "reason",
)

# Heavy modules are imported inside the commands, so that --help and a refusal come at once.
app = typer.Typer(
    help="Where should test-time compute go? More samples, more training, or smarter selection?",
    epilog="Exit status: 0 done, 1 the answer is no, 2 wrong usage, 3 infrastructure failed.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(cli_bench.app, name="bench")


def main() -> None:
    """Entry point: a TtkitError becomes one line on stderr and its exit status."""
    try:
        app()
    except TtkitError as error:
        print(f"ttkit: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
    except Exception:  # a defect of ours; Python's own status 1 would read as "the answer is no"
        traceback.print_exc()
        sys.exit(3)


@app.command()
def run(
    profile: Annotated[
        str, typer.Option(help="A name in notebooks/profiles, or a YAML file's path.")
    ] = "demo",
    out: Annotated[str | None, typer.Option(help="Run folder; default runs/PROFILE.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a parameter.")
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="Only these notebooks: 04, or 01,04.")
    ] = None,
    from_: Annotated[str | None, typer.Option("--from", help="Start at this notebook: 03.")] = None,
    as_json: Json = False,
) -> None:
    """Execute the notebooks in order; what is complete is left alone."""
    from ttkit import pipeline

    result = pipeline.run(
        profile,
        out,
        overrides=set_ or (),
        only=[name for text in only or () for name in text.split(",")],
        start_from=from_,
        stream=sys.stderr if as_json else sys.stdout,
    )
    if as_json:
        print_json(asdict(result))


@app.command()
def status(
    run: Annotated[str, typer.Argument(help="The run folder.")] = "runs/demo",
    as_json: Json = False,
) -> None:
    """Say how far each stage of a run is."""
    from ttkit import pipeline

    stages = pipeline.status(run)
    if as_json:
        print_json([asdict(stage) for stage in stages])
    else:
        columns = ("stage", "state", "rows", "seconds", "mib", "detail")
        print_table(columns, ([getattr(s, name) for name in columns] for s in stages))


@app.command()
def sweep(
    file: Annotated[Path, typer.Argument(help="A sweep, as those in notebooks/sweeps.")],
    jobs: Annotated[int, typer.Option(min=1, help="Notebooks that run at a time.")] = 1,
    executor: Annotated[str, typer.Option(help="local, or ray (a cluster).")] = "local",
    out: Annotated[str | None, typer.Option(help="Folder; default runs/NAME.")] = None,
    as_json: Json = False,
) -> None:
    """Run the notebooks at every point of a grid; gather the results in one table.

    What runs/PROFILE (runs/demo) or another point has done already, equally, is copied.
    """
    from ttkit.sweep import sweep as start

    result = start(file, out, jobs, executor, stream=sys.stderr if as_json else sys.stdout)
    if as_json:
        print_json(asdict(result))
    else:
        ok = len(result.points) - len(set(result.failures) & set(result.points))
        print(f"{ok} of {len(result.points)} points complete in {result.seconds:.0f} s")
        for name in [*result.tables, *filter(None, [result.figure, result.findings])]:
            print(result.out / name)
        for point, why in result.failures.items():
            print(f"FAILED {point}: {why}")
    raise typer.Exit(3 if result.failures else 0)


@app.command()
def publish(
    run: Annotated[
        str, typer.Argument(help="A complete run of the default, or a complete sweep.")
    ] = "runs/demo",
    as_json: Json = False,
) -> None:
    """Copy a run's notebooks and figures, or a sweep's figure, to where readers find them."""
    from ttkit.publish import publish as copy

    written = [str(path) for path in copy(run)]
    if as_json:
        print_json(written)
    else:
        print("\n".join(written))


@app.command()
def tasks(
    source: Source = "minibench",
    level: Level = 1,
    scale: Scale = "cpu",
    kernelbench_dir: KernelBench = None,
    headroom: Annotated[
        bool, typer.Option("--headroom", help="Measure every known form of the minibench tasks.")
    ] = False,
    out: Annotated[
        str | None, typer.Option(help="With --headroom: write the table as CSV.")
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(help="With --headroom: a file of verdicts to go on from.")
    ] = None,
    protocol: ProtocolName = "rigorous",
    device: Device = "cpu",
    workers: Workers = 1,
    as_json: Json = False,
) -> None:
    """List a level's tasks, or measure their headroom."""
    from ttkit.tasks import load_tasks

    if (out or cache) and not headroom:
        raise UsageError("--out and --cache go with --headroom")
    if headroom and source != "minibench":
        raise UsageError(
            "--headroom measures the forms of minibench tasks; other sources have none"
        )
    found = load_tasks(source, level, scale, kernelbench_dir)
    if not headroom:
        if as_json:
            print_json([asdict(task) | {"key": task.key} for task in found])
        else:
            print_table(("task", "name"), ([task.key, task.name] for task in found))
        return
    from ttkit import headroom as forms
    from ttkit.pipeline import Console
    from ttkit.verify import Verifier

    if out:
        check_writable(out)
    console = Console(sys.stderr)
    with Verifier(protocol, device, cache, workers=workers) as verifier:
        table = forms.measure(
            found, verifier, lambda done, n: console.update(f"measured {done}/{n} forms", "")
        )
    if out:
        table.round(4).to_csv(out, index=False)
    summary = forms.summarise(table)
    console.line(f"measured {len(table)} forms")
    if as_json:
        print_json({"forms": table.to_dict("records"), "summary": summary})
        return
    columns = ("task", "name", "form", "speedup", "speedup_lo", "speedup_hi")
    print_table(columns, forms.best(table)[list(columns)].itertuples(index=False))
    print(
        f"{summary['faster']} of {summary['tasks']} tasks ({summary['share_faster']:.0%}) have a "
        f"form {forms.FASTER}x or faster, {summary['none']} ({summary['share_none']:.0%}) have "
        f"none above {forms.NONE}x"
    )


@app.command()
def split(
    source: Source = "minibench",
    level: Level = 1,
    seed: Annotated[int, typer.Option(help="42, 43 and 44 are the paper's.")] = 42,
    out: Annotated[str | None, typer.Option("--out", "-o", help="Write the split file.")] = None,
    as_json: Json = False,
) -> None:
    """Print or write the paper's train/eval split of a level."""
    from ttkit.journal import write_atomic
    from ttkit.tasks import make_split

    made = make_split(source, level, seed)
    if out:
        write_atomic(Path(out), made.dump().encode())
    if as_json:
        print(made.dump(), end="")
    else:
        print(f"train {' '.join(map(str, made.train))}")
        print(f"eval {' '.join(map(str, made.eval))}")
        print(f"sha256 {made.sha256}" + (f", written to {out}" if out else ""))


@app.command()
def verify(
    task: Annotated[str, typer.Argument(help="minibench:1/17, kernelbench:1/12, or a file.")],
    file: Annotated[Path, typer.Argument(help="A body of forward, or a module with ModelNew.")],
    protocol: ProtocolName = "rigorous",
    device: Device = "cpu",
    action: Annotated[
        str | None, typer.Option(help="body or module; default: by what the file holds.")
    ] = None,
    scale: Scale = "cpu",
    kernelbench_dir: KernelBench = None,
    as_json: Json = False,
) -> None:
    """Judge one candidate: correct (exit status 0), or not (1), and why?"""
    from ttkit import prompts
    from ttkit.tasks import find_task, read_code

    found = find_task(task, scale, kernelbench_dir)
    try:
        code = read_code(file)
        action = action or prompts.action_of(code)
    except UsageError as error:
        raise UsageError(f"the candidate {file} {error}") from None
    code = prompts.extract(code, action)
    source = prompts.candidate_source(found, code, action)
    from ttkit.verify import Verifier
    from ttkit.verify.explain import explain

    with Verifier(protocol, device) as verifier:
        verdict = verifier.verify(found, source)
    if action == "body":  # lines are those of the file, not of the module made of it
        before = prompts.lines_before_body(found)
        reason = re.sub(
            r"\(line (\d+)\)",
            lambda m: f"(line {int(m[1]) - before})" if int(m[1]) > before else m[0],
            verdict.reason,
        )
        verdict = replace(verdict, reason=reason)
    if as_json:
        print_json({"task": found.key, **verdict.to_dict()})
    else:
        print(f"{found.key}: {verdict.status}")
        print(explain(verdict, code))
    raise typer.Exit({"correct": 0, "infra_error": 3}.get(verdict.status, 1))


@app.command()
def aa(
    tasks: Annotated[str | None, typer.Option(help="Task ids: 4,5,12.")] = None,
    source: Source = "minibench",
    level: Level = 1,
    runs: Annotated[int, typer.Option(min=1, help="Runs a task.")] = 40,
    faster: Annotated[
        float | None, typer.Option(help="Instead of tasks: a candidate so many times faster.")
    ] = None,
    protocol: ProtocolName = "rigorous",
    workers: Workers = 1,
    device: Device = "cpu",
    scale: Scale = "cpu",
    kernelbench_dir: KernelBench = None,
    out: Annotated[str | None, typer.Option(help="Write every run as CSV.")] = None,
    as_json: Json = False,
) -> None:
    """Measure references against themselves: how often is one called faster?

    With --faster 1.1 a candidate that is faster by construction: how often is that seen?
    """
    if (tasks is None) == (faster is None):
        raise UsageError("give either --tasks, to be measured against themselves, or --faster")
    chosen = tasks_named(tasks or "", source, level, scale, kernelbench_dir)
    from ttkit.pipeline import Console
    from ttkit.verify import aa as measure

    console = Console(sys.stderr)
    settings = {"protocol": protocol, "device": device, "workers": workers}
    rows: list[dict[str, Any]] = []
    with csv_rows(out, AA_COLUMNS) as write:

        def on_run(done: int, total: int, task: Task, verdict: Verdict) -> None:
            rows.append({"task": task.key, **verdict.to_dict()})
            write(rows[-1])
            if not measure.is_measured(verdict):
                why = f"{verdict.status}: {verdict.reason}"
                console.line(f"run {done} of {total}, {task.key}: not measured, {why}")
            console.update(f"run {done}/{total}", "")

        if faster is None:
            _, summary = measure.aa(chosen, runs, settings, on_run)
        else:
            _, summary = measure.power(faster, runs, settings, on_run)
    console.line(f"{len(rows)} runs")
    if as_json:
        print_json({"summary": summary.to_dict(), "runs": rows})
        return
    for key, value in summary.to_dict().items():
        print(f"{key:20} {cell(value)}")
    if not summary.measured:
        raise InfraError(f"no run could be measured: {rows[0]['reason']}")


@app.command()
def claims(
    run: Annotated[str, typer.Argument(help="The run folder.")] = "runs/demo",
    as_json: Json = False,
) -> None:
    """Set every published claim beside what a run measured, with a verdict and its rule."""
    from ttkit import claims as book

    table = book.ledger(run)
    if as_json:
        missing = book.not_reproduced().to_dict("records")
        rules = {"rules": book.RULES, "margins": book.MARGINS, "claims": table.to_dict("records")}
        print_json({**rules, "not_reproduced": missing})
        return
    shown = book.display(table)
    print_table(list(shown), shown.itertuples(index=False))
    counts = table["verdict"].value_counts()
    print(", ".join(f"{counts.get(name, 0)} {name}" for name in book.VERDICTS))
    print("margins are a choice of ttkit, not of the paper, fixed in its code before the run:")
    for margin, why in book.MARGINS.items():
        print(f"  ± {margin:g}: {why}")
    for command in sorted(set(table["command"][table["verdict"] == book.NOT_RUN])):
        print(f"not run yet: {command}")


@app.command()
def select(
    file: Annotated[Path, typer.Argument(help="Samples: .jsonl, .csv or .parquet.")],
    k: Annotated[int, typer.Option("--k", min=1, help="Picks a task.")] = 3,
    by: Annotated[
        str | None, typer.Option(help="The score; default: nll_sum, or the first there is.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Pick the k least likely correct samples of each task, and say what that is worth."""
    from ttkit.advice import advise, read

    advice = advise(read(file), k, by)
    if as_json:
        frames = ("picks", "tasks", "expected", "gains")
        data = {name: getattr(advice, name) for name in ("by", "k", "unit", "counts", "notes")}
        for name in frames:
            frame = getattr(advice, name)
            data[name] = None if frame is None else frame.to_dict("records")
        print_json(data)
        return
    print_table(list(advice.picks), advice.picks.itertuples(index=False))
    counts = ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in advice.counts.items())
    print(f"{counts}; by {advice.by}, one row is a {advice.unit} program")
    for note in advice.notes:
        print(f"note: {note}")
    if advice.expected is not None and advice.gains is not None:
        print("\nwhat each strategy keeps of these samples (95 % intervals, tasks resampled):")
        print_table(list(advice.expected), advice.expected.itertuples(index=False))
        for gain in advice.gains.itertuples():
            print(
                f"{k} picks against {gain.against}: fast_1 {gain.fast_1_value:+.0%} "
                f"[{gain.fast_1_lo:+.0%}, {gain.fast_1_hi:+.0%}], "
                f"speedup {gain.speedup_value:.2f}x "
                f"[{gain.speedup_lo:.2f}, {gain.speedup_hi:.2f}], {gain.tasks} tasks"
            )


@app.command()
def doctor(as_json: Json = False) -> None:
    """Try all that a default run needs on this machine."""
    from ttkit.doctor import examine

    findings = examine()
    if as_json:
        print_json([asdict(finding) for finding in findings])
    else:
        for finding in findings:
            print(f"{'ok  ' if finding.ok else 'FAIL'} {finding.name}: {finding.text}")
    raise typer.Exit(0 if all(finding.ok for finding in findings) else 3)
