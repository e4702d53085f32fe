"""`python -m tests.adversarial`: run the suite and write docs/adversarial.md.

With words after it, only the cases whose id contains one of them run, and nothing is written.
Exit status 1 when a case did not come out as it must.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from ttkit.verify import Verdict

from .case import Case
from .suite import CASES, judged, lacking, table, verifier

PAGE = Path(__file__).resolve().parents[2] / "docs" / "adversarial.md"


def main(words: list[str]) -> int:
    """Run the cases in order, one line each."""
    chosen = [c for c in CASES if not words or any(word in c.id for word in words)]
    results: list[tuple[Case, Verdict | None]] = []
    for device in ("cuda", "cpu"):
        here = [c for c in chosen if c.gpu == (device == "cuda") and not lacking(c)]
        if here:
            with verifier(device) as v:
                for case in here:
                    results.append((case, judged(v, case)))
                    _say(*results[-1])
    for case in filter(lacking, chosen):
        results.append((case, None))
        _say(case, None)
    results.sort(key=lambda result: CASES.index(result[0]))
    if not words:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(table(results))
    return int(any(verdict and not case.right(verdict) for case, verdict in results))


def _say(case: Case, verdict: Verdict | None) -> None:
    if verdict is None:
        print(f"skip  {case.id}: {lacking(case)}", flush=True)
        return
    mark = "ok   " if case.right(verdict) else "WRONG"
    flags = f" [{', '.join(verdict.flags)}]" if verdict.flags else ""
    said = f"{verdict.status}{flags} {verdict.seconds:.2f} s: {verdict.reason}"
    print(f"{mark} {case.id}: {said}", flush=True)


if __name__ == "__main__":
    started = time.monotonic()
    status = main(sys.argv[1:])
    print(f"{time.monotonic() - started:.0f} s")
    sys.exit(status)
