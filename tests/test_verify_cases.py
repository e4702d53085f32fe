"""The referee's cases: what is kept, what is made anew, what stands in where memory is short."""

from __future__ import annotations

import math
import types

import pytest
import torch
from case_makers import Log, Softmax, answer, call_large, maker

from ttkit.verify import correctness, draws, reference, variations
from ttkit.verify.arena import Arena, place
from ttkit.verify.cases import NativeCase, judge
from ttkit.verify.referee import Referee
from ttkit.verify.runner import Runner, overlaps
from ttkit.verify.shared import Taken
from ttkit.verify.worker import describe


def test_what_is_scrambled_comes_back_with_its_key_only():
    arena = Arena(4096, "cpu")
    tensors = [torch.randn(7, 3), torch.ones(5, dtype=torch.bool), torch.zeros(0), torch.eye(4).T]
    specs, _ = place(tensors, 0)
    for tensor, spec in zip(tensors, specs, strict=True):
        arena.view(spec).copy_(tensor)
    clear = arena.base.clone()
    arena.scramble(specs, 11)
    covered = torch.zeros(4096, dtype=torch.bool)
    for tensor, spec in zip(tensors, specs, strict=True):
        covered[spec["offset"] : spec["offset"] + tensor.numel() * tensor.element_size()] = True
    changed = arena.base != clear
    assert not changed[~covered].any() and changed[covered].float().mean() > 0.95
    arena.scramble(specs, 12)
    assert (arena.base != clear)[covered].float().mean() > 0.95
    arena.scramble(specs, 12)
    arena.scramble(specs, 11)
    assert torch.equal(arena.base, clear)


def test_a_small_case_is_kept_with_its_float64_run():
    made = maker()
    first = made.first()
    assert made.numbered(0, "declared") is first is made.unanswered()
    assert first.exact[0].dtype == torch.float64


def test_a_large_case_is_drawn_anew_and_judged_by_the_error_found_once():
    made = maker(keep_bytes=0)
    errors = made.first().own_errors
    one, two = made.numbered(0, "declared"), made.numbered(0, "declared")
    assert isinstance(one, NativeCase)
    assert one.own_errors == two.own_errors == errors and 0 < errors[0] < 1e-6
    assert not torch.equal(one.args[0], two.args[0])
    assert answer(one)["ok"] and answer(one, lambda y: y * (1 + 1e-7))["ok"]
    wrong = answer(one, lambda y: y * 1.001)
    assert not wrong["ok"] and "e-06 is allowed" in wrong["what"]


@pytest.mark.parametrize("keep_bytes", [0, 1 << 30])
def test_what_equals_the_reference_is_judged_as_the_reference_is(monkeypatch, keep_bytes):
    made = maker(keep_bytes=keep_bytes)
    errors = made.first().own_errors
    case = made.numbered(0, "declared")
    slowly = correctness.compare(
        case.outputs[0], case.outputs[0], case.yardsticks[0], case.reference_errors[0]
    )
    monkeypatch.setattr(correctness, "compare", None)  # large tensors have no time for it
    found = answer(case)
    assert found["ok"] and found["allclose"] and slowly.ok and slowly.allclose
    assert found["max_error"] == errors[0] and slowly.error in (errors[0], 0.0)
    with pytest.raises(TypeError):
        answer(case, lambda y: torch.nextafter(y, torch.ones(())))


def test_a_run_that_nobody_judges_needs_no_answer():
    made = maker(keep_bytes=0)
    pattern = made.first()
    blank = made.unanswered()
    assert blank.args is None and blank.outputs[0].is_meta
    assert blank.outputs[0].shape == pattern.outputs[0].shape
    assert blank.own_errors == pattern.own_errors


def test_variations_of_a_large_task_are_kept_by_their_own_size(monkeypatch):
    call_large(monkeypatch, 1 << 15)
    monkeypatch.setattr(draws, "SMALL_BYTES", 1 << 14)
    made = maker(keep_bytes=1 << 16)
    made.first()
    assert made.numbered(0, "declared") is not made.numbered(0, "declared")
    varied = made.numbered(3, "negated")
    assert varied.args[0].nbytes <= 1 << 14
    assert made.numbered(3, "negated") is varied


def test_without_room_for_float64_the_error_is_that_of_a_cut_down_form(monkeypatch):
    monkeypatch.setattr(draws, "SMALL_BYTES", 1 << 14)
    made = maker(keep_bytes=0)
    exact = made.reference.exact

    def short_of_memory(x):
        if x.numel() * 4 > 1 << 14:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return exact(x)

    made.reference.exact = short_of_memory
    case = made.first()
    assert 0 < case.own_errors[0] < 1e-6
    assert answer(made.numbered(0, "declared"))["ok"]
    # A variation that would need it is left out, not judged by a yardstick of less.
    monkeypatch.setattr(made.draws, "small_inputs", made.draws.inputs)
    assert "memory" in made.numbered(3, "negated").skipped


def test_nothing_can_be_cut_down_and_nothing_fits(monkeypatch):
    call_large(monkeypatch, 1 << 10)
    monkeypatch.setattr(variations, "reshaped", lambda args, fixed: iter(()))
    made = maker(keep_bytes=0)

    def short_of_memory(x):
        raise torch.OutOfMemoryError("CUDA out of memory")

    made.reference.exact = short_of_memory
    with pytest.raises(torch.OutOfMemoryError):
        made.first()


def test_values_too_small_for_an_error_to_show_have_to_be_right():
    truth = torch.logspace(0, -30, 400, dtype=torch.float64)
    reference = truth.float()
    yardstick = correctness.Yardstick(truth)
    for wrong in (0.0, 1e-30, 1e-12):
        filled = torch.where(reference > 1e-7, reference, wrong)
        assert correctness.compare(filled, reference, yardstick, 1e-7).ok
        assert correctness.lost(filled, reference, truth)
        assert not correctness.surely_close(filled, reference, 1e-7)
    near = reference * (1 + 1e-6 * torch.randn(400))
    assert not correctness.lost(near, reference, truth)
    assert not correctness.lost(filled, filled, truth)  # the reference has them wrong as well


def test_what_is_close_by_the_whole_may_be_far_in_its_row():
    reference = torch.randn(64, 64)
    reference[32:] *= 1e-3
    wrong = reference.clone()
    wrong[32:] *= 1.001
    assert not correctness.surely_close(wrong, reference, 1e-6)
    assert correctness.surely_close(reference * (1 + 1e-7), reference, 1e-6)


def test_what_is_not_finite_as_declared_is_varied_all_the_same():
    made = maker(Log)
    assert not made.first().finite and not made.numbered(5, "scaled").skipped
    assert made.numbered(6, "special").skipped
    made = maker(Log, draw=torch.rand)
    made.first()
    assert made.numbered(5, "negated").skipped  # NaN where there was none


def test_calls_that_share_memory_and_views_of_one_arena_are_told_apart():
    arena = torch.zeros(64)
    one, other = arena[:16], arena[16:32]
    assert overlaps([one, other], [other[4:8], one * 1]) == [[1], []]
    runner = Runner.__new__(Runner)
    runner.inputs, runner.handed_out = [], set()
    runner.outputs = [one, other]
    assert not runner.reuses()
    runner.outputs = [(one, 1.0), (one.view(4, 4), 2.0)]
    assert runner.reuses()
    runner.outputs = [one, lambda: one]
    assert not runner.reuses()


def test_memory_that_comes_back_is_told_from_what_was_let_go():
    runner = Runner.__new__(Runner)
    runner.inputs, runner.handed_out = [(torch.ones(4),)], set()

    def returns(output):
        runner.outputs = [output]
        found = runner.reuses()
        runner.outputs = []
        return found

    ring = [torch.ones(4) for _ in range(5)]
    assert [returns(ring[i % 5]) for i in range(7)] == [False] * 5 + [True] * 2
    assert not any(returns(torch.ones(4)) for _ in range(9))
    assert not any(returns(runner.inputs[0][0].view(2, 2)) for _ in range(2))
    assert len(runner.handed_out) < 9  # what was let go is forgotten


def test_a_short_row_has_no_size_of_its_own():
    column = torch.tensor([[1.0], [1e-6], [2.0]] * 5)
    near = column + 3e-7
    assert correctness.relative_error(near, column.double()) < 1e-6
    rows = torch.tensor([1.0, 1e-6, 2.0] * 5)[:, None].expand(15, 16).contiguous()
    assert correctness.relative_error(rows + 3e-7, rows.double()) > 1e-5


def test_what_just_overflows_may_just_not():
    most = torch.finfo(torch.float32).max
    y64 = torch.tensor([1.0, math.inf, -math.inf, 0.999 * most], dtype=torch.float64)
    near = torch.tensor([1.0, 0.9999 * most, -math.inf, math.inf])
    assert correctness.relative_error(near, y64) < 1e-7
    for wrong in (0.5 * most, -most, -math.inf, math.nan):
        near[1] = wrong
        assert correctness.relative_error(near, y64) == math.inf


def test_half_floats_have_a_tighter_bound():
    assert correctness.allowed_error(0.0, torch.bfloat16) == 4 * torch.finfo(torch.bfloat16).eps
    assert correctness.allowed_error(0.0, torch.float32) == 32 * torch.finfo(torch.float32).eps


def test_a_faint_column_may_not_be_lost():
    truth = torch.randn(64, 64, dtype=torch.float64)
    truth[:, 5] *= 1e-13
    y = truth.float()
    assert not correctness.lost(y, truth.float(), truth)
    y[:, 5] = 0
    assert correctness.lost(y, truth.float(), truth)
    y[8:, 5] = truth[8:, 5].float()
    assert not correctness.lost(y, truth.float(), truth)


def test_an_exception_that_cannot_be_read_is_still_one():
    class Mute(Exception):
        def __str__(self):
            raise ValueError

    assert describe(Mute(), "")["text"].startswith("Mute: its message cannot be read")


def test_what_overflows_in_the_native_type_is_right_to():
    class Exp(torch.nn.Module):
        def forward(self, x):
            return (60 * x).exp()

    made = maker(Exp, (64, 64))
    case = made.first()
    assert case.outputs[0].isinf().any() and case.own_errors[0] < 1e-4
    assert not made.habits(case)["unusable"]


@pytest.mark.parametrize("shape", [(300,), (17, 31), (5, 7, 11)])
def test_in_pieces_errors_come_out_as_in_one(monkeypatch, shape):
    torch.manual_seed(0)
    y64 = torch.randn(shape, dtype=torch.float64)
    y = (y64 * (1 + 1e-4 * torch.randn(shape))).float()
    close = correctness.surely_close(y, y64.float(), 1e-4)
    whole = correctness._largest(y, y64, correctness._rms(y64))
    monkeypatch.setattr(correctness, "PIECE", 16)
    yardstick = correctness.Yardstick(y64)
    assert yardstick.error(y) == pytest.approx(whole, rel=1e-12)
    assert correctness.surely_close(y, y64.float(), 1e-4) == close is True
    assert not correctness._allclose(y64.float(), y, 1e-6)
    assert correctness._allclose(y64.float(), y, 1e-2)
    y.flatten()[-1] = float("nan")
    assert yardstick.error(y) == float("inf")
    assert not correctness.surely_close(y, y64.float(), 1e-4)


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1.0, 1e14, 1e30, 3e38])
def test_large_tensors_of_any_scale_are_compared_in_their_own_precision(monkeypatch, scale):
    torch.manual_seed(0)
    y64 = (torch.rand(300, dtype=torch.float64) * scale).float()
    y = y64 * 1.001
    whole = correctness.Yardstick(y64).error(y)
    monkeypatch.setattr(correctness, "PIECE", 16)
    assert correctness.Yardstick(y64).error(y) == pytest.approx(whole, rel=1e-4)
    assert correctness.Yardstick(y64).rms == pytest.approx(
        float(y64.double().square().mean()) ** 0.5
    )
    assert not correctness.surely_close(y, y64, 1e-6)
    for special in (math.nan, math.inf, -math.inf):
        y64[7] = special
        yardstick = correctness.Yardstick(y64)
        assert not yardstick.finite and yardstick.error(y64.clone()) == 0.0
        assert yardstick.error(y) == math.inf


class Named(torch.nn.Module):
    """Fixes single precision wherever a program can."""

    def forward(self, x):
        ramp = torch.arange(x.shape[1], dtype=torch.float32)
        hot = torch.nn.functional.one_hot(x.argmax(dim=1), x.shape[1]).float()
        return (x @ torch.ones(x.shape[1], 3)) * (hot @ ramp)[:, None] + x.to(torch.float32)[:, :3]


def test_a_reference_that_names_its_precision_has_a_float64_run():
    made = maker(Named, (64, 64))
    case = made.first()
    assert case.exact[0].dtype == torch.float64 and 0 < case.own_errors[0] < 1e-2
    assert case.outputs[0].dtype == torch.float32 and torch.get_default_dtype() == torch.float32


class Singular(torch.nn.Module):
    """Has an answer in single precision alone, by chance."""

    def forward(self, x):
        return torch.linalg.inv(x[:, :1, None] * 0) if x.dtype == torch.float64 else x.exp()


def test_where_float64_finds_no_answer_there_is_no_case():
    case = maker(Singular, (64, 64)).numbered(1, "more_rows")
    assert "the reference raises" in case.skipped and "LinAlgError" in case.skipped


class Mean(torch.nn.Module):
    def forward(self, x):
        return ((x - 1) ** 2).mean()


@pytest.mark.parametrize(
    ("model", "shape", "expected"),
    [(Softmax, (64, 256), 256), (Mean, (64, 256), 64 * 256), (Log, (64, 256), 1)],
)
def test_what_a_number_is_made_of_is_found_by_derivatives(model, shape, expected):
    made = maker(model, shape, draw=torch.rand)
    made.first()
    assert made.reference.fan_in == made.numbered(0, "declared").fan_in == expected


def test_of_large_inputs_it_is_that_of_a_cut_down_form_made_larger(monkeypatch):
    call_large(monkeypatch, 1 << 15)
    monkeypatch.setattr(draws, "SMALL_BYTES", 1 << 14)
    made = maker(shape=(256, 512), keep_bytes=0)
    made.first()
    assert 256 < made.reference.fan_in < 1024
    assert made.unanswered().reference_errors[0] > 0


def test_long_sums_may_be_off_by_what_rounding_makes_of_them():
    made = maker(Mean, (1024, 1024))
    case = made.first()
    assert answer(case, lambda y: y * (1 + 3e-5))["ok"]
    assert not answer(case, lambda y: y * (1 + 1e-3))["ok"]
    short = maker(Log, (64, 64), draw=lambda *shape: 2 + torch.rand(shape)).first()
    assert not answer(short, lambda y: y * (1 + 3e-5))["ok"]
    assert correctness.rounding(10**6, torch.int64) == 0
    assert correctness.rounding(10**6, torch.bfloat16) < 1e-4


class UnitRows(torch.nn.Module):
    def forward(self, x):
        return x / x.abs().sum(dim=1, keepdim=True)


@pytest.mark.parametrize("name", ["near_one", "uneven", "scaled", "touched"])
def test_a_library_may_lose_the_same_part_of_each_of_many_equal_terms(name):
    made = maker(UnitRows, (16, 65_536), keep_bytes=0, draw=torch.rand)
    made.first()
    case = made.numbered(1, name)
    (x,) = case.args

    def judged(y):
        return answer(case, lambda _: y)["ok"]

    assert judged(torch.nn.functional.normalize(x, p=1, dim=1))
    assert not judged(x / x[:, :-256].abs().sum(dim=1, keepdim=True))
    assert not judged(case.outputs[0].bfloat16().float())


def test_the_error_of_a_few_numbers_is_no_longer_chance_when_it_is_settled():
    made = maker(Mean, (64, 64))
    case = made.first()
    case.own_errors = [0.0]  # by luck
    made.reference.settle(case)
    assert 0 < case.own_errors[0] < 1e-6
    assert not judge(case, [case.outputs[0] * 1.1], [], [])["near"]
    assert judge(case, [case.outputs[0] * (1 + 2e-5)], [], [])["near"]


class Apart(torch.nn.Module):
    """What is left where two nearly equal numbers cancel, without an error of its own."""

    def forward(self, x):
        return 3 * (x[:, 0] - x[:, 1])


def _nearly_equal(*shape):
    return torch.randn(shape[0], 1) * (1 + 0.01 * torch.rand(shape))


@pytest.mark.parametrize("keep_bytes", [0, 1 << 30])
def test_where_terms_cancel_other_orders_are_as_good_as_the_numbers_are_known(keep_bytes):
    made = maker(Apart, (4096, 2), keep_bytes, draw=_nearly_equal)
    made.first()
    case = made.numbered(0, "declared")
    x = case.args[0]
    other = 3 * x[:, 0] - 3 * x[:, 1]
    found = judge(case, [other], [], [])
    assert found["near"] and not found["ok"]
    made.reference.settle(case)
    assert judge(case, [other], [], [])["ok"]
    half = 3 * (x[:, 0] - x[:, 1].bfloat16().float())
    assert not judge(case, [half], [], [])["ok"]


def test_half_floats_are_known_exactly():
    numbers = torch.randn(64, 64)
    assert not torch.equal(reference._rounded(numbers), numbers)
    assert torch.equal(reference._rounded(numbers.bfloat16()), numbers.bfloat16())


def test_what_the_reference_delivered_of_varied_inputs_needs_no_float64_run():
    made = maker()
    made.first()
    referee = Referee.__new__(Referee)
    referee.reference, runs = made.reference, []
    judged = made.reference.judged
    made.reference.judged = lambda *given: runs.append(given) or judged(*given)
    referee.varied, referee.weights_now = [], None
    referee.stage = types.SimpleNamespace()
    referee.current = [[torch.randn(64, 256)]]
    theirs = torch.softmax(referee.current[0][0], dim=1)

    def found(ours, values=()):
        referee.stage.taken = {False: [Taken(ours)], True: [Taken(theirs)]}
        referee.do_varied({"slot": 0, "name": "negated", "values": list(values), "expected": []})
        return referee.do_judge_varied({})["ok"]

    assert found(theirs.clone()) and not runs
    assert found(theirs * (1 + 1e-7)) and len(runs) == 1  # another order of operations
    wrong = theirs.clone()
    wrong[3, 5] *= 2
    assert not found(wrong) and not found(theirs, values=[1]) and len(runs) == 3
