"""Writing that survives: full disks, kills and two processes at once; the append-only journal.

Everything a run records goes through here: files that are replaced whole, lock files, and journals
of JSON lines from which a killed run continues with nothing lost and nothing twice.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ttkit.errors import InfraError, UsageError

if TYPE_CHECKING:
    import pandas as pd


@contextlib.contextmanager
def disk(path: Path) -> Iterator[None]:
    """Turns a full disk (or quota) met while writing `path` into an InfraError of one sentence."""
    try:
        yield
    except Exception as error:
        # Libraries written in other languages report a full disk as an error of their own, and
        # torch's archive writer only as a file position that it did not expect.
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        full = full or "No space left on device" in str(error)
        if not full and not (isinstance(error, RuntimeError) and _free_bytes(path) < 1 << 20):
            raise
        raise InfraError(
            f"the disk is full: {path} could not be written; what was recorded before is kept, "
            "so free some space and give the same command again"
        ) from None


def _free_bytes(path: Path) -> int:
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` so that `path` holds either its old content or all of the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            try:
                _write_all(fd, data)
                os.fsync(fd)
            finally:
                os.close(fd)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def to_json(data: Any) -> bytes:
    return (json.dumps(data, indent=1, sort_keys=True, default=_plain) + "\n").encode()


def _plain(value: Any) -> Any:
    """numpy scalars and arrays, tuples' relatives and paths, for json."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"a {type(value).__name__} cannot be written as JSON")


def sha256_of(path: Path, whole: bool = True) -> str:
    """SHA-256 of a file, or of a folder's relative file names and contents.

    With `whole=False` a file above 64 MiB counts by its size, first and last MiB: a model of many
    gigabytes is recognised, but an edit in its middle is not.
    """
    digest = hashlib.sha256()
    if path.is_dir():
        for item in sorted(p for p in path.rglob("*") if p.is_file()):
            name = item.relative_to(path).as_posix()
            digest.update(f"{name}\0{sha256_of(item, whole)}\n".encode())
        return digest.hexdigest()
    size = path.stat().st_size
    with path.open("rb") as file:
        if whole or size <= 64 << 20:
            while block := file.read(1 << 20):
                digest.update(block)
        else:
            digest.update(f"{size}\0".encode() + file.read(1 << 20))
            file.seek(-(1 << 20), os.SEEK_END)
            digest.update(file.read())
    return digest.hexdigest()


_locks: dict[Path, int] = {}


def acquire(lock: Path, what: str, wait: float = 0.0) -> None:
    """Take the lock file `lock` for this process; taking it again in the same process is fine.

    A record lock is used since children do not inherit it: a forked worker that outlives its
    parent cannot hold it. Raises InfraError with the holder's process id after `wait` seconds.
    """
    lock = lock.absolute()
    if lock in _locks:
        return
    with disk(lock):
        lock.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
    deadline = time.monotonic() + wait
    while True:
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except (BlockingIOError, PermissionError):
            if time.monotonic() < deadline:
                time.sleep(0.1)
                continue
            holder = os.pread(fd, 64, 0).decode(errors="replace").strip() or "unknown"
            os.close(fd)
            raise InfraError(
                f"{what} is in use by process {holder} (another run, or a notebook left open): "
                "wait for it or shut it down"
            ) from None
    with contextlib.suppress(OSError):  # the number only serves the message
        os.ftruncate(fd, 0)
        os.pwrite(fd, str(os.getpid()).encode(), 0)
    _locks[lock] = fd


def release(lock: Path) -> None:
    """Give the lock back; no error when this process does not hold it."""
    fd = _locks.pop(lock.absolute(), None)
    if fd is not None:
        os.close(fd)


class Journal:
    """Append-only JSON lines with a unique key: what has been appended survives any kill.

    `rows` are the rows so far, in the order they came. In the file a line holds the list of rows
    of one `append`, so that a kill leaves all of them or none: a torn last line is cut off on
    opening. Of two rows with one key the first stays. Threads may share a journal; a second
    process that opens it is refused with an InfraError naming the first.
    """

    _open: dict[Path, Journal] = {}

    def __init__(self, path: str | Path, key: Sequence[str]) -> None:
        self.path, self.key = Path(path).absolute(), tuple(key)
        stale = Journal._open.get(self.path)
        if stale is not None:  # a notebook cell run a second time
            stale.close()
        self._lock = self.path.with_name(f".{self.path.name}.lock")
        acquire(self._lock, f"the journal {self.path}", wait=10.0)
        self.rows: list[dict[str, Any]] = []
        self._keys: set[tuple[Any, ...]] = set()
        self._guard = threading.Lock()
        with disk(self.path):
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        Journal._open[self.path] = self
        try:
            os.ftruncate(self._fd, self._read())
        except BaseException:
            self.close()
            raise

    def _read(self) -> int:
        """Take in the rows; returns the size in bytes of the sound part of the file."""
        size = 0
        lines = self.path.read_bytes().splitlines(keepends=True)
        for number, line in enumerate(lines, 1):
            try:
                rows = [(self._key_of(row), row) for row in json.loads(line)]
            except (ValueError, TypeError, AttributeError):
                if number == len(lines):
                    break
                raise InfraError(
                    f"line {number} of the journal {self.path} is damaged: remove that line, or "
                    "the file to start afresh"
                ) from None
            if not line.endswith(b"\n"):
                break
            size += len(line)
            for key, row in rows:
                if key not in self._keys:
                    self._keys.add(key)
                    self.rows.append(row)
        return size

    def _key_of(self, row: dict[str, Any]) -> tuple[Any, ...]:
        missing = [name for name in self.key if name not in row]
        if missing:
            raise UsageError(f"a row for the journal {self.path} lacks {', '.join(missing)}")
        return tuple(row[name] for name in self.key)

    def append(self, rows: Iterable[dict[str, Any]]) -> int:
        """Append rows as one write and one fsync; returns how many had a new key.

        Raises InfraError on a full disk: then no row of this call is in the file.
        """
        with self._guard:
            if self._fd < 0:
                raise UsageError(
                    f"the journal {self.path} is closed: run the notebook again from its first cell"
                )
            new: dict[tuple[Any, ...], dict[str, Any]] = {}
            for row in rows:
                key = self._key_of(row)
                if key not in self._keys:
                    new.setdefault(key, row)
            if not new:
                return 0
            data = json.dumps(list(new.values()), default=_plain).encode() + b"\n"
            before = os.fstat(self._fd).st_size
            with disk(self.path):
                try:
                    _write_all(self._fd, data)
                    os.fsync(self._fd)
                except BaseException:
                    os.ftruncate(self._fd, before)
                    raise
            self._keys.update(new)
            self.rows.extend(json.loads(data))  # just as a resumed run would read them
            return len(new)

    def __contains__(self, key: Sequence[Any]) -> bool:
        """Whether the row with this key (values in the order of `key`) has been appended."""
        return tuple(key) in self._keys

    def __len__(self) -> int:
        return len(self.rows)

    def frame(self) -> pd.DataFrame:
        """The rows as a table sorted by key, the same whatever order they came in."""
        import pandas as pd

        table = pd.DataFrame(self.rows)
        return table.sort_values(list(self.key), ignore_index=True) if self.rows else table

    def close(self) -> None:
        with self._guard:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1
                Journal._open.pop(self.path, None)
                release(self._lock)


def count_rows(path: Path) -> int:
    """Rows in a journal that may be in use: what is being written is left out."""
    total = 0
    for line in path.read_bytes().splitlines():
        with contextlib.suppress(ValueError, TypeError):
            total += len(json.loads(line))
    return total
