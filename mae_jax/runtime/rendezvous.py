"""How the processes of a run find each other: process 0 listens, the others call it and say who they are."""

import contextlib
import errno
import json
import logging
import socket
import time
from collections.abc import Mapping
from typing import Any, NoReturn

from mae_jax import errors
from mae_jax.errors import UserError
from mae_jax.runtime.discovery import ProcessInfo

ANSWER = 2.0  # seconds for a greeting to arrive after its connection
PATIENCE = 0.2  # seconds between two calls

logger = logging.getLogger(__name__)


def listen(place: ProcessInfo) -> socket.socket:
    """Process 0: opens the port of --coordinator; raises UserError where it is taken.

    A name may be another address to the others than to this machine, so one listens at all of its addresses for it.
    """
    try:
        if place.loopback:
            return socket.create_server(("127.0.0.1", place.coordinator_port))
        if place.numeric:
            try:
                return socket.create_server((place.coordinator_host, place.coordinator_port))
            except OSError as error:
                if error.errno != errno.EADDRNOTAVAIL:
                    raise
                logger.warning("%s is no address of this machine; process 0 listens at all that it has",
                               place.coordinator_host)
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", place.coordinator_port), family=socket.AF_INET6, dualstack_ipv6=True)
        return socket.create_server(("", place.coordinator_port))
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"port {place.coordinator_port} of --coordinator={place.address} is in use on this "
                            "machine, by another program or another process 0; end that, or choose another port for "
                            "all") from None
        raise UserError(f"cannot listen at --coordinator={place.address}: {error.strerror or error}") from None


def receive(place: ProcessInfo, listener: socket.socket, own: Mapping[str, Any],
            seconds: float) -> dict[int, socket.socket]:
    """Process 0: waits for a call of every other process; returns number → connection."""
    lines: dict[int, socket.socket] = {}
    where: dict[int, str] = {0: own["where"]}
    deadline = time.monotonic() + seconds
    while absent := [number for number in range(1, place.num_processes) if number not in lines
                     or _closed(lines[number])]:
        listener.settimeout(max(0.01, deadline - time.monotonic()))
        try:
            line, _ = listener.accept()
        except TimeoutError:
            _dismiss(lines, f"{_names(absent)} of {place.num_processes} did not come to {place.address} within "
                            f"{seconds:g} s; start the same command there too, each with its own --process")
        greeting = greeting_of(line)
        number = greeting.get("mae_jax")
        if not isinstance(number, int):  # something that came across the port
            line.close()
            continue
        if difference := _difference(greeting.get("same", {}), own["same"]):
            _dismiss({**lines, -1: line}, f"process {number} and process 0 were started differently: {difference}")
        if number == 0 or (number in lines and not _closed(lines[number])):
            text = f"process {number} was started twice: {where[number]}, and {greeting['where']}"
            logger.warning("%s; the second one is refused", text)
            send(line, {"leave": [errors.MISTAKE, f"{text}; each needs its own --process"]})
            line.close()
            continue
        lines[number], where[number] = line, greeting["where"]
    listener.settimeout(None)
    return lines


def call(place: ProcessInfo, greeting: Mapping[str, Any], seconds: float) -> tuple[socket.socket, int]:
    """Other processes: calls process 0 until it answers; returns the connection and the port of jax.distributed."""
    deadline, state = time.monotonic() + seconds, "no answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            line = socket.create_connection((place.coordinator_host, place.coordinator_port), timeout=left)
        except OSError as error:
            state = str(error.strerror or error)
            time.sleep(PATIENCE)
            continue
        send(line, greeting)
        reply, state = {}, "it takes the call and says nothing"
        with contextlib.suppress(OSError):
            # Process 0 began to wait at another time.
            reply = _read_line(line, time.monotonic() + left + ANSWER)
        if "go" in reply:
            line.settimeout(None)
            return line, reply["go"]
        line.close()
        if "leave" in reply:
            raise UserError(reply["leave"][1])
        time.sleep(PATIENCE)
    raise UserError(f"coordinator {place.address} does not answer within {seconds:g} s ({state}); is process 0 running "
                    "there, and the port open?")


def _dismiss(lines: Mapping[int, socket.socket], text: str) -> NoReturn:
    for line in lines.values():
        send(line, {"leave": [errors.MISTAKE, text]})
        line.close()
    raise UserError(text)


def _difference(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """Returns which flags differ, '' where none does."""
    ours = json.loads(json.dumps(ours))  # tuples become lists, as they did on the way here
    names = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    return "; ".join(f"{name}={theirs.get(name)!r} and {ours.get(name)!r}" for name in names[:3])


def _names(numbers: list[int]) -> str:
    return f"process{'es' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def greeting_of(line: socket.socket) -> dict[str, Any]:
    """Returns what the caller says, {} where it says nothing that can be understood."""
    try:
        greeting = _read_line(line, time.monotonic() + ANSWER)
        line.settimeout(None)
    except OSError:
        return {}
    return greeting


def _read_line(line: socket.socket, deadline: float) -> dict[str, Any]:
    """Reads one message; {} where what comes is none; raises TimeoutError past the deadline."""
    text = b""
    while not text.endswith(b"\n"):  # byte by byte: what follows belongs to Peers
        line.settimeout(max(deadline - time.monotonic(), 1e-3))
        byte = line.recv(1)
        if not byte or len(text) > 100_000:
            return {}
        text += byte
    try:
        message = json.loads(text)
    except ValueError:
        return {}
    return message if isinstance(message, dict) else {}


def send(line: socket.socket, message: Mapping[str, Any]) -> None:
    """Sends one message, a line of JSON."""
    with contextlib.suppress(OSError):  # that it is gone shows when its line is read
        line.sendall(json.dumps(message).encode() + b"\n")


def _closed(line: socket.socket) -> bool:
    try:
        return line.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def free_port() -> int:
    """Returns a port that nobody listens at."""
    with socket.socket() as free:
        free.bind(("", 0))
        return free.getsockname()[1]
