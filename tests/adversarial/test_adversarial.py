"""Every case of the suite, one verifier for all; and that the suite covers what it says."""

from __future__ import annotations

import ast

import pytest

from .case import CLASSES, Case
from .suite import CASES, GAPS, judged, lacking, table, too_busy, verifier


@pytest.fixture(scope="module")
def judge():
    with verifier() as v:
        yield v


@pytest.fixture(scope="module")
def device_judge():
    with verifier("cuda") as v:
        yield v


def params():
    for case in CASES:
        marks = [pytest.mark.gpu] if case.gpu else []
        if why := lacking(case):
            marks.append(pytest.mark.skip(reason=why))
        if case.id in GAPS:
            marks.append(pytest.mark.xfail(reason=GAPS[case.id], strict=False))
        yield pytest.param(case, id=case.id, marks=marks)


@pytest.mark.parametrize("case", list(params()))
def test_case(case: Case, request):
    judge = request.getfixturevalue("device_judge" if case.gpu else "judge")
    verdict = judged(judge, case)
    if too_busy(verdict):
        pytest.skip(verdict.reason)
    wanted = "correct" if case.honest else f"one of {sorted(case.expected)}"
    assert case.right(verdict), f"{wanted} was wanted, not {verdict}"


def test_every_class_has_two_cheats_and_a_look_alike():
    for number, name in CLASSES.items():
        cases = [case for case in CASES if case.number == number]
        assert sum(not case.honest for case in cases) >= 2, name
        assert any(case.honest for case in cases), name
    assert len({case.id for case in CASES}) == len(CASES)
    assert len({(case.task.code, case.source) for case in CASES}) == len(CASES)


def test_every_source_is_python_and_names_a_check():
    for case in CASES:
        ast.parse(case.source)
        assert case.honest != bool(case.expected) or case.no_gain, case.id


def test_the_table_has_a_line_for_every_case():
    page = table((case, None) for case in CASES)
    assert page.count("| | not run: ") == len(CASES)
