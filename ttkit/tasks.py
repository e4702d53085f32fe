"""Tasks, the sources they come from, and the paper's train/eval split.

A task is one file in KernelBench's format: a reference `Model`, `get_inputs` and
`get_init_inputs`. Three sources give such files: the built-in `minibench`, a KernelBench clone or
data set (`kernelbench`), and any single file of the user's.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import random
import re
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ttkit.errors import UsageError

SOURCES = ("minibench", "kernelbench")
LEVELS = {"minibench": (1, 2), "kernelbench": (1, 2, 3)}
SCALES = ("cpu", "gpu")
TRAIN_FRACTION = 0.8


@dataclass(frozen=True)
class Task:
    """One task: a reference implementation to be made faster.

    `code` is a whole module in KernelBench's file format. `key` names the task on the command
    line and in every table (`minibench:2/17`, or the path for a file).
    """

    source: str
    level: int
    id: int
    name: str
    code: str
    scale: str = "cpu"

    @property
    def key(self) -> str:
        return self.name if self.source == "file" else f"{self.source}:{self.level}/{self.id}"

    @functools.cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.code.encode()).hexdigest()

    @functools.cached_property
    def _forward(self) -> ast.FunctionDef:
        for node in ast.parse(self.code).body:
            if isinstance(node, ast.ClassDef) and node.name == "Model":
                for item in node.body:
                    if isinstance(item, ast.FunctionDef) and item.name == "forward":
                        return item
        raise UsageError(f"task {self.key} has no class Model with a method forward")

    @property
    def forward_args(self) -> tuple[str, ...]:
        """Argument names of `Model.forward`, without `self`."""
        return tuple(arg.arg for arg in self._forward.args.args[1:])

    @property
    def forward_signature(self) -> str:
        """The arguments of `Model.forward` as written, defaults and annotations included."""
        return ast.unparse(self._forward.args)

    @property
    def forward_body(self) -> str:
        """The source lines of `Model.forward`, dedented, without its docstring."""
        body = self._forward.body
        if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
            body = body[1:] or body
        if body[0].lineno == self._forward.lineno:
            return "\n".join(map(ast.unparse, body))
        lines = self.code.splitlines()[body[0].lineno - 1 : body[-1].end_lineno]
        return textwrap.dedent("\n".join(lines))


def load_tasks(
    source: str = "minibench", level: int = 1, scale: str = "cpu", directory: str | None = None
) -> list[Task]:
    """All tasks of one level, by id.

    `directory` is a KernelBench clone, its `KernelBench` folder, or a download of the Hugging Face
    data set; `minibench` needs none and takes `scale` instead.
    Raises UsageError for an unknown source, level, scale, or a directory that holds no tasks.
    """
    _check(source, level, scale)
    if source == "minibench":
        from ttkit import minibench

        return minibench.tasks(level, scale)
    return _kernelbench(level, directory)


def find_task(name: str, scale: str = "cpu", directory: str | None = None) -> Task:
    """The task behind `minibench:1/17`, `kernelbench:1/12` or the path of a file.

    Raises UsageError with the form that is wanted when `name` is none of these.
    """
    match = re.fullmatch(r"(\w+):(\d+)/(\d+)", name)
    if match:
        source, level, number = match[1], int(match[2]), int(match[3])
        for task in load_tasks(source, level, scale, directory):
            if task.id == number:
                return task
        raise UsageError(
            f"there is no task {number} in {source} level {level}; `ttkit tasks` lists them"
        )
    path = Path(name)
    if not path.is_file():
        raise UsageError(
            f"unknown task {name!r}: name one as minibench:1/17 or kernelbench:1/12, "
            "or give a file's path"
        )
    try:
        code = read_code(path)
        names = {getattr(node, "name", "") for node in ast.parse(code).body}
    except UsageError as error:
        raise UsageError(f"the task file {name} {error}") from None
    except (SyntaxError, ValueError) as error:
        at = getattr(error, "lineno", None)
        line = f", line {at}" if at else ""
        text = getattr(error, "msg", None) or error
        raise UsageError(f"the task file {name} is not valid Python: {text}{line}") from None
    missing = {"Model", "get_inputs", "get_init_inputs"} - names
    if missing:
        raise UsageError(
            f"the task file {name} lacks {', '.join(sorted(missing))} (KernelBench's file format)"
        )
    return Task("file", 0, 0, str(path), code)


def read_code(path: Path) -> str:
    """The text of a file of source code. Raises UsageError, worded to follow the file's name, where
    it cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError("is not UTF-8 text") from None


def _check(source: str, level: int, scale: str = "cpu") -> None:
    if source not in SOURCES:
        raise UsageError(f"unknown task source {source!r}: it is one of {', '.join(SOURCES)}")
    if level not in LEVELS[source]:
        levels = ", ".join(map(str, LEVELS[source]))
        raise UsageError(f"{source} has no level {level}: it has {levels}")
    if scale not in SCALES:
        raise UsageError(f"unknown scale {scale!r}: it is one of {', '.join(SCALES)}")


def _kernelbench(level: int, directory: str | None) -> list[Task]:
    if directory is None:
        raise UsageError(
            "kernelbench needs its task files: clone ScalingIntelligence/KernelBench, or download "
            "the Hugging Face data set of that name, and pass the folder as --kernelbench-dir"
        )
    root = Path(directory)
    for folder in (root / f"level{level}", root / "KernelBench" / f"level{level}"):
        files = {int(m[1]): p for p in folder.glob("*.py") if (m := re.match(r"(\d+)_", p.name))}
        if files:
            return [
                Task("kernelbench", level, i, files[i].stem, read_code(files[i]))
                for i in sorted(files)
            ]
    tables = sorted(root.rglob(f"level_{level}-*.parquet"))
    if tables:
        import pandas as pd

        rows = pd.concat(map(pd.read_parquet, tables)).sort_values("problem_id")
        return [
            Task("kernelbench", level, int(row.problem_id), row.name_, row.code)
            for row in rows.rename(columns={"name": "name_"}).itertuples()
        ]
    raise UsageError(
        f"no KernelBench level {level} under {directory}: expected KernelBench/level{level}/*.py "
        f"as in a clone, or data/level_{level}-*.parquet as in the data set"
    )


@dataclass(frozen=True)
class Split:
    """A train/eval split by the paper's rule: shuffle the sorted ids, the first 80 % train."""

    source: str
    level: int
    seed: int
    train: tuple[int, ...]
    eval: tuple[int, ...]

    @property
    def sha256(self) -> str:
        """Hash of the ids alone, so that a file edited by hand is noticed on load."""
        return hashlib.sha256(
            json.dumps([sorted(self.train), sorted(self.eval)]).encode()
        ).hexdigest()

    def dump(self) -> str:
        fields = {**asdict(self), "sha256": self.sha256}.items()
        return "{\n" + ",\n".join(f' "{k}": {json.dumps(v)}' for k, v in fields) + "\n}\n"


def make_split(source: str, level: int, seed: int, ids: Sequence[int] | None = None) -> Split:
    """Split `ids` (default 1..100, the size of every level here but KernelBench's level 3 with 50).

    Seed 42 on KernelBench level 1 gives the 20 evaluation tasks of the paper.
    """
    _check(source, level)
    if ids is None:
        ids = range(1, (50 if (source, level) == ("kernelbench", 3) else 100) + 1)
    shuffled = sorted(ids)
    random.Random(seed).shuffle(shuffled)
    cut = int(len(shuffled) * TRAIN_FRACTION)
    return Split(source, level, seed, tuple(sorted(shuffled[:cut])), tuple(sorted(shuffled[cut:])))


def load_split(path: str | Path) -> Split:
    """Read a split file; raises UsageError if it is missing, malformed or its hash is off."""
    path = Path(path)
    try:
        data = json.loads(path.read_text())
        recorded = data.pop("sha256")
        split = Split(**{**data, "train": tuple(data["train"]), "eval": tuple(data["eval"])})
    except FileNotFoundError:
        raise UsageError(f"there is no split file {path}; `ttkit split` writes one") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"the split file {path} cannot be read ({error}); write it again with `ttkit split`"
        ) from None
    if split.sha256 != recorded:
        raise UsageError(
            f"the split file {path} was altered: its ids do not match its sha256; "
            "write it again with `ttkit split`"
        )
    return split
