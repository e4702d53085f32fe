"""Best-of-N (paper section 4.1): draw K samples a task, run and time every one, keep the table.

One sampling pass at the largest K serves every smaller budget: the curves in `ttkit.stats` are
unbiased estimates from subsets of it. The samples and the verdicts are journaled as they come, so
a killed run continues where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, Protocol

import pandas as pd

from ttkit import prompts, stats
from ttkit.errors import InfraError
from ttkit.sampling import Completion, Sampler, SamplingParams
from ttkit.tasks import Task
from ttkit.verify import Verdict, Verifier

Progress = Callable[[str, int, int], None]

VERDICT_COLUMNS = (
    "status",
    "correct",
    "speedup",
    "speedup_lo",
    "speedup_hi",
    "candidate_ms",
    "reference_ms",
    "n_pairs",
    "flags",
    "reason",
    "protocol",
)
SPEEDUP = ("speedup", "speedup_lo", "speedup_hi")
MEASURED = (*SPEEDUP, "candidate_ms", "reference_ms")
AGAIN = {
    "speedup": "again_speedup",
    "speedup_lo": "again_lo",
    "speedup_hi": "again_hi",
    "status": "again_status",
}


class RowJournal(Protocol):
    """What is needed of `ttkit.store.Journal`: rows that survive a kill."""

    @property
    def rows(self) -> list[dict[str, Any]]: ...

    def append(self, rows: Sequence[dict[str, Any]]) -> object: ...


def best_of_n(
    tasks: Sequence[Task],
    sampler: Sampler,
    verifier: Verifier,
    params: SamplingParams,
    *,
    samples_journal: RowJournal,
    verdicts_journal: RowJournal,
    run: str,
    arm: str = "best_of_n",
    step: int = 0,
    prompt_style: str = "full",
    action: str = "body",
    tasks_per_batch: int = 4,
    progress: Progress = lambda label, done, total: None,
) -> pd.DataFrame:
    """`params.n` samples of each task, judged: one row a sample (columns of `samples.parquet`).

    What the journals already hold for this arm, step and temperature is not done again. Batches
    are cut from the whole list of tasks, so that a continued run draws the samples that an
    uninterrupted one would have drawn.
    """
    rows = sample(
        tasks,
        sampler,
        params,
        journal=samples_journal,
        run=run,
        arm=arm,
        step=step,
        prompt_style=prompt_style,
        action=action,
        tasks_per_batch=tasks_per_batch,
        progress=progress,
    )
    verdicts = judge(tasks, rows, verifier, verdicts_journal, action=action, progress=progress)
    return rows.merge(verdicts, on=["task", "code_sha256"], how="left", validate="many_to_one")


def sample(
    tasks: Sequence[Task],
    sampler: Sampler,
    params: SamplingParams,
    *,
    journal: RowJournal,
    run: str,
    arm: str,
    step: int,
    prompt_style: str,
    action: str,
    tasks_per_batch: int,
    progress: Progress,
) -> pd.DataFrame:
    """The sampling half of `best_of_n`: the columns up to `finish_reason`."""
    identity = {"arm": arm, "step": step, "temperature": params.temperature}

    def mine(row: dict[str, Any]) -> bool:
        return all(row[name] == value for name, value in identity.items())

    have = {row["task"] for row in journal.rows if mine(row)}
    label = f"sampling at temperature {params.temperature:g}"
    for start in range(0, len(tasks), tasks_per_batch):
        batch = tasks[start : start + tasks_per_batch]
        if not all(task.key in have for task in batch):
            chats = [prompts.messages(task, prompt_style, action) for task in batch]
            drawn = sampler.sample(chats, params)
            rows = sample_rows(batch, drawn, {"run": run, **identity, "seed": params.seed}, action)
            journal.append([row for row in rows if row["task"] not in have])
        progress(label, start + len(batch), len(tasks))
    keys = {task.key for task in tasks}
    return pd.DataFrame([row for row in journal.rows if mine(row) and row["task"] in keys])


def sample_rows(
    tasks: Sequence[Task],
    drawn: Sequence[Sequence[Completion]],
    identity: dict[str, Any],
    action: str,
) -> list[dict[str, Any]]:
    """`drawn[i]`, the completions of task i, as rows of a samples table that start with `identity`.

    They end at `finish_reason`: what comes of running the code is not known yet.
    """
    return [
        {
            **identity,
            "task": task.key,
            "index": index,
            "code": (code := prompts.extract(completion.text, action)),
            "code_sha256": prompts.code_sha256(code),
            **{k: v for k, v in asdict(completion).items() if k not in ("token_ids", "logps")},
            "token_ids": list(completion.token_ids),
        }
        for task, completions in zip(tasks, drawn, strict=True)
        for index, completion in enumerate(completions)
    ]


def judge(
    tasks: Sequence[Task],
    samples: pd.DataFrame,
    verifier: Verifier,
    journal: RowJournal,
    *,
    action: str = "body",
    progress: Progress = lambda label, done, total: None,
    fresh: bool = False,
) -> pd.DataFrame:
    """Verdicts on the distinct candidates of `samples`: one row for each task and `code_sha256`.

    With `fresh` the verifier's cache is left out. A speedup that was measured before the candidate
    failed is left out too. An `infra_error` is in the table but not in the journal, so that a
    continued run tries again.
    Raises InfraError when every candidate ended so: a table of such rows would say nothing.
    """
    by_key = {task.key: task for task in tasks}
    distinct = samples.drop_duplicates(["task", "code_sha256"])[["task", "code", "code_sha256"]]
    have = {(row["task"], row["code_sha256"]) for row in journal.rows}
    todo = [row for row in distinct.itertuples() if (row.task, row.code_sha256) not in have]
    failed: list[dict[str, Any]] = []
    done = len(distinct) - len(todo)

    def keep(position: int, verdict: Verdict) -> None:
        nonlocal done
        sample, measured = todo[position], verdict.to_dict()
        row = {"task": sample.task, "code_sha256": sample.code_sha256}
        row |= {name: measured[name] for name in VERDICT_COLUMNS}
        if not verdict.correct:
            row |= dict.fromkeys(SPEEDUP)
        if verdict.status == "infra_error":
            failed.append(row)
        else:
            journal.append([row])
        done += 1
        progress(label, done, len(distinct))

    label = "timing candidates again" if fresh else "running and timing candidates"
    progress(label, done, len(distinct))
    items = [
        (by_key[row.task], prompts.candidate_source(by_key[row.task], row.code, action))
        for row in todo
    ]
    verifier.verify_many(items, on_verdict=keep, fresh=fresh)
    wanted = {(row.task, row.code_sha256) for row in distinct.itertuples()}
    kept = [row for row in journal.rows if (row["task"], row["code_sha256"]) in wanted]
    if failed and not kept:
        raise InfraError(
            f"none of the {len(failed)} candidates could be judged; the first: "
            f"{failed[0]['reason']}"
        )
    # JSON has no nan, so what was not measured comes back as None.
    return pd.DataFrame(kept + failed).astype(dict.fromkeys(MEASURED, float))


def confirm_winners(
    samples: pd.DataFrame,
    tasks: Sequence[Task],
    verifier: Verifier,
    journal: RowJournal,
    *,
    action: str = "body",
    progress: Progress = lambda label, done, total: None,
) -> pd.DataFrame:
    """The oracle's picks measured a second time, by themselves: do their figures last?

    The largest of many noisy figures is too large on average (the winner's curse), so a winner is
    reported by a measurement that did not choose it. Picks are, for each temperature and task, the
    correct sample of the largest speedup, where the lower end of its interval exceeds 1. Columns:
    temperature, task, sample (its index), speedup and speedup_lo at first; again_speedup, again_lo,
    again_hi and again_status (a status of Verdict) the second time. Journaled as in `judge`, by
    task and code_sha256, in a journal of its own.
    """
    right = samples[samples["correct"] & samples["speedup"].notna()]
    best = right.loc[right.groupby(["temperature", "task"])["speedup"].idxmax()]
    picks = best[best["speedup_lo"] > 1]
    first = picks.rename(columns={"index": "sample"})
    first = first[["temperature", "task", "sample", "speedup", "speedup_lo", "code_sha256"]]
    if picks.empty:
        return first.drop(columns="code_sha256").assign(
            again_speedup=0.0, again_lo=0.0, again_hi=0.0, again_status=""
        )
    verdicts = judge(
        tasks, picks, verifier, journal, action=action, progress=progress, fresh=True
    ).rename(columns=AGAIN)
    second = verdicts[["task", "code_sha256", *AGAIN.values()]]
    merged = first.merge(second, on=["task", "code_sha256"], how="left", validate="many_to_one")
    return merged.drop(columns="code_sha256")


def shrinkage(winners: pd.DataFrame) -> str:
    """What became of the figures of `confirm_winners`, in one sentence."""
    if winners.empty:
        return "Winners measured again: none, for no task's best sample is surely faster."
    fast = (winners["again_status"] == "correct") & (winners["again_lo"] > 1)
    ratios = (winners["again_speedup"] / winners["speedup"]).dropna()
    text = f"Winners measured again: {fast.sum()} of {len(winners)} are fast again"
    if len(ratios):
        mean = stats.geometric_mean(ratios)
        text += f"; again over first {mean:.2f} (geometric mean, n = {len(ratios)})"
    return f"{text}."
