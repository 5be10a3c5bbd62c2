"""One connection between two processes: messages are lines of JSON, and nothing here waits for the other end.

What is urgent (signs of life, ends) goes before values, which go in parts: it waits behind one part at most.
"""

import contextlib
import json
import socket
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from mae_jax.runtime import bounded_json

PART = 1 << 15  # bytes of a longer message that go at once
LIMIT = 1 << 23  # bytes of a message: lists of steps, texts of errors, no arrays
UNREAD = 4 * LIMIT  # bytes that may wait for the other end
MORE, LAST = b"+", b"="  # begin the lines of a message in parts; others begin with '{'


class Garbage(Exception):
    """What came is no message."""


def encode(message: Mapping[str, Any]) -> list[bytes]:
    """Returns a message as lines, for any number of `Line.put`; raises ValueError for one beyond LIMIT."""
    text = json.dumps(message).encode()
    if len(text) > LIMIT:
        raise ValueError(f"a message of {len(text)} bytes to other processes; at most {LIMIT}")
    if len(text) <= PART:
        return [text + b"\n"]
    starts = range(0, len(text), PART)
    return [(LAST if start == starts[-1] else MORE) + text[start:start + PART] + b"\n" for start in starts]


def decode(text: bytes) -> dict[str, Any]:
    """Returns a message; raises Garbage."""
    try:
        return bounded_json.parse_object(text)
    except ValueError as error:
        raise Garbage(repr(text[:40])) from error


class Line:
    """A connection.

    Attributes:
      socket: does not block.
      limit: bytes of a message that is taken.
      moved: when something was last taken by the other end's machine, or began to wait for it (time.monotonic).
    """

    def __init__(self, connection: socket.socket, limit: int = LIMIT):
        self.socket, self.limit, self.moved = connection, limit, 0.0
        connection.setblocking(False)
        with contextlib.suppress(OSError):  # a pair of Unix sockets has neither
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # What the kernel holds back is sent before anything urgent.
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, PART)
        self._urgent: deque[bytes] = deque()
        self._values: deque[bytes] = deque()
        self._rest = memoryview(b"")  # of what was sent in part
        self._unread = 0
        self._heard, self._parts = bytearray(), bytearray()

    @property
    def waits(self) -> bool:
        """Says whether something is still to be sent."""
        return self._unread > 0

    @property
    def full(self) -> bool:
        """Says whether more waits than may."""
        return self._unread > UNREAD

    def put(self, lines: Sequence[bytes], urgent: bool = False) -> None:
        """Has lines of `encode` sent, and sends what goes at once."""
        if not self.waits:
            self.moved = time.monotonic()
        (self._urgent if urgent else self._values).extend(lines)
        self._unread += sum(map(len, lines))
        self.flush()

    def flush(self) -> None:
        """Sends what goes without waiting; forgets all where the connection is closed, which reading will show."""
        try:
            while self._unread:
                if not self._rest:
                    self._rest = memoryview((self._urgent or self._values).popleft())
                sent = self.socket.send(self._rest)
                self._rest, self._unread, self.moved = self._rest[sent:], self._unread - sent, time.monotonic()
        except BlockingIOError:
            return
        except OSError:
            self._urgent.clear()
            self._values.clear()
            self._rest, self._unread = memoryview(b""), 0

    def read(self) -> bool:
        """Reads once what has come; returns False at the connection's end."""
        try:
            data = self.socket.recv(1 << 16)
        except BlockingIOError:
            return True
        except OSError:
            return False
        self._heard += data
        return bool(data)

    def next(self) -> dict[str, Any] | None:
        """Returns the next message that has come whole, None where there is none; raises Garbage."""
        while (end := self._heard.find(b"\n")) >= 0:
            text = bytes(self._heard[:end])
            del self._heard[:end + 1]
            if text[:1] not in (MORE, LAST):
                return decode(text)
            self._parts += text[1:]
            if text[:1] == LAST:
                text, self._parts = bytes(self._parts), bytearray()
                return decode(text)
            self._check(len(self._parts))
        self._check(len(self._heard))
        return None

    def _check(self, size: int) -> None:
        if size > self.limit:
            raise Garbage(f"more than {self.limit} bytes")

    def close(self) -> None:
        """Closes the connection; what was sent still arrives."""
        self.socket.close()
