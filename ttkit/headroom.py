"""How much faster a minibench task can get: every form of it measured by the verifier."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ttkit import minibench, prompts
from ttkit.tasks import Task

if TYPE_CHECKING:
    import pandas as pd

    from ttkit.verify import Verifier

FASTER, NONE = 1.2, 1.05  # a task has headroom from the first on, and none up to the second


def measure(
    tasks: Sequence[Task],
    verifier: Verifier,
    progress: Callable[[int, int], None] | None = None,
) -> pd.DataFrame:
    """One row a form: task, name, form, kind, status, reference_ms, speedup with _lo and _hi, and
    the reason where the form did not come out correct.

    `progress` is called with the forms done and their number.
    """
    import pandas as pd

    items = [(task, form) for task in tasks for form in minibench.forms(task.level, task.id)]
    done = 0

    def report(*_: object) -> None:
        nonlocal done
        done += 1
        if progress:
            progress(done, len(items))

    verdicts = verifier.verify_many(
        [(task, prompts.candidate_source(task, form.body)) for task, form in items], report
    )
    return pd.DataFrame(
        {
            "task": task.key,
            "name": task.name,
            "form": form.name,
            "kind": form.kind,
            "status": verdict.status,
            "reference_ms": verdict.reference_ms,
            "speedup": verdict.speedup,
            "speedup_lo": verdict.speedup_lo,
            "speedup_hi": verdict.speedup_hi,
            "reason": "" if verdict.correct else verdict.reason,
        }
        for (task, form), verdict in zip(items, verdicts, strict=True)
    )


def best(table: pd.DataFrame) -> pd.DataFrame:
    """Each task's fastest correct form, a row a task; tasks without any are left out."""
    right = table[table["status"] == "correct"].sort_values("speedup", ascending=False)
    first = right.drop_duplicates("task").set_index("task")
    return first.reindex([t for t in table["task"].unique() if t in first.index]).reset_index()


def summarise(table: pd.DataFrame) -> dict[str, float]:
    """Numbers and shares of tasks with a form FASTER or more, and with none above NONE."""
    speedup = best(table)["speedup"]
    tasks = table["task"].nunique()
    faster, none = int((speedup >= FASTER).sum()), tasks - int((speedup > NONE).sum())
    return {
        "tasks": tasks,
        "faster": faster,
        "share_faster": faster / tasks,
        "none": none,
        "share_none": none / tasks,
    }
