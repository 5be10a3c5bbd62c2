"""Several processes as one run: who takes part, how they start, hear of each other, agree and end together.

jax.distributed starts the processes as one, but names nobody when a peer is missing, and aborts when one is lost. So
process 0 first listens at --coordinator itself. The others call it, say their number and what they were asked to run,
and their connections stay open to the end of the run: a closed one means a dead peer, a silent one a frozen peer, and
small messages pass what all must do alike (stop after the same step, leave with the same exit code). No message has
anything to do with devices, so that none can be held up by a compilation or a collective.
"""

import contextlib
import json
import logging
import os
import queue
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import jax

from mae_jax import errors
from mae_jax.runtime import rendezvous, startup_timer
from mae_jax.runtime.discovery import ProcessInfo
from mae_jax.runtime.exit import ending_signals, exit_now, write_stderr
from mae_jax.runtime.rendezvous import send

ANY = ("::", "0.0.0.0")  # a listener at these hears all addresses of the machine
ENDED = object()  # said by a process that has come to its end
LOST = 134  # exit code of a process whose peer was lost; also what shells report for JAX's own abort
THREADS = ("main", "save")  # that gather
GRACE = 2.0  # seconds in which a process that is told to leave may end by itself

logger = logging.getLogger(__name__)
_peers: "Peers | None" = None


def peers() -> "Peers | None":
    """Returns this process's link to the others, None where it runs alone."""
    return _peers


def gather(value: Any, thread: str = "main") -> list[Any]:
    """Returns the values (of JSON's types) of all processes, in their order; all must call it alike.

    Args:
      value: this process's.
      thread: who asks, of THREADS; each has an order of its own.
    """
    return _peers.gather(value, thread) if _peers else [value]


def broadcast(value: Any) -> Any:
    """Returns the value of process 0 on all processes."""
    return gather(value)[0]


def launch(command: Callable[[], int], place: ProcessInfo, same: Mapping[str, Any], start_seconds: float,
           heartbeat: float) -> int:
    """Runs `command` as one of several processes, and ends when all end.

    Args:
      command: returns the exit code.
      place: which process this is.
      same: what all processes must have been started with, by the name of the flag.
      start_seconds: for all to come.
      heartbeat: seconds of silence after which a peer counts as lost.

    Returns:
      The exit code, where all processes came to the end. Else the process ends here, with the code of the one that
      stopped first, or `LOST`.

    Raises:
      UserError: not all came, or they do not fit together.
    """
    global _peers
    for number in ending_signals():
        signal.signal(number, _interrupt)
    _peers = join(place, same, start_seconds, heartbeat)
    startup_timer.done("processes")
    try:
        if place.process_id:
            logging.getLogger("mae_jax").setLevel(logging.WARNING)
        code = command()
    except BaseException as error:
        _peers.fail(error)
    _peers.shutdown()
    _peers = None
    return code


def _interrupt(*_: Any) -> None:
    """Ends the run by a signal while there is no SignalHandler: nothing is lost."""
    if not _peers:
        raise KeyboardInterrupt
    # Not as an exception, which the interpreter may drop in a callback; and the main thread may be holding a lock.
    threading.Thread(target=_peers.fail, args=(KeyboardInterrupt(),), daemon=True).start()


def join(place: ProcessInfo, same: Mapping[str, Any], start_seconds: float, heartbeat: float) -> "Peers":
    """Waits for all processes and starts jax.distributed; raises UserError naming who did not come."""
    greeting = {"mae_jax": place.process_id, "where": f"{socket.gethostname()}, process id {os.getpid()}", "same": same}
    bound = ANY[0]
    if place.process_id:
        line, port = rendezvous.call(place, greeting, start_seconds)
        link = Peers(place, {0: line}, None, heartbeat)
    else:
        listener = rendezvous.listen(place)
        bound = listener.getsockname()[0]
        lines, port = rendezvous.receive(place, listener, greeting, start_seconds), rendezvous.free_port()
        link = Peers(place, lines, listener, heartbeat)
        link.tell({"go": port})
    try:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        # On CPUs, a collective holds a thread until all processes have come to it. Seen on two cores: with fewer
        # threads than collectives at a time, processes wait for each other for ever. XLA reads this variable.
        os.environ.setdefault("NPROC", str(max(32, os.cpu_count() or 1)))
        # One program at a time: gloo does not tell them apart.
        jax.config.update("jax_cpu_enable_async_dispatch", False)
        jax.config.update("jax_enable_preemption_service", False)  # Peers.should_stop does its work, and at once
        jax.distributed.initialize(
            f"{place.coordinator_host}:{port}", place.num_processes, place.process_id,
            local_device_ids=place.local_device_ids,
            cluster_detection_method="deactivate", initialization_timeout=max(1, int(start_seconds)),
            # Longer than ours, which names who was lost.
            heartbeat_timeout_seconds=int(2 * heartbeat) + 10, shutdown_timeout_seconds=int(2 * heartbeat) + 10,
            coordinator_bind_address=None if bound in ANY else f"{bound}:{port}")
        jax.devices()  # the processes exchange their devices here
    except BaseException as error:
        link.fail(error)
    return link


class Peers:
    """The open connections of one process: of process 0 to all others, of every other one to process 0.

    Attributes:
      verdict: (exit code, why) once the run is known to be over before its end.
    """

    def __init__(self, place: ProcessInfo, lines: dict[int, socket.socket], listener: socket.socket | None,
                 heartbeat: float):
        self.place, self.lines, self.listener, self.heartbeat = place, lines, listener, heartbeat
        self.verdict: tuple[int, str] | None = None
        self._over = threading.Event()  # there is a verdict
        self._sending = threading.Lock()
        self._self, own = socket.socketpair()  # what this process tells its own thread
        self.lines[place.process_id] = own
        self._buffers = dict.fromkeys(lines, b"")
        self._heard = dict.fromkeys(lines, time.monotonic())
        self._parted: set[int] = set()
        self._leaving = False
        self._deadline = float("inf")
        self._values: dict[tuple[int, str], queue.SimpleQueue[Any]] = {
            (number, thread): queue.SimpleQueue() for number in lines for thread in THREADS}
        self._done = 0
        self._stop_after: int | None = None
        self._at: dict[int, int] = {}  # process → step, while a step to stop after is agreed on
        self._moving = threading.Lock()  # held meanwhile, so that none takes another step
        self._thread = threading.Thread(target=self._watch, name="peers", daemon=True)
        self._thread.start()

    def tell(self, message: Mapping[str, Any], but: int = -1) -> None:
        """Sends to all that are linked, which for process 0 are all."""
        with self._sending:
            for number, line in list(self.lines.items()):
                if number not in (self.place.process_id, but):
                    send(line, message)

    def gather(self, value: Any, thread: str = "main") -> list[Any]:
        """Returns the values of all processes, in their order."""
        if self.place.process_id:
            self.tell({"value": [thread, value]})
            return self._take(0, thread)
        values = [value, *(self._take(number, thread) for number in range(1, self.place.num_processes))]
        self.tell({"value": [thread, values]})
        return values

    def _take(self, number: int, thread: str) -> Any:
        value = self._values[number, thread].get()
        if value is ENDED:
            raise RuntimeError(f"process {number} came to its end while this one waits for what it says")
        return value

    def request_stop(self) -> None:
        """Asks all processes to stop after the same step."""
        send(self._self, {"stop": None})

    def should_stop(self, step: int) -> bool:
        """Says whether to stop after `step`: the same on all processes."""
        with self._moving:
            self._done = step
            return self._stop_after is not None and step >= self._stop_after

    def shutdown(self) -> None:
        """Ends the link when all have come to their end."""
        for number in (signal.SIGTERM, signal.SIGHUP):  # all is saved
            signal.signal(number, signal.SIG_IGN)
        self._hang_up()
        self.tell({"bye": None})
        try:
            jax.distributed.shutdown()  # waits for all
        except jax.errors.JaxRuntimeError as error:
            logger.warning("the others did not end in order: %s", str(error).split("\n")[0])
        self._leaving = True
        send(self._self, {"bye": None})
        self._thread.join()

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
        self._hang_up()
        self.tell({"leave": [code, line]})
        # Process 0 goes last: JAX aborts where it is gone.
        deadline = time.monotonic() + 2 * GRACE
        while self.place.process_id == 0 and len(self.lines) > 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        _exit(code)

    def _hang_up(self) -> None:
        if self.listener:
            self.listener.close()
            self.listener = None

    def _watch(self) -> None:
        """The thread: listens, sends signs of life, and ends the process some time after the verdict."""
        ticks = 0.0
        while True:
            listener = [self.listener] if self.listener else []
            try:
                ready, _, _ = select.select([*self.lines.values(), *listener], [], [], min(0.5, self.heartbeat / 8))
            except (OSError, ValueError):  # the listener was closed meanwhile
                continue
            now = time.monotonic()
            if now - ticks > self.heartbeat / 4:
                self.tell({"alive": None})
                ticks = now
            for number, line in list(self.lines.items()):
                if line in ready:
                    self._heard[number] = now
                    self._read(number)
                elif number != self.place.process_id and now - self._heard[number] > self.heartbeat:
                    self._lost(number, f"nothing was heard of it for {self.heartbeat:g} s")
            if listener and listener[0] in ready and self.listener:
                self._refuse(listener[0])
            if self.place.process_id in self._parted and self._leaving:
                return
            last = self.place.process_id or len(self.lines) == 1
            if self.verdict and now > self._deadline + (0 if last else GRACE):
                _exit(self.verdict[0])

    def _refuse(self, listener: socket.socket) -> None:
        """Turns a late caller away, without listening to it: this thread must not wait for a stranger."""
        with contextlib.suppress(OSError):
            line, _ = listener.accept()
            send(line, {"leave": [errors.MISTAKE, f"a run has begun at {self.place.address}, and all its processes are "
                                  "there; was this one started twice?"]})
            line.close()

    def _read(self, number: int) -> None:
        try:
            data = self.lines[number].recv(1 << 16)
        except OSError:
            data = b""
        if not data:
            if number not in self._parted:
                self._lost(number, "its connection was closed")
            elif line := self.lines.pop(number, None):
                line.close()
            return
        *messages, self._buffers[number] = (self._buffers[number] + data).split(b"\n")
        for message in messages:
            for kind, value in json.loads(message).items():
                self._handle(number, kind, value)

    def _handle(self, number: int, kind: str, value: Any) -> None:
        """What the messages mean; 'stop' goes to process 0, which asks all how far they are and says after which."""
        if kind == "bye":
            self._parted.add(number)
            for thread in THREADS:
                self._values[number, thread].put(ENDED)
        elif kind == "value":
            self._values[number, value[0]].put(value[1])
        elif kind == "leave":
            self._end(value[0], f"process {number} stopped: {value[1]}", number)
        elif kind == "stop" and self.place.process_id:
            self.tell({"stop": None})
        elif kind == "stop" and self._stop_after is None and not self._at:
            self.tell({"where": None})
            self._handle(0, "where", None)
        elif kind == "where":
            self._moving.acquire()
            if self.place.process_id:
                self.tell({"at": self._done})
            else:
                self._handle(0, "at", self._done)
        elif kind == "at":
            self._at[number] = value
            if len(self._at) == self.place.num_processes:
                after = max(self._at.values()) + 1
                self.tell({"after": after})
                self._handle(0, "after", after)
        elif kind == "after":
            self._stop_after = value
            self._moving.release()

    def _lost(self, number: int, why: str) -> None:
        if line := self.lines.pop(number, None):  # nothing more is awaited of it
            line.close()
        self._end(LOST,
                  f"process {number} of {self.place.num_processes} was lost: {why}; start the same command again on "
                  "all", number)

    def _end(self, code: int, line: str, origin: int) -> None:
        """Takes the verdict, passes it on, and leaves some time to end by oneself."""
        if self.verdict or self._leaving:
            return
        self._hang_up()
        self.tell({"leave": [code, line]}, but=origin)
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
