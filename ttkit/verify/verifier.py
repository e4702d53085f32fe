"""The verifier: candidates in, verdicts out.

The calling process is the judge: it holds the only clock, needs no torch, and runs no candidate.
"""

from __future__ import annotations

import atexit
import itertools
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from ttkit.errors import UsageError
from ttkit.tasks import Task
from ttkit.verify.cache import Cache, verdict_key
from ttkit.verify.desk import Desk, Room
from ttkit.verify.device import device_name
from ttkit.verify.protocol import Limits, Protocol, protocol_named
from ttkit.verify.verdict import Verdict

# On CUDA a process takes a third of a second to start and a compiler minutes: so many candidates
# of one task are loaded side by side. On CPU loading is cheap, and there are no cores to spare.
LOADED_TOGETHER = 8


class Verifier:
    """Verifies candidates on one device; a context manager.

    `protocol` is the name of one of PROTOCOLS, or a Protocol of one's own. `cache` is a file
    that verdicts are kept in by content. `workers` candidates run at a time under the unpaired
    protocols, contended on purpose as in the paper; paired ones measure one at a time whatever its
    value. Raises UsageError for an unknown protocol or a device that is not `cpu` or `cuda[:n]`.
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
        kind, _, index = device.partition(":")
        if kind not in ("cpu", "cuda") or (index and not index.isdigit()):
            raise UsageError(f"unknown device {device!r}: it is cpu, cuda or cuda:<number>")
        if workers < 1:
            raise UsageError(f"workers is {workers}: it must be 1 or more")
        self.device = device
        self.limits = limits or Limits()
        self.workers = 1 if self.protocol.exclusive else workers
        self.cache = Cache(cache)
        self._room = Room(self.protocol, device, self.limits)
        self._desks: list[Desk] = []
        self._local = threading.local()
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
        self._local = threading.local()
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
        calling thread as verdicts come in, once for each index.
        """
        groups: OrderedDict[str, list[int]] = OrderedDict()
        for index, (task, source) in enumerate(items):
            key = self._key(task, source)
            groups.setdefault(f"{key}{index}" if fresh else key, []).append(index)
        verdicts: dict[int, Verdict] = {}

        def give(indices: list[int], verdict: Verdict) -> None:
            for index in indices:
                verdicts[index] = verdict
                if on_verdict is not None:
                    on_verdict(index, verdict)

        todo: list[list[int]] = []
        for key, indices in groups.items():
            known = None if fresh else self.cache.get(key)
            if known is None:
                todo.append(indices)
            else:
                give(indices, known)
        try:
            if self.workers == 1:
                for batch in self._batches(items, todo):
                    for indices, verdict in zip(
                        batch, self._measure(items, batch, fresh), strict=True
                    ):
                        give(indices, verdict)
            else:
                with ThreadPoolExecutor(self.workers) as pool:
                    futures = {pool.submit(self._measure_one, items, g, fresh): g for g in todo}
                    try:
                        for future in as_completed(futures):
                            give(futures[future], future.result())
                    except BaseException:
                        for future in futures:
                            future.cancel()
                        raise
        except BaseException:
            # Interrupted: no candidate may go on running.
            self.close()
            raise
        return [verdicts[index] for index in range(len(items))]

    def _batches(self, items: Sequence[tuple[Task, str]], todo: list[list[int]]) -> Iterator[Any]:
        """Neighbours of one task, as many as are loaded side by side."""
        size = 1 if self.device == "cpu" else LOADED_TOGETHER
        for _, group in itertools.groupby(todo, lambda g: items[g[0]][0].sha256):
            batch = list(group)
            for start in range(0, len(batch), size):
                yield batch[start : start + size]

    def _measure(
        self, items: Sequence[tuple[Task, str]], batch: list[list[int]], fresh: bool
    ) -> Iterator[Verdict]:
        task = items[batch[0][0]][0]
        sources = [items[indices[0]][1] for indices in batch]
        found = self._desk().verify_several(task, sources)
        for source, verdict in zip(sources, found, strict=True):
            contended = verdict.contention.get("busy", False)
            passing = verdict.status == "timeout" and contended
            if not (fresh or passing or verdict.status == "infra_error"):
                self.cache.put(self._key(task, source), verdict)
            yield verdict

    def _measure_one(
        self, items: Sequence[tuple[Task, str]], indices: list[int], fresh: bool
    ) -> Verdict:
        return next(self._measure(items, [indices], fresh))

    def _desk(self) -> Desk:
        desk = getattr(self._local, "desk", None)
        if desk is None:
            desk = self._local.desk = Desk(self._room)
            self._desks.append(desk)
        return desk


_open_verifiers: weakref.WeakSet[Verifier] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for verifier in list(_open_verifiers):
        verifier.close()
