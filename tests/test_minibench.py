"""minibench: every form is what its label says, every task runs, nothing held out leaks."""

from __future__ import annotations

import ast
import copy
import hashlib
import itertools
import os
import random
import subprocess
import sys

import pytest
import torch

from ttkit.errors import UsageError
from ttkit.minibench import Link, chain_of, forms, tasks
from ttkit.minibench.corpus import contains_excluded, corpus, evaluation_chains
from ttkit.minibench.grammar import KINDS, args, body, fits, idioms
from ttkit.minibench.taskfile import task_code
from ttkit.prompts import compact_text, messages
from ttkit.tasks import Task, make_split

ALL = [(level, number) for level in (1, 2) for number in range(1, 101)]
EPS = torch.finfo(torch.float32).eps
TINY = (20, 24)  # N, D: unequal, and every constant that must divide D does


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def load(code: str) -> dict:
    namespace: dict = {}
    exec(compile(code, "task", "exec"), namespace)
    return namespace


def method(namespace: dict, names: tuple[str, ...], text: str):
    lines = "\n".join("    " + line for line in text.splitlines())
    scope = dict(namespace)
    exec(f"def forward(self, {', '.join(names)}):\n{lines}", scope)
    return scope["forward"]


def error(y, exact: torch.Tensor) -> float:
    """Largest |y - exact| / (|exact| + rms(exact)); infinite for a wrong shape or value."""
    if not isinstance(y, torch.Tensor) or y.shape != exact.shape or not y.numel():
        return float("inf")
    y = y.double()
    if not torch.isfinite(y).all():
        return float("inf")
    scale = exact.abs() + exact.square().mean().sqrt()
    return ((y - exact).abs() / scale.clamp(min=1e-300)).max().item()


class Judge:
    """Compares bodies with a chain's reference in float64, on several inputs, x4 and negated."""

    def __init__(self, chain, shape=TINY, scale="tiny", seeds=(0, 1)):
        self.namespace = load(task_code(chain, shape, scale))
        self.names = args(chain)
        torch.manual_seed(9)
        self.model = self.namespace["Model"](*self.namespace["get_init_inputs"]())
        double = copy.deepcopy(self.model).double()
        exact = method(self.namespace, self.names, body(chain).replace(".float()", ".double()"))
        self.cases = []
        for seed, factor in [(seed, 1) for seed in seeds] + [(seeds[0], 4), (seeds[0], -1)]:
            torch.manual_seed(seed)
            drawn = self.namespace["get_inputs"]()
            inputs = [t * factor if t.is_floating_point() else t for t in drawn]
            with torch.no_grad():
                torch.set_default_dtype(torch.float64)
                try:
                    wide = [t.double() if t.is_floating_point() else t for t in inputs]
                    y = exact(double, *wide).double()
                finally:
                    torch.set_default_dtype(torch.float32)
            assert torch.isfinite(y).all(), (chain, factor)
            with torch.no_grad():
                own = error(self.model(*[t.clone() for t in inputs]), y)
            assert own < 1e-4, f"{chain} is badly conditioned: {own}"
            self.cases.append((inputs, y, max(10 * own, 32 * EPS)))

    @torch.no_grad()
    def accepts(self, text: str) -> bool:
        candidate = method(self.namespace, self.names, text)
        for inputs, y, tolerance in self.cases:
            given = [t.clone() for t in inputs]
            try:
                result = candidate(self.model, *given)
            except Exception:  # whatever a wrong form raises is a failure, as in the verifier
                return False
            if error(result, y) > tolerance:
                return False
            if not all(map(torch.equal, given, inputs)):
                return False
        return True


def test_the_bank_has_the_promised_size():
    assert len(idioms()) >= 45
    for level in (1, 2):
        assert [task.id for task in tasks(level)] == list(range(1, 101))
        assert len({task.sha256 for task in tasks(level)}) == 100
    singles = [chain_of(1, number) for number in range(1, 101)]
    assert all(len(chain) == 1 for chain in singles)
    assert {chain[0].idiom for chain in singles} == set(idioms())
    assert len(set(singles)) == 100


def test_level_2_chains_differ_in_their_idioms():
    chains = [tuple(link.idiom for link in chain_of(2, number)) for number in range(1, 101)]
    assert len(set(chains)) == 100
    assert {len(chain) for chain in chains} == {2, 3}


@pytest.mark.parametrize("name", idioms())
def test_every_form_is_what_its_label_says(name):
    idiom = idioms()[name]
    for variant in range(len(idiom.variants)):
        chain = (Link(name, variant),)
        judge = Judge(chain)
        texts = []
        for kind in KINDS:
            for i in range(len(idiom.forms(kind))):
                text = body(chain, [(kind, i)])
                assert judge.accepts(text) == (kind != "wrong"), (variant, kind, text)
                texts.append(text)
        assert len(set(texts)) == len(texts), "two forms of one variant are the same text"
        assert sum(len(idiom.forms(kind)) for kind in ("common", "wrong")) >= 2


@pytest.mark.parametrize("number", range(1, 101))
def test_chains_hold_together_numerically(number):
    chain = chain_of(2, number)
    judge = Judge(chain, shape=(40, 48))
    for form in forms(2, number):
        assert judge.accepts(form.body), form
    rng = random.Random(number)
    for kind in ("common", "slow"):  # a wrong form may be hidden by the link after it
        spots = [i for i, link in enumerate(chain) if idioms()[link.idiom].forms(kind)]
        if spots:
            picks = [("reference", 0)] * len(chain)
            spot = rng.choice(spots)
            picks[spot] = (kind, rng.randrange(len(idioms()[chain[spot].idiom].forms(kind))))
            assert judge.accepts(body(chain, picks)), picks


def test_forms_begin_with_the_reference_and_are_distinct():
    for level, number in ALL:
        found = forms(level, number)
        assert found[0].kind == "reference"
        assert found[0].body == tasks(level)[number - 1].forward_body
        assert len({form.body for form in found}) == len(found)
        assert all(form.kind in KINDS and form.kind != "wrong" for form in found)


def test_every_task_file_runs_alone():
    for level in (1, 2):
        for task in tasks(level):
            namespace = load(task.code)
            inputs = namespace["get_inputs"]()
            assert all(isinstance(t, torch.Tensor) for t in inputs)
            assert len(inputs) == len(task.forward_args)
            model = namespace["Model"](*namespace["get_init_inputs"]())
            with torch.no_grad():
                result = model(*inputs)
            assert isinstance(result, torch.Tensor) and torch.isfinite(result).all(), task.key
            assert result.untyped_storage().data_ptr() != inputs[0].untyped_storage().data_ptr()


def test_some_tasks_have_parameters_and_some_have_integer_inputs():
    codes = [task.code for task in tasks(1)]
    assert sum("nn.Parameter" in code or "nn.Linear" in code for code in codes) >= 4
    assert sum("torch.randint" in code for code in codes) >= 4


def test_gpu_tasks_are_the_same_tasks_at_larger_sizes():
    for level in (1, 2):
        for small, large in zip(tasks(level), tasks(level, "gpu"), strict=True):
            assert (small.key, small.forward_body) == (large.key, large.forward_body)
            with torch.device("meta"):
                totals = [
                    sum(t.nbytes for t in load(task.code)["get_inputs"]())
                    for task in (small, large)
                ]
            assert totals[0] < totals[1] < 2 * 2**30, small.key


def test_prompts_of_tasks_and_corpus_agree():
    for level in (1, 2):
        for task in tasks(level):
            chain = chain_of(level, task.id)
            text = messages(task, "compact")[-1]["content"]
            assert text == compact_text(args(chain), body(chain))
    for example in corpus(300, seed=3):
        task = Task("file", 0, 0, "", task_code(example.chain, (512, 1024)))
        assert example.prompt == compact_text(task.forward_args, task.forward_body)


def held_out() -> set:
    return set().union(
        *(evaluation_chains(level, make_split("minibench", level, 42).eval) for level in (1, 2))
    )


def leaks(examples, excluded) -> int:
    """Counted without the corpus's own check: by the written-out names of the links."""
    singles = {f"{chain[0].idiom}:{chain[0].variant}" for chain in excluded if len(chain) == 1}
    parts = [f" {' '.join(link.idiom for link in chain)} " for chain in excluded if len(chain) > 1]
    count = 0
    for example in examples:
        names = f" {' '.join(link.idiom for link in example.chain)} "
        alone = {f"{link.idiom}:{link.variant}" for link in example.chain}
        count += bool(alone & singles) or any(part in names for part in parts)
    return count


def test_no_evaluation_chain_is_in_the_corpus():
    excluded = held_out()
    assert leaks(corpus(20_000, exclude=excluded, seed=1), excluded) == 0
    prompts = {example.prompt for example in corpus(20_000, exclude=excluded, seed=1)}
    for level in (1, 2):
        for number in make_split("minibench", level, 42).eval:
            chain = chain_of(level, number)
            assert compact_text(args(chain), body(chain)) not in prompts


def test_the_leak_check_can_fail():
    excluded = held_out()
    assert leaks(corpus(5_000, seed=1), excluded) > 100
    pair = next(chain for chain in sorted(excluded) if len(chain) == 2)
    planted = (Link("add", 0), *(Link(link.idiom, 0) for link in pair))
    assert contains_excluded(planted, excluded)
    assert contains_excluded(planted[1:], {pair})
    assert not contains_excluded(planted[:2], {pair})
    assert not contains_excluded(tuple(reversed(planted[1:])), {pair})
    assert contains_excluded((Link("add", 0), Link("unary", 1)), {(Link("unary", 1),)})
    assert not contains_excluded((Link("add", 0), Link("unary", 0)), {(Link("unary", 1),)})
    # these two idioms read the same
    vector, thin = Link("product_vector", 0), Link("product_thin", 0)
    assert contains_excluded((Link("add", 0), thin), {(Link("add", 0), vector)})
    assert contains_excluded((thin,), {(vector,)})


def test_the_corpus_is_deterministic_also_across_processes():
    first = list(corpus(500, seed=5, exclude=held_out()))
    assert first == list(corpus(500, seed=5, exclude=held_out()))
    assert first != list(corpus(500, seed=6, exclude=held_out()))
    script = (
        "import hashlib\n"
        "from ttkit.minibench import tasks\n"
        "from ttkit.minibench.corpus import corpus, evaluation_chains\n"
        "text = [e.prompt + e.completion for e in corpus(300, seed=5, "
        "exclude=evaluation_chains(2, range(1, 21)))] + [t.code for t in tasks(1) + tasks(2)]\n"
        "print(hashlib.sha256(repr(text).encode()).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1 and len(digests.pop().strip()) == hashlib.sha256().digest_size * 2


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5])
def test_expert_share_is_the_share_of_expert_forms(share):
    drawn = [
        kind
        for example in corpus(6_000, expert_share=share, seed=2)
        for link, kind in zip(example.chain, example.kinds, strict=True)
        if idioms()[link.idiom].expert
    ]
    assert drawn.count("expert") / len(drawn) == pytest.approx(share, abs=0.02)
    assert drawn.count("wrong") / len(drawn) == pytest.approx(0.08 * (1 - share), abs=0.02)


def test_corpus_examples_are_chains_that_fit_and_code_that_parses():
    lengths = set()
    for example in itertools.islice(corpus(3_000, expert_share=0.3, seed=4), 3_000):
        ast.parse("def f():\n    " + example.completion.replace("\n", "\n    "))
        assert example.completion.endswith("\nreturn x")
        assert fits(example.chain)
        lengths.add(len(example.chain))
        if example.kinds == ("reference",) * len(example.chain):
            assert example.prompt.endswith(example.completion)
    assert lengths == {1, 2, 3}


def test_a_matrix_is_needed_to_go_on():
    assert fits((Link("softmax", 0), Link("reduce", 0)))
    assert not fits((Link("reduce", 0), Link("softmax", 0)))
    assert not fits((Link("softmax", 0), Link("argmax", 0)))
    assert not fits((Link("kron", 0), Link("unary", 0)))
    assert not fits((Link("unary", 0), Link("unary", 1)))


@pytest.mark.parametrize(
    "call",
    [
        lambda: tasks(3),
        lambda: tasks(1, "huge"),
        lambda: chain_of(1, 101),
        lambda: chain_of(0, 1),
        lambda: forms(2, 0),
        lambda: next(corpus(1, expert_share=1.5)),
        lambda: evaluation_chains(2, [101]),
        lambda: next(
            corpus(
                1,
                exclude=[(Link(n, v),) for n in idioms() for v in range(len(idioms()[n].variants))],
            )
        ),
    ],
)
def test_wrong_input_is_refused_in_one_sentence(call):
    with pytest.raises(UsageError) as caught:
        call()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200
