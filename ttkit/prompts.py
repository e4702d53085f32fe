"""From a task to chat messages, and from a completion to the source of `ModelNew`.

Two action formats. `body` is the paper's: the completion is the body of `ModelNew.forward`, placed
into a subclass of the reference. `module` is KernelBench's: a whole module that defines `ModelNew`,
inline CUDA or Triton included.
"""

from __future__ import annotations

import ast
import hashlib
import re
import textwrap
from collections.abc import Sequence

from ttkit.errors import UsageError
from ttkit.tasks import Task

ACTIONS = ("body", "module")
STYLES = ("compact", "full")

SYSTEM = "You write fast and correct PyTorch code."
ASK = {
    "body": (
        "Write the body of `forward` for a class `ModelNew(Model)` that returns the same values as "
        "the reference and runs faster. Answer with the lines of the body only, in one ```python "
        "block."
    ),
    "module": (
        "Write a complete Python module that defines `class ModelNew(nn.Module)` with the same "
        "constructor and the same `forward` as `Model`, returns the same values and runs faster; "
        "custom CUDA or Triton kernels are welcome. Answer with one ```python block."
    ),
}


def compact_text(args: Sequence[str], body: str) -> str:
    """The user text of the compact style: the arguments and the reference body, nothing else.

    Small models trained on the spot read this; it keeps prompts to a few dozen tokens.
    """
    return f"{', '.join(args)}\n{body}"


def messages(task: Task, style: str = "full", action: str = "body") -> list[dict[str, str]]:
    """Chat messages for `task`. Raises UsageError for an unknown style or action."""
    _check_action(action)
    if style == "compact":
        return [{"role": "user", "content": compact_text(task.forward_args, task.forward_body)}]
    if style != "full":
        raise UsageError(f"unknown prompt style {style!r}: it is one of {', '.join(STYLES)}")
    text = f"The reference:\n\n```python\n{task.code.strip()}\n```\n\n{ASK[action]}"
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]


def extract(text: str, action: str = "body") -> str:
    """The code in a completion: the last fenced block if there is one, else the whole text.

    For `body`, a completion that repeats the `def forward` line or the class is cut down to the
    body. What does not parse is returned as it is: the verifier will call it a compile error.
    """
    _check_action(action)
    blocks = re.findall(r"```(?:[\w+-]*)\n(.*?)(?:```|\Z)", text, flags=re.DOTALL)
    code = textwrap.dedent(blocks[-1] if blocks else text).strip("\n").rstrip()
    if action == "body" and re.search(r"^\s*def forward\b", code, flags=re.MULTILINE):
        try:
            tree = ast.parse(code)
        except SyntaxError:
            return code
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.name == "forward":
                first, last = node.body[0], node.body[-1]
                lines = code.splitlines()[first.lineno - 1 : last.end_lineno]
                return textwrap.dedent("\n".join(lines))
    return code


def candidate_source(task: Task, code: str, action: str = "body") -> str:
    """Source of a module that defines `ModelNew`.

    For `body` this is the reference followed by `class ModelNew(Model)` with the body in place.
    Nothing is checked here: an empty or broken body gives a module that does not compile.
    """
    _check_action(action)
    if action == "module":
        return code + "\n"
    body = textwrap.indent(code, " " * 8)
    head = f"class ModelNew(Model):\n    def forward({task.forward_signature}):"
    return f"{task.code.rstrip()}\n\n\n{head}\n{body}\n"


def lines_before_body(task: Task) -> int:
    """How many lines of `candidate_source` stand before those of a body."""
    return len(task.code.rstrip().splitlines()) + 4


def action_of(text: str) -> str:
    """How source is meant: `module` if its top level defines ModelNew, else `body`.

    Raises UsageError, worded to follow the file's name, for what can be neither: no code at all, or
    definitions without ModelNew.
    """
    code = extract(text, "module")
    try:
        statements = ast.parse(code).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return "module" if re.search(r"^class ModelNew\b", code, flags=re.MULTILINE) else "body"
    if not statements:
        raise UsageError("holds no code")
    defined = {name for node in statements for name in _bound(node)}
    if "ModelNew" in defined:
        return "module"
    definitions = (ast.ClassDef, ast.Import, ast.ImportFrom, ast.FunctionDef)
    if any(isinstance(node, definitions) for node in statements) and not (
        "forward" in defined or any(map(_returns, statements))
    ):
        raise UsageError(
            "defines no ModelNew: write a class of that name, or nothing but the body of forward"
        )
    return "body"


def _bound(node: ast.stmt) -> list[str]:
    if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
        return [node.name]
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return [alias.asname or alias.name for alias in node.names]
    return [n.id for n in ast.walk(node) if isinstance(n, ast.Name) and type(n.ctx) is ast.Store]


def _returns(node: ast.AST) -> bool:
    """Whether there is a `return` that belongs to no function inside."""
    if isinstance(node, (ast.FunctionDef, ast.Lambda, ast.ClassDef)):
        return False
    return isinstance(node, ast.Return) or any(map(_returns, ast.iter_child_nodes(node)))


def code_sha256(code: str) -> str:
    """Hash of the code up to layout and comments: two texts with one syntax tree share it."""
    try:
        code = ast.unparse(ast.parse(code))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        try:
            wrapped = f"def forward():\n{textwrap.indent(code, '    ')}"
            code = ast.unparse(ast.parse(wrapped))
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            code = "\n".join(line.rstrip() for line in code.strip().splitlines())
    return hashlib.sha256(code.encode(errors="surrogatepass")).hexdigest()


def _check_action(action: str) -> None:
    if action not in ACTIONS:
        raise UsageError(f"unknown action format {action!r}: it is one of {', '.join(ACTIONS)}")
