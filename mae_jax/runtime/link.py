"""The connections between the processes of a run, and the protocol of their messages.

A closed connection means a dead process, a silent one a frozen process. Messages do not involve devices, so no
compilation or collective can delay them. One thread owns the connections and never blocks on one of them; other threads
queue their messages for it.
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

LOST = 134  # exit code of a process whose peer was lost; shells report the same for JAX's own abort
THREADS = ("main", "save")  # threads that may call `Link.meet`
ALIVE = encode({"alive": None})
SHORT = 2000  # most characters of the reason in a 'leave' message
GRACE = 2.0  # seconds for a process that must leave to end by itself

logger = logging.getLogger(__name__)


class Link:
    """The connections of one process: process 0 is connected to all others, every other process to process 0.

    Attributes:
      verdict: (exit code, reason) once the run must end early; else None.
    """

    def __init__(self, place: ProcessInfo, lines: dict[int, Line], listener: socket.socket | None, heartbeat: float):
        self.place, self.lines, self.heartbeat, self._others = place, lines, heartbeat, len(lines)
        self.verdict: tuple[int, str] | None = None
        self._over = threading.Event()  # there is a verdict
        self._selector = selectors.DefaultSelector()
        self._door = Door(listener, self._selector) if listener else None
        self._todo: deque[Callable[[], None]] = deque()  # actions that other threads queue for the link's thread
        self._wake, self._woken = socket.socketpair()
        self._wake.setblocking(False)
        self._selector.register(self._woken, selectors.EVENT_READ, place.process_id)
        self._heard = dict.fromkeys(lines, time.monotonic())  # process → time of its last message, oldest first
        self._unsent: set[int] = set()  # processes with messages that are not sent yet
        self._parted: set[int] = set()
        self._leaving = self._ended = False
        self._deadline = float("inf")
        # A process sends its next value only after the answer to the last one. An int in a queue: that process ended.
        self._values: dict[str, dict[int, Any]] = {name: {} for name in THREADS}
        self._whole: dict[str, queue.SimpleQueue[dict[int, Any] | int]] = {
            name: queue.SimpleQueue() for name in THREADS}
        self._done = 0
        self._stop_after: int | None = None
        self._at: dict[int, int] = {}  # process → step, during the agreement on the last step
        self._moving = threading.Lock()  # held during the agreement, so that no process takes another step
        for number, line in lines.items():
            line.limit = LIMIT
            self._selector.register(line.socket, selectors.EVENT_READ, number)
        self._thread = threading.Thread(target=self._watch, name="peers", daemon=True)
        self._thread.start()

    def tell(self, message: Mapping[str, Any], urgent: bool = True) -> None:
        """Queues a message to all connected processes; for process 0 these are all others."""
        self._post(functools.partial(self._put, encode(message), urgent))

    def meet(self, value: Any, choose: Callable[[list[Any]], Any], thread: str = "main") -> Any:
        """Sends the values of all processes to process 0, and returns `choose(values)` of process 0 on all processes.

        Args:
          value: this process's value, of JSON's types.
          choose: maps the values, in the order of processes, to a value of JSON's types; called on process 0 only.
          thread: the calling thread, one of THREADS.
        """
        if self.place.process_id:
            self.tell({"value": [thread, value]}, urgent=False)
            return self._take(thread)[0]
        values = {0: value, **(self._take(thread) if self._others else {})}
        answer = choose([values[number] for number in range(self.place.num_processes)])
        self.tell({"value": [thread, answer]}, urgent=False)
        return answer

    def _take(self, thread: str) -> dict[int, Any]:
        """Waits for the values of all connected processes; returns process → value."""
        values = self._whole[thread].get()
        if isinstance(values, int):
            raise RuntimeError(f"process {values} ended while this process waits for its value")
        return values

    def request_stop(self) -> None:
        """Asks all processes to stop after the same step."""
        self._post(functools.partial(self._handle, self.place.process_id, "stop", None))

    def should_stop(self, step: int) -> bool:
        """Returns whether to stop after `step`; all processes get the same answer."""
        with self._moving:
            self._done = step
            return self._stop_after is not None and step >= self._stop_after

    def shutdown(self) -> None:
        """Waits until all processes have finished, and closes the connections."""
        for number in (signal.SIGTERM, signal.SIGHUP):  # everything is saved
            signal.signal(number, signal.SIG_IGN)
        self._post(self._hang_up)
        self.tell({"bye": None}, urgent=False)  # after the last answer
        try:
            jax.distributed.shutdown()  # waits for all
        except jax.errors.JaxRuntimeError as error:
            logger.warning("other processes did not shut down cleanly: %s", str(error).split("\n")[0])
        self._leaving = True
        self._wait(lambda: not (self._todo or self._unsent), GRACE)
        self._ended = True
        self._post(lambda: None)
        self._thread.join()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # only the interpreter's shutdown remains

    def fail(self, error: BaseException) -> NoReturn:
        """Ends all processes because of an error in this one, or with the verdict that caused the error."""
        # A failing collective is usually the consequence of a lost process, which the link's thread will soon detect.
        self._over.wait(self.heartbeat + GRACE if _of_peers(error) else GRACE / 2)
        if self.verdict:
            self._deadline = time.monotonic()  # nothing is left to do here
        if self.verdict or self._leaving:
            time.sleep(60)  # another thread is about to end the process
        code, text = errors.explain(error)
        with contextlib.suppress(OSError):  # a full disk must not keep the message from the others
            print(text, file=sys.stderr)
        self.leave(code, text.strip().splitlines()[-1])

    def leave(self, code: int, line: str) -> NoReturn:
        """Ends this process immediately, and the others with the same exit code."""
        self._leaving = True
        self._post(self._hang_up)
        self.tell({"leave": [code, line[:SHORT]]})
        if self.place.process_id:
            self._wait(lambda: not (self._todo or self._unsent), GRACE)
        else:  # process 0 exits last: JAX aborts processes that lose it
            self._wait(lambda: not self.lines, 2 * GRACE)
        _exit(code)

    def _wait(self, done: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not done() and time.monotonic() < deadline:
            time.sleep(0.01)

    def _post(self, action: Callable[[], None]) -> None:
        """Queues an action for the link's thread and wakes it."""
        self._todo.append(action)
        with contextlib.suppress(OSError):  # the thread is awake already, or has ended
            self._wake.send(b"\0")

    # All methods below run in the link's thread.

    def _watch(self) -> None:
        try:
            self._serve()
        except BaseException as error:
            code, text = errors.explain(error)
            write_stderr(text)
            _exit(code)

    def _serve(self) -> None:
        """Receives and sends messages and heartbeats, and ends the process some time after the verdict."""
        signed = time.monotonic()
        # Frequent heartbeats tolerate a busy machine. With thousands of processes they are most of process 0's work.
        pause = self.heartbeat / (8 if self.place.num_processes < 1000 else 2)
        for number in list(self.lines):
            self._hear(number)  # messages that arrived together with the start
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
        """Detects lost processes, and ends this process at the deadline of the verdict."""
        if self._door:
            self._door.sweep()
        for number in list(self._unsent):
            if (line := self.lines[number]).full or now - line.moved > self.heartbeat:
                self._lost(number, f"it does not read its messages ({now - line.moved:.0f} s)")
        while self._heard and now - self._heard[number := next(iter(self._heard))] > self.heartbeat:
            self._lost(number, f"it sent nothing for {self.heartbeat:g} s")
        last = self.place.process_id or not self.lines
        if self.verdict and now > self._deadline + (0 if last else GRACE):
            _exit(self.verdict[0])

    def _turn_away(self) -> None:
        """Rejects connections after the start without reading from them."""
        if not (door := self._door):
            return
        try:
            for line in door.accept():
                door.turn_away(line, f"a run has begun at {self.place.address} with all its processes; was this one "
                               "started twice?")
        except OSError:  # no descriptors are left; late callers need no answer
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
        """Sends to or receives from a process whose connection is ready."""
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
            self._lost(number, f"it sent an invalid message: {garbage}")

    def _handle(self, number: int, kind: str, value: Any) -> None:
        """Handles one message.

        To stop, a process sends 'stop' to process 0. Process 0 asks all processes for their step ('where', answered by
        'at') and sends them the step after which to stop ('after').
        """
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
        line = self.lines.pop(number)
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
        """Sets the verdict, forwards it, and leaves GRACE seconds for the process to end by itself."""
        if self.verdict or self._leaving:
            return
        self._hang_up()
        self._put(encode({"leave": [code, line[:SHORT]]}), but=origin)
        write_stderr(line)
        self.verdict, self._deadline = (code, line), time.monotonic() + GRACE
        self._over.set()


def _of_peers(error: BaseException) -> bool:
    """Returns whether an error may be the consequence of a lost process."""
    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error)


def _exit(code: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, RuntimeError):
            stream.flush()
    exit_now(code)  # the main thread may wait for a lost process, and so would JAX's shutdown
