"""`ttkit bench COMMAND`: how fast the parts are, as ratios."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ttkit.cli_common import (
    Device,
    Json,
    KernelBench,
    Level,
    ProtocolName,
    Scale,
    Source,
    cell,
    json_file,
    print_json,
    print_table,
    tasks_named,
)
from ttkit.errors import UsageError

# Heavy modules are imported inside the commands, so that --help and a refusal come at once.
app = typer.Typer(help="Measure how fast the parts are, as ratios.", no_args_is_help=True)


@app.command("verify")
def verify(
    source: Source = "minibench",
    level: Level = 1,
    tasks: Annotated[
        str | None, typer.Option(help="Task ids; default: the evaluation tasks of split 42.")
    ] = None,
    candidates: Annotated[int, typer.Option(min=1, help="Different candidates a task.")] = 4,
    samples: Annotated[
        str | None, typer.Option(help="Candidates from notebook 02 of this run: what it wrote.")
    ] = None,
    protocol: ProtocolName = "rigorous",
    seconds: Annotated[
        float | None, typer.Option(help="Longest timing of one candidate; default: the protocol's.")
    ] = None,
    device: Device = "cpu",
    scale: Scale = "cpu",
    kernelbench_dir: KernelBench = None,
    beside: Annotated[
        int, typer.Option(min=0, help="Candidates a task for the clone's own evaluator, too.")
    ] = 0,
    out: Annotated[
        str | None, typer.Option(help="A JSON file, written anew whenever more is known.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Candidates a second that the verifier judges, per task and overall."""
    from ttkit.bench_verify import bench as measure
    from ttkit.pipeline import Console
    from ttkit.store import read_samples
    from ttkit.tasks import make_split

    if beside and kernelbench_dir is None:
        raise UsageError("--beside needs --kernelbench-dir, a clone with src/kernelbench")
    ids = tasks or ",".join(map(str, make_split(source, level, 42).eval))
    console = Console(sys.stderr)
    result = measure(
        tasks_named(ids, source, level, scale, kernelbench_dir),
        candidates=candidates,
        samples=read_samples(Path(samples, "02_best_of_n", "samples.parquet")) if samples else None,
        device=device,
        protocol=protocol,
        seconds=seconds,
        kernelbench=kernelbench_dir if beside else None,
        beside=beside,
        progress=lambda label, done, total: console.update(f"{label} {done}/{total}", ""),
        keep=json_file(out),
    )
    console.line(f"{result['candidates_per_second']:.2f} candidates a second")
    if as_json:
        print_json(result)
        return
    columns = ["task", "seconds_per_candidate", "reference_ms", "statuses", "fast"]
    columns += ["kernelbench_seconds_per_candidate", "ratio"] if beside else []
    print_table(columns, ([row[name] for name in columns] for row in result["tasks"]))
    for name in ("device", "candidates_per_second", "ratio", "identical"):
        if name in result:
            print(f"{name:24} {cell(result[name])}")


@app.command("ttt")
def ttt(
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
        print_json(found)
    else:
        for key, value in found.items():
            print(f"{key:20} {cell(value)}")


@app.command("score")
def score(
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
        print_json(result)
    else:
        for key, value in result.items():
            print(f"{key:24} {f'{value:.1e}' if key == 'largest_difference' else value}")
    raise typer.Exit(0 if result["ok"] else 1)
