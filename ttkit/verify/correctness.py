"""Is an output right? Error against a float64 run, in units of the reference's own error.

    err(y) = max |y - y64| / (|y64| + rms(y64))

A candidate is accepted when err <= max(10 * err(reference), 32 * eps(dtype)), 4 * eps for half
floats, and its NaN and Inf stand where the float64 run has them. The root mean square in the
denominator keeps elements that happen to be near zero from dominating; unlike a fixed absolute
tolerance it scales with the output, and since it is the smallest of the whole's, the row's and the
column's, with every part of it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

ERROR_FACTOR = 10.0
# (32 roundings of a half float are a quarter of its value.)
EPS_FACTOR, EPS_FACTOR_DOUBLE, EPS_FACTOR_HALF = 32.0, 4096.0, 4.0
LOCAL_FLOOR = 1e-3
# A row or column of fewer elements has no size of its own: one that is near zero by chance would
# decide both errors.
FEW = 8
# The share of integers made of floating numbers that may come out otherwise, beside ERROR_FACTOR
# times as many as in the reference: where a number is as near to one as to the other.
UNDECIDED = 1e-5
# Values too small for the error above to show, of which so many are off by so large a part.
LOST_SHARE, LOST_LEAST, LOST_PART, LOST_LINE = 0.05, 8, 0.5, 0.5
# Elements of a large tensor that are looked at together.
PIECE = 1 << 26
# KernelBench's tolerances by dtype (src/kernelbench/eval.py, get_tolerance_for_precision).
KERNELBENCH_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 1e-2}


@dataclass(frozen=True)
class Comparison:
    """How one output compares; errors are relative, as defined in this module's docstring."""

    ok: bool
    error: float
    allowed: float
    allclose: bool
    what: str = ""


def to_float64(value: Any) -> Any:
    """Floating tensors in lists and tuples as float64 copies; integers and the rest unchanged."""
    if isinstance(value, torch.Tensor):
        if value.is_complex():
            return value.to(torch.complex128)
        return value.double() if value.is_floating_point() else value
    if isinstance(value, (list, tuple)):
        return type(value)(to_float64(v) for v in value)
    return value


class _Widen(TorchFunctionMode):
    """Takes every mention of single precision for double."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        kwargs = {k: torch.float64 if a is torch.float32 else a for k, a in (kwargs or {}).items()}
        return func(*args, **kwargs)


@contextlib.contextmanager
def widened() -> Iterator[None]:
    """Code that makes tensors of its own, or names float32, computes in float64 meanwhile."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Widen():
            yield
    finally:
        torch.set_default_dtype(usual)


def overflow_(y64: torch.Tensor, largest: float) -> None:
    """Make what is beyond `largest` infinite, in place."""
    if not _magnitude(y64) <= largest:  # or NaN
        y64.masked_fill_(y64 > largest, math.inf).masked_fill_(y64 < -largest, -math.inf)


class Yardstick:
    """A tensor that others are compared with, in float64; what does not depend on them is kept."""

    def __init__(self, y64: torch.Tensor):
        # Of large ones nothing of their size is made: they are looked at piece by piece.
        self.y64 = y64.double() if y64.numel() <= PIECE else y64
        self.finite = math.isfinite(_magnitude(self.y64))
        self.mask = None if self.finite else torch.isfinite(self.y64)
        self.kept = self.y64 if self.mask is None else self.y64[self.mask]
        self.rms = _rms(self.kept)
        # Of large outputs only the whole counts.
        local: torch.Tensor | float = self.rms
        if self.finite and self.y64.numel() <= PIECE:
            local = _local_rms(self.y64, self.rms)
        self.local = local

    def error(self, y: torch.Tensor) -> float:
        """err(y): inf when NaN or Inf stand elsewhere than in the float64 tensor."""
        if not self.y64.numel():
            return 0.0
        if self.mask is not None:
            y = _at_the_edge(y, self.y64)
            if not _same_special(y[~self.mask].double(), self.y64[~self.mask]):
                return math.inf
            y = y[self.mask]
        if not self.kept.numel():
            return 0.0
        if self.rms == 0.0:
            return 0.0 if bool((y == 0).all()) else math.inf
        if isinstance(self.local, torch.Tensor):
            return _largest(y, self.kept, self.local)
        return max(_largest(a, b, self.local) for a, b in _pieces(y, self.kept))


def _pieces(*tensors: torch.Tensor) -> Iterable[tuple[torch.Tensor, ...]]:
    """Tensors of one size, cut alike into flat pieces that work can be done on with little room."""
    return zip(*(t.flatten().split(PIECE) for t in tensors), strict=True)


def _largest(y: torch.Tensor, y64: torch.Tensor, local: torch.Tensor | float) -> float:
    if not (y.dtype is y64.dtype is torch.float32 and _moderate(local)):
        y, y64 = y.double(), y64.double()
    # A NaN anywhere in y makes the largest difference NaN.
    error = float(y.sub(y64).abs_().div_(y64.abs().add_(local)).max())
    return error if math.isfinite(error) else math.inf


def _moderate(scale: torch.Tensor | float) -> bool:
    """Whether numbers of this size can be subtracted and divided in single precision."""
    return isinstance(scale, float) and 1e-15 < scale < 1e15


def _magnitude(tensor: torch.Tensor) -> float:
    """The largest absolute value, 0 of nothing; NaN or infinite if one is."""
    if not tensor.numel():
        return 0.0
    low, high = (float(end) for end in tensor.aminmax())
    return max(-low, high)


def _rms(tensor: torch.Tensor) -> float:
    """Root mean square; the largest value is taken out first where a square could underflow."""
    scale = _magnitude(tensor) if tensor.dtype is torch.float64 else 1.0
    if not (scale and tensor.numel()):
        return 0.0
    norms = (
        torch.linalg.vector_norm(piece if scale == 1.0 else piece / scale, dtype=torch.float64)
        for piece in tensor.flatten().split(PIECE)
    )
    return scale * math.hypot(*map(float, norms)) / math.sqrt(tensor.numel())


def _local_rms(tensor: torch.Tensor, rms: float) -> torch.Tensor | float:
    """The smallest of the root mean squares of the whole, of an element's row and of its column;
    at least a thousandth of the whole's, since rounding errors may come from elsewhere."""
    if tensor.dim() < 2 or not tensor.numel():
        return rms
    squares = tensor.square()
    small = torch.full_like(squares[:1].flatten()[:1], rms * rms)
    if tensor.shape[-1] >= FEW:
        small = torch.minimum(small, squares.mean(dim=-1, keepdim=True))
    if tensor.numel() >= FEW * tensor.shape[-1]:
        column = squares.mean(dim=tuple(range(tensor.dim() - 1)), keepdim=True)
        small = torch.minimum(small, column)
    return small.sqrt_().clamp_(LOCAL_FLOOR * rms, rms)


def _at_the_edge(y: torch.Tensor, y64: torch.Tensor) -> torch.Tensor:
    """`y` with what just overflowed in one of the two, and just did not in the other, as in y64."""
    if not y.is_floating_point():
        return y
    most = 0.9 * torch.finfo(y.dtype).max
    beyond = (y.abs() > most) & (y64.abs() > most) & (y.sign() == y64.sign())
    return torch.where(beyond & (y.isinf() != y64.isinf()), y64.to(y.dtype), y)


def _same_special(a: torch.Tensor, b: torch.Tensor) -> bool:
    before = a
    a, b = (torch.nan_to_num(t, nan=7.0, posinf=1.0, neginf=-1.0) for t in (a, b))
    return not bool(torch.isfinite(before).any()) and torch.equal(a, b)


def relative_error(y: torch.Tensor, y64: torch.Tensor) -> float:
    """err(y) against `y64`; see `Yardstick`."""
    return Yardstick(y64).error(y)


def allowed_error(reference_error: float, dtype: torch.dtype) -> float:
    """The largest err(y) that is accepted where the reference has `reference_error`.

    Of double precision there is none more exact to know the reference's error by: it is taken to be
    of the size that a sum of some thousand numbers has.
    """
    factor = EPS_FACTOR_DOUBLE if dtype in (torch.float64, torch.complex128) else EPS_FACTOR
    factor = EPS_FACTOR_HALF if dtype in (torch.float16, torch.bfloat16) else factor
    return max(ERROR_FACTOR * reference_error, factor * torch.finfo(dtype).eps)


def rounding(terms: int, dtype: torch.dtype) -> float:
    """The error that a sum of so many terms has, in the order that suits a program.

    The reference's own may be smaller by luck (that of a single number), or by the order that it
    takes. Of n roundings that are independent the square root of n is left (Higham and Mary 2019,
    "A new approach to probabilistic rounding error analysis"); a tenth of that here, since
    ERROR_FACTOR times what the reference is off by is allowed. Half floats are summed in single
    precision.
    """
    if not dtype.is_floating_point and not dtype.is_complex:
        return 0.0
    half = dtype in (torch.float16, torch.bfloat16)
    eps = torch.finfo(torch.float32 if half else dtype).eps
    return math.sqrt(terms) * eps / ERROR_FACTOR


def compare(
    y: torch.Tensor,
    reference: torch.Tensor,
    yardstick: Yardstick | None,
    reference_error: float,
    rounded: bool = False,
) -> Comparison:
    """Compare a candidate's tensor with the reference's and the float64 run's.

    Integer and boolean outputs (`yardstick` None) must be equal to the reference's; where they are
    made of floating numbers (`rounded`) a very few may not be. Complex ones are compared as pairs
    of real numbers.
    """
    if yardstick is None:
        share = share_unlike(y, reference)
        allowed = ERROR_FACTOR * reference_error + UNDECIDED if rounded else 0.0
        unlike = round(share * y.numel())
        what = "" if share <= allowed else f"{unlike} of {y.numel()} values differ"
        return Comparison(share <= allowed, share, allowed, not unlike, what)
    y, reference = as_real(y), as_real(reference)
    allowed = allowed_error(reference_error, reference.dtype)
    error = yardstick.error(y)
    tolerance = KERNELBENCH_TOLERANCE.get(reference.dtype, 1e-4)
    close = _allclose(reference, y, tolerance)
    ok = error <= allowed
    what = "" if ok else _what(y, error, allowed, yardstick.y64)
    return Comparison(ok, error, allowed, close, what)


def share_unlike(y: torch.Tensor, reference: torch.Tensor) -> float:
    """The share of elements that differ."""
    return int((y != reference).count_nonzero()) / y.numel() if y.numel() else 0.0


def lost(y: torch.Tensor, reference: torch.Tensor, y64: torch.Tensor | None = None) -> bool:
    """Whether many of the reference's values, too small for an error to show, are others in `y`:
    zeros, a constant, or anything else that is off by half of them or more.

    Only values count that the reference itself has right (against `y64`, if given). A few may be
    lost, where what cancels in one order of operations does not in another.
    """
    if not y.is_floating_point() or not y.numel():
        return False
    tensors = (y, reference) if y64 is None else (y, reference, y64)
    most = max(LOST_SHARE * y.numel(), LOST_LEAST)
    if y.numel() > PIECE:
        return sum(int(_off(*piece).count_nonzero()) for piece in _pieces(*tensors)) > most
    off = _off(*tensors)
    if int(off.count_nonzero()) > most:
        return True
    # Or most of a row, or of a column, where it is known that those are no noise.
    lines = [off, off.transpose(0, -1)] if off.dim() > 1 and y64 is not None else []
    return any(
        bool((line.flatten(1).sum(dim=1) > LOST_LINE * line[0].numel()).any())
        for line in lines
        if line[0].numel() >= FEW
    )


def _off(y: torch.Tensor, reference: torch.Tensor, *y64: torch.Tensor) -> torch.Tensor:
    # Nothing is off by more than a part of what is infinite, or by more than NaN.
    off = y.sub(reference).abs_() > reference.abs().mul_(LOST_PART)
    for truth in y64:
        off.logical_and_(reference.sub(truth).abs_() <= truth.abs().mul_(LOST_PART / 10))
    return off


def surely_close(y: torch.Tensor, reference: torch.Tensor, reference_error: float) -> bool:
    """Whether err(y) against `reference` is at most half of what is allowed; a few native passes.

    For what is compared very often; False says nothing, `compare` has to look.
    """
    if all(torch.equal(a, b) for a, b in _pieces(y, reference)):
        return True
    if y.dtype not in (torch.float32, torch.float64) or not y.numel():
        return False
    rms = _rms(reference)
    if not _moderate(rms):
        return False
    if lost(y, reference):
        return False
    allowed = allowed_error(reference_error, y.dtype) / 2

    def near(a: torch.Tensor, b: torch.Tensor, scale: torch.Tensor | float) -> bool:
        return float(a.sub(b).abs_().div_(b.abs().add_(scale)).max()) <= allowed

    if y.numel() <= PIECE:
        return near(y, reference, _local_rms(reference, rms))
    return all(near(a, b, rms) for a, b in _pieces(y, reference))


def _allclose(reference: torch.Tensor, y: torch.Tensor, tolerance: float) -> bool:
    """torch.allclose with atol = rtol, in a few passes where everything is finite."""
    for a, b in _pieces(y, reference):
        excess = a.sub(b).abs_().sub_(a.abs().mul_(tolerance))
        largest = float(excess.max()) if excess.numel() else 0.0
        if not math.isfinite(largest):
            close = torch.allclose(b, a, atol=tolerance, rtol=tolerance)
        else:
            close = largest <= tolerance
        if not close:
            return False
    return True


def as_real(tensor: torch.Tensor) -> torch.Tensor:
    """Complex tensors with a last dimension of 2, others as they are."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _what(y: torch.Tensor, error: float, allowed: float, y64: torch.Tensor) -> str:
    bad = int((~torch.isfinite(y) & torch.isfinite(y64)).sum())
    if bad:
        return f"{bad} of {y.numel()} values are NaN or Inf where the reference is finite"
    if math.isinf(error):
        return "NaN, Inf or non-zero values stand where the reference has none"
    few = f"{error:.2g}", f"{allowed:.2g}"
    found, most = few if few[0] != few[1] else (f"{error:.6g}", f"{allowed:.6g}")
    return f"its error is {found}, {most} is allowed"


def all_finite(tensors: list[torch.Tensor]) -> bool:
    """Whether every floating tensor is finite throughout."""
    return all(math.isfinite(_magnitude(t)) for t in tensors if t.is_floating_point())
