"""Advice on anybody's samples: which to keep, whether there is anything to go by, what it buys.

The format is documented in docs/select.md. Nothing is dropped in silence: what cannot be used is
refused with its row, and what was used is counted. Needs pandas and scipy, not torch.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ttkit import select, stats
from ttkit.errors import UsageError

SCORES = (*select.CONVENTIONS, "nll_max", "entropy_mean", "n_tokens")
# What other tools call a log-probability: the score it stands for, which is minus it.
LOGPROBS = {
    "logprob_sum": "nll_sum",
    "cumulative_logprob": "nll_sum",  # vLLM
    "logprob_mean": "nll_mean",
}
TRUTHS = {True: True, False: False, "true": True, "false": False, "1": True, "0": False}
GATE = 1.0  # nats of nll_sum, the paper's
FEW = 5  # tasks below which an interval deserves a warning


@dataclass(frozen=True)
class Advice:
    """`picks`: task, rank, row, id, score, tied. `tasks`: `select.variance_gate` of every task.
    `expected`: strategy, k, fast_1 and speedup_gmean with intervals, or None without verdicts.
    `gains`: what k picks are against one and against k at random. `counts` and `notes`: what was
    used, and what a reader has to know, in sentences."""

    by: str
    k: int
    unit: str
    picks: pd.DataFrame
    tasks: pd.DataFrame
    expected: pd.DataFrame | None
    gains: pd.DataFrame | None
    counts: dict[str, int]
    notes: list[str]


def read(path: str | Path) -> pd.DataFrame:
    """A table of samples from JSON lines, CSV or parquet, by the file's ending; rows count from 1.

    Raises UsageError for a file that is not there, cannot be read, is empty or ends otherwise.
    """
    path = Path(path)
    is_csv = path.suffix == ".csv"
    if path.suffix not in (".jsonl", ".csv", ".parquet"):
        raise UsageError(f"{path}: samples come as .jsonl, .csv or .parquet")
    try:
        if path.suffix == ".jsonl":
            table = pd.DataFrame(_lines(path))
        else:
            table = pd.read_csv(path) if is_csv else pd.read_parquet(path)
    except FileNotFoundError:
        raise UsageError(f"there is no file {path}") from None
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise UsageError(f"{path} cannot be read: {reason}") from None
    if table.empty:
        raise UsageError(f"{path} holds no samples")
    for name in {*SCORES, *LOGPROBS, "speedup", "speedup_lo"} & set(table) if is_csv else ():
        # one cell that is no number makes text of its whole column: only that cell is at fault
        numbers = pd.to_numeric(table[name], errors="coerce")
        table[name] = numbers.astype(object).where(numbers.notna(), table[name])
    return table.set_axis(pd.RangeIndex(1, len(table) + 1))


def _lines(path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            raise UsageError(f"{path}, line {number} is not valid JSON") from None
        if not isinstance(row, dict):
            raise UsageError(f"{path}, line {number} is not an object but {line.strip()[:40]!r}")
        rows.append(row)
    return rows


def advise(table: pd.DataFrame, k: int = 3, by: str | None = None, seed: int = 0) -> Advice:
    """The k least likely correct samples of each task, and what is known of their worth.

    `table` is one row a sample: task; a score (SCORES, LOGPROBS); if known id, correct, speedup,
    speedup_lo, code. `by` is the score, by default the first of SCORES that is there. Copies of one
    program count once where there is code. Without `correct` all samples are ranked, and a note
    says what that is worth. Raises UsageError, naming the row, for anything that cannot be used.
    """
    if k < 1 or k != int(k):
        raise UsageError(f"the number of picks is a whole number from 1 on, got {k}")
    notes: list[str] = []
    samples, by = _prepared(table, by, notes)
    verdicts = "correct" in table
    unit = "distinct" if "code" in table else "sample"
    pool = samples[samples["correct"]]
    if unit == "distinct":
        pool = pool.sort_values([by, "index"]).drop_duplicates(["task", "code_sha256"])
    picks = pd.concat([_ranked(part, by, k) for _, part in pool.groupby("task", sort=False)])
    gate = select.variance_gate(samples, by, GATE)
    _gate_notes(gate, by, notes)
    expected = gains = None
    if verdicts and "speedup" in table:
        scored = select.select(samples, sorted({1, k}), [by], unit)
        columns = ["strategy", "k", "tasks", "fast_1", "fast_1_lo", "fast_1_hi"]
        columns += ["speedup_gmean", "speedup_gmean_lo", "speedup_gmean_hi"]
        expected = select.summarise(scored, seed=seed)[columns]
        gains = _gains(scored, by, k, seed)
        if (few := int((gate["n_correct"] > 0).sum())) < FEW:
            notes.append(f"intervals resample tasks, and with {few} of them say next to nothing")
    elif verdicts:
        notes.append("without speedups the expected gain is unknown")
    counts = {
        "samples": len(samples),
        **({"correct": int(samples["correct"].sum())} if verdicts else {}),
        "tasks": samples["task"].nunique(),
        **({"tasks_without_correct": int((gate["n_correct"] == 0).sum())} if verdicts else {}),
        "candidates": len(pool),
        "picks": len(picks),
    }
    return Advice(by, k, unit, picks.reset_index(drop=True), gate, expected, gains, counts, notes)


def _prepared(table: pd.DataFrame, by: str | None, notes: list[str]) -> tuple[pd.DataFrame, str]:
    """The columns that `ttkit.select` needs, checked; and the score."""
    if table.empty:
        raise UsageError("the table holds no samples")
    if "task" not in table:
        raise UsageError("the table lacks the column task, the name of each sample's task")
    # Where each score is read from: its own column, or one of log-probabilities.
    columns = {name: name for name in SCORES if name in table}
    for old, new in LOGPROBS.items():
        if old in table and columns.setdefault(new, old) != old:
            notes.append(f"{old} is left aside, since there is {columns[new]}")
    known = [name for name in SCORES if name in columns]
    if not known:
        wanted = ", ".join((*SCORES, *LOGPROBS))
        raise UsageError(f"the table has no score of the samples: give one of {wanted}")
    by = LOGPROBS.get(by, by) if by else known[0]
    if by not in known:
        raise UsageError(f"the table has no score {by!r}: it has {', '.join(known)}")
    _refuse(table, ~table["task"].map(_is_name), "task", "a name")
    score = _numbers(table, columns[by])
    if columns[by] in LOGPROBS:
        _refuse(table, score > 0, columns[by], "0 or less, as log-probabilities are")
        score = -score
    elif by.startswith("nll"):
        wanted = "0 or more (a log-probability goes into logprob_sum or logprob_mean)"
        _refuse(table, score < 0, by, wanted)
    samples = pd.DataFrame({"task": table["task"].astype(str), by: score})
    samples["index"] = _ids(table, samples["task"])
    samples["correct"] = _truths(table, notes)
    samples["speedup"] = _speedups(table, samples["correct"], "speedup")
    lower = "speedup_lo" if "speedup_lo" in table else "speedup"
    samples["speedup_lo"] = _speedups(table, samples["correct"], lower)
    above = samples["speedup_lo"] > samples["speedup"]
    _refuse(table, above, lower, "at most the speedup, whose lower end it is")
    if "speedup" in table and lower == "speedup":
        notes.append("without speedup_lo a sample counts as fast by its point estimate")
    code = table["code"] if "code" in table else samples["task"] + "\n" + samples["index"]
    _refuse(table, ~code.map(lambda c: isinstance(c, str)), "code", "text")
    samples["code_sha256"] = [hashlib.sha256(c.encode()).hexdigest() for c in code]
    if len(samples) == 1:
        raise UsageError("the table has one sample: there is nothing to select from")
    if not samples["correct"].any():
        raise UsageError(
            f"none of the {len(samples)} samples is correct: there is nothing to select from"
        )
    _name_tasks(samples, notes)
    return samples, by


def _name_tasks(samples: pd.DataFrame, notes: list[str]) -> None:
    by_task = samples.groupby("task", sort=False)["correct"].agg(["sum", "size"])
    without = list(by_task.index[by_task["sum"] == 0])
    alone = list(by_task.index[by_task["size"] == 1])
    if without:
        notes.append(f"no correct sample, so no pick: {_some(without)}")
    if alone:
        notes.append(f"one sample only, so no choice: {_some(alone)}")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{len(names)} tasks ({', '.join(names[:5])}{more})"


def _is_name(value: Any) -> bool:
    """Whether a cell can name something: text, or a number as files hold them; not nothing."""
    if isinstance(value, float):
        return bool(np.isfinite(value))
    return isinstance(value, str | int | np.integer) and type(value) is not bool and value != ""


def _is_number(value: Any) -> bool:
    number = isinstance(value, int | float | np.number)
    return number and not isinstance(value, bool | np.bool_)


def _float(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:  # a whole number that no float is near to
        return np.inf


def _refuse(table: pd.DataFrame, bad: pd.Series, name: str, wanted: str) -> None:
    if not bad.any():
        return
    at = bad[bad].index[0]
    value = table.loc[[at], name].tolist()[0] if name in table else None
    missing = value is None or (isinstance(value, float) and np.isnan(value))
    said = f"lacks {name}" if missing else f"has {name} = {value!r}"
    count = f"{int(bad.sum())} of {len(table)} rows are like it"
    raise UsageError(
        f"row {at} (task {table.loc[at, 'task']}) {said}: it must be {wanted}; {count}"
    )


def _numbers(table: pd.DataFrame, name: str) -> pd.Series:
    column = table[name]
    _refuse(table, ~(column.map(_is_number) | column.isna()), name, "a number")
    values = column.map(_float)
    _refuse(table, ~np.isfinite(values), name, "a finite number")
    return values


def _ids(table: pd.DataFrame, tasks: pd.Series) -> pd.Series:
    """The name of each sample within its task: `id`, else `index`, else its place there."""
    name = next((c for c in ("id", "index") if c in table), None)
    if name is None:
        return tasks.groupby(tasks).cumcount().astype(str)
    _refuse(table, ~table[name].map(_is_name), name, "a name")
    ids = table[name].astype(str)
    twice = pd.DataFrame({"task": tasks, "id": ids}).duplicated(keep="first")
    _refuse(table, twice, name, "another one for each sample of a task")
    return ids


def _truths(table: pd.DataFrame, notes: list[str]) -> pd.Series:
    if "correct" not in table:
        notes.append(
            "without the column correct all samples are ranked, broken ones too: the least likely "
            "samples are often broken, so verify first"
        )
        return pd.Series(True, table.index)
    text = table["correct"].map(lambda v: str(v).lower() if isinstance(v, str) else v)
    right = text.map(
        lambda v: TRUTHS.get(v) if isinstance(v, bool | np.bool_ | str | int | float) else None
    )
    _refuse(table, right.isna(), "correct", "true or false")
    return right.astype(bool)


def _speedups(table: pd.DataFrame, right: pd.Series, name: str) -> pd.Series:
    """Speedups of the correct samples; those of others mean nothing and are left out."""
    if name not in table:
        return pd.Series(1.0, table.index).where(right)
    numbers = table[name].where(table[name].map(_is_number)).map(_float, na_action="ignore")
    values = numbers.astype(float).where(right)
    _refuse(table, right & ~(np.isfinite(values) & (values > 0)), name, "positive where correct")
    return values


def _ranked(part: pd.DataFrame, by: str, k: int) -> pd.DataFrame:
    top = part.sort_values(by, ascending=False, kind="stable").head(k)
    return pd.DataFrame(
        {
            "task": top["task"],
            "rank": range(1, len(top) + 1),
            "row": top.index,
            "id": top["index"],
            "score": top[by],
            "tied": [int((part[by] == score).sum()) - 1 for score in top[by]],
        }
    )


def _gate_notes(gate: pd.DataFrame, by: str, notes: list[str]) -> None:
    spread = gate["std"].fillna(0.0)
    flat = list(gate["task"][spread < stats.NOISE])
    if flat:
        notes.append(f"{by} does not vary, so a pick is a draw: {_some(flat)}")
    if by == "nll_sum" and not gate["open"].all():
        closed = list(gate["task"][~gate["open"]])
        notes.append(f"std of nll_sum at or below {GATE:g}, so little to go by: {_some(closed)}")


def _gains(picks: pd.DataFrame, by: str, k: int, seed: int) -> pd.DataFrame:
    """k picks by surprisal against one, and against k at random: paired by task."""
    known = picks[picks["n_correct"] > 0].set_index(["strategy", "k", "task"]).sort_index()
    rows = []
    for name, other in (("1 pick", ("surprisal", 1)), (f"{k} at random", ("random", k))):
        mine, theirs = known.loc["surprisal", k], known.loc[other]
        fast = stats.bootstrap_mean(mine["fast_1"] - theirs["fast_1"], seed=seed)
        log = stats.bootstrap_mean(mine["log_speedup"] - theirs["log_speedup"], seed=seed)
        rows.append(
            {
                "against": name,
                "tasks": len(mine),
                **{f"fast_1_{end}": fast[end] for end in ("value", "lo", "hi")},
                **{f"speedup_{end}": float(np.exp(log[end])) for end in ("value", "lo", "hi")},
            }
        )
    return pd.DataFrame(rows)
