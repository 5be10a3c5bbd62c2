"""Runs of several processes: start, exchange of small values, and a common end.

jax.distributed connects the processes, but does not name the missing process at the start, and aborts when one is lost.
So process 0 first listens on --coordinator itself. Every other process connects and sends its index and its flags. The
connections stay open to the end of the run. A closed connection means a dead process, a silent one a frozen process.
Messages coordinate the processes: they stop after the same step and exit with the same code.
"""

import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Mapping
from typing import Any

import jax

from mae_jax.runtime import rendezvous, startup_timer
from mae_jax.runtime.discovery import ProcessInfo, address
from mae_jax.runtime.exit import ending_signals
from mae_jax.runtime.link import Link

ANY = ("::", "0.0.0.0")  # wildcard addresses

_peers: Link | None = None


def peers() -> Link | None:
    """Returns this process's link to the others, or None for a single process."""
    return _peers


def gather(value: Any) -> list[Any]:
    """Gathers a JSON value of each process on process 0, in the order of processes; others return [value].

    `gather`, `broadcast` and `first_true` are collective: all processes must make the same calls, and each call returns
    when all processes have made it.
    """
    values = [value]
    if _peers:
        _peers.meet(value, lambda found: values.__setitem__(slice(None), found))
    return values


def broadcast(value: Any) -> Any:
    """Returns the value of process 0, of JSON's types, on all processes."""
    return _peers.meet(value if _peers.place.process_id == 0 else None, lambda values: values[0]) if _peers else value


def first_true(value: Any, thread: str = "main") -> Any:
    """Returns the first true value among those of all processes, on all processes; a false value if there is none.

    Args:
      value: this process's value, of JSON's types.
      thread: the calling thread, one of `link.THREADS`; the calls of each thread are matched separately.
    """
    return _peers.meet(value, lambda values: next(filter(None, values), value), thread) if _peers else value


def launch(command: Callable[[], int], place: ProcessInfo, same: Mapping[str, Any], start_seconds: float,
           heartbeat: float) -> int:
    """Runs `command` as one of several processes, which end together.

    Args:
      command: returns the exit code.
      place: this process.
      same: flags by name, with their values, which must be equal on all processes.
      start_seconds: timeout for all processes to connect.
      heartbeat: seconds of silence after which a process counts as lost.

    Returns:
      The exit code, if all processes finish. Otherwise the function does not return: the process exits with the code of
      the process that failed first, or `LOST`.

    Raises:
      UserError: a process did not connect, or was started differently.
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
    """Ends the run after a signal while there is no SignalHandler, and so nothing to save."""
    if not _peers:
        raise KeyboardInterrupt
    # In a thread: the interpreter may drop an exception in a callback, and the main thread may hold a lock.
    threading.Thread(target=_peers.fail, args=(KeyboardInterrupt(),), daemon=True).start()


def join(place: ProcessInfo, same: Mapping[str, Any], start_seconds: float, heartbeat: float) -> Link:
    """Waits for all processes and starts jax.distributed; raises UserError that names the missing processes."""
    greeting = {"mae_jax": place.process_id, "where": f"{socket.gethostname()}, process id {os.getpid()}", "same": same}
    bound = ANY[0]
    if place.process_id:
        line, port = rendezvous.call(place, greeting, start_seconds)
        link = Link(place, {0: line}, None, heartbeat)
    else:
        listener = rendezvous.listen(place)
        bound = listener.getsockname()[0]
        lines = rendezvous.receive(place, listener, greeting, start_seconds)
        port = rendezvous.free_port(listener)
        link = Link(place, lines, listener, heartbeat)
        link.tell({"go": port})
    try:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        # On CPUs, a collective blocks a thread until all processes reach it. With fewer threads than concurrent
        # collectives, processes deadlock (seen on two cores). XLA reads this variable.
        os.environ.setdefault("NPROC", str(max(32, os.cpu_count() or 1)))
        # One program at a time: gloo cannot tell the collectives of concurrent programs apart.
        jax.config.update("jax_cpu_enable_async_dispatch", False)
        jax.config.update("jax_enable_preemption_service", False)  # Link.should_stop replaces it, without delay
        jax.distributed.initialize(
            address(place.coordinator_host, port), place.num_processes, place.process_id,
            local_device_ids=place.local_device_ids,
            cluster_detection_method="deactivate", initialization_timeout=max(1, int(start_seconds)),
            # Longer than the link's timeout, whose message names the lost process.
            heartbeat_timeout_seconds=int(2 * heartbeat) + 10, shutdown_timeout_seconds=int(2 * heartbeat) + 10,
            coordinator_bind_address=None if bound in ANY else address(bound, port))
        jax.devices()  # the processes exchange their devices here
    except BaseException as error:
        link.fail(error)
    return link
