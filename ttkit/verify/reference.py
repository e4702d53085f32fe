"""What a task's reference returns, natively and in float64, on any inputs and with any weights."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Collection
from typing import Any

import torch

from ttkit.verify import correctness, structure, variations
from ttkit.verify.arena import flatten, tensors_of
from ttkit.verify.cases import LARGE_BYTES, Case, size_of
from ttkit.verify.runner import Runner, aliases, kind_of, secret_seed, seed_all

# A variation on which the reference itself is no better than this says nothing of a candidate.
VAGUE_ERROR = 1e-2
DENSE = torch.contiguous_format
# How many numbers of an output are looked at for what they are made of.
PROBED = 3
LOST = 64
# In how many runs, on inputs that differ by so little, an error is looked for.
RUNS, JITTER = 4, 1e-3


class Reference:
    """Runs the reference and its float64 copy."""

    def __init__(self, runner: Runner):
        self.runner = runner
        # Taken before any run could change a buffer of the model.
        self.exact = runner.twin().double()
        self._tables = runner.tables()
        self.mutates = True  # until it is known
        self.usually_finite = True  # the output, on inputs as declared
        self.fan_in = 1  # see `find_fan_in`

    def case(self, name: str, args: Any, weights: dict[str, torch.Tensor] | None = None) -> Case:
        """Run the reference on `args`, natively and in float64, with other `weights` if given."""
        case = self._exact_case(name, args, weights)
        # Where that is so as declared, NaN for NaN, if the reference itself agrees.
        # (How infinite inputs spread is nobody's promise.)
        strict = self.usually_finite or name == variations.SPECIAL
        if not case.finite and (strict or not max(case.own_errors) < VAGUE_ERROR):
            case.skipped = "the float64 reference is not finite"
        return case

    def _exact_case(self, name: str, args: Any, weights: dict[str, torch.Tensor] | None) -> Case:
        case = self.native(name, args, weights)
        case.exact = self.in_float64(args, case.outputs, weights)
        return case

    def settle(self, case: Case) -> None:
        """Make its errors the most that several runs show.

        Where one number decides, by how much it is off is chance: of programs as good as the
        reference one in sixteen is off by ten times as much. Some runs are of nearly the same
        inputs; some of these very inputs, each number off by a rounding: where terms cancel, that
        is what tells how exact any program can be. Not of large inputs.
        """
        if case.args is None or size_of(case.args) > LARGE_BYTES:
            return
        errors = [case.own_errors]
        for _ in range(RUNS - 1):
            near = variations.vary(case.args, _jittered)
            errors.append(self._exact_case(case.name, near, case.weights).own_errors)
            rounded = variations.vary(case.args, _rounded)
            errors.append(case.errors_of(self.native(case.name, rounded, case.weights).outputs))
        found = zip(*errors, strict=True)
        case.own_errors = [max(filter(math.isfinite, e), default=math.nan) for e in found]

    def judged(self, name: str, args: Any, weights: dict[str, torch.Tensor] | None) -> Case:
        """`case`, skipped where the reference itself is vague about it."""
        return unless_vague(self.case(name, args, weights))

    def native(self, name: str, args: Any, weights: dict[str, torch.Tensor] | None = None) -> Case:
        """What the reference itself makes of `args`, without a float64 run."""
        tensors: list[torch.Tensor] = []
        given = copy.deepcopy(args) if self.mutates else args
        with torch.no_grad():
            tree = flatten(_call(self.runner.model, given, weights), tensors)
            case = Case(name, args, [_own(t) for t in tensors], [], tree)
            case.aliases = aliases(tensors_of(given), tensors)
        case.types = tuple(map(kind_of, tensors))
        case.fan_in = self.fan_in * (LOST if name in variations.BIASED else 1)
        case.weights = weights
        return case

    def in_float64(
        self,
        args: Any,
        outputs: list[torch.Tensor],
        weights: dict[str, torch.Tensor] | None = None,
    ) -> list[torch.Tensor]:
        """The float64 run's outputs. Raises torch.OutOfMemoryError where there is no room."""
        exact: list[torch.Tensor] = []
        try:
            wide = weights and {k: correctness.to_float64(v) for k, v in weights.items()}
            with torch.no_grad(), correctness.widened():
                flatten(_call(self.exact, correctness.to_float64(args), wide), exact)
            exact = [_own(t) for t in exact]
        except (torch.OutOfMemoryError, torch.linalg.LinAlgError):
            # The second: there is no answer, and what single precision makes of it is chance.
            raise
        except (RuntimeError, TypeError):
            # No float64 kernel, say: the native run is the yardstick.
            exact = []
        if [t.shape for t in exact] != [t.shape for t in outputs]:
            return [correctness.to_float64(t) for t in outputs]
        # What no number of the native type is near to overflows there, and is right to.
        for y64, y in zip(exact, outputs, strict=True):
            if y.is_floating_point() and y64.is_floating_point() and y64.numel():
                correctness.overflow_(y64, torch.finfo(y.dtype).max)
        return exact

    def differentiable(self, args: Any) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The floating inputs and those outputs of the float64 copy that derivatives exist of."""
        outputs: list[torch.Tensor] = []
        with torch.enable_grad():
            wide = variations.vary(args, lambda t: t.detach().double().clone().requires_grad_(True))
            flatten(self.exact(*wide), outputs)
        leaves = [t for t in tensors_of(wide) if t.requires_grad]
        return leaves, [t for t in outputs if t.requires_grad]

    def find_fan_in(self, args: Any) -> int:
        """How many numbers of the inputs one number of the output is made of, about; 1 where
        derivatives do not tell."""
        most = 1
        with contextlib.suppress(RuntimeError, TypeError, NotImplementedError):
            leaves, outputs = self.differentiable(args)
            for output in outputs if leaves else ():
                for _ in range(min(PROBED, output.numel())):
                    number = output.flatten()[secret_seed() % output.numel()]
                    found = torch.autograd.grad(
                        number, leaves, retain_graph=True, allow_unused=True
                    )
                    most = max(most, sum(int(g.count_nonzero()) for g in found if g is not None))
        return most

    def sizes(self) -> frozenset[int]:
        """All sizes that its parameters have: inputs of others fit them by chance at most."""
        model = self.runner.model
        weights = model.parameters() if isinstance(model, torch.nn.Module) else ()
        return frozenset(n for weight in weights for n in weight.shape)

    def state(self) -> set[str]:
        """The names of the reference's weights; tables of constants (positions, filters) are
        none."""
        model = self.runner.model
        names = set(model.state_dict()) if isinstance(model, torch.nn.Module) else set()
        return names - self._tables

    def changed_weights(
        self,
        which: Collection[str],
        change: Callable[[torch.Tensor], torch.Tensor],
        state: dict[str, torch.Tensor] | None = None,
    ) -> dict[str, torch.Tensor]:
        """All weights, its own or those of `state`, with those changed that `which` names."""
        seed_all(secret_seed())
        state = self.runner.model.state_dict() if state is None else state
        return {k: change(v) if k in which else v for k, v in state.items()}

    def constant(self, names: Collection[str]) -> list[str]:
        """Those of `names` whose weights are of one value throughout."""
        state = self.runner.model.state_dict() if names else {}
        return [name for name in names if structure.constant(state[name])]


def _jittered(tensor: torch.Tensor) -> torch.Tensor:
    """Nearly the same numbers; zeros and equal ones stay."""
    noise = 1 + JITTER * torch.rand_like(tensor)
    return tensor * noise if structure.free(tensor) else tensor


def _rounded(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers, most of them off by a rounding, up or down, of what sums are kept in: half
    floats stay."""
    eps = min(torch.finfo(tensor.dtype).eps, torch.finfo(torch.float32).eps)
    factors = torch.randint_like(tensor, -1, 2).mul_(eps).add_(1)
    return tensor * factors if structure.free(tensor) else tensor


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """A dense copy of an output, or a large one itself: for it there may be no room, and it is
    let go before the model runs again."""
    tensor = tensor.detach()
    if tensor.nbytes > LARGE_BYTES:
        return tensor.contiguous()
    return tensor.clone(memory_format=DENSE)


def unless_vague(case: Case) -> Case:
    """`case`, skipped where the reference's own error is large."""
    if not case.skipped and max(case.reference_errors, default=0.0) > VAGUE_ERROR:
        case.skipped = "the reference itself is far from its float64 run"
    return case


def _call(model: Any, args: Any, weights: dict[str, torch.Tensor] | None) -> Any:
    if weights is None:
        return model(*args)
    return torch.func.functional_call(model, weights, tuple(args))
