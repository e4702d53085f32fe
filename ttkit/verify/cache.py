"""Verdicts kept by content: an append-only file of JSON lines that several processes may share."""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import threading
import tokenize
from importlib import metadata
from pathlib import Path

import ttkit
from ttkit.errors import InfraError
from ttkit.tasks import Task
from ttkit.verify.protocol import Limits, Protocol
from ttkit.verify.verdict import Verdict


def normalised(source: str) -> str:
    """`source` without its comments, every line where it was.

    This is also what is run: a program could read its own text and do as a comment says, and two
    that differ in nothing else share one verdict.
    """
    lines = source.split("\n")
    try:
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.COMMENT:
                row, column = token.start
                lines[row - 1] = lines[row - 1][:column].rstrip()
    except (SyntaxError, ValueError, RecursionError, MemoryError, tokenize.TokenError):
        return source
    return "\n".join(lines)


def verdict_key(
    task: Task, source: str, protocol: Protocol, limits: Limits, device_name: str, workers: int
) -> str:
    """Hash of everything a verdict depends on; comments of the source do not count."""
    parts = (
        hashlib.sha256(normalised(source).encode(errors="surrogatepass")).hexdigest(),
        task.sha256,
        protocol.fingerprint(),
        repr(limits),
        device_name,
        str(workers),
        metadata.version("torch"),
        ttkit.__version__,
    )
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


class Cache:
    """The verdicts in a file, by key; without a file they last as long as this object.

    Safe for several writers: each verdict is one write in append mode under a lock. A last line
    that is torn (a killed writer) is ignored and the next writer starts a new line.
    """

    def __init__(self, path: Path | None):
        self.path = None if path is None else Path(path)
        self._known: dict[str, Verdict] = {}
        self._read = 0
        self._lock = threading.Lock()

    def get(self, key: str) -> Verdict | None:
        with self._lock:
            if key not in self._known:
                self._refresh()
            return self._known.get(key)

    def put(self, key: str, verdict: Verdict) -> None:
        """Keep `verdict`. Raises InfraError when the file cannot be written."""
        with self._lock:
            self._known[key] = verdict
            if self.path is None:
                return
            line = json.dumps({"key": key, "verdict": verdict.to_dict()}) + "\n"
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with open(self.path, "ab+", buffering=0) as file:
                    fcntl.flock(file, fcntl.LOCK_EX)
                    if file.seek(0, os.SEEK_END) and _last_byte(file.fileno()) != b"\n":
                        line = "\n" + line
                    file.write(line.encode())
            except OSError as error:
                raise InfraError(
                    f"the verdict cache {self.path} cannot be written: {error.strerror}"
                ) from None

    def _refresh(self) -> None:
        if self.path is None or not self.path.exists():
            return
        with open(self.path, "rb") as file:
            file.seek(self._read)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._read += len(line)
                try:
                    entry = json.loads(line)
                    self._known[entry["key"]] = Verdict.from_dict(entry["verdict"])
                except (ValueError, KeyError, TypeError):
                    continue


def _last_byte(fd: int) -> bytes:
    return os.pread(fd, 1, os.fstat(fd).st_size - 1)
