"""The verifier: candidates in, verdicts out.

The calling process is the judge: it holds the only clock, needs no torch, and runs no candidate.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import os
import queue
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ttkit.domains import check_device
from ttkit.errors import UsageError
from ttkit.tasks import Task
from ttkit.verify.cache import Cache, verdict_key
from ttkit.verify.desk import Desk, Room
from ttkit.verify.device import SHARED, DeviceLock, device_name
from ttkit.verify.protocol import Limits, Protocol, protocol_named
from ttkit.verify.verdict import Verdict

# On CUDA a process takes a third of a second to start and a compiler minutes: so many candidates
# of one task are loaded side by side. On CPU loading is cheap, and there are no cores to spare.
LOADED_TOGETHER = 8
# On CPU so many candidates are checked side by side under a paired protocol. Of one task so many
# follow each other at one desk, which has to start a referee for it; more where there is so much to
# do that a desk has several such turns.
DESKS = 2
UNIT, TURNS = 16, 4

# Places in `items` that share a verdict.
Group = list[int]


class Verifier:
    """Verifies candidates on one device; a context manager.

    `protocol` is the name of one of PROTOCOLS, or a Protocol of one's own. `cache` is a file
    that verdicts are kept in by content. `workers` candidates run at a time under the unpaired
    protocols, contended on purpose as in the paper; paired ones check side by side where there are
    cores for it and time one at a time, whatever its value. Raises UsageError for an unknown
    protocol and a device that is neither `cpu` nor a `cuda[:n]` that is there.
    """

    def __init__(
        self,
        protocol: str | Protocol = "rigorous",
        device: str = "cpu",
        cache: Path | None = None,
        limits: Limits | None = None,
        workers: int = 1,
    ):
        self.protocol = protocol_named(protocol)
        check_device(device)
        if workers < 1:
            raise UsageError(f"workers is {workers}: it must be 1 or more")
        self.device = device
        self.limits = limits or Limits()
        self.workers = 1 if self.protocol.exclusive else workers
        self.cache = Cache(cache)
        self._room = Room(self.protocol, device, self.limits)
        self._desks: list[Desk] = []
        self._idle: list[Desk] = []
        self._lock = threading.Lock()
        _open_verifiers.add(self)

    def __enter__(self) -> Verifier:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End every process and remove every scratch directory; may be called again."""
        for desk in self._desks:
            desk.close()
        self._desks.clear()
        self._idle.clear()
        self._room.close()
        _open_verifiers.discard(self)

    def verify(self, task: Task, source: str, *, fresh: bool = False) -> Verdict:
        """The verdict on `source`, a module that defines ModelNew.

        `fresh` measures again even if the cache knows the answer, and leaves the cache as it is.
        Never raises for anything the candidate does; raises InfraError only when verdicts can no
        longer be kept.
        """
        return self.verify_many([(task, source)], fresh=fresh)[0]

    def _key(self, task: Task, source: str) -> str:
        name = device_name(self.device)
        return verdict_key(task, source, self.protocol, self.limits, name, self.workers)

    def verify_many(
        self,
        items: Sequence[tuple[Task, str]],
        on_verdict: Callable[[int, Verdict], None] | None = None,
        *,
        fresh: bool = False,
    ) -> list[Verdict]:
        """One verdict for each (task, source), in the order of `items`.

        Items of the same content are measured once; with `fresh`, each item is measured and the
        cache is neither asked nor changed. `on_verdict(index, verdict)` is called in the
        calling thread as verdicts come in, once for each index, while nothing is timed.
        """
        groups: OrderedDict[str, list[int]] = OrderedDict()
        for index, (task, source) in enumerate(items):
            key = self._key(task, source)
            groups.setdefault(f"{key}{index}" if fresh else key, []).append(index)
        verdicts: dict[int, Verdict] = {}

        def give(indices: Group, verdict: Verdict) -> None:
            for index in indices:
                verdicts[index] = verdict
                if on_verdict is not None:
                    on_verdict(index, verdict)

        todo: list[Group] = []
        for key, indices in groups.items():
            known = None if fresh else self.cache.get(key)
            if known is None:
                todo.append(indices)
            else:
                give(indices, known)
        try:
            units = list(self._units(items, todo))
            if self._places() == 1 or len(units) < 2:
                for unit in units:
                    with self._desk() as desk:
                        for group, verdict in self._measure(desk, items, unit, fresh):
                            give(group, verdict)
            else:
                self._side_by_side(items, units, fresh, give)
        except BaseException:
            # Interrupted: no candidate may go on running.
            self.close()
            raise
        return [verdicts[index] for index in range(len(items))]

    def _places(self) -> int:
        """How many candidates are worked on at a time."""
        if not self.protocol.exclusive:
            return self.workers
        cores = len(os.sched_getaffinity(0)) if self.device == "cpu" else 1
        return min(DESKS, cores)

    def _units(self, items: Sequence[tuple[Task, str]], todo: list[Group]) -> Iterator[list[Group]]:
        """What one desk does in one go: neighbours of one task."""
        size = max(UNIT, len(todo) // (TURNS * self._places())) if self.protocol.exclusive else 1
        for _, group in itertools.groupby(todo, lambda g: items[g[0]][0].sha256):
            neighbours = list(group)
            for start in range(0, len(neighbours), size):
                yield neighbours[start : start + size]

    def _side_by_side(
        self,
        items: Sequence[tuple[Task, str]],
        units: list[list[Group]],
        fresh: bool,
        give: Callable[[Group, Verdict], None],
    ) -> None:
        """Several desks, each in a thread of its own; what they find is given in this thread."""
        found: queue.SimpleQueue[tuple[Group, Verdict] | BaseException] = queue.SimpleQueue()
        stopped = threading.Event()

        def work(unit: list[Group]) -> None:
            try:
                with self._desk() as desk:
                    for pair in self._measure(desk, items, unit, fresh):
                        found.put(pair)
                        if stopped.is_set():
                            return
            except BaseException as error:
                found.put(error)

        with ThreadPoolExecutor(self._places()) as pool, DeviceLock(self.device) as lock:
            try:
                for unit in units:
                    pool.submit(work, unit)
                for _ in range(sum(map(len, units))):
                    pair = found.get()
                    if isinstance(pair, BaseException):
                        raise pair
                    if self.protocol.exclusive:
                        # Python at work here would take the interpreter from a judge that times.
                        lock.hold(SHARED)
                    give(*pair)
                    lock.release()
            except BaseException:
                stopped.set()
                pool.shutdown(wait=False, cancel_futures=True)
                self._room.close()  # whoever waits for a process need not wait long
                raise

    def _measure(
        self, desk: Desk, items: Sequence[tuple[Task, str]], unit: list[Group], fresh: bool
    ) -> Iterator[tuple[Group, Verdict]]:
        size = 1 if self.device == "cpu" else LOADED_TOGETHER
        for start in range(0, len(unit), size):
            batch = unit[start : start + size]
            task = items[batch[0][0]][0]
            sources = [items[group[0]][1] for group in batch]
            found = desk.verify_several(task, sources)
            for group, source, verdict in zip(batch, sources, found, strict=True):
                contended = verdict.contention.get("busy", False)
                passing = verdict.status == "timeout" and contended
                if not (fresh or passing or verdict.status == "infra_error"):
                    self.cache.put(self._key(task, source), verdict)
                yield group, verdict

    @contextlib.contextmanager
    def _desk(self) -> Iterator[Desk]:
        """A desk that is nobody else's until the end of the context."""
        with self._lock:
            if not self._idle:
                desk = Desk(self._room, len(self._desks))
                self._desks.append(desk)
                self._idle.append(desk)
            desk = self._idle.pop()
        try:
            yield desk
        finally:
            self._idle.append(desk)


_open_verifiers: weakref.WeakSet[Verifier] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for verifier in list(_open_verifiers):
        verifier.close()
