"""A verdict in plain words; what real candidates lead to is in test_cli.py."""

import math
import re
from pathlib import Path

import pytest

from ttkit.verify import Verdict
from ttkit.verify.explain import GUARDS, INPUTS, demand, explain
from ttkit.verify.protocol import VARIATION_NAMES

ROOT = Path(__file__).parent.parent
CORRECT = Verdict(
    "correct",
    "correct",
    protocol="rigorous",
    device="cuda",
    speedup=1.25,
    speedup_lo=1.2,
    speedup_hi=1.3,
    candidate_ms=0.4,
    reference_ms=0.5,
    n_pairs=24,
    checks=("values_declared", "values_timed", "relaunched", "relaunched", "a_new_check"),
    max_error=2e-7,
    reference_error=1e-7,
    kernelbench_allclose=True,
    limit_ms=0.1,
    guards={"network_namespace": True, "memory_limit": False},
    contention={
        "load_average": 9.5,
        "cores": 2,
        "busy": True,
        "stolen_seconds": 0.31,
        "gpu_state": "0x0000000000000004, 1980 MHz, 41",
        "gpu_processes": 3,
    },
)


def changed(**fields):
    return Verdict(**{**vars(CORRECT), **fields})


def test_every_fact_of_a_correct_candidate_has_a_line():
    lines = explain(CORRECT).splitlines()
    assert max(map(len, lines)) <= 80
    for line in (
        "speedup         1.250x, 95 % interval 1.200x to 1.300x",
        "measured        24 pairs of runs",
        "reference       0.5 ms",
        "candidate       0.4 ms",
        "physical limit  0.1 ms to read the inputs once; the candidate takes 4 times that",
        "KernelBench     within its tolerance, on the inputs that were compared here",
        "measured by     protocol rigorous on cuda",
        "guards on       no network",
        "guards off      limited memory",
        "checks          4 ran",
        "  a_new_check           a new check",
    ):
        assert line in lines
    shared = (
        "load average 9.5 on 2 cores (busy); 0.31 s taken by the host of this virtual machine; "
        "3 processes on the GPU; its throttling, clock"
    )
    assert shared in re.sub(r"\s+", " ", explain(CORRECT))


@pytest.mark.parametrize(
    ("fields", "meaning"),
    [
        ({}, "right values, and faster: the whole interval is above 1"),
        ({"speedup_lo": 1.0}, "right values, but not shown to be faster: the interval reaches 1"),
        ({"speedup_lo": 0.5, "speedup_hi": 0.9}, "right values, but slower"),
        ({"speedup_lo": math.nan, "speedup_hi": math.nan}, "this protocol cannot tell"),
        ({"status": "timeout"}, "it took too long"),
        ({"status": "infra_error"}, "says nothing of the candidate"),
    ],
)
def test_the_meaning_follows_from_status_and_interval(fields, meaning):
    assert meaning in re.sub(r"\s+", " ", explain(changed(**fields)))


def test_the_speedup_of_a_cheat_does_not_count():
    text = explain(changed(status="rejected", reason="too late", flags=("deferred_work",)))
    assert "failed check    deferred_work\n" in text and "evidence        too late\n" in text
    assert "1.200x to 1.300x; it does not count\n" in text
    assert "checks          4 ran; deferred_work failed\n" in text


def test_kernelbench_is_quoted_only_where_values_were_compared():
    nothing = {"max_error": math.nan, "kernelbench_allclose": False, "status": "runtime_error"}
    assert "no values were compared" in explain(changed(**nothing, flags=("exception",)))
    # An error that is not finite is not in the verdict.
    wrong = nothing | {"status": "incorrect", "flags": ("values_declared",)}
    assert "outside its tolerance" in explain(changed(**wrong))
    assert "none is known" in explain(changed(limit_ms=0.0))


def test_the_line_that_an_error_names_is_shown_and_cannot_steer_the_terminal():
    error = changed(status="runtime_error", reason="ValueError: \x1b[2J no (line 2) (on inputs)")
    text = explain(error, "def f(x):\n    return g(x)\n")
    assert "that line       return g(x)\n" in text and "\x1b" not in text
    assert "that line" not in explain(error, "def f(x): pass\n")


def test_every_check_and_guard_has_plain_words():
    assert set(VARIATION_NAMES) <= set(INPUTS)
    found = re.findall(r"\| ([a-z_]+) \| \w+ \|$", (ROOT / "docs/adversarial.md").read_text(), re.M)
    source = "".join(p.read_text() for p in (ROOT / "ttkit/verify").glob("*.py"))
    raised = re.findall(r'raise Outcome\([^()]*?"([a-z_]+)"\s*,?\s*\)', source)
    names = {*found, *raised} - {"check"}
    assert len(names) > 15
    assert [name for name in sorted(names) if demand(name) == name.replace("_", " ")] == []
    guards = set(re.findall(r'active\["(\w+)"\]', (ROOT / "ttkit/verify/limits.py").read_text()))
    assert {"network_namespace", "system_call_filter"} <= guards <= set(GUARDS)
