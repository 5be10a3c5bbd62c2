"""Runs callables in daemon threads, which the exit of the process does not join."""

import concurrent.futures
import threading
from collections.abc import Callable
from typing import Any


def start(action: Callable[[], Any]) -> concurrent.futures.Future:
    """Runs `action` in a daemon thread; returns the Future of its result or exception."""
    future: concurrent.futures.Future = concurrent.futures.Future()

    def run() -> None:
        try:
            future.set_result(action())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def ends(future: concurrent.futures.Future, seconds: float) -> bool:
    """Waits for the future for at most `seconds`; returns whether it is done."""
    return not concurrent.futures.wait([future], seconds).not_done
