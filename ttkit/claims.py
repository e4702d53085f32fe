"""The ledger: every published claim beside what a run measured, with a verdict and its rule.

A claim is a row of `data/paper_claims.csv`. `data/claim_rules.csv` says what has to be measured
for it, and which values would agree with it: a region around or on one side of a target. A stage
that measures a claim writes a `Finding`, with the interval of its value, into its table `findings`.

One rule serves all claims: HOLDS if the whole interval lies in the region, DIFFERS if no part of it
does, UNDERPOWERED if it reaches over the edge, NOT RUN if there is no finding. DIFFERS speaks of
this run: another model, other tasks and another evaluator may all be the reason.

A claim that needs several runs is measured by a sweep (`ttkit.findings_sweep`), whose folder lies
beside the run's; it counts for the run whose policy (stage 01) it started from.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import binomtest

from ttkit.errors import UsageError
from ttkit.store import read_manifest

HOLDS, DIFFERS, UNDERPOWERED, NOT_RUN = VERDICTS = ("HOLDS", "DIFFERS", "UNDERPOWERED", "NOT RUN")
RULES = {
    "level": "the interval lies within target ± margin",
    "below": "the interval lies below the target",
    "at_most": "the interval lies at or below the target",
    "sign": "the interval lies on the target's side of 0",
    "count": "the exact binomial interval of the share lies within target ± margin",
    "all_of": "all n are counted, and n is at least the target; one exception is enough to differ",
    "shape": "the shape is found in at least 95 % of bootstrap draws; in at most 5 % it differs",
    "exact": "the value is the target",
}
# How wide a band around a published level agrees with it. The paper states none: these are a choice
# of this package, made when the rules were written and before any run was judged by them.
MARGINS = {
    0.1: "ten points of a share, what one of the ten task-seed pairs behind the published table of "
    "strategies is worth; as much for correlations and for the mean speedup 0.87",
    0.05: "half of that, for the three claims of nearly all or of no difference",
    8.0: "half of the published m = 16",
}
# A bootstrap over fewer units than this does not deserve its name.
MIN_UNITS = 5
BASE_POLICY = "01_train_base_policy"
SHAPE_SHARE = 0.95
SHARES = ("correct_rate", "task_success", "sample_fast_1", "fast_1")
FINDING_COLUMNS = ("claim", "value", "lo", "hi", "n", "unit", "note")
LEDGER_COLUMNS = (
    *("claim", "section", "says", "metric", "published", "detail", "source"),
    *("measured", "rule", "target", "margin", "region_lo", "region_hi"),
    *("value", "lo", "hi", "n", "unit", "note", "stage", "verdict", "reason", "command"),
)


@dataclass(frozen=True)
class Finding:
    """One run's measurement of one claim.

    `value` is what the claim's `measured` text in `data/claim_rules.csv` says, `lo` and `hi` its
    95 % interval (nan where there is none), `n` the number of independent units behind it and
    `unit` what one of them is ("task", "learning rate"). A claim that could not be measured has a
    `value` of nan and a `note` that says why. Raises UsageError for an unknown claim, an interval
    whose ends are exchanged, or numbers that are none.
    """

    claim: str
    value: float
    lo: float = math.nan
    hi: float = math.nan
    n: int = 0
    unit: str = "task"
    note: str = ""

    def __post_init__(self) -> None:
        from ttkit.parameters import near

        known = list(load_claims()["id"])
        if self.claim not in known:
            raise UsageError(f"no claim is called {self.claim!r}{near(str(self.claim), known)}")
        for name in ("value", "lo", "hi"):
            number = getattr(self, name)
            # An interval may be open (a budget that no K reaches), a value may not.
            if isinstance(number, str | bool | None) or (name == "value" and math.isinf(number)):
                raise UsageError(f"the finding {self.claim} has {name} = {number!r}, not a number")
        if self.lo > self.hi:
            raise UsageError(
                f"the finding {self.claim} has an interval from {self.lo} to {self.hi}"
            )
        if self.n != int(self.n) or self.n < 0:
            raise UsageError(f"the finding {self.claim} has n = {self.n!r}, not a count of units")
        if math.isnan(self.value) and not self.note:
            raise UsageError(f"the finding {self.claim} has no value and no note that says why")


@dataclass(frozen=True)
class Verdict:
    """What a finding says of its claim, and why in one clause."""

    verdict: str
    reason: str


def load_claims() -> pd.DataFrame:
    """The published claims with their rules, one row a claim: columns id, section, claim, metric,
    published, detail, unit, source; rule, target, margin, measured, notebook, sweep (the name of
    the sweep that measures it, nan where a run does), command."""
    claims, rules = read_data("paper_claims"), read_data("claim_rules")
    return claims.merge(rules.astype({"notebook": str}), on="id", validate="one_to_one")


def read_data(name: str) -> pd.DataFrame:
    """The packaged table `ttkit/data/NAME.csv`."""
    with resources.files("ttkit").joinpath(f"data/{name}.csv").open() as file:
        return pd.read_csv(file, dtype={"notebook": str}, keep_default_na=True)


def not_reproduced() -> pd.DataFrame:
    """What of the article this package does not reproduce: columns what, why, instead."""
    return read_data("not_reproduced")


def findings(rows: Iterable[Finding]) -> pd.DataFrame:
    """The table `findings` of a stage. Raises UsageError if one claim is measured twice."""
    table = pd.DataFrame([asdict(row) for row in rows], columns=list(FINDING_COLUMNS))
    if (twice := table["claim"].duplicated()).any():
        raise UsageError(f"the claim {table['claim'][twice].iloc[0]} is measured twice")
    numbers = dict.fromkeys(("value", "lo", "hi"), "float64")
    return table.astype({**numbers, "n": "int64", "claim": str, "unit": str, "note": str})


def region(rule: str, target: float, margin: float = math.nan) -> tuple[float, float]:
    """The values, ends included, that agree with a claim. Raises UsageError for another rule."""
    if rule == "sign":
        tiny = float(np.nextafter(0, 1))  # 0 itself is on neither side
        return (tiny, math.inf) if target > 0 else (-math.inf, -tiny)
    if rule in ("level", "count"):
        return round(target - margin, 9), round(target + margin, 9)
    if rule in ("below", "at_most"):
        return -math.inf, target if rule == "at_most" else float(np.nextafter(target, -math.inf))
    if rule == "shape":
        return SHAPE_SHARE, 1.0
    if rule in ("exact", "all_of"):
        return target, target
    raise UsageError(f"unknown rule {rule!r}: it is one of {', '.join(RULES)}")


def judge(claim: pd.Series, finding: Finding) -> Verdict:
    """The verdict on a finding; `claim` is a row of `load_claims`. Rules: see `RULES`."""
    if math.isnan(finding.value):
        return Verdict(NOT_RUN, finding.note)
    value, n, rule = finding.value, finding.n, claim["rule"]
    if rule == "exact":
        same = value == claim["target"]
        return Verdict(HOLDS if same else DIFFERS, f"it is {value:g}, claimed {claim['target']:g}")
    if rule == "all_of":
        return _judge_all(value, n, claim["target"], finding.unit)
    if rule == "shape":
        said = f"the shape is found in {value:.0%} of the draws"
        if value >= SHAPE_SHARE or value <= 1 - SHAPE_SHARE:
            return _few(n, finding.unit) or Verdict(HOLDS if value > 0.5 else DIFFERS, said)
        return Verdict(UNDERPOWERED, said)
    lo, hi = _interval(claim, finding)
    if math.isnan(lo) or math.isnan(hi):
        return Verdict(UNDERPOWERED, "its value has no interval")
    if few := _few(n, finding.unit):
        return few
    low, high = region(rule, claim["target"], claim["margin"])
    said = f"[{lo:.3g}, {hi:.3g}]"
    wanted = _region_text(rule, claim["target"], claim["margin"])
    if low <= lo and hi <= high:
        return Verdict(HOLDS, f"{said} lies {wanted}")
    if hi < low or lo > high:
        return Verdict(DIFFERS, f"{said} does not lie {wanted}")
    return Verdict(UNDERPOWERED, f"{said} lies only in part {wanted}; n = {n}")


def _judge_all(value: float, n: int, wanted: float, unit: str) -> Verdict:
    said = f"{value:g} of {n} {unit}s"
    if value < n:
        return Verdict(DIFFERS, f"{said}: not all")
    if n < wanted:
        return Verdict(UNDERPOWERED, f"{said}; the claim is of {wanted:g}")
    return Verdict(HOLDS, said)


def _few(n: int, unit: str) -> Verdict | None:
    if n >= MIN_UNITS:
        return None
    return Verdict(UNDERPOWERED, f"n = {n} ({unit}): an interval needs {MIN_UNITS} at least")


def _interval(claim: pd.Series, finding: Finding) -> tuple[float, float]:
    """The finding's interval; for a count, the exact one of its share.

    Where all units agree, resampling them gives an interval without width. Shares get the rule of
    three then: what was never seen in n units may have a share of 3 / n (Hanley and
    Lippman-Hand 1983).
    """
    lo, hi, n = finding.lo, finding.hi, finding.n
    if claim["rule"] == "count":
        if not 0 <= finding.value <= n or n == 0:
            return math.nan, math.nan
        exact = binomtest(round(finding.value), n).proportion_ci(0.95)
        return float(exact.low), float(exact.high)
    if lo == hi and claim["unit"] == "fraction" and n:
        lo, hi = lo - 3 / n, hi + 3 / n
        if claim["metric"] in SHARES and claim["rule"] == "level" and claim["target"] > 0:
            lo, hi = max(lo, 0.0), min(hi, 1.0)
    return lo, hi


def _region_text(rule: str, target: float, margin: float) -> str:
    if rule == "sign":
        return "above 0" if target > 0 else "below 0"
    if rule in ("below", "at_most"):
        return f"below {target:g}" if rule == "below" else f"at or below {target:g}"
    band = f"{target - margin:.3g} to {target + margin:.3g}"
    return f"within {band} ({target:g} ± {margin:g})"


# --- a run --------------------------------------------------------------------------------------


def gather(run_dir: str | Path) -> pd.DataFrame:
    """The findings of all complete stages of a run, and of the sweeps beside it that started from
    its policy: FINDING_COLUMNS and `stage` (of a sweep "sweep <name>").

    Raises UsageError for a folder that is no run and for a table `findings` that is malformed.
    """
    run_dir = Path(run_dir)
    stages = sorted(path for path in run_dir.glob("[0-9][0-9]_*") if path.is_dir())
    if not stages:
        raise UsageError(f"{run_dir} holds no run: `ttkit run` makes one")
    done = [stage for stage in stages if (stage / "DONE").is_file()]
    paths = {stage.name: stage / "findings.parquet" for stage in done}
    for name, path in sweep_tables(run_dir).items():
        if _same_policy(run_dir, path.parent):
            paths[f"sweep {name}"] = path
    return _read_all(paths)


def sweep_tables(run_dir: str | Path) -> dict[str, Path]:
    """Where the findings of each sweep that measures a claim lie, or would lie, beside a run."""
    return {
        name: Path(run_dir).parent / name / "findings.parquet"
        for name in load_claims()["sweep"].dropna().unique()
    }


def _read_all(paths: dict[str, Path]) -> pd.DataFrame:
    tables = []
    for stage, path in paths.items():
        if not path.is_file():
            continue
        try:
            table = pd.read_parquet(path)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0].rstrip(".")
            raise UsageError(
                f"{path} cannot be read ({reason}): remove it and run its notebook again"
            ) from None
        if set(table) != set(FINDING_COLUMNS):
            raise UsageError(
                f"{path} must have the columns {', '.join(FINDING_COLUMNS)}; it has "
                f"{', '.join(map(str, table))}"
            )
        rows = [Finding(**row) for row in table.to_dict("records")]
        tables.append(findings(rows).assign(stage=stage))
    if not tables:
        return findings([]).assign(stage=pd.Series(dtype=str))
    return pd.concat(tables, ignore_index=True)


def _same_policy(run_dir: Path, sweep: Path) -> bool:
    """Whether every point of the sweep holds the adapter of the run's base policy."""
    try:
        points = json.loads((sweep / "sweep.json").read_text())["points"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    mine = _policy(run_dir)
    return mine is not None and all(_policy(sweep / point) == mine for point in points)


def _policy(run_dir: Path) -> object:
    return ((read_manifest(run_dir / BASE_POLICY) or {}).get("outputs") or {}).get("adapter")


def ledger(run_dir: str | Path, found: pd.DataFrame | None = None) -> pd.DataFrame:
    """Every published claim with the run's finding and its verdict: LEDGER_COLUMNS, one row each.

    `found` is `gather(run_dir)` unless given. Where two stages measured one claim, the stage that
    the rules name counts. `command` is what would measure the claim, in this run, again or at all.
    """
    run_dir = Path(run_dir)
    found = gather(run_dir) if found is None else found
    here = Path.cwd()
    shown = run_dir.relative_to(here) if run_dir.is_relative_to(here) else run_dir
    rows = []
    for _, claim in load_claims().iterrows():
        mine = found[found["claim"] == claim["id"]]
        owner = mine["stage"].str.startswith(claim["notebook"])
        mine = mine[owner] if owner.any() else mine
        low, high = region(claim["rule"], claim["target"], claim["margin"])
        row = {
            "claim": claim["id"],
            "says": claim["claim"],
            **claim[["section", "metric", "published", "detail", "source"]].fillna("").to_dict(),
            **claim[["measured", "rule", "target", "margin"]].to_dict(),
            "region_lo": low,
            "region_hi": high,
            "command": claim["command"].format(run=shown),
        }
        if mine.empty:
            row |= dict.fromkeys(("value", "lo", "hi"), math.nan) | {"n": 0}
            row |= {"unit": "", "note": "", "stage": ""}
            outcome = Verdict(NOT_RUN, _why_not_run(run_dir, claim))
        else:
            last = mine.iloc[-1]
            outcome = judge(claim, Finding(**last[list(FINDING_COLUMNS)].to_dict()))
            row |= last.drop("claim").to_dict()
        rows.append(row | asdict(outcome))
    return pd.DataFrame(rows)[list(LEDGER_COLUMNS)]


def _why_not_run(run_dir: Path, claim: pd.Series) -> str:
    notebook, sweep = claim["notebook"], claim["sweep"]
    if isinstance(sweep, str):
        folder = run_dir.parent / sweep
        if not (folder / "findings.parquet").is_file():
            return f"the sweep {sweep} has not been run beside this run"
        if not _same_policy(run_dir, folder):
            return f"the sweep {sweep} beside this run started from another policy"
        return f"the sweep {sweep} did not measure it"
    stage = next((path for path in run_dir.glob(f"{notebook}_*") if path.is_dir()), None)
    if stage is None or not (stage / "DONE").is_file():
        return f"notebook {notebook} is not complete in this run"
    return f"notebook {notebook} did not measure it with these parameters"


def display(table: pd.DataFrame) -> pd.DataFrame:
    """The ledger as people read it: columns claim, says, published, measured, n, verdict, why."""
    return pd.DataFrame(
        {
            "claim": table["claim"],
            "says": table["says"],
            "published": [
                f"{row.published:g}{f' ({row.detail})' if row.detail else ''}"
                for row in table.itertuples()
            ],
            "measured": [_measured_text(row.value, row.lo, row.hi) for row in table.itertuples()],
            "n": [f"{row.n} {row.unit}" if row.n else "" for row in table.itertuples()],
            "verdict": table["verdict"],
            "why": table["reason"],
        }
    )


def _measured_text(value: float, lo: float, hi: float) -> str:
    if math.isnan(value):
        return ""
    return f"{value:.3g}" + ("" if math.isnan(lo) else f" [{lo:.3g}, {hi:.3g}]")
