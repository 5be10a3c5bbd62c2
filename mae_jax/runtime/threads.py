"""Something done by a thread of its own, which no end of the process waits for."""

import concurrent.futures
import threading
from collections.abc import Callable
from typing import Any


def start(action: Callable[[], Any]) -> concurrent.futures.Future:
    """Starts an action; returns what will hold its result, or what it raised."""
    future: concurrent.futures.Future = concurrent.futures.Future()

    def run() -> None:
        try:
            future.set_result(action())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def ends(future: concurrent.futures.Future, seconds: float) -> bool:
    """Waits for so many seconds at most; returns whether the action has ended."""
    return not concurrent.futures.wait([future], seconds).not_done
