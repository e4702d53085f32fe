"""Messages between the judge and its workers: one JSON object a packet, length-capped.

Nothing that arrives is ever unpickled or evaluated, so a candidate that writes to its channel can
at most send a wrong value, and every value that matters is checked by the judge or the referee.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import select
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any

MAX_BYTES = 128 << 10
MAX_FDS = 8


class ChannelClosed(Exception):
    """The other side is gone."""


class ChannelTimeout(Exception):
    """No message came in time."""


class BadMessage(Exception):
    """The other side sent something that is no message."""


class Channel:
    """One end of a SOCK_SEQPACKET pair."""

    def __init__(self, sock: socket.socket):
        self.sock = sock

    def send(self, message: dict[str, Any], fds: Sequence[int] = ()) -> None:
        data = json.dumps(message).encode()
        if len(data) > MAX_BYTES:
            raise BadMessage(f"a message of {len(data)} bytes is too long")
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            self.sock.sendmsg([data], rights)
        except TimeoutError:
            raise ChannelTimeout from None
        except OSError as error:
            raise ChannelClosed from error

    def recv(
        self, timeout: float | None = None, watch: Callable[[], None] | None = None
    ) -> tuple[dict[str, Any], list[int]]:
        """The next message and the file descriptors that came with it.

        `watch` is called every tenth of a second while waiting.
        Raises ChannelClosed, ChannelTimeout or BadMessage.
        """
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            left = None if end is None else max(end - time.monotonic(), 1e-3)
            self.sock.settimeout(left if watch is None else min(0.1, left or 0.1))
            try:
                data, rights, flags, _ = self.sock.recvmsg(
                    MAX_BYTES, socket.CMSG_SPACE(MAX_FDS * 4), socket.MSG_CMSG_CLOEXEC
                )
            except TimeoutError:
                if watch is not None:
                    watch()
                if end is not None and time.monotonic() >= end:
                    raise ChannelTimeout from None
                continue
            except OSError as error:
                raise ChannelClosed from error
            break
        fds = _descriptors(rights)
        if not data:
            raise ChannelClosed
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            _close_all(fds)
            raise BadMessage("a message was too long")
        return _parse(data), fds

    def timed(self, message: dict[str, Any], timeout: float) -> tuple[float, dict[str, Any]]:
        """Send `message` and wait for the answer; seconds between the two, by this clock.

        Raises as `recv` does.
        """
        data = json.dumps(message).encode()
        self.sock.settimeout(timeout)
        clock = time.perf_counter
        try:
            started = clock()
            self.sock.send(data)
            answer = self.sock.recv(MAX_BYTES)
            seconds = clock() - started
        except TimeoutError:
            raise ChannelTimeout from None
        except OSError as error:
            raise ChannelClosed from error
        if not answer:
            raise ChannelClosed
        return seconds, _parse(answer)

    def pending(self) -> bool:
        """Whether a packet has arrived that nobody has asked for."""
        if not select.select([self.sock], [], [], 0)[0]:
            return False
        try:
            # Readable and empty means closed, which the next request finds out.
            return bool(self.sock.recv(1, socket.MSG_PEEK))
        except OSError:
            return False

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.sock.close()


def _parse(data: bytes) -> dict[str, Any]:
    try:
        message = json.loads(data)
    except (ValueError, RecursionError):
        raise BadMessage("a message was not JSON") from None
    if not isinstance(message, dict):
        raise BadMessage("a message was not an object")
    return message


def _descriptors(rights: Sequence[tuple[int, int, bytes]]) -> list[int]:
    fds = array.array("i")
    for level, kind, data in rights:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return list(fds)


def _close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)


def pair() -> tuple[socket.socket, socket.socket]:
    """Two connected ends, neither inherited by a program that is started."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
