"""The referee's cases: what is kept, what is made anew, what stands in where memory is short."""

from __future__ import annotations

import copy
import functools
import math
import types

import pytest
import torch

from ttkit.verify import casemaker, correctness, variations
from ttkit.verify.arena import Arena, place
from ttkit.verify.casemaker import CaseMaker
from ttkit.verify.cases import NativeCase, judge
from ttkit.verify.worker import Candidate, Runner, describe, overlaps, tensors_within, values_of


class Softmax(torch.nn.Module):
    def forward(self, x):
        return torch.softmax(x, dim=1)


class Conv(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 5, 3)

    def forward(self, x):
        return self.conv(x)


def maker(model=Softmax, shape=(64, 256), keep_bytes=1 << 30, draw=torch.randn):
    task = types.SimpleNamespace(get_inputs=lambda: [draw(*shape)], get_init_inputs=lambda: [])
    return CaseMaker(task, Runner(model, task, 0, "cpu"), "cpu", keep_bytes)


def answer(case, change=lambda y: y):
    return judge(case, [change(y) for y in case.outputs], [], values_of(case.tree))


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
    monkeypatch.setattr(casemaker, "LARGE_BYTES", 1 << 15)
    monkeypatch.setattr(casemaker, "SMALL_BYTES", 1 << 14)
    made = maker(keep_bytes=1 << 16)
    made.first()
    assert made.numbered(0, "declared") is not made.numbered(0, "declared")
    varied = made.numbered(3, "negated")
    assert varied.args[0].nbytes <= 1 << 14
    assert made.numbered(3, "negated") is varied


def test_without_room_for_float64_the_error_is_that_of_a_cut_down_form(monkeypatch):
    monkeypatch.setattr(casemaker, "SMALL_BYTES", 1 << 14)
    made = maker(keep_bytes=0)
    exact = made.exact

    def short_of_memory(x):
        if x.numel() * 4 > 1 << 14:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return exact(x)

    made.exact = short_of_memory
    case = made.first()
    assert 0 < case.own_errors[0] < 1e-6
    assert answer(made.numbered(0, "declared"))["ok"]
    # A variation that would need it is left out, not judged by a yardstick of less.
    monkeypatch.setattr(made, "_small_inputs", made.inputs)
    assert "memory" in made.numbered(3, "negated").skipped


def test_nothing_can_be_cut_down_and_nothing_fits(monkeypatch):
    monkeypatch.setattr(casemaker, "LARGE_BYTES", 1 << 10)
    monkeypatch.setattr(variations, "reshaped", lambda args: iter(()))
    made = maker(keep_bytes=0)

    def short_of_memory(x):
        raise torch.OutOfMemoryError("CUDA out of memory")

    made.exact = short_of_memory
    with pytest.raises(torch.OutOfMemoryError):
        made.first()


def test_a_convolution_is_varied_in_its_image_not_only_in_its_batch():
    made = maker(Conv, (4, 3, 32, 32))
    made.first()
    assert made.numbered(1, "other_shapes").args[0].shape == (3, 3, 20, 20)


def test_a_large_image_is_cut_down_in_all_but_its_channels(monkeypatch):
    monkeypatch.setattr(casemaker, "LARGE_BYTES", 1 << 16)
    monkeypatch.setattr(casemaker, "SMALL_BYTES", 1 << 11)
    made = maker(Conv, (2, 3, 96, 96))
    small = made.shrunk(made.inputs())[0]
    assert small.shape[1] == 3 and small.nbytes <= 1 << 11
    # With a batch of one and nothing else to cut, as near as it gets; too large is nothing.
    monkeypatch.setattr(casemaker, "SMALL_BYTES", 1)
    assert made.shrunk(made.inputs())[0].nbytes < 1 << 16


def test_a_mixture_keeps_what_inputs_promise_and_is_no_multiple_of_either():
    one, other = torch.rand(8, 8).tril(), torch.rand(8, 8).tril()
    index = torch.arange(8)
    (found, same, plain), number = variations.mixed(
        ([one, index, torch.ones(3)], 5),
        ([other, index.flip(0), torch.ones(4)], 6),
        *(0.25, 2.0, [False]),
    )
    noise = (found / (2 * (0.25 * one + 0.75 * other)))[one > 0]
    assert 0.9 <= noise.min() < 0.95 and 1.05 < noise.max() <= 1.1 and not found.triu(1).any()
    assert torch.equal(same, index) and torch.equal(plain, torch.ones(3)) and number == 5
    ratios = (found / one)[one > 0]
    assert float(ratios.std()) > 0.1
    assert torch.allclose(variations.mixed(one, one, 0.25, 2.0, []), 2 * one, rtol=0.1)
    both = one + one.T
    found = variations.mixed(both, both, 0.25, 2.0, [])
    assert torch.equal(found, found.T) and not torch.allclose(found, 2 * both)
    assert torch.allclose(found, 2 * both, rtol=0.22)


def test_few_values_and_integers_stay_what_they_are_when_they_are_mixed():
    """A mask of 0 and 1 that became one of 0 and 1.38 made honest programs wrong."""
    masks = [(torch.rand(64, 48) < 0.3).float() for _ in range(2)]
    counts = [torch.poisson(torch.full((64, 48), 3.0)) for _ in range(2)]
    index = [torch.randint(0, 9, (64, 48)) for _ in range(2)]
    inputs = [[m, c, i] for m, c, i in zip(masks, counts, index, strict=True)]
    drawn = [variations.mixed(*inputs, 0.5, 1.7, [True]) for _ in range(2)]
    for first, second in zip(*drawn, strict=True):
        assert torch.equal(first, first.round()) and first.min() >= 0 and first.max() < 15
        assert 0.02 < (first != second).float().mean() < 0.6  # not twice the same
    kept = variations.mixed(*inputs, 0.5, 1.7, [False])
    assert torch.equal(kept[2], index[0])
    alone = variations.mixed(counts[0], counts[0], 0.5, 1.7, [])
    assert (alone != counts[0]).float().mean() > 0.2 and torch.equal(alone, alone.round())


def test_integers_are_mixed_where_the_reference_takes_that():
    class Bag(torch.nn.Module):
        def forward(self, x, offsets, table):
            assert (offsets[1:] >= offsets[:-1]).all(), "offsets in order"
            return torch.nn.functional.embedding_bag(x, table, offsets)

    def draw():
        offsets = torch.randint(0, 60, (8,)).sort().values
        offsets[0] = 0
        return [torch.randint(0, 50, (64,)), offsets, torch.randn(50, 4)]

    task = types.SimpleNamespace(get_inputs=draw, get_init_inputs=lambda: [])
    made = CaseMaker(task, Runner(Bag, task, 0, "cpu"), "cpu", 1 << 30)
    drawn = made.pooled_inputs(6)
    assert made.mixable == [True, False]
    assert all((x[0] != y[0]).any() for x in drawn for y in made.pool)


def test_what_is_made_of_few_inputs_is_no_combination_of_them():
    made = maker(shape=(8, 64))
    drawn = torch.stack([args[0].flatten() for args in made.pooled_inputs(16)]).double()
    values = torch.linalg.svdvals(drawn)
    assert values[-1] > 1e-3 * values[0]  # four sets alone would leave twelve of sixteen at 0


def test_touched_inputs_are_the_ones_met_before_but_for_a_few_values():
    made = maker(shape=(64, 64))
    before = made.first().args[0]
    after = made.numbered(1, "touched").args[0]
    changed = before != after
    assert 0 < changed.sum() <= 16
    factors = (after / before)[changed].abs()
    assert ((factors == 0) | (factors >= 1.5)).all() and factors.max() <= 300.0**2
    again = made.touched([before])[0]
    factors = (again / before)[again != before].abs()
    assert factors.min() >= 1.5 and factors.max() <= 3.0**2  # no outliers where it is timed


def test_a_touch_may_make_an_outlier_or_a_zero():
    ones = torch.ones(1000)
    touched = [variations.touched(ones, True, [True], outliers=True) for _ in range(50)]
    values = torch.cat([t[t != 1] for t in touched])
    assert (values == 0).any() and values.abs().max() > 100 and (values < 0).any()


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


def test_a_triangle_stays_one_whatever_varies():
    upper = torch.triu(torch.randn(300, 300))
    wide = torch.triu(torch.randn(4200, 4200))  # its first row, 4200 elements, has no zeros
    assert variations.with_zeros(wide) and not variations.with_zeros(torch.randn(4200, 4200))
    for change in variations.VALUES.values():
        assert torch.equal(change(upper) == 0, upper == 0)
    for _ in range(20):
        touched = variations.touched([upper], True, [True], outliers=True)[0]
        assert not touched.tril(-1).any() and not torch.equal(touched, upper)
    assert list(variations.enlarged([upper, upper])) == []
    assert list(variations.enlarged([torch.randn(300, 300)] * 2))


def test_masks_among_the_weights_are_left_alone():
    mask = torch.tril(torch.ones(9, 9))
    assert torch.equal(variations.touched_weight(mask), mask)
    assert not torch.equal(variations.touched_weight(torch.randn(9)), torch.randn(9))


class Careful(torch.nn.Module):
    def forward(self, x, y):
        return torch.where(torch.isfinite(x), x - y, 0.0)


def test_infinite_values_come_only_where_the_reference_looks_for_them():
    task = types.SimpleNamespace(
        get_inputs=lambda: [torch.randn(16, 64), torch.randn(16, 64)], get_init_inputs=lambda: []
    )
    made = CaseMaker(task, Runner(Careful, task, 0, "cpu"), "cpu", 1 << 30)
    made.first()
    x, y = made.numbered(5, "special").args
    assert x.isinf().any() and 0 < (x == y).sum() <= 32
    plain = maker(torch.nn.ReLU, (64, 64))
    plain.first()
    assert plain.numbered(5, "special").args[0].isfinite().all()


class Log(torch.nn.Module):
    def forward(self, x):
        return torch.log(x)


def test_what_is_not_finite_as_declared_is_varied_all_the_same():
    made = maker(Log)
    assert not made.first().finite and not made.numbered(5, "scaled").skipped
    assert made.numbered(6, "special").skipped
    made = maker(Log, draw=torch.rand)
    made.first()
    assert made.numbered(5, "negated").skipped  # NaN where there was none


def test_a_fixed_seed_is_noticed():
    fixed = maker(draw=lambda *shape: torch.ones(shape) * torch.arange(256.0))
    assert fixed.repeats() and not maker().repeats()


def test_calls_that_share_memory_and_views_of_one_arena_are_told_apart():
    arena = torch.zeros(64)
    one, other = arena[:16], arena[16:32]
    assert overlaps([one, other], [other[4:8], one * 1]) == [[1], []]
    runner = Runner.__new__(Runner)
    runner.outputs = [one, other]
    assert not runner.reuses()
    runner.outputs = [(one, 1.0), (one.view(4, 4), 2.0)]
    assert runner.reuses()
    runner.outputs = [one, lambda: one]
    assert not runner.reuses()


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


class Gated(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)
        self.alpha = torch.nn.Parameter(torch.zeros(1))
        self.idle = torch.nn.Parameter(torch.ones(3))
        self.register_buffer("mask", torch.ones(8))

    def forward(self, x):
        return (x + self.alpha * self.linear(x).tanh()) * self.mask


def test_weights_of_one_value_are_varied_too():
    made = maker(Gated, (4, 8))
    case = made.numbered(5, "other_weights")
    state = made.runner.model.state_dict()
    other = dict(zip(state, case.weights, strict=True))
    assert 0.25 <= float(other["alpha"]) <= 0.5
    assert not torch.allclose(case.outputs[0], case.args[0], rtol=1e-3)
    few = dict(zip(state, made.numbered(-1, "touched_weights", fresh=True).weights, strict=True))
    moved = few["linear.weight"] != state["linear.weight"]
    assert 0 < moved.sum() <= 16


def test_parameters_that_matter_have_to_be_kept():
    made = maker(Gated, (4, 8))
    kept = {"linear.weight", "linear.bias", "alpha"}
    assert made.missing(kept) == []  # the mask is a buffer, and nothing depends on `idle`
    assert made.missing(kept - {"alpha"}) == ["alpha", "idle"]
    assert made.missing([]) == ["alpha", "idle", "linear.bias", "linear.weight"]
    assert maker().missing([]) == []


def test_weights_of_other_names_are_found_by_their_values():
    shared = torch.randn(4, 4)
    model = types.SimpleNamespace(inner=torch.nn.Sequential(torch.nn.Linear(4, 4)), copy=[shared])
    deep = {"a": [{"b": types.SimpleNamespace(c=model)}]}
    found = tensors_within(deep)
    assert [id(t) for t in found] == [
        *map(id, model.inner[0].parameters()),
        id(shared),
    ]
    model.me = model  # a circle
    assert len(tensors_within(model)) == 3
    script = torch.jit.script(torch.nn.Linear(2, 2))
    assert len(tensors_within([script])) == 2


def test_weights_are_found_in_slots_functions_and_other_shapes():
    class Box:
        __slots__ = ("empty", "weight")

    box, layer = Box(), torch.nn.Linear(4, 6)
    box.weight = layer.weight
    holders = [box, functools.partial(layer), lambda x: layer(x), layer.forward]
    for holder in holders:
        assert any(t is layer.weight for t in tensors_within([holder]))
    candidate = Candidate.__new__(Candidate)
    flat, turned = layer.weight.detach().reshape(24), layer.weight.detach().t().clone()
    for kept in (flat, turned, turned.t()):
        values = {"w": layer.weight.detach()}
        specs, size = place(list(values.values()), 0)
        model = types.SimpleNamespace(kept=kept.clone())
        candidate.runner = types.SimpleNamespace(model=model, device="cpu")
        candidate.specs, candidate.unclear = dict(zip(values, specs, strict=True)), []
        candidate.weights, candidate.places = Arena(size, "cpu"), None
        candidate.weights.view(specs[0]).copy_(values["w"])
        assert candidate._load_weights() == ["w"]
        candidate.weights.view(specs[0]).mul_(2)
        candidate._load_weights()
        assert torch.equal(model.kept, 2 * kept)


def test_an_exception_that_cannot_be_read_is_still_one():
    class Mute(Exception):
        def __str__(self):
            raise ValueError

    assert describe(Mute(), "")["text"].startswith("Mute: its message cannot be read")


def test_equal_weights_are_paired_in_order():
    values = {"g1": torch.ones(4), "b1": torch.zeros(4), "g2": torch.ones(4), "w": torch.randn(4)}
    specs, size = place(list(values.values()), 0)
    model = types.SimpleNamespace(
        scale=[torch.ones(4), torch.ones(4)],
        shift=[torch.zeros(4), torch.zeros(4)],
        weight=[values["w"].clone(), values["w"].clone()],
    )
    candidate = Candidate.__new__(Candidate)
    candidate.runner = types.SimpleNamespace(model=model, device="cpu")
    candidate.specs, candidate.unclear = dict(zip(values, specs, strict=True)), []
    candidate.weights, candidate.places = Arena(size, "cpu"), None
    for spec, value in zip(specs, values.values(), strict=True):
        candidate.weights.view(spec).copy_(value)
    assert candidate._load_weights() == ["g1", "g2", "w"] and candidate.unclear == ["b1"]
    for number, spec in enumerate(specs):
        candidate.weights.view(spec).fill_(number)
    candidate._load_weights()
    assert [float(t[0]) for t in (*model.scale, *model.weight)] == [0, 2, 3, 3]
    assert all(t._version == 0 for t in model.weight)


def test_touched_inputs_keep_their_signs_where_the_reference_needs_them():
    class Log(torch.nn.Module):
        def forward(self, x):
            return x.log()

    made = maker(Log, (64, 64), draw=torch.rand)
    made.first()
    case = made.numbered(1, "touched")
    assert not case.skipped and (case.args[0] > 0).all() and made.signs is False
    assert (made.touched([torch.rand(64, 64)])[0] > 0).all()


def test_one_touch_with_other_signs_that_the_reference_bore_by_chance_proves_nothing():
    made = maker(shape=(64, 64))
    made.first()
    made.signs = False  # as an earlier touch found
    made.numbered(2, "touched")
    assert made.signs is False


def test_what_overflows_in_the_native_type_is_right_to():
    class Exp(torch.nn.Module):
        def forward(self, x):
            return (60 * x).exp()

    made = maker(Exp, (64, 64))
    case = made.first()
    assert case.outputs[0].isinf().any() and case.own_errors[0] < 1e-4
    assert not made.habits(case)["unusable"]


def test_inputs_that_are_dear_to_make_do_not_come_back_as_multiples():
    made = maker(shape=(8, 64))
    drawn = [made.pooled_inputs(2) for _ in range(6)]
    flat = torch.stack([args[0].flatten() for sets in drawn for args in sets])
    likeness = torch.corrcoef(flat) - torch.eye(len(flat))
    # Of four sets that are only scaled, a fifth of all pairs are multiples of each other.
    assert float((likeness > 1 - 1e-6).double().mean()) < 0.1


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


class Flat(torch.nn.Module):
    """Takes rows of another length for other rows."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(64, 8)

    def forward(self, x):
        return self.layer(x.reshape(-1, 64))


def test_other_shapes_that_are_cut_up_by_chance_are_left_out():
    made = maker(Flat, (256, 64))
    made.first()
    # 192 rows of 48 are 144 rows of 64.
    shape = made.numbered(1, "other_shapes").args[0].shape
    assert shape[1] == 64 and shape[0] < 256


def test_a_model_that_cannot_be_copied_is_made_again():
    class Normed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.utils.weight_norm(torch.nn.Linear(256, 8))

        def forward(self, x):
            return self.layer(x)

    cases = maker(Normed)
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(cases.runner.model)
    case = cases.first()
    assert 0 < max(case.own_errors) < 1e-5  # the same weights, in double precision
    other = cases.numbered(1, "other_weights")
    assert not other.skipped and not torch.equal(other.outputs[0], case.outputs[0])
