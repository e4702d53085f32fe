"""The parameters of a run: what the notebooks declare, and the values a run gives them.

The cells tagged `parameters` are the only definition. Each line is `name: type = default`, with a
comment; types are int, float, str, bool, lists of these but bool, and any of them `| None`.
Profiles and `--set` are checked against the union over all notebooks before anything starts.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import functools
import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ttkit
from ttkit import domains
from ttkit.errors import UsageError
from ttkit.store import Code

SCALARS = {"int": int, "float": float, "str": str, "bool": bool}
TYPES = (*SCALARS, "list[int]", "list[float]", "list[str]")

# What runs a notebook and files its results decides no number in them.
MACHINERY = {"cli", "__main__", "pipeline", "parameters", "domains", "store", "journal"}
MACHINERY |= {"provenance"}
# Functions of finished tables: the rows in a journal do not depend on them.
PURE = {"claims", "clusters", "dial", "findings", "hypothesis", "prefilter", "probe", "published"}
PURE |= {"plots", "plots_claims", "plots_probe", "plots_ttt", "resample", "select", "stats"}
PURE |= {"strategies", "transfer"}


@dataclass(frozen=True)
class Parameter:
    """One line of a `parameters` cell; `type` as written, `comment` without its #."""

    name: str
    type: str
    default: Any
    comment: str = ""

    def check(self, value: Any, where: str) -> Any:
        """`value` in its canonical type (an int becomes a float where a float is declared).

        Raises UsageError, naming `where` the value came from, for a wrong type and for a value
        outside the parameter's domain (`ttkit.domains`).
        """
        kind, optional, _ = self.type.partition(" | None")
        if value is None and optional:
            return None
        found: Any = None
        try:
            if not kind.startswith("list["):
                found = _scalar(kind, value)
            elif isinstance(value, list | tuple):
                found = [_scalar(kind[5:-1], item) for item in value]
        except TypeError:
            pass
        if found is not None:
            domains.check(self.name, found, where)
            return found
        hint = ""
        if "float" in kind and isinstance(value, str) and re.fullmatch(r"[-+]?\d+e[-+]?\d+", value):
            mantissa, exponent = value.split("e")
            hint = f": YAML takes {value} for text, write {mantissa}.0e{exponent}"
        meaning = f" ({self.comment})" if self.comment else ""
        raise UsageError(f"{where}: {self.name}{meaning} must be {self.type}, not {value!r}{hint}")

    def parse(self, text: str) -> Any:
        """The value of `--set name=text`, read by the declared type."""
        import yaml

        where, kind = "--set", self.type.removesuffix(" | None")
        if kind != self.type and text.lower() in ("null", "none", ""):
            return None
        if kind == "str":
            return self.check(text, where)
        if kind == "float":
            with contextlib.suppress(ValueError):
                return self.check(float(text), where)  # here 1e-5 is no trap
            return self.check(text, where)
        if kind.startswith("list[") and not text.startswith("["):
            text = f"[{text}]"
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            value = text
        if kind in ("list[float]", "list[str]") and isinstance(value, list):
            convert = float if kind == "list[float]" else str
            with contextlib.suppress(ValueError, TypeError):
                value = [v if isinstance(v, bool) else convert(v) for v in value]
        return self.check(value, where)


def _scalar(kind: str, value: Any) -> Any:
    if kind == "float" and type(value) is int:
        return float(value)
    if type(value) is not SCALARS[kind] or (isinstance(value, float) and not math.isfinite(value)):
        raise TypeError
    return value


@dataclass(frozen=True)
class Notebook:
    """A numbered notebook as it lies in `notebooks/`, outputs left aside.

    `cells` are the sources of its code cells but for the `parameters` cell.
    """

    path: Path
    parameters: dict[str, Parameter]
    cells: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.path.stem

    @classmethod
    def load(cls, path: Path) -> Notebook:
        """Raises UsageError for a file that is no notebook or a malformed `parameters` cell."""
        try:
            cells = json.loads(path.read_text())["cells"]
        except FileNotFoundError:
            names = [p.stem for p in sorted(path.parent.glob("*.ipynb"))]
            raise UsageError(f"there is no notebook {path.name}{near(path.stem, names)}") from None
        except (ValueError, KeyError, TypeError):
            raise UsageError(f"{path} is not a notebook that can be read") from None
        parameters: dict[str, Parameter] = {}
        sources = []
        for cell in cells:
            source = "".join(cell["source"])
            if cell["cell_type"] != "code":
                continue
            if "parameters" in cell.get("metadata", {}).get("tags", ()):
                parameters |= _declared(source, path.name)
            else:
                sources.append(source)
        return cls(path, parameters, tuple(sources))


def _declared(source: str, notebook: str) -> dict[str, Parameter]:
    found = {}
    where = f"the parameters cell of {notebook}"
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        raise UsageError(f"{where} is not valid Python: {error.msg}, line {error.lineno}") from None
    lines = source.splitlines()
    for node in tree.body:
        text = ast.unparse(node)
        if not (
            isinstance(node, ast.AnnAssign)
            and isinstance(node.target, ast.Name)
            and node.value is not None
        ):
            raise UsageError(f"{where} has {text!r}: each line must be `name: type = default`")
        kind = ast.unparse(node.annotation)
        if kind.removesuffix(" | None") not in TYPES:
            known = ", ".join(TYPES)
            raise UsageError(f"{where}: {text!r} has the type {kind}, which is not one of {known}")
        try:
            default = ast.literal_eval(node.value)
        except ValueError:
            raise UsageError(f"{where}: the default in {text!r} must be a plain value") from None
        rest = lines[(node.end_lineno or 1) - 1].encode()[node.end_col_offset or 0 :].decode()
        parameter = Parameter(node.target.id, kind, default, rest.strip().lstrip("# "))
        found[parameter.name] = Parameter(
            parameter.name, kind, parameter.check(default, where), parameter.comment
        )
    return found


def load_notebooks(folder: Path) -> list[Notebook]:
    """The numbered notebooks (`02_best_of_n.ipynb`) in order; UsageError if there are none."""
    paths = sorted(p for p in folder.glob("*.ipynb") if re.match(r"\d\d_", p.name))
    if not paths:
        raise UsageError(f"there are no numbered notebooks (01_name.ipynb) in {folder}")
    return [Notebook.load(path) for path in paths]


def union(notebooks: Iterable[Notebook]) -> dict[str, Parameter]:
    """All parameters by name.

    Raises UsageError if two notebooks declare one name with unlike types or defaults.
    """
    first: dict[str, tuple[Parameter, str]] = {}
    for notebook in notebooks:
        for name, mine in notebook.parameters.items():
            other, owner = first.setdefault(name, (mine, notebook.name))
            if (other.type, other.default) != (mine.type, mine.default):
                raise UsageError(
                    f"the parameter {name} is `{other.type} = {other.default!r}` in {owner} but "
                    f"`{mine.type} = {mine.default!r}` in {notebook.name}: make them the same"
                )
    return {name: parameter for name, (parameter, _) in first.items()}


def resolve(
    known: Mapping[str, Parameter], profile: Path | None, overrides: Sequence[str]
) -> dict[str, Any]:
    """The values a profile file and `name=value` overrides give, checked against `known`.

    Overrides win. Raises UsageError for an unknown name (with the nearest right one), a wrong type,
    or a profile that is not a flat YAML mapping.
    """
    values: dict[str, Any] = {}
    if profile is not None:
        values = check_values(known, _read_profile(profile), f"profile {profile.name}")
    for text in overrides:
        name, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"--set {text}: write it as name=value")
        values[name.strip()] = _known(known, name.strip(), "--set").parse(value.strip())
    return values


def check_values(
    known: Mapping[str, Parameter], values: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """The values in their canonical types; UsageError for an unknown name or a wrong type."""
    return {name: _known(known, name, where).check(v, where) for name, v in values.items()}


def _known(known: Mapping[str, Parameter], name: str, where: str) -> Parameter:
    if name not in known:
        raise UsageError(f"{where}: no notebook has a parameter {name!r}{near(name, known)}")
    return known[name]


def _read_profile(path: Path) -> dict[str, Any]:
    import yaml

    try:
        text = path.read_text()
        tree, values = yaml.compose(text), yaml.safe_load(text)
    except FileNotFoundError:
        names = [p.stem for p in sorted(path.parent.glob("*.yaml"))]
        raise UsageError(f"there is no profile {path.stem!r}{near(path.stem, names)}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "malformed"
        raise UsageError(f"the profile {path.name} is not valid YAML{line}: {problem}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UsageError(f"the profile {path.name} must be a flat list of `name: value` lines")
    names = [str(key.value) for key, _ in tree.value]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f"the profile {path.name} gives {twice[0]} more than once")
    return {str(name): value for name, value in values.items()}


def near(name: str, names: Iterable[str]) -> str:
    """ "; did you mean K?" for the nearest of `names`, else what there is."""
    names = sorted(names)
    close = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]}?"
    return f"; there are {', '.join(names)}" if names else ""


# --- the code behind a notebook -----------------------------------------------------------------


def code_of(notebook: Notebook) -> Code:
    """Hashes of the notebook's code cells and of the `ttkit` files they import, at any remove.

    What is journaled depends on the cells up to the last that works with a journal: later cells,
    which look at the rows, may be edited without losing them.
    """
    last = _last_journal_cell([_plain_python(cell) for cell in notebook.cells])
    files = {
        str(path.relative_to(PACKAGE.parent)): _stamped(path, path.stat().st_mtime_ns)[0]
        for path in _closure(_imports("\n".join(map(_plain_python, notebook.cells))))
    }
    drawn = {name: sha for name, sha in files.items() if _module(name) not in PURE}
    key = [list(notebook.cells[: last + 1]), drawn]
    cells = hashlib.sha256(json.dumps(notebook.cells).encode()).hexdigest()
    return Code(
        {**files, notebook.path.name: cells}, hashlib.sha256(json.dumps(key).encode()).hexdigest()
    )


def _module(file: str) -> str:
    """ "plots" of "ttkit/plots.py" and of "ttkit/plots/style.py"."""
    return Path(file).parts[1].removesuffix(".py")


PACKAGE = Path(ttkit.__file__).parent
HOLDERS = {"dict", "list", "tuple", "partial"}


def _last_journal_cell(cells: Sequence[str]) -> int:
    """Index of the last cell that names a journal, or a variable or function that holds one."""
    try:
        trees = [ast.parse(cell) for cell in cells]
    except SyntaxError:
        return len(cells) - 1
    names: set[str] = set()

    def touches(tree: ast.AST) -> bool:
        return any(
            "journal" in text or text in names
            for node in ast.walk(tree)
            for text in (getattr(node, field, None) for field in ("id", "attr", "arg"))
            if isinstance(text, str)
        )

    last = -1
    for index, tree in enumerate(trees):
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and touches(node):
                names.add(node.name)
            elif isinstance(node, ast.Assign) and touches(node.value):
                made = node.value.func if isinstance(node.value, ast.Call) else None
                maker = getattr(made, "id", getattr(made, "attr", ""))
                # What another call returns are results, not the journal.
                if made is None or maker in HOLDERS or maker == "journal":
                    targets = [n for target in node.targets for n in ast.walk(target)]
                    names |= {n.id for n in targets if isinstance(n, ast.Name)}
        if touches(tree):
            last = index
    return last


def _plain_python(cell: str) -> str:
    return "\n".join(line for line in cell.splitlines() if not line.lstrip().startswith(("%", "!")))


def _imports(source: str) -> set[str]:
    """The modules of `ttkit` that the source imports; all of them if it does not parse."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return {path.stem for path in PACKAGE.iterdir()}
    modules = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = "ttkit." * bool(node.level) + (f"{node.module}." if node.module else "")
            modules |= {package + alias.name for alias in node.names}
    return {name.split(".")[1] for name in modules if name.startswith("ttkit.")}


def _closure(names: set[str]) -> list[Path]:
    """The files of these modules and of all that they import; a subpackage counts as a whole,
    since its workers may be started by name."""
    seen: set[str] = set()
    found: list[Path] = []
    while names:
        name = names.pop()
        if name in seen or name in MACHINERY:
            continue
        seen.add(name)
        file, folder = PACKAGE / f"{name}.py", PACKAGE / name
        for path in [file] if file.is_file() else sorted(folder.rglob("*.py")):
            found.append(path)
            names |= _stamped(path, path.stat().st_mtime_ns)[1]
    return sorted(found)


@functools.cache
def _stamped(path: Path, mtime_ns: int) -> tuple[str, frozenset[str]]:
    """SHA-256 and imports of a source file, read again when its time changes."""
    data = path.read_bytes()
    return hashlib.sha256(data).hexdigest(), frozenset(_imports(data.decode()))
