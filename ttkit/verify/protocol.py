"""How a candidate is measured: the protocols, and the limits a candidate lives under."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, replace

from ttkit.errors import UsageError

# All kinds of input sets in the order of use (ttkit.verify.variations): the declared one finds most
# wrong candidates, and has to come right before those that touch it (two, since one may by chance
# touch the very elements that a program remembers an input by); of large inputs all others are cut
# down, so that other shapes have to come before other values.
VARIATION_NAMES = (
    "declared",
    "touched",
    "touched",
    "other_shapes",
    "more_rows",
    "negated",
    "scaled",
    "large",
    "small",
    "tiny",
    "near_one",
    "shifted",
    "noncontiguous",
    "other_indices",
    "uneven",
    "uneven",
    "unsaturated",
    "special",
    "other_weights",
)
# Those whose inputs have the shapes, the layout and the plain numbers of the declared ones.
IN_PLACE = ("negated", "scaled", "large", "small", "tiny", "near_one", "shifted", "unsaturated")
# The kind of one more case once all has been timed: the weights are changed a little.
TOUCHED_WEIGHTS = "touched_weights"

# The look at which another launch ends at the latest, and how narrow an interval ends any. (At 1.15
# it took a third fewer pairs, but with one of two cores loaded a program 1.1 times as fast was then
# found in 32 of 40 runs, and in 117 of 120 at 1.04.)
AGAIN_LOOKS, AGAIN_PRECISE = 4, 1.04


@dataclass(frozen=True)
class Protocol:
    """The settings of one way to measure.

    `paired` protocols interleave reference and candidate in random order and add pairs at the
    fixed `looks` until the answer is settled; their times are ranked `block` pairs at a time
    (ttkit.verify.ranks). Unpaired ones are the paper's: `trials` runs of the candidate, then as
    many of the reference, and the ratio of the means.

    `settled_width` is the ratio of the interval's ends at which a figure other than 1 is precise
    enough, and `precise` that at which any is. `futile` is the speedup below which a candidate that
    may be faster is not pursued, if the interval is no wider than `futile_width`, and
    `process_spread` what two processes that run the same code may differ by (both ends of the
    interval are moved by that share). A candidate whose interval lies above 1, but not above
    `relaunch_below`, or spans 1 and is undecided, is measured again in up to `relaunches` pairs of
    fresh processes, and its interval is then that of the launches; once one of them is not ahead,
    there are no more, and the interval spans what they found.

    Correctness is looked at on an input set of each kind in `variations` (some of VARIATION_NAMES),
    or without any on `correctness_trials` draws as declared, and with `compared` on the outputs of
    every timed pair as well. `seconds` is the time budget of one timing phase and `flush_bytes`
    what is written before every run to displace the core's caches (on CUDA the size of the L2 cache
    counts).
    """

    name: str
    paired: bool
    warmup: int
    correctness_trials: int = 1
    variations: tuple[str, ...] = ()
    compared: bool = False
    looks: tuple[int, ...] = ()
    block: int = 6
    alpha: float = 0.025
    process_spread: float = 0.0
    relaunches: int = 0
    relaunch_below: float = 1.25
    settled_width: float = 1.0
    precise: float = 1.0
    futile: float = 1.0
    futile_width: float = 1.0
    seconds: float = 2.0
    trials: int = 0
    flush_bytes: int = 0
    exclusive: bool = True

    @property
    def cases(self) -> tuple[str, ...]:
        """The kinds of the input sets that correctness is judged on, one after another."""
        return self.variations or ("declared",) * self.correctness_trials

    @property
    def again(self) -> Protocol:
        """For another launch of a candidate, of which only counts on which side of 1 its figure is.

        It ends by no rule that treats the two sides differently: an unchanged program has to be
        ahead in half of the launches, and a faster one not to be given up in a bad moment.
        """
        return replace(self, looks=self.looks[:AGAIN_LOOKS], futile=0.0, precise=AGAIN_PRECISE)

    def fingerprint(self) -> str:
        """A hash of all settings: verdicts of different settings never share a cache entry."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


RIGOROUS = Protocol(
    name="rigorous",
    paired=True,
    warmup=2,
    variations=VARIATION_NAMES,
    compared=True,
    looks=(9, 14, 22, 36, 60, 100),
    settled_width=1.4,
    futile=1.07,
    futile_width=1.2,
    seconds=2.0,
    flush_bytes=4 << 20,
    process_spread=0.01,
    relaunches=5,  # 1 in 2 ** 6 is less than alpha
)
# For rewards in training, in a third of the time: the variations that programs fail most often on,
# and one look. Its interval has the same error rate, and is wider.
REWARD = replace(
    RIGOROUS,
    name="reward",
    variations=("declared", "other_shapes", "negated", "noncontiguous", "other_weights"),
    looks=(7,),
    relaunches=0,
)
FULL = Protocol("full", paired=False, warmup=3, correctness_trials=5, trials=50, exclusive=False)
FAST_PROXY = Protocol(
    "fast-proxy", paired=False, warmup=3, correctness_trials=1, trials=5, exclusive=False
)
PROTOCOLS = {p.name: p for p in (RIGOROUS, REWARD, FULL, FAST_PROXY)}


def protocol_named(name: str | Protocol) -> Protocol:
    """The protocol of that name; raises UsageError when there is none."""
    if isinstance(name, Protocol):
        return name
    if name not in PROTOCOLS:
        raise UsageError(f"unknown protocol {name!r}: it is one of {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]


@dataclass(frozen=True)
class Limits:
    """What one candidate may use; seconds, bytes and counts.

    `memory_bytes` is on top of what the harness itself uses. `run_factor` times the reference's
    time, but at least `run_seconds`, is the wall time of one call; `total_seconds` (more where the
    reference is slow) that of all it is asked from its first call on. Compiling an inline CUDA
    extension takes a minute or two, so a source that names a compiler has `compile_seconds` to load
    and for each call, and as much more CPU time.
    """

    load_seconds: float = 10.0
    load_seconds_cuda: float = 30.0
    compile_seconds: float = 240.0
    run_seconds: float = 3.0
    run_factor: float = 100.0
    total_seconds: float = 60.0
    cpu_seconds: int = 60
    cpu_seconds_cuda: int = 600
    memory_bytes: int = 4 << 30
    gpu_memory_fraction: float = 0.6
    processes: int = 128
    open_files: int = 256
    file_bytes: int = 256 << 20
    file_bytes_cuda: int = 1 << 30

    def cpu_time(self, device: str, compiles: bool) -> int:
        """Seconds of CPU time of a process on `device`, which may have a compiler in it."""
        seconds = self.cpu_seconds if device == "cpu" else self.cpu_seconds_cuda
        return seconds + (math.ceil(self.compile_seconds) if compiles else 0)
