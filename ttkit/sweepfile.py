"""Sweep files: which parameters take which values, and what is gathered; all checked on reading."""

from __future__ import annotations

import importlib
import inspect
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ttkit.errors import UsageError
from ttkit.parameters import Notebook, Parameter, check_values, load_notebooks, near, resolve, union
from ttkit.pipeline import choose

KEYS = {"name": str, "profile": str, "set": dict, "only": list, "grid": dict, "collect": list}
KEYS |= {"figure": str, "findings": str}


@dataclass(frozen=True)
class Sweep:
    """A sweep file, checked. `values` are those of the profile and of `set`; `grid` maps a
    parameter to the values it takes; `collect` are (stage, table) pairs; `figure` and `findings`
    are functions of `ttkit.plots_sweep` and `ttkit.findings_sweep` that take these tables."""

    name: str
    profile: str
    values: dict[str, Any]
    grid: dict[str, list[Any]]
    notebooks: list[Notebook]
    collect: list[tuple[str, str]]
    figure: str | None
    findings: str | None

    @classmethod
    def load(cls, path: str | Path, notebooks_dir: Path) -> Sweep:
        """Read and check `path` before anything starts. Raises UsageError, naming what is wrong
        and the nearest right name."""
        path, books = Path(path), load_notebooks(notebooks_dir)
        known = union(books)
        data = _read(path)
        where = f"sweep {path.name}"
        for key, value in data.items():
            if key not in KEYS:
                raise UsageError(f"{where}: there is no key {key!r}{near(str(key), KEYS)}")
            if not isinstance(value, KEYS[key]):
                raise UsageError(f"{where}: {key} must be a {KEYS[key].__name__}, not {value!r}")
        profile = data.get("profile", "demo")
        values = resolve(known, notebooks_dir / "profiles" / f"{profile}.yaml", ())
        values |= check_values(known, data.get("set", {}), where)
        values.pop("run", None)
        grid = _grid(known, data["grid"], where)
        if "run" in {*data.get("set", {}), *grid}:
            raise UsageError(f"{where}: run cannot be set, each point has a folder of its own")
        only = [str(name).zfill(2) for name in data.get("only", [])]
        chosen = choose(books, only, None)
        collect = [_collected(item, chosen, where) for item in data.get("collect", [])]
        made = {}
        for key, module in (("figure", "plots_sweep"), ("findings", "findings_sweep")):
            name = made[key] = data.get(key)
            if name is not None and name not in (names := _functions(module)):
                raise UsageError(
                    f"{where}: ttkit.{module} has no {key} {name!r}{near(name, names)}"
                )
        name = data.get("name", path.stem)
        if not re.fullmatch(r"[\w.-]*\w[\w.-]*", name):
            raise UsageError(f"{where}: the name {name!r} has to serve as a folder's name")
        return cls(name, profile, values, grid, chosen, collect, made["figure"], made["findings"])

    def points(self) -> dict[str, dict[str, Any]]:
        """The grid's cartesian product: the values of each point by its label, "seed=0,k=8"."""
        found = {}
        for combination in itertools.product(*self.grid.values()):
            values = dict(zip(self.grid, combination, strict=True))
            label = ",".join(f"{name}={slug(value)}" for name, value in values.items())
            if label in found:
                raise UsageError(f"sweep {self.name}: two points would be called {label}")
            found[label] = values
        return found


def _read(path: Path) -> dict[str, Any]:
    import yaml

    try:
        data = yaml.safe_load(path.read_text())
    except OSError:
        names = [p.stem for p in sorted(path.parent.glob("*.yaml"))]
        raise UsageError(f"there is no sweep file {path}{near(path.stem, names)}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UsageError(f"the sweep {path.name} is not valid YAML{line}") from None
    if not isinstance(data, dict) or not data.get("grid"):
        raise UsageError(f"the sweep {path.name} needs a `grid` of parameters with their values")
    return {key: value for key, value in data.items() if value is not None}


def _grid(known: Mapping[str, Parameter], grid: Any, where: str) -> dict[str, list[Any]]:
    found = {}
    for name, values in grid.items():
        if not isinstance(values, list) or not values:
            raise UsageError(f"{where}: the grid of {name} must be a list of values")
        found[name] = [check_values(known, {name: value}, where)[name] for value in values]
    return found


def _collected(item: Any, notebooks: Sequence[Notebook], where: str) -> tuple[str, str]:
    if not isinstance(item, dict) or set(item) != {"stage", "table"}:
        raise UsageError(f"{where}: collect has {item!r}, each must be {{stage: ..., table: ...}}")
    (notebook,) = choose(list(notebooks), [str(item["stage"]).zfill(2)], None)
    return notebook.name, str(item["table"])


def _functions(module: str) -> list[str]:
    """The public functions that are defined in ttkit.`module`."""
    home = importlib.import_module(f"ttkit.{module}")
    return [
        name
        for name, value in inspect.getmembers(home, inspect.isfunction)
        if value.__module__ == home.__name__ and not name.startswith("_")
    ]


def slug(value: Any) -> str:
    text = "+".join(map(str, value)) if isinstance(value, list) else str(value)
    return re.sub(r"[^\w.+-]", "-", text)
