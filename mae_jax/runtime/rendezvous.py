"""Start of a run with several processes: process 0 listens, the others connect and send a greeting.

A caller with an invalid, too long or missing greeting is rejected without any effect on the others.
"""

import errno
import logging
import reprlib
import resource
import selectors
import socket
import time
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

from mae_jax import errors
from mae_jax.errors import UserError
from mae_jax.runtime import bounded_json
from mae_jax.runtime.discovery import ProcessInfo
from mae_jax.runtime.wire import Garbage, Line, encode

ANSWER = 2.0  # seconds for a greeting to arrive after the connection, and for a rejected caller to read the reason
PATIENCE = 0.2  # seconds between attempts to connect
GREETING = 100_000  # most bytes of a greeting
STRANGERS = 256  # most concurrent connections without a valid greeting, or rejected
SPARE = 64 + STRANGERS  # file descriptors besides those for the other processes

logger = logging.getLogger(__name__)
_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 200


def listen(place: ProcessInfo) -> socket.socket:
    """Opens the port of --coordinator on process 0.

    For a host name it listens on all addresses of this machine, since the name may resolve differently on the others.

    Raises:
      UserError: the port is in use, or cannot be opened.
    """
    def at(host: str, **more: Any) -> socket.socket:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, place.coordinator_port), **{"family": family, **more},
                                    backlog=max(128, place.num_processes))  # the kernel may limit it further

    try:
        if place.coordinator_host == "localhost":
            return at("127.0.0.1")
        if place.numeric:
            try:
                return at(place.coordinator_host)
            except OSError as error:
                if error.errno != errno.EADDRNOTAVAIL:
                    raise
                logger.warning("%s is not an address of this machine; process 0 listens on all of its addresses",
                               place.coordinator_host)
        dual = socket.has_dualstack_ipv6()
        return at("", family=socket.AF_INET6, dualstack_ipv6=True) if dual else at("")
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"port {place.coordinator_port} of --coordinator={place.address} is in use on this "
                            "machine, by another program or another process 0; end that, or choose another port for "
                            "all") from None
        raise UserError(f"cannot listen at --coordinator={place.address}: {error.strerror or error}") from None


def receive(place: ProcessInfo, listener: socket.socket, own: Mapping[str, Any], seconds: float) -> dict[int, Line]:
    """Waits on process 0 for all other processes; returns process → connection.

    Raises:
      UserError: a process did not connect within `seconds`, or was started with other flags.
    """
    allow_descriptors(place.num_processes)
    deadline = time.monotonic() + seconds
    with selectors.DefaultSelector() as selector:
        reception = Reception(place, Door(listener, selector), own)
        while absent := place.num_processes - 1 - len(reception.lines):
            if (left := deadline - time.monotonic()) <= 0:
                reception.dismiss(f"{reception.absent(absent)} of {place.num_processes} did not connect to "
                                  f"{place.address} within {seconds:g} s; start the same command there too, each with "
                                  "its own --process")
            for key, _ in selector.select(min(left, PATIENCE)):
                reception.hear(key.data)
            reception.door.sweep()
        reception.door.sweep(all_of_them=True)
    return reception.lines


def allow_descriptors(processes: int) -> None:
    """Raises this process's limit of open files for connections to `processes` processes.

    Raises:
      UserError: the hard limit is too low.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * processes + 1024  # jax.distributed opens a connection to each process too
    if hard != resource.RLIM_INFINITY:
        if hard < 2 * processes + SPARE - STRANGERS:
            raise UserError(f"process 0 of {processes} needs {wanted} open files, and may have {hard}; raise the limit "
                            "(ulimit -Hn) where it is started")
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class Door:
    """The listening socket of process 0, and the connections that are not accepted as processes of the run.

    Attributes:
      callers: connections without a valid greeting, or rejected → time at which they are closed, ascending.
    """

    def __init__(self, listener: socket.socket, selector: selectors.BaseSelector):
        self.listener, self.selector = listener, selector
        self.callers: dict[Line, float] = {}
        listener.setblocking(False)
        selector.register(listener, selectors.EVENT_READ)

    def accept(self) -> Iterator[Line]:
        """Yields new connections, at most 64; raises OSError if there are no file descriptors for them."""
        for _ in range(64):  # a bound, so that established connections are served too
            try:
                line = Line(self.listener.accept()[0], GREETING)
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE):
                    return  # no caller is waiting, or it has gone
                if not self.callers:
                    raise
                self.drop(next(iter(self.callers)))
                continue
            if len(self.callers) >= STRANGERS:
                self.drop(next(iter(self.callers)))
            self.callers[line] = time.monotonic() + ANSWER
            self.selector.register(line.socket, selectors.EVENT_READ, line)
            yield line

    def turn_away(self, line: Line, text: str) -> None:
        """Rejects a caller with a reason; the connection stays open for ANSWER seconds, so that the reason arrives."""
        line.put(encode({"leave": [errors.MISTAKE, text]}))
        self.selector.unregister(line.socket)
        self.callers.pop(line)
        self.callers[line] = time.monotonic() + ANSWER

    def drop(self, line: Line) -> None:
        """Closes a connection; does nothing if it is closed, as it may be later in the round that closed it."""
        self.callers.pop(line, None)
        if line.socket.fileno() < 0:
            return
        if line.socket in self.selector.get_map():
            self.selector.unregister(line.socket)
        line.close()

    def close(self) -> None:
        """Closes all callers and the listening socket."""
        self.sweep(all_of_them=True)
        self.selector.unregister(self.listener)
        self.listener.close()

    def sweep(self, all_of_them: bool = False) -> None:
        """Closes the callers whose time is over, or all."""
        now = float("inf") if all_of_them else time.monotonic()
        while self.callers and now > next(iter(self.callers.values())):
            self.drop(next(iter(self.callers)))


class Reception:
    """The state of process 0 while the others connect.

    Attributes:
      lines: process → connection, for the processes that are connected.
    """

    def __init__(self, place: ProcessInfo, door: Door, own: Mapping[str, Any]):
        self.place, self.door, self.lines = place, door, dict[int, Line]()
        self._where: dict[int, str] = {0: own["where"]}
        self._numbers: dict[Line, int] = {}
        self._same = bounded_json.as_read(own["same"])

    def hear(self, line: Line | None) -> None:
        """Reads from a connection that is ready, or for None accepts new connections."""
        if line is None:
            try:
                list(self.door.accept())
            except OSError as error:
                raise UserError(f"process 0 of {self.place.num_processes} cannot accept more connections: "
                                f"{error.strerror}; raise the limit of open files (ulimit -n) where it is started"
                                ) from None
            return
        try:
            lasts = line.read()
            message = line.next()
        except Garbage:
            lasts, message = False, None
        if line in self.door.callers and message is not None:
            self._greet(line, message)
        elif not lasts or message is not None:  # connected processes must be silent until all are connected
            self.lines.pop(self._numbers.pop(line, 0), None)
            self.door.drop(line)

    def _greet(self, line: Line, greeting: Mapping[str, Any]) -> None:
        match greeting:
            case {"mae_jax": int(number), "where": str(where), "same": dict(same)} if not isinstance(number, bool) and (
                    same.keys() & self._same.keys() or not self._same):
                difference, where = _difference(same, self._same), errors.printable(where)[:200]
            case _:
                return self.door.drop(line)  # not a process of mae_jax
        if not 0 <= number < self.place.num_processes:
            return self._refuse(line, f"{where} was started as process {_repr.repr(number)} of a run of "
                                f"{self.place.num_processes}, from 0", difference)
        if difference:
            self.lines[-1] = line
            self.dismiss(f"process {number} and process 0 were started differently: {difference}")
        if number in self.lines:
            self.hear(self.lines[number])  # it may have ended just now
        if number == 0 or number in self.lines:
            return self._refuse(line, f"process {number} was started twice: {self._where[number]}, and {where}",
                                "each needs its own --process")
        del self.door.callers[line]
        self.lines[number], self._where[number], self._numbers[line] = line, where, number
        return None

    def _refuse(self, line: Line, text: str, more: str) -> None:
        logger.warning("%s; it is refused", text)
        self.door.turn_away(line, f"{text}; {more}" if more else text)

    def absent(self, count: int) -> str:
        """Returns the text 'processes 1, 3' for the `count` processes that are not connected."""
        numbers = [number for number in range(1, self.place.num_processes) if number not in self.lines]
        rest = f" and {count - 20} more" if count > 20 else ""
        return f"process{'es' if count > 1 else ''} {', '.join(map(str, numbers[:20]))}{rest}"

    def dismiss(self, text: str) -> NoReturn:
        """Sends the reason to all connected processes, which then end, and raises UserError."""
        for line in self.lines.values():
            line.put(encode({"leave": [errors.MISTAKE, text]}))
            line.close()
        raise UserError(text)


def call(place: ProcessInfo, greeting: Mapping[str, Any], seconds: float) -> tuple[Line, int]:
    """Connects to process 0 from another process; returns the connection and the port of jax.distributed.

    Raises:
      UserError: process 0 does not answer within `seconds`, or rejects this process.
    """
    deadline, state = time.monotonic() + seconds, "no answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            line = Line(socket.create_connection((place.coordinator_host, place.coordinator_port), timeout=left))
        except OSError as error:
            state = str(error.strerror or error)
            time.sleep(PATIENCE)
            continue
        reply = _answer(line, greeting, deadline + ANSWER)  # process 0's own deadline may be somewhat later
        match reply:
            case {"go": int(port)}:
                return line, port
            case {"leave": [int(), str(text)]}:
                line.close()
                raise UserError(text)
        line.close()
        state = "it accepts connections and sends nothing"
        time.sleep(PATIENCE)
    raise UserError(f"coordinator {place.address} does not answer within {seconds:g} s ({state}); is process 0 running "
                    "there, and the port open?")


def _answer(line: Line, greeting: Mapping[str, Any], deadline: float) -> dict[str, Any]:
    """Sends the greeting and returns the answer of process 0; {} if there is no valid answer before the deadline."""
    line.put(lines := encode(greeting))
    if (size := sum(map(len, lines))) > GREETING:
        raise UserError(f"flags and config are {size} bytes of text; processes can compare at most {GREETING}")
    with selectors.DefaultSelector() as selector:
        selector.register(line.socket, selectors.EVENT_READ)
        while (left := deadline - time.monotonic()) > 0:
            selector.modify(line.socket, selectors.EVENT_READ | selectors.EVENT_WRITE * line.waits)
            selector.select(left)
            line.flush()
            lasts = line.read()
            try:
                message = line.next()
            except Garbage:
                return {}
            if message is not None or not lasts:
                return message or {}
    return {}


def _difference(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """Returns the first flags that differ, with both values; '' if none does."""
    names = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    return "; ".join(f"{errors.printable(name)[:200]}={_repr.repr(theirs.get(name))} and {_repr.repr(ours.get(name))}"
                     for name in names[:3])


def free_port(listener: socket.socket) -> int:
    """Returns a free port on the address of `listener`."""
    with socket.socket(listener.family) as free:
        free.bind((listener.getsockname()[0], 0))
        return free.getsockname()[1]
