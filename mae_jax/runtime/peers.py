"""Several processes as one run: who takes part, how they start, hear of each other, agree and end together.

jax.distributed starts the processes as one, but names nobody when a peer is missing, and aborts when one is lost. So
process 0 first listens at --coordinator itself. The others call it, say their number and what they were asked to run,
and their connections stay open to the end of the run: a closed one means a dead peer, a silent one a frozen peer, and
small messages pass what all must do alike (stop after the same step, leave with the same exit code).
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

ANY = ("::", "0.0.0.0")  # a listener at these hears all addresses of the machine

_peers: Link | None = None


def peers() -> Link | None:
    """Returns this process's link to the others, None where it runs alone."""
    return _peers


def gather(value: Any) -> list[Any]:
    """Returns the values (of JSON's types) of all processes, in their order, on process 0; each other has its own.

    Of this and the next two: all processes must call the same one, and it returns when all have.
    """
    values = [value]
    if _peers:
        _peers.meet(value, lambda found: values.__setitem__(slice(None), found))
    return values


def broadcast(value: Any) -> Any:
    """Returns the value of process 0 on all processes."""
    return _peers.meet(value if _peers.place.process_id == 0 else None, lambda values: values[0]) if _peers else value


def first_true(value: Any, thread: str = "main") -> Any:
    """Returns the value of the first process that has a true one, on all; else one that is not.

    Args:
      value: this process's, of JSON's types.
      thread: who asks, of THREADS; each has an order of its own.
    """
    return _peers.meet(value, lambda values: next(filter(None, values), value), thread) if _peers else value


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


def join(place: ProcessInfo, same: Mapping[str, Any], start_seconds: float, heartbeat: float) -> Link:
    """Waits for all processes and starts jax.distributed; raises UserError naming who did not come."""
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
        # On CPUs, a collective holds a thread until all processes have come to it. Seen on two cores: with fewer
        # threads than collectives at a time, processes wait for each other for ever. XLA reads this variable.
        os.environ.setdefault("NPROC", str(max(32, os.cpu_count() or 1)))
        # One program at a time: gloo does not tell them apart.
        jax.config.update("jax_cpu_enable_async_dispatch", False)
        jax.config.update("jax_enable_preemption_service", False)  # Link.should_stop does its work, and at once
        jax.distributed.initialize(
            address(place.coordinator_host, port), place.num_processes, place.process_id,
            local_device_ids=place.local_device_ids,
            cluster_detection_method="deactivate", initialization_timeout=max(1, int(start_seconds)),
            # Longer than ours, which names who was lost.
            heartbeat_timeout_seconds=int(2 * heartbeat) + 10, shutdown_timeout_seconds=int(2 * heartbeat) + 10,
            coordinator_bind_address=None if bound in ANY else address(bound, port))
        jax.devices()  # the processes exchange their devices here
    except BaseException as error:
        link.fail(error)
    return link
