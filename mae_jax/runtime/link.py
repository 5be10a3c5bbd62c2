"""The connections that the processes of a run keep to its end, and what they say there.

A closed connection means a dead peer, a silent one a frozen peer. No message has anything to do with devices, so that
none can be held up by a compilation or a collective. One thread has the connections, and waits for none of them: the
others leave it what is to be sent.
"""

import contextlib
import functools
import logging
import queue
import selectors
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import jax

from mae_jax import errors
from mae_jax.runtime.discovery import ProcessInfo
from mae_jax.runtime.exit import exit_now, write_stderr
from mae_jax.runtime.rendezvous import Door
from mae_jax.runtime.wire import LIMIT, Garbage, Line, encode

LOST = 134  # exit code of a process whose peer was lost; also what shells report for JAX's own abort
THREADS = ("main", "save")  # that gather
ALIVE = encode({"alive": None})
SHORT = 2000  # characters of a reason to leave
GRACE = 2.0  # seconds in which a process that is told to leave may end by itself

logger = logging.getLogger(__name__)


class Link:
    """The open connections of one process: of process 0 to all others, of every other one to process 0.

    Attributes:
      verdict: (exit code, why) once the run is known to be over before its end.
    """

    def __init__(self, place: ProcessInfo, lines: dict[int, Line], listener: socket.socket | None, heartbeat: float):
        self.place, self.lines, self.heartbeat, self._others = place, lines, heartbeat, len(lines)
        self.verdict: tuple[int, str] | None = None
        self._over = threading.Event()  # there is a verdict
        self._selector = selectors.DefaultSelector()
        self._door = Door(listener, self._selector) if listener else None
        self._todo: deque[Callable[[], None]] = deque()  # what other threads ask of this one's, which they wake
        self._wake, self._woken = socket.socketpair()
        self._wake.setblocking(False)
        self._selector.register(self._woken, selectors.EVENT_READ, place.process_id)
        self._heard = dict.fromkeys(lines, time.monotonic())  # when; the most silent one comes first
        self._unsent: set[int] = set()  # whose lines have something to send
        self._parted: set[int] = set()
        self._leaving = self._ended = False
        self._deadline = float("inf")
        # None has another value to say before it has the answer to the last one. A number instead: who has ended.
        self._values: dict[str, dict[int, Any]] = {name: {} for name in THREADS}
        self._whole: dict[str, queue.SimpleQueue[dict[int, Any] | int]] = {
            name: queue.SimpleQueue() for name in THREADS}
        self._done = 0
        self._stop_after: int | None = None
        self._at: dict[int, int] = {}  # process → step, while a step to stop after is agreed on
        self._moving = threading.Lock()  # held meanwhile, so that none takes another step
        for number, line in lines.items():
            line.limit = LIMIT
            self._selector.register(line.socket, selectors.EVENT_READ, number)
        self._thread = threading.Thread(target=self._watch, name="peers", daemon=True)
        self._thread.start()

    def tell(self, message: Mapping[str, Any], urgent: bool = True) -> None:
        """Has a message sent to all that are linked, which for process 0 are all; does not wait for it."""
        self._post(functools.partial(self._put, encode(message), urgent))

    def meet(self, value: Any, choose: Callable[[list[Any]], Any], thread: str = "main") -> Any:
        """Returns what `choose` makes, on process 0, of the values of all processes, in their order."""
        if self.place.process_id:
            self.tell({"value": [thread, value]}, urgent=False)
            return self._take(thread)[0]
        values = {0: value, **(self._take(thread) if self._others else {})}
        answer = choose([values[number] for number in range(self.place.num_processes)])
        self.tell({"value": [thread, answer]}, urgent=False)
        return answer

    def _take(self, thread: str) -> dict[int, Any]:
        """Returns the values of all that are linked, by their numbers."""
        values = self._whole[thread].get()
        if isinstance(values, int):
            raise RuntimeError(f"process {values} came to its end while this one waits for what it says")
        return values

    def request_stop(self) -> None:
        """Asks all processes to stop after the same step."""
        self._post(functools.partial(self._handle, self.place.process_id, "stop", None))

    def should_stop(self, step: int) -> bool:
        """Says whether to stop after `step`: the same on all processes."""
        with self._moving:
            self._done = step
            return self._stop_after is not None and step >= self._stop_after

    def shutdown(self) -> None:
        """Ends the link when all have come to their end."""
        for number in (signal.SIGTERM, signal.SIGHUP):  # all is saved
            signal.signal(number, signal.SIG_IGN)
        self._post(self._hang_up)
        self.tell({"bye": None}, urgent=False)  # behind the last answer
        try:
            jax.distributed.shutdown()  # waits for all
        except jax.errors.JaxRuntimeError as error:
            logger.warning("the others did not end in order: %s", str(error).split("\n")[0])
        self._leaving = True
        self._wait(lambda: not (self._todo or self._unsent), GRACE)
        self._ended = True
        self._post(lambda: None)
        self._thread.join()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # what is left is the interpreter's own end

    def fail(self, error: BaseException) -> NoReturn:
        """Ends this process and all others because of an error here, or with the verdict that caused the error."""
        # A collective that fails is most often the echo of a lost peer, which the thread soon hears of.
        self._over.wait(self.heartbeat + GRACE if _of_peers(error) else GRACE / 2)
        if self.verdict:
            self._deadline = time.monotonic()  # nothing is left to do here
        if self.verdict or self._leaving:
            time.sleep(60)  # another thread is about to end the process
        code, text = errors.explain(error)
        with contextlib.suppress(OSError):  # a full disk; the others must hear of it all the same
            print(text, file=sys.stderr)
        self.leave(code, text.strip().splitlines()[-1])

    def leave(self, code: int, line: str) -> NoReturn:
        """Ends this process at once, and tells the others to end with the same code."""
        self._leaving = True
        self._post(self._hang_up)
        self.tell({"leave": [code, line[:SHORT]]})
        if self.place.process_id:
            self._wait(lambda: not (self._todo or self._unsent), GRACE)
        else:  # process 0 goes last: JAX aborts where it is gone
            self._wait(lambda: not self.lines, 2 * GRACE)
        _exit(code)

    def _wait(self, done: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not done() and time.monotonic() < deadline:
            time.sleep(0.01)

    def _post(self, action: Callable[[], None]) -> None:
        """Has the thread do something."""
        self._todo.append(action)
        with contextlib.suppress(OSError):  # it is awake, or has ended
            self._wake.send(b"\0")

    # From here on, all is done by the thread.

    def _watch(self) -> None:
        try:
            self._serve()
        except BaseException as error:
            code, text = errors.explain(error)
            write_stderr(text)
            _exit(code)

    def _serve(self) -> None:
        """Listens, sends signs of life, and ends the process some time after the verdict."""
        signed = time.monotonic()
        # Many signs outlast a busy machine; of thousands of processes, they cost process 0 most of what it does.
        pause = self.heartbeat / (8 if self.place.num_processes < 1000 else 2)
        for number in list(self.lines):
            self._hear(number)  # what came at once with the start
        while not self._ended:
            ready = self._selector.select(min(0.5, self.heartbeat / 8))
            now = time.monotonic()
            if now - signed > pause:
                self._put(ALIVE)
                signed = now
            for key, events in ready:
                if key.data is None:
                    self._turn_away()
                elif key.data == self.place.process_id:
                    self._woken.recv(1 << 12)
                    while self._todo:
                        self._todo[0]()
                        self._todo.popleft()
                else:
                    self._attend(key.data, events, now)
            self._judge(now)
        for end in (self._selector, self._wake, self._woken):
            end.close()

    def _judge(self, now: float) -> None:
        """Finds out who is lost, and ends the process when the time has come."""
        if self._door:
            self._door.sweep()
        for number in list(self._unsent):
            if (line := self.lines[number]).full or now - line.moved > self.heartbeat:
                self._lost(number, f"it does not read what it is told, for {now - line.moved:.0f} s")
        while self._heard and now - self._heard[number := next(iter(self._heard))] > self.heartbeat:
            self._lost(number, f"nothing was heard of it for {self.heartbeat:g} s")
        last = self.place.process_id or not self.lines
        if self.verdict and now > self._deadline + (0 if last else GRACE):
            _exit(self.verdict[0])

    def _turn_away(self) -> None:
        """Sends late callers away, without listening to them."""
        if not (door := self._door):
            return
        try:
            for line in door.accept():
                door.turn_away(line, f"a run has begun at {self.place.address}, and all its processes are there; was "
                               "this one started twice?")
        except OSError:  # no descriptors are left: nobody need be told
            self._hang_up()

    def _hang_up(self) -> None:
        if self._door:
            self._door.close()
            self._door = None

    def _put(self, lines: Sequence[bytes], urgent: bool = True, but: int = -1) -> None:
        for number, line in self.lines.items():
            if number != but:
                line.put(lines, urgent)
                self._listen_for(number, line)

    def _listen_for(self, number: int, line: Line) -> None:
        if line.waits != (number in self._unsent):
            self._unsent ^= {number}
            self._selector.modify(line.socket, selectors.EVENT_READ | selectors.EVENT_WRITE * line.waits, number)

    def _attend(self, number: int, events: int, now: float) -> None:
        """Writes to a peer, or reads."""
        if not (line := self.lines.get(number)):
            return
        if events & selectors.EVENT_WRITE:
            line.flush()
            self._listen_for(number, line)
        if events & selectors.EVENT_READ:
            del self._heard[number]
            self._heard[number] = now
            lasts = line.read()
            self._hear(number)
            if number not in self.lines:
                return
            if not lasts and number in self._parted:
                self._drop(number)
            elif not lasts:
                self._lost(number, "its connection was closed")

    def _hear(self, number: int) -> None:
        try:
            while (line := self.lines.get(number)) and (message := line.next()) is not None:
                for kind, value in message.items():
                    self._handle(number, kind, value)
        except Garbage as garbage:
            self._lost(number, f"it says what no process of a run does: {garbage}")

    def _handle(self, number: int, kind: str, value: Any) -> None:
        """What the messages mean; 'stop' goes to process 0, which asks all how far they are and says after which."""
        match kind, value:
            case "alive", _:
                pass
            case "bye", _:
                self._parted.add(number)
                for whole in self._whole.values():
                    whole.put(number)
            case "value", [str(thread), said] if thread in THREADS:
                self._values[thread][number] = said
                if len(self._values[thread]) == self._others:
                    self._whole[thread].put(self._values[thread])
                    self._values[thread] = {}
            case "leave", [int(code), str(line)] if 0 <= code < 256:
                self._end(code, f"process {number} stopped: {line}", number)
            case "stop", _ if self.place.process_id:
                self._put(encode({"stop": None}))
            case "stop", _:
                if self._stop_after is None and not self._at:
                    self._put(encode({"where": None}))
                    self._handle(0, "where", None)
            case "where", _ if number == 0:
                self._moving.acquire()
                if self.place.process_id:
                    self._put(encode({"at": self._done}))
                else:
                    self._handle(0, "at", self._done)
            case "at", int(step) if self._moving.locked():
                self._at[number] = step
                if len(self._at) == self.place.num_processes:
                    after = max(self._at.values()) + 1
                    self._put(encode({"after": after}))
                    self._handle(0, "after", after)
            case "after", int(step) if number == 0 and self._moving.locked():
                self._stop_after = step
                self._moving.release()
            case _:
                raise Garbage(f"{kind[:40]!r}")

    def _drop(self, number: int) -> None:
        line = self.lines.pop(number)  # nothing more is awaited of it
        self._selector.unregister(line.socket)
        self._unsent.discard(number)
        del self._heard[number]
        line.close()

    def _lost(self, number: int, why: str) -> None:
        if number in self.lines:
            self._drop(number)
        self._end(LOST, f"process {number} of {self.place.num_processes} was lost: {why}; start the same command again "
                  "on all", number)

    def _end(self, code: int, line: str, origin: int) -> None:
        """Takes the verdict, passes it on, and leaves some time to end by oneself."""
        if self.verdict or self._leaving:
            return
        self._hang_up()
        self._put(encode({"leave": [code, line[:SHORT]]}), but=origin)
        write_stderr(line)
        self.verdict, self._deadline = (code, line), time.monotonic() + GRACE
        self._over.set()


def _of_peers(error: BaseException) -> bool:
    """Says whether an error may come from a peer that is gone or silent."""
    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error)


def _exit(code: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, RuntimeError):
            stream.flush()
    exit_now(code)  # the main thread may wait for a peer that is gone, and so would JAX's own end
