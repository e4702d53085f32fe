"""The command line: `ttkit COMMAND`, also `python -m ttkit`. Every command has `--json`.

Exit status: 0 done, 1 the answer is no, 2 wrong usage, 3 infrastructure failed.
"""

from __future__ import annotations

import json
import math
import re
import sys
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from ttkit.errors import InfraError, TtkitError, UsageError

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

bench_app = typer.Typer(help="Measure how fast the parts are, as ratios.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")

Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, nothing else.")]
Source = Annotated[str, typer.Option(help="minibench or kernelbench.")]
Level = Annotated[int, typer.Option(help="1 or 2; for kernelbench also 3.")]
Scale = Annotated[str, typer.Option(help="Sizes of minibench tasks: cpu or gpu.")]
KernelBench = Annotated[
    str | None, typer.Option("--kernelbench-dir", help="A KernelBench clone or data set.")
]
ProtocolName = Annotated[str, typer.Option("--protocol", help="rigorous, reward, full or fast-proxy.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Workers = Annotated[int, typer.Option(min=1, help="Candidates judged at a time.")]


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
        _print_json(asdict(result))


@app.command()
def status(
    run: Annotated[str, typer.Argument(help="The run folder.")] = "runs/demo",
    as_json: Json = False,
) -> None:
    """Say how far each stage of a run is."""
    from ttkit import pipeline

    stages = pipeline.status(run)
    if as_json:
        _print_json([asdict(stage) for stage in stages])
    else:
        columns = ("stage", "state", "rows", "seconds", "mib", "detail")
        _print_table(columns, ([getattr(s, name) for name in columns] for s in stages))


@app.command()
def sweep(
    file: Annotated[Path, typer.Argument(help="A sweep, as those in notebooks/sweeps.")],
    jobs: Annotated[int, typer.Option(min=1, help="Notebooks that run at a time.")] = 1,
    executor: Annotated[str, typer.Option(help="local, or ray (a cluster).")] = "local",
    out: Annotated[str | None, typer.Option(help="Folder; default runs/NAME.")] = None,
    as_json: Json = False,
) -> None:
    """Run the notebooks at every point of a grid; gather the results in one table."""
    from ttkit.sweep import sweep as start

    result = start(file, out, jobs, executor, stream=sys.stderr if as_json else sys.stdout)
    if as_json:
        _print_json(asdict(result))
    else:
        ok = len(result.points) - len(set(result.failures) & set(result.points))
        print(f"{ok} of {len(result.points)} points complete in {result.seconds:.0f} s")
        for name in [*result.tables, *filter(None, [result.figure])]:
            print(result.out / name)
        for point, why in result.failures.items():
            print(f"FAILED {point}: {why}")
    raise typer.Exit(3 if result.failures else 0)


@app.command()
def publish(
    run: Annotated[str, typer.Argument(help="A complete run of the default.")] = "runs/demo",
    as_json: Json = False,
) -> None:
    """Copy a run's executed notebooks and figures to where readers find them."""
    from ttkit.publish import publish as copy

    written = [str(path) for path in copy(run)]
    if as_json:
        _print_json(written)
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
            _print_json([asdict(task) | {"key": task.key} for task in found])
        else:
            _print_table(("task", "name"), ([task.key, task.name] for task in found))
        return
    from ttkit import headroom as forms
    from ttkit.pipeline import Console
    from ttkit.verify import Verifier

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
        _print_json({"forms": table.to_dict("records"), "summary": summary})
        return
    columns = ("task", "name", "form", "speedup", "speedup_lo", "speedup_hi")
    _print_table(columns, forms.best(table)[list(columns)].itertuples(index=False))
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
    """Judge one candidate: correct (exit status 0), or not (1)?"""
    from ttkit import prompts
    from ttkit.tasks import find_task

    found = find_task(task, scale, kernelbench_dir)
    try:
        code = file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UsageError(f"the candidate {file} cannot be read: {reason}") from None
    if action is None:
        is_module = re.search(r"^class ModelNew\b", code, flags=re.MULTILINE)
        action = "module" if is_module else "body"
    source = prompts.candidate_source(found, prompts.extract(code, action), action)
    from ttkit.verify import Verifier

    with Verifier(protocol, device) as verifier:
        verdict = verifier.verify(found, source)
    if as_json:
        _print_json({"task": found.key, **verdict.to_dict()})
    else:
        why = f": {verdict.reason}" if not verdict.correct else ""
        print(f"{found.key}: {verdict.status}{why}")
        if not math.isnan(verdict.speedup):
            print(
                f"speedup {verdict.speedup:.3f}x (95 % interval {verdict.speedup_lo:.3f} to "
                f"{verdict.speedup_hi:.3f}), {verdict.reference_ms:.3f} ms to "
                f"{verdict.candidate_ms:.3f} ms, {verdict.n_pairs} pairs"
            )
        print(f"protocol {verdict.protocol} on {verdict.device}")
        print(f"checks that ran: {', '.join(verdict.checks) or 'none'}")
        if verdict.flags:
            print(f"flags: {', '.join(verdict.flags)}")
    raise typer.Exit({"correct": 0, "infra_error": 3}.get(verdict.status, 1))


@app.command()
def aa(
    tasks: Annotated[str, typer.Option(help="Task ids: 4,5,12.")],
    source: Source = "minibench",
    level: Level = 1,
    runs: Annotated[int, typer.Option(min=1, help="Runs a task.")] = 40,
    protocol: ProtocolName = "rigorous",
    workers: Workers = 1,
    device: Device = "cpu",
    scale: Scale = "cpu",
    kernelbench_dir: KernelBench = None,
    out: Annotated[str | None, typer.Option(help="Write every run as CSV.")] = None,
    as_json: Json = False,
) -> None:
    """Measure references against themselves: how often is one called faster?"""
    chosen = _tasks_named(tasks, source, level, scale, kernelbench_dir)
    import pandas as pd

    from ttkit.pipeline import Console
    from ttkit.verify.aa import aa as measure

    console = Console(sys.stderr)
    results, summary = measure(
        chosen,
        runs,
        {"protocol": protocol, "device": device, "workers": workers},
        lambda done, total: console.update(f"run {done}/{total}", ""),
    )
    console.line(f"{len(results)} runs")
    rows = [{"task": task.key, **verdict.to_dict()} for task, verdict in results]
    columns = ["task", "status", "speedup", "speedup_lo", "speedup_hi", "n_pairs", "seconds"]
    if out:
        pd.DataFrame(rows)[columns].to_csv(out, index=False)
    if as_json:
        _print_json({"summary": summary.to_dict(), "runs": rows})
        return
    for key, value in summary.to_dict().items():
        print(f"{key:20} {_cell(value)}")
    if not summary.measured:
        raise InfraError(f"no run could be measured: {results[0][1].reason}")


@bench_app.command("verify")
def bench_verify(
    source: Source = "minibench",
    level: Level = 1,
    tasks: Annotated[
        str | None, typer.Option(help="Task ids; default: the evaluation tasks of split 42.")
    ] = None,
    candidates: Annotated[int, typer.Option(min=1, help="Different candidates a task.")] = 4,
    protocol: ProtocolName = "rigorous",
    seconds: Annotated[
        float | None, typer.Option(help="Longest timing of one candidate; default: the protocol's.")
    ] = None,
    device: Device = "cpu",
    scale: Scale = "cpu",
    kernelbench_dir: KernelBench = None,
    beside: Annotated[
        bool, typer.Option("--beside", help="Also time the evaluator of the KernelBench clone.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Candidates a second that the verifier judges, per task and overall."""
    from ttkit.bench_verify import bench as measure
    from ttkit.pipeline import Console
    from ttkit.tasks import make_split

    if beside and kernelbench_dir is None:
        raise UsageError("--beside needs --kernelbench-dir, a clone with src/kernelbench")
    ids = tasks or ",".join(map(str, make_split(source, level, 42).eval))
    console = Console(sys.stderr)
    result = measure(
        _tasks_named(ids, source, level, scale, kernelbench_dir),
        candidates=candidates,
        device=device,
        protocol=protocol,
        seconds=seconds,
        kernelbench=kernelbench_dir if beside else None,
        progress=lambda label, done, total: console.update(f"{label} {done}/{total}", ""),
    )
    console.line(f"{result['candidates_per_second']:.2f} candidates a second")
    if as_json:
        _print_json(result)
        return
    columns = ["task", "seconds_per_candidate", "reference_ms", "statuses", "fast"]
    columns += ["kernelbench_seconds_per_candidate", "ratio"] if beside else []
    _print_table(columns, ([row[name] for name in columns] for row in result["tasks"]))
    for name in ("device", "candidates_per_second", "ratio", "identical"):
        if name in result:
            print(f"{name:24} {_cell(result[name])}")


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
        rules = {"rules": book.RULES, "claims": table.to_dict("records")}
        _print_json({**rules, "not_reproduced": missing})
        return
    shown = book.display(table)
    _print_table(list(shown), shown.itertuples(index=False))
    counts = table["verdict"].value_counts()
    print(", ".join(f"{counts.get(name, 0)} {name}" for name in book.VERDICTS))
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
        _print_json(data)
        return
    _print_table(list(advice.picks), advice.picks.itertuples(index=False))
    counts = ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in advice.counts.items())
    print(f"{counts}; by {advice.by}, one row is a {advice.unit} program")
    for note in advice.notes:
        print(f"note: {note}")
    if advice.expected is not None and advice.gains is not None:
        print("\nwhat each strategy keeps of these samples (95 % intervals, tasks resampled):")
        _print_table(list(advice.expected), advice.expected.itertuples(index=False))
        for gain in advice.gains.itertuples():
            print(
                f"{k} picks against {gain.against}: fast_1 {gain.fast_1_value:+.0%} "
                f"[{gain.fast_1_lo:+.0%}, {gain.fast_1_hi:+.0%}], "
                f"speedup {gain.speedup_value:.2f}x "
                f"[{gain.speedup_lo:.2f}, {gain.speedup_hi:.2f}], {gain.tasks} tasks"
            )


@bench_app.command("ttt")
def bench_ttt(
    model: Annotated[
        str | None, typer.Option(help="A model directory; default: a policy pretrained briefly.")
    ] = None,
    source: Source = "minibench",
    level: Level = 2,
    scale: Scale = "cpu",
    kernelbench_dir: KernelBench = None,
    tasks: Annotated[int, typer.Option(min=1, help="How many tasks of the level.")] = 5,
    rollouts: Annotated[int, typer.Option(min=2, help="Samples of each.")] = 16,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest completion.")] = 192,
    prompt_style: Annotated[str, typer.Option(help="compact or full.")] = "compact",
    repeats: Annotated[int, typer.Option(min=1, help="Repeats behind each median.")] = 5,
    device: Device = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    as_json: Json = False,
) -> None:
    """Time a TTT update against bare forward and backward, and a TTT step against TRL's."""
    import tempfile

    from ttkit.bench_ttt import bench
    from ttkit.pretrain import pretrain
    from ttkit.tasks import load_tasks

    chosen = load_tasks(source, level, scale, kernelbench_dir)[:tasks]
    with tempfile.TemporaryDirectory() as folder:
        where = model or pretrain(folder, n_examples=6000, device=device, on_step=lambda *_: None)
        found = bench(
            where,
            chosen,
            device=device,
            dtype=dtype,
            repeats=repeats,
            rollouts=rollouts,
            max_tokens=max_tokens,
            prompt_style=prompt_style,
        )
    if as_json:
        _print_json(found)
    else:
        for key, value in found.items():
            print(f"{key:20} {_cell(value)}")


@bench_app.command("score")
def bench_score(
    run: Annotated[str, typer.Argument(help="A run with notebooks 01 and 02.")] = "runs/demo",
    checkpoints: Annotated[int, typer.Option(min=1, help="Adapters to score under.")] = 9,
    samples: Annotated[int, typer.Option(min=1, help="Samples to score.")] = 320,
    device: Device = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    as_json: Json = False,
) -> None:
    """Score samples under many checkpoints, together and one at a time: 8x faster?"""
    from ttkit.bench_score import bench_score as measure

    result = measure(run, checkpoints, samples, device=device, dtype=dtype)
    if as_json:
        _print_json(result)
    else:
        for key, value in result.items():
            print(f"{key:24} {f'{value:.1e}' if key == 'largest_difference' else value}")
    raise typer.Exit(0 if result["ok"] else 1)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Try all that a default run needs on this machine."""
    from ttkit.doctor import examine

    findings = examine()
    if as_json:
        _print_json([asdict(finding) for finding in findings])
    else:
        for finding in findings:
            print(f"{'ok  ' if finding.ok else 'FAIL'} {finding.name}: {finding.text}")
    raise typer.Exit(0 if all(finding.ok for finding in findings) else 3)


def _tasks_named(
    ids: str, source: str, level: int, scale: str, kernelbench_dir: str | None
) -> list[Any]:
    """The tasks of `--tasks 4,5,12`."""
    from ttkit.tasks import load_tasks

    known = {str(task.id): task for task in load_tasks(source, level, scale, kernelbench_dir)}
    names = [text.strip() for text in ids.split(",") if text.strip()]
    if wrong := [text for text in names if text not in known]:
        raise UsageError(f"--tasks: there is no task {wrong[0]} in {source} level {level}")
    return [known[name] for name in names]


def _print_json(data: Any) -> None:
    print(json.dumps(_finite(data), indent=1, default=str))


def _finite(data: Any) -> Any:
    """The same with None for nan and infinity, which strict JSON readers refuse."""
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def _print_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    lines = [list(columns), *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    for line in lines:
        cells = (text.ljust(width) for text, width in zip(line, widths, strict=True))
        print("  ".join(cells).rstrip())


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
