"""The verdict on one candidate: what came out, how fast it was, and on what grounds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

STATUSES = (
    "correct",
    "incorrect",
    "compile_error",
    "runtime_error",
    "timeout",
    "rejected",
    "infra_error",
)


@dataclass(frozen=True)
class Verdict:
    """What the verifier found out about one candidate.

    Times are milliseconds for one call of `forward`, the empty round trip subtracted; speedups are
    reference time over candidate time, with the interval that holds for the whole sequential
    procedure (95 % two-sided). What was not measured is nan. `pairs` keeps each raw trial as
    (reference_ms, candidate_ms). `checks` names every check that ran; the name of the one that
    failed is in `flags`, and a speedup measured before it failed does not count.
    `kernelbench_allclose` is about the outputs compared until then. `infra_error` never counts
    against the candidate.
    """

    status: str
    reason: str
    protocol: str = ""
    device: str = ""
    speedup: float = math.nan
    speedup_lo: float = math.nan
    speedup_hi: float = math.nan
    candidate_ms: float = math.nan
    reference_ms: float = math.nan
    n_pairs: int = 0
    flags: tuple[str, ...] = ()
    checks: tuple[str, ...] = ()
    pairs: tuple[tuple[float, float], ...] = ()
    max_error: float = math.nan
    reference_error: float = math.nan
    kernelbench_allclose: bool = False
    null_ms: float = math.nan
    limit_ms: float = math.nan
    guards: Mapping[str, Any] = field(default_factory=dict)
    contention: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = math.nan

    @property
    def correct(self) -> bool:
        return self.status == "correct"

    def fast(self, p: float = 1.0) -> bool:
        """Whether the candidate is correct and the lower end of its speedup interval exceeds p."""
        return self.correct and self.speedup_lo > p

    def to_dict(self) -> dict[str, Any]:
        """A dictionary that `json.dumps` takes; nan becomes None."""
        return {k: None if _is_nan(v) else v for k, v in asdict(self).items()} | {
            "correct": self.correct
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Verdict:
        """The inverse of `to_dict`, also after a way through JSON."""
        known = {f.name: f for f in fields(cls)}
        values = {k: v for k, v in data.items() if k in known}
        for name, value in values.items():
            if value is None:
                values[name] = math.nan
        for name in ("flags", "checks"):
            values[name] = tuple(values.get(name, ()))
        values["pairs"] = tuple((r, c) for r, c in values.get("pairs", ()))
        return cls(**values)


def _is_nan(value: object) -> bool:
    return isinstance(value, float) and math.isnan(value)
