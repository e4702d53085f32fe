"""What notebooks 02, 04, 05 and 06 measure of the published claims: from tables to `Finding` rows.

One unit is one task throughout. What the table at hand cannot answer is a finding without a value,
and says why.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from ttkit import prefilter, select, stats
from ttkit.claims import Finding

NEED_PICKS = (
    *("sel_oracle", "sel_surprisal_top3", "sel_surprisal", "sel_random", "sel_confidence"),
    *("sel_gap", "len_partial", "quartile_shape", "prefilter_m5", "prefilter_cross"),
)
SUBSET = 5  # the paper's subset 1: the first five evaluation tasks


def best_of_n(
    samples: pd.DataFrame, tasks: Sequence[str], bootstrap: int = 1000, seed: int = 0
) -> list[Finding]:
    """The claims rlvr_*, bon_* and logprob_std from one temperature's samples (notebook 02).

    `tasks` are the evaluation tasks in the order of the split, whose first five are subset 1.
    Success is by the interval rule, budgets are averaged over subsets of the K samples.
    """
    note = f"{_where(samples)}; the paper's is 0.25"
    curve = stats.scaling_curve(samples, "task_success", bootstrap, seed)
    at, n, largest = curve.table.set_index("k"), len(tasks), int(curve.table["k"].max())
    by_task = samples.groupby("task")["correct"].mean()
    right = samples[samples["correct"]].groupby("task")["speedup"].mean()
    found = [
        _mean("rlvr_correct", by_task.astype(float), note, bootstrap, seed),
        _mean("rlvr_speedup", right, f"{note}; mean of the tasks' means", bootstrap, seed),
    ]
    for k in (1, 2, 4, 8):
        if k > largest:
            found.append(_unknown(f"bon_k{k}", f"only {largest} samples a task were drawn"))
        else:
            found.append(Finding(f"bon_k{k}", *_ends(at.loc[k]), n, "task", note))
    if largest < 64:
        said = f"only {largest} samples a task were drawn, 64 are needed"
        return found + [
            *(_unknown(name, said) for name in ("bon_k16", "bon_k64", "bon_k64_all")),
            _gate(samples, note),
        ]
    draws = curve.draws(bootstrap, seed)
    with np.errstate(invalid="ignore"):  # a draw of tasks without any success has no share
        share = stats.interval(draws[:, 15] / draws[:, 63])
    value = at.loc[16, "value"] / at.loc[64, "value"] if at.loc[64, "value"] else math.nan
    first = samples[samples["task"].isin(tasks[:SUBSET])]
    five = stats.scaling_curve(first, "task_success", bootstrap, seed).table.set_index("k").loc[64]
    return found + [
        Finding("bon_k16", value, share["lo"], share["hi"], n, "task", note)
        if value == value
        else _unknown("bon_k16", "no task has a fast sample"),
        Finding("bon_k64", *_ends(five), min(SUBSET, n), "task", note),
        Finding("bon_k64_all", *_ends(at.loc[64]), n, "task", note),
        _gate(samples, note),
    ]


def selection(
    samples: pd.DataFrame,
    picks: pd.DataFrame,
    key: str = "nll_sum",
    bootstrap: int = 1000,
    seed: int = 0,
) -> list[Finding]:
    """The claims of the sections selection, prefilter and cost from one temperature's samples.

    `picks` are those of `select.select` with the k 1 and 3. By the interval rule; `key` is the
    convention.
    """
    note = f"{key}, interval rule, {_where(samples)}"
    right = samples[samples["correct"].astype(bool)]
    if len(right) < 4:
        said = f"the table has {len(right)} correct samples"
        return [*(_unknown(name, said) for name in NEED_PICKS), _cost(samples)]

    def fast(strategy: str, k: int = 1) -> pd.Series:
        wanted = "" if strategy in ("oracle", "random") else key
        part = picks[(picks["strategy"] == strategy) & (picks["key"] == wanted)]
        return part[(part["k"] == k) & (part["n_correct"] > 0)].set_index("task")["fast_1"]

    def partial(part: pd.DataFrame) -> float:
        return stats.partial_spearman(-part[key], part["speedup"], part["n_tokens"])["rho"]

    values = {
        "sel_oracle": fast("oracle"),
        "sel_surprisal_top3": fast("surprisal", 3) - fast("oracle"),
        "sel_surprisal": fast("surprisal"),
        "sel_random": fast("random"),
        "sel_confidence": fast("confidence"),
        "sel_gap": fast("surprisal") - fast("confidence"),
    }
    # What as many correct samples at random reach: the part that is not due to surprisal.
    top = {name: f"{fast(name, 3).mean():.0%}" for name in ("surprisal", "random")}
    said = f"surprisal top 3 {top['surprisal']}, random top 3 {top['random']}"
    notes = {"sel_surprisal_top3": f"{note}; {said}"}
    found = [
        _mean(name, value, notes.get(name, note), bootstrap, seed) for name, value in values.items()
    ]
    rho = stats.clustered_bootstrap(right, partial, min(bootstrap, 200), seed)
    tasks = right["task"].nunique()
    if math.isnan(rho["value"]):
        found.append(_unknown("len_partial", "one of the three columns does not vary"))
    else:
        found.append(Finding("len_partial", *_ends(rho), tasks, "task", f"{note}, tasks resampled"))
    table = select.quartiles(samples, key, 10, seed)
    said = ", ".join(f"{row.quartile} {row.fast_1:.0%}" for row in table.itertuples())
    shape = select.quartile_shape(samples, key, "interval", bootstrap, seed)
    found.append(Finding("quartile_shape", shape, n=tasks, note=f"{said} ({note})"))
    return [*found, *_before(samples, key, note, bootstrap, seed), _cost(samples)]


def _before(samples: pd.DataFrame, key: str, note: str, bootstrap: int, seed: int) -> list[Finding]:
    table = prefilter.by_task(samples, key=key)
    wide = table.pivot(index=["strategy", "task"], columns="m", values="success")
    if 5 in wide:
        gap = (wide.loc["surprisal"] - wide.loc["random"])[5]
        found = [_mean("prefilter_m5", gap, note, bootstrap, seed)]
    else:
        found = [_unknown("prefilter_m5", f"only {wide.columns.max()} samples a task were drawn")]
    cross = prefilter.crossover(table, bootstrap=bootstrap, seed=seed)
    if math.isnan(cross["m"]):
        said = f"surprisal is never ahead of random up to m = {wide.columns.max()}"
        return [*found, _unknown("prefilter_cross", said)]
    said = f"{note}; without a crossover in {cross['never']:.0%} of the draws"
    tasks = samples["task"].nunique()
    # A share of draws without a crossover lies beyond every m: the interval is open upwards then.
    high = cross["hi"] if cross["never"] < 0.025 else float(wide.columns.max())
    return [*found, Finding("prefilter_cross", cross["m"], cross["lo"], high, tasks, "task", said)]


def _cost(samples: pd.DataFrame) -> Finding:
    said = "by construction: selection draws no sample and asks no model; to time its picks again "
    said += "costs no token"
    return Finding("cost_zero", 0.0, n=samples["task"].nunique(), note=said)


def over_sharpening(table: pd.DataFrame) -> list[Finding]:
    """The claims probe_* from the table of `ttkit.probe.by_step` (notebook 05).

    Two are of the first step, two of the change since then, with the paired interval. The unit is a
    task, since tasks are what the intervals resample.
    """
    at = table.set_index(["subset", "step"]).sort_index()
    first, last = int(table["step"].min()), int(table["step"].max())
    quarter = at.loc["Q1", "value"]
    deepest = int(quarter.idxmin()) if quarter.notna().any() else last
    level, change = ("value", "lo", "hi"), ("change", "change_lo", "change_hi")
    found = []
    for claim, subset, step, columns, of in (
        ("probe_rho0", "all", first, level, "rho"),
        ("probe_rho8", "all", last, change, "its change"),
        ("probe_q0", "Q1", first, level, "rho of the least likely quarter"),
        ("probe_q3", "Q1", deepest, change, "its change there"),
    ):
        row, begun = at.loc[(subset, step)], at.loc[(subset, first)]
        note = f"{of} at step {step} of {last}"
        if columns is change:
            note += f", from {begun['value']:.3f} to {row['value']:.3f}"
        if claim == "probe_q3":
            note += ", the deepest, chosen as such, which favours the claim"
        note += f"; {row['n']:.0f} samples, rho undefined in {row['undefined']:.0%} of the draws; "
        note += "incorrect samples have speedup 0"
        value, low, high = (float(row[name]) for name in columns)
        found.append(Finding(claim, value, low, high, int(row["tasks"]), "task", note))
    return found


def transfer(pairs: pd.DataFrame, names: Sequence[str], step: int) -> list[Finding]:
    """The claims transfer_* from the paired differences of notebook 06.

    `names` are the subsets in order; `pairs` has the rows of `ttkit.transfer.paired` with the
    columns policy ("adapted on subset 1") and evaluated ("subset 2").
    """
    found = []
    for one, other in ((1, 2), (2, 1)):
        policy, place = f"adapted on {names[one - 1]}", names[other - 1]
        rows = pairs[(pairs["policy"] == policy) & (pairs["evaluated"] == place)]
        row = rows[rows["metric"] == "sample fast_1"].iloc[0]
        note = f"adapted {row['adapted']:.3f}, unadapted {row['unadapted']:.3f}, {row['n']} and "
        note += f"{row['k']} samples a task; sign-flip p {row['p']:.2g}; step {step}"
        value, low, high = (float(row[name]) for name in ("difference", "lo", "hi"))
        claim = f"transfer_{one}{other}"
        found.append(Finding(claim, value, low, high, int(row["tasks"]), "task", note))
    return found


def _gate(samples: pd.DataFrame, note: str) -> Finding:
    gate = select.variance_gate(samples)
    return Finding("logprob_std", float(gate["open"].sum()), n=len(gate), note=note)


def _mean(name: str, values: pd.Series, note: str, bootstrap: int, seed: int) -> Finding:
    if values.empty:
        return _unknown(name, "no task has a correct sample")
    found = stats.bootstrap_mean(values, bootstrap, seed)
    return Finding(name, *_ends(found), len(values), "task", note)


def _unknown(name: str, why: str) -> Finding:
    return Finding(name, math.nan, note=why)


def _ends(row: pd.Series | dict[str, float]) -> tuple[float, float, float]:
    return float(row["value"]), float(row["lo"]), float(row["hi"])


def _where(samples: pd.DataFrame) -> str:
    return f"temperature {', '.join(f'{t:g}' for t in samples['temperature'].unique())}"
