"""Clusters of samples that do the same thing, whatever it is called: selection without log-probs.

Programs of one task are grouped by the *structure* of what they compute, and a sample is scored by
how often its group was drawn. Picking from the largest group is the majority vote of
self-consistency (Wang et al. 2022, arXiv 2203.11171) and of AlphaCode's clusters (Li et al. 2022,
arXiv 2203.07814), which run the programs to group them; picking from the smallest is its surprisal
counterpart, for the share of a group estimates its probability, as in semantic entropy (Kuhn et al.
2023, arXiv 2302.09664). Outputs cannot tell correct samples apart: they all agree with the
reference. Structure can, and needs no further run.
"""

from __future__ import annotations

import ast
import hashlib

import numpy as np
import pandas as pd

from ttkit import stats


def _hash(text: str) -> str:
    return "_" + hashlib.sha256(text.encode()).hexdigest()[:16]


def structure(code: str) -> str:
    """A hash of what a body of `forward` returns, with every intermediate result put in its place.

    Layout, comments, names of local variables and the cutting of an expression into statements do
    not count; constants, calls and the order of operands do. In straight-line code each variable
    is followed through its assignments. A statement executed for its effect (`x.mul_(2)`) is part
    of everything after it. Code with branches, loops or definitions is compared as its syntax tree,
    and code that does not parse as its text.
    """
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError):
        return _hash("text " + code)
    values: dict[str, str] = {}
    effects = ""
    for statement in tree.body:
        if any(isinstance(node, ast.NamedExpr) for node in ast.walk(statement)):
            return _hash("tree " + ast.dump(tree))
        if isinstance(statement, ast.AugAssign) and isinstance(statement.target, ast.Name):
            # x += y changes the object in place where there is one: an effect, and a new value
            new = f"{ast.dump(statement.op)} {_value(statement.value, values)}"
            name = statement.target.id
            effects = _hash(f"{effects} {values.get(name, name)} {new}")
            values[name] = effects
        elif isinstance(statement, ast.Assign) and _plain(statement.targets):
            value = _value(statement.value, values)
            if effects and not isinstance(statement.value, ast.Name):  # a name is only an alias
                value = _hash(effects + value)
            values |= {target.id: value for target in statement.targets}  # type: ignore[attr-defined]
        elif isinstance(statement, ast.Expr):
            effects = _hash(effects + _value(statement.value, values))
        elif isinstance(statement, ast.Return) and statement.value is not None:
            return _hash(effects + _value(statement.value, values))
        else:
            return _hash("tree " + ast.dump(tree))
    return _hash("tree " + ast.dump(tree))


def _plain(targets: list[ast.expr]) -> bool:
    return all(isinstance(target, ast.Name) for target in targets)


def _value(node: ast.AST, values: dict[str, str]) -> str:
    """A number for the value of an expression (value numbering): equal for equal computations."""
    if isinstance(node, ast.Name):
        return values.get(node.id, node.id)
    inner = [n for n in ast.walk(node) if isinstance(n, ast.Lambda | ast.comprehension)]
    if inner:  # they bind names of their own, which are not the variables of the body
        bound = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and _stores(n)}
        bound |= {n.arg for n in ast.walk(node) if isinstance(n, ast.arg)}
        values = {name: value for name, value in values.items() if name not in bound}
    parts = [type(node).__name__]
    for name, field in ast.iter_fields(node):
        for item in field if isinstance(field, list) else [field]:
            parts.append(f"{name}={_value(item, values) if isinstance(item, ast.AST) else item!r}")
    return _hash("(" + ",".join(parts) + ")")


def _stores(name: ast.Name) -> bool:
    return isinstance(name.ctx, ast.Store)


def cluster(samples: pd.DataFrame) -> pd.DataFrame:
    """The table with two columns more: `cluster` and `cluster_nll`.

    `cluster_nll` is minus the logarithm (nats) of the share of the task's samples, correct or not,
    that lie in the sample's cluster: low for what many samples do, ln(n) for what one does. As a
    key of `select.select`, "confidence" is then the majority and "surprisal" the rarest cluster.
    Needs the columns that `stats.check` asks for, and code.
    """
    stats.check(samples, others=["code"])
    known = {code: structure(code) for code in samples["code"].unique()}
    names = samples["code"].map(known)
    size = names.groupby([samples["task"], names]).transform("size")
    total = samples.groupby("task")["task"].transform("size")
    return samples.assign(cluster=names, cluster_nll=-np.log(size / total))
