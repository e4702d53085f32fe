"""The verifier: candidates in, verdicts out.

The calling process is the judge: it holds the only clock, needs no torch, and runs no candidate.
"""

from __future__ import annotations

import atexit
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from ttkit.errors import UsageError
from ttkit.tasks import Task
from ttkit.verify.cache import Cache, verdict_key
from ttkit.verify.desk import Desk, Room
from ttkit.verify.device import device_name
from ttkit.verify.protocol import Limits, Protocol, protocol_named
from ttkit.verify.verdict import Verdict


class Verifier:
    """Verifies candidates on one device; a context manager.

    `protocol` is `rigorous`, `full` or `fast-proxy`, or a Protocol of one's own. `cache` is a file
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

        `fresh` measures again even if the cache knows the answer. Never raises for anything the
        candidate does; raises InfraError only when verdicts can no longer be kept.
        """
        key = verdict_key(
            task, source, self.protocol, self.limits, device_name(self.device), self.workers
        )
        if not fresh and (known := self.cache.get(key)) is not None:
            return known
        try:
            verdict = self._desk().verify(task, source)
        except BaseException:
            # Interrupted: no candidate may go on running.
            self.close()
            raise
        contended = verdict.contention.get("busy", False)
        if verdict.status != "infra_error" and not (verdict.status == "timeout" and contended):
            self.cache.put(key, verdict)
        return verdict

    def verify_many(
        self,
        items: Sequence[tuple[Task, str]],
        on_verdict: Callable[[int, Verdict], None] | None = None,
        *,
        fresh: bool = False,
    ) -> list[Verdict]:
        """One verdict for each (task, source), in the order of `items`.

        Items of the same content are measured once; with `fresh`, each item is measured and the
        cache is not asked. `on_verdict(index, verdict)` is called in the calling thread as verdicts
        come in, once for each index.
        """
        groups: OrderedDict[str, list[int]] = OrderedDict()
        name = device_name(self.device)
        for index, (task, source) in enumerate(items):
            key = verdict_key(task, source, self.protocol, self.limits, name, self.workers)
            groups.setdefault(f"{key}{index}" if fresh else key, []).append(index)
        verdicts: dict[int, Verdict] = {}

        def give(indices: list[int], verdict: Verdict) -> None:
            for index in indices:
                verdicts[index] = verdict
                if on_verdict is not None:
                    on_verdict(index, verdict)

        if self.workers == 1:
            for indices in groups.values():
                give(indices, self.verify(*items[indices[0]], fresh=fresh))
        else:
            with ThreadPoolExecutor(self.workers) as pool:
                futures = {
                    pool.submit(self.verify, *items[g[0]], fresh=fresh): g for g in groups.values()
                }
                try:
                    for future in as_completed(futures):
                        give(futures[future], future.result())
                except BaseException:
                    for future in futures:
                        future.cancel()
                    self.close()
                    raise
        return [verdicts[index] for index in range(len(items))]

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
