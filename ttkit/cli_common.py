"""What the modules of the command line share: common options, and how results are printed."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from ttkit.errors import UsageError

Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, nothing else.")]
Source = Annotated[str, typer.Option(help="minibench or kernelbench.")]
Level = Annotated[int, typer.Option(help="1 or 2; for kernelbench also 3.")]
Scale = Annotated[str, typer.Option(help="Sizes of minibench tasks: cpu or gpu.")]
KernelBench = Annotated[
    str | None, typer.Option("--kernelbench-dir", help="A KernelBench clone or data set.")
]
ProtocolName = Annotated[
    str, typer.Option("--protocol", help="rigorous, reward, full or fast-proxy.")
]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Workers = Annotated[int, typer.Option(min=1, help="Candidates judged at a time.")]


def tasks_named(
    ids: str, source: str, level: int, scale: str, kernelbench_dir: str | None
) -> list[Any]:
    """The tasks of `--tasks 4,5,12`; raises UsageError for an id that the level lacks."""
    from ttkit.tasks import load_tasks

    known = {str(task.id): task for task in load_tasks(source, level, scale, kernelbench_dir)}
    names = [text.strip() for text in ids.split(",") if text.strip()]
    if wrong := [text for text in names if text not in known]:
        raise UsageError(f"--tasks: there is no task {wrong[0]} in {source} level {level}")
    return [known[name] for name in names]


def print_json(data: Any) -> None:
    """Strict JSON: nan and infinity become null."""
    print(_json(data))


def json_file(path: str | None) -> Callable[[Any], None]:
    """A function that replaces what the file holds by its argument, as strict JSON, so that what is
    measured is not lost when the command is stopped; without a path it does nothing. Raises
    UsageError when the file cannot be written, before anything is measured.
    """
    from ttkit.journal import write_atomic

    if path is None:
        return lambda data: None
    check_writable(path)
    return lambda data: write_atomic(Path(path), f"{_json(data)}\n".encode())


def check_writable(path: str) -> None:
    """Raises UsageError when the file of `--out` cannot be written."""
    try:
        Path(path).touch()
    except OSError as error:
        raise UsageError(f"--out {path}: {error.strerror}") from error


def _json(data: Any) -> str:
    return json.dumps(_finite(data), indent=1, default=str)


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


@contextmanager
def csv_rows(
    path: str | None, columns: Sequence[str]
) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that writes one row to the CSV file at once, so that what is measured is not lost
    when the command is stopped; without a path it does nothing. Raises UsageError when the file
    cannot be written, before anything is measured.
    """
    if path is None:
        yield lambda row: None
        return
    check_writable(path)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()

        def write(row: dict[str, Any]) -> None:
            writer.writerow(row)
            file.flush()

        yield write


def print_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """The columns' names and the rows, left-aligned."""
    lines = [list(columns), *([cell(value) for value in row] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    for line in lines:
        cells = (text.ljust(width) for text, width in zip(line, widths, strict=True))
        print("  ".join(cells).rstrip())


def cell(value: Any) -> str:
    """A value as text: floats with three decimals, None as a dash."""
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
