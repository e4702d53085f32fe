"""Weights: where a model keeps them, which ones matter, and how they are varied."""

from __future__ import annotations

import copy
import functools
import types

import pytest
import torch
from case_makers import maker

from ttkit.verify import variations
from ttkit.verify.arena import Arena, place
from ttkit.verify.weights import tensors_within
from ttkit.verify.worker import Candidate


def test_masks_among_the_weights_are_left_alone():
    mask = torch.tril(torch.ones(9, 9))
    assert torch.equal(variations.touched_weight(mask), mask)
    assert not torch.equal(variations.touched_weight(torch.randn(9)), torch.randn(9))


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
    assert 0.25 <= float(case.weights["alpha"]) <= 0.5
    assert not torch.allclose(case.outputs[0], case.args[0], rtol=1e-3)


def test_weights_are_touched_one_by_one_and_each_stays_as_it_has_become():
    made = maker(Gated, (4, 8))
    state, touched = made.reference.runner.model.state_dict(), []
    for _ in range(3):
        case = made.numbered(-1, "touched_weights", fresh=True, present=state)
        moved = {name: int((state[name] != w).sum()) for name, w in case.weights.items()}
        touched += [name for name, places in moved.items() if places]
        assert sum(moved.values()) == 1
        state = case.weights
    # Each in its turn, but for those much smaller than the largest.
    assert sorted(touched) == ["linear.bias", "linear.weight", "mask"]


class Positions(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.arange(32.0).view(4, 8).sin())
        self.register_buffer("noise", torch.randn(4, 8))
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x):
        return (x - self.mean) * self.noise + self.table


def test_a_table_that_every_seed_gives_is_no_weight():
    made = maker(Positions, (4, 8))
    assert made.reference.state() == {"noise", "mean"}
    own, other = made.reference.runner.model, made.numbered(5, "other_weights").weights
    assert torch.equal(other["table"], own.table)
    assert not torch.equal(other["noise"], own.noise) and (other["mean"] > 0).all()


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


def test_a_model_that_cannot_be_copied_is_made_again():
    class Normed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.utils.weight_norm(torch.nn.Linear(256, 8))

        def forward(self, x):
            return self.layer(x)

    cases = maker(Normed)
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(cases.reference.runner.model)
    case = cases.first()
    assert 0 < max(case.own_errors) < 1e-5  # the same weights, in double precision
    other = cases.numbered(1, "other_weights")
    assert not other.skipped and not torch.equal(other.outputs[0], case.outputs[0])
