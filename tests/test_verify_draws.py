"""Inputs of a referee: drawn, mixed, touched, cut down, and what they keep in all of that."""

from __future__ import annotations

import types

import torch
from case_makers import Conv, call_large, case_maker, maker

from ttkit.verify import draws, mixing, structure, variations


def test_a_convolution_is_varied_in_its_image_not_only_in_its_batch():
    made = maker(Conv, (4, 3, 32, 32))
    made.first()
    assert made.numbered(1, "other_shapes").args[0].shape == (3, 3, 20, 20)


def test_a_large_image_is_cut_down_in_all_but_its_channels(monkeypatch):
    call_large(monkeypatch, 1 << 16)
    monkeypatch.setattr(draws, "SMALL_BYTES", 1 << 11)
    made = maker(Conv, (2, 3, 96, 96))
    small = made.draws.shrunk(made.draws.inputs())[0]
    assert small.shape[1] == 3 and small.nbytes <= 1 << 11
    # With a batch of one and nothing else to cut, as near as it gets; too large is nothing.
    monkeypatch.setattr(draws, "SMALL_BYTES", 1)
    assert made.draws.shrunk(made.draws.inputs())[0].nbytes < 1 << 16


def test_a_mixture_keeps_what_inputs_promise_and_is_no_multiple_of_either():
    one, other = torch.rand(8, 8).tril(), torch.rand(8, 8).tril()
    index = torch.arange(8)
    (found, same, plain), number = mixing.mixed(
        ([one, index, torch.ones(3)], 5),
        ([other, index.flip(0), torch.ones(4)], 6),
        *(0.25, 2.0, [False]),
    )
    noise = (found / (2 * (0.25 * one + 0.75 * other)))[one > 0]
    assert 0.9 <= noise.min() < 0.95 and 1.05 < noise.max() <= 1.1 and not found.triu(1).any()
    assert torch.equal(same, index) and torch.equal(plain, torch.ones(3)) and number == 5
    ratios = (found / one)[one > 0]
    assert float(ratios.std()) > 0.1
    assert torch.allclose(mixing.mixed(one, one, 0.25, 2.0, []), 2 * one, rtol=0.1)
    both = one + one.T
    found = mixing.mixed(both, both, 0.25, 2.0, [])
    assert torch.equal(found, found.T) and not torch.allclose(found, 2 * both)
    assert torch.allclose(found, 2 * both, rtol=0.22)


def test_few_values_and_integers_stay_what_they_are_when_they_are_mixed():
    """A mask of 0 and 1 that became one of 0 and 1.38 made honest programs wrong."""
    masks = [(torch.rand(64, 48) < 0.3).float() for _ in range(2)]
    counts = [torch.poisson(torch.full((64, 48), 3.0)) for _ in range(2)]
    index = [torch.randint(0, 9, (64, 48)) for _ in range(2)]
    inputs = [[m, c, i] for m, c, i in zip(masks, counts, index, strict=True)]
    drawn = [mixing.mixed(*inputs, 0.5, 1.7, [True]) for _ in range(2)]
    for first, second in zip(*drawn, strict=True):
        assert torch.equal(first, first.round()) and first.min() >= 0 and first.max() < 15
        assert 0.02 < (first != second).float().mean() < 0.6  # not twice the same
    kept = mixing.mixed(*inputs, 0.5, 1.7, [False])
    assert torch.equal(kept[2], index[0])
    alone = mixing.mixed(counts[0], counts[0], 0.5, 1.7, [])
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
    made = case_maker(task, Bag, 1 << 30)
    drawn = made.draws.pooled_inputs(6)
    assert made.draws._mixable == [True, False]
    assert all((x[0] != y[0]).any() for x in drawn for y in made.draws._pool)


def test_what_is_made_of_few_inputs_is_no_combination_of_them():
    made = maker(shape=(8, 64))
    drawn = torch.stack([args[0].flatten() for args in made.draws.pooled_inputs(16)]).double()
    values = torch.linalg.svdvals(drawn)
    assert values[-1] > 1e-3 * values[0]  # four sets alone would leave twelve of sixteen at 0


def test_touched_inputs_are_the_ones_met_before_but_for_a_few_values():
    made = maker(shape=(64, 64))
    before = made.first().args[0]
    after = made.numbered(1, "touched").args[0]
    changed = before != after
    assert 0 < changed.sum() <= 16
    factors = (after / before)[changed].abs()
    assert ((factors == 0) | (factors >= 1.5)).all()
    # What becomes a far one may have been near zero: then only its size is bounded.
    far = after[changed].abs() >= 0.75 * mixing.LARGEST
    assert (factors[~far] <= 300.0**2).all() and after.abs().max() <= 1.5**2 * 300 * mixing.LARGEST
    again = made.draws.touched([before])[0]
    factors = (again / before)[again != before].abs()
    assert factors.min() >= 1.5 and factors.max() <= 3.0**2  # no outliers where it is timed


def test_a_touch_may_make_an_outlier_or_a_zero():
    ones = torch.ones(1000)
    touched = [mixing.touched(ones, True, [True], outliers=True) for _ in range(50)]
    values = torch.cat([t[t != 1] for t in touched])
    assert (values == 0).any() and values.abs().max() > 100 and (values < 0).any()


def test_a_triangle_stays_one_whatever_varies():
    upper = torch.triu(torch.randn(300, 300))
    wide = torch.triu(torch.randn(4200, 4200))  # its first row, 4200 elements, has no zeros
    assert structure.with_zeros(wide) and not structure.with_zeros(torch.randn(4200, 4200))
    for change in variations.VALUES.values():
        assert torch.equal(change(upper) == 0, upper == 0)
    for _ in range(20):
        touched = mixing.touched([upper], True, [True], outliers=True)[0]
        assert not touched.tril(-1).any() and not torch.equal(touched, upper)
    assert list(variations.enlarged([upper, upper])) == []
    assert list(variations.enlarged([torch.randn(300, 300)] * 2))


class Careful(torch.nn.Module):
    def forward(self, x, y):
        return torch.where(torch.isfinite(x), x - y, 0.0)


def test_infinite_values_come_only_where_the_reference_looks_for_them():
    task = types.SimpleNamespace(
        get_inputs=lambda: [torch.randn(16, 64), torch.randn(16, 64)], get_init_inputs=lambda: []
    )
    made = case_maker(task, Careful, 1 << 30)
    made.first()
    x, y = made.numbered(5, "special").args
    assert x.isinf().any() and 0 < (x == y).sum() <= 32
    plain = maker(torch.nn.ReLU, (64, 64))
    plain.first()
    assert plain.numbered(5, "special").args[0].isfinite().all()


def test_a_fixed_seed_is_noticed():
    fixed = maker(draw=lambda *shape: torch.ones(shape) * torch.arange(256.0))
    assert fixed.draws.repeats() and not maker().draws.repeats()


def test_touched_inputs_keep_their_signs_where_the_reference_needs_them():
    class Log(torch.nn.Module):
        def forward(self, x):
            return x.log()

    made = maker(Log, (64, 64), draw=torch.rand)
    made.first()
    case = made.numbered(1, "touched")
    assert not case.skipped and (case.args[0] > 0).all() and made.draws.signs is False
    assert (made.draws.touched([torch.rand(64, 64)])[0] > 0).all()


def test_one_touch_with_other_signs_that_the_reference_bore_by_chance_proves_nothing():
    made = maker(shape=(64, 64))
    made.first()
    made.draws.signs = False  # as an earlier touch found
    made.numbered(2, "touched")
    assert made.draws.signs is False


def test_inputs_that_are_dear_to_make_do_not_come_back_as_multiples():
    made = maker(shape=(8, 64))
    drawn = [made.draws.pooled_inputs(2) for _ in range(6)]
    flat = torch.stack([args[0].flatten() for sets in drawn for args in sets])
    likeness = torch.corrcoef(flat) - torch.eye(len(flat))
    # Of four sets that are only scaled, a fifth of all pairs are multiples of each other.
    assert float((likeness > 1 - 1e-6).double().mean()) < 0.1


class Product(torch.nn.Module):
    def forward(self, a, x):
        return a.t() @ x


def test_symmetric_matrices_stay_symmetric_when_there_is_more_of_them():
    def get_inputs():
        a = torch.randn(40, 40)
        return [a + a.t(), torch.randn(40, 24)]

    task = types.SimpleNamespace(get_inputs=get_inputs, get_init_inputs=lambda: [])
    made = case_maker(task, Product)
    made.first()
    matrix, _ = made.numbered(1, "more_rows").args
    assert len(matrix) > 40 and torch.equal(matrix, matrix.t())


def test_a_few_rows_become_unlike_the_others():
    x, y = torch.randn(2, 64, 256)
    labels, zeros = torch.randint(0, 5, (64, 256)), torch.zeros(64)
    mask, order = torch.rand(64, 256) > 0.5, torch.arange(64)
    triangle, given = torch.randn(64, 64).tril(), (x, y, labels, zeros, mask, order)
    *changed, low = mixing.uneven([*given, triangle], floats_only=False)
    a, b, whole, gate, flags, same = changed
    assert same is order and torch.equal(low, low.tril())
    assert int((gate != 0).sum()) == 1
    moved = (a != x).any(dim=1)
    assert 2 <= int(moved.sum()) <= mixing.LINES / 2
    assert float((a.norm(dim=1) / x.norm(dim=1)).min()) < 1e-3
    halves = torch.cat([a[:, :128] == y[:, :128], a[:, 128:] == y[:, 128:]]).all(dim=1)
    assert halves.any() and (b != y).any()
    for values, before in ((whole, labels), (flags, mask)):
        halves = values.int().view(2, -1)
        alike = (halves == halves.mode(dim=1, keepdim=True).values).double().mean(dim=1)
        assert float(alike.max()) > 0.7 and values.dtype == before.dtype
        assert any(len(row.unique()) == 1 for row in values)
        assert set(values.unique().tolist()) <= set(before.unique().tolist())
    one, *rest = mixing.uneven([*given], floats_only=True)
    assert not torch.equal(one, x) and torch.equal(rest[1], labels) and torch.equal(rest[3], mask)
    assert mixing.uneven([order, triangle[:3, :3]], floats_only=True) is None


def test_no_half_of_a_line_becomes_equal_near_zero(monkeypatch):
    monkeypatch.setattr(mixing, "_level", torch.min)
    x = torch.rand(64, 4096)
    (changed,) = mixing.uneven([x], floats_only=True)
    halves = changed.view(-1, 2048)
    level = halves[(halves.mean(dim=1) < 0.1) & (halves.mean(dim=1) > 1e-3)]
    assert len(level) >= 2 and float(level.std(dim=1).min()) > 0.01


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


def test_how_large_inputs_are_cut_down_is_found_once(monkeypatch):
    call_large(monkeypatch, 1 << 16)
    monkeypatch.setattr(draws, "SMALL_BYTES", 1 << 11)
    made = maker(Conv, (2, 3, 96, 96))
    first = made.draws.shrunk(made.draws.inputs())
    monkeypatch.setattr(made.reference.runner.model, "forward", None)  # it is not run again
    again = made.draws.shrunk(made.draws.inputs())
    assert first[0].shape == again[0].shape and not torch.equal(first[0], again[0])


def test_sizes_that_weights_have_stay_where_they_are():
    x = [torch.randn(32, 32, 48, 48)]
    ways = [args[0].shape for args in variations.reshaped(x, {32, 3})]
    assert ways[0] == (20, 32, 36, 36) and all(shape[1] == 32 for shape in ways)
    assert all(args[0].shape[1] == 32 for args in variations.enlarged(x, {32, 3}))
    assert [args[0].shape for args in variations.reshaped([torch.randn(1, 32)], {32})] == []


def test_rows_come_in_odd_numbers():
    for rows in (2, 4, 16, 33, 512):
        x = [torch.randn(rows, 64)]
        whole = variations.enlarged_throughout(x, odd=True)[0]
        assert whole.shape[1] == 67 and (rows < 16 or whole.shape[0] % 2)
        assert [args[0].shape[0] % 2 for args in variations.enlarged(x)][-1]
    square = next(variations.enlarged([torch.randn(64, 64)]))[0]
    assert square.shape == (68, 68)  # or what pools or halves would be left with a rest
