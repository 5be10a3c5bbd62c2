"""A non-blocking connection between two processes, whose messages are lines of JSON.

Urgent messages (heartbeats, exits) precede others. Long messages are sent in parts, so that an urgent one waits for at
most one part.
"""

import contextlib
import json
import socket
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from mae_jax.runtime import bounded_json

PART = 1 << 15  # most bytes of a part
LIMIT = 1 << 23  # most bytes of a message: lists of steps, texts of errors, no arrays
UNREAD = 4 * LIMIT  # most bytes that may wait to be sent
MORE, LAST = b"+", b"="  # first byte of the lines of a message in parts; other lines begin with '{'


class Garbage(Exception):
    """Received bytes that are not a valid message."""


def encode(message: Mapping[str, Any]) -> list[bytes]:
    """Encodes a message as lines for `Line.put`; raises ValueError if it is longer than LIMIT."""
    text = json.dumps(message).encode()
    if len(text) > LIMIT:
        raise ValueError(f"a message of {len(text)} bytes to other processes; at most {LIMIT}")
    if len(text) <= PART:
        return [text + b"\n"]
    starts = range(0, len(text), PART)
    return [(LAST if start == starts[-1] else MORE) + text[start:start + PART] + b"\n" for start in starts]


def decode(text: bytes) -> dict[str, Any]:
    """Decodes a message; raises Garbage if it is not a JSON object."""
    try:
        return bounded_json.parse_object(text)
    except ValueError as error:
        raise Garbage(repr(text[:40])) from error


class Line:
    """A connection.

    Attributes:
      socket: non-blocking.
      limit: most bytes of a received message.
      moved: time (time.monotonic) at which the kernel last accepted bytes, or bytes began to wait.
    """

    def __init__(self, connection: socket.socket, limit: int = LIMIT):
        self.socket, self.limit, self.moved = connection, limit, 0.0
        connection.setblocking(False)
        with contextlib.suppress(OSError):  # Unix sockets have neither option
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # Bytes in the kernel's buffer precede urgent messages, so the buffer is kept short.
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, PART)
        self._urgent: deque[bytes] = deque()
        self._values: deque[bytes] = deque()
        self._rest = memoryview(b"")  # unsent rest of the current line
        self._unread = 0
        self._heard, self._parts = bytearray(), bytearray()

    @property
    def waits(self) -> bool:
        """Whether bytes wait to be sent."""
        return self._unread > 0

    @property
    def full(self) -> bool:
        """Whether more than UNREAD bytes wait to be sent."""
        return self._unread > UNREAD

    def put(self, lines: Sequence[bytes], urgent: bool = False) -> None:
        """Queues lines from `encode`, and sends as much as possible without blocking."""
        if not self.waits:
            self.moved = time.monotonic()
        (self._urgent if urgent else self._values).extend(lines)
        self._unread += sum(map(len, lines))
        self.flush()

    def flush(self) -> None:
        """Sends as much as possible without blocking; drops everything if the connection is closed (see `read`)."""
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
        """Receives available bytes once; returns False if the connection is closed."""
        try:
            data = self.socket.recv(1 << 16)
        except BlockingIOError:
            return True
        except OSError:
            return False
        self._heard += data
        return bool(data)

    def next(self) -> dict[str, Any] | None:
        """Returns the next complete message, or None; raises Garbage for an invalid or too long one."""
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
        """Closes the connection; bytes that were sent still arrive."""
        self.socket.close()
