"""How far a pass over many images is: a bar on a terminal, else a line now and then."""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import jax

from mae_jax.runtime.console import clock

EVERY = 30.0  # seconds between two lines

logger = logging.getLogger(__name__)


class Tell(Protocol):
    """Is told how many images more are done."""

    def __call__(self, images: int) -> object: ...


@contextmanager
def told(total: int, done: int, what: str) -> Iterator[Tell]:
    """Gives what is to be told of progress; `done` images of `total` were there before."""
    if jax.process_index():
        yield lambda images: None
    elif sys.stderr is not None and sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(total=total, initial=done, desc=what, unit="image", smoothing=0.1) as bar:
            yield bar.update
    else:
        yield _Lines(total, done, what)


class _Lines:
    def __init__(self, total: int, done: int, what: str):
        self._total, self._done, self._what, self._first = total, done, what, done
        self._began = self._said = time.monotonic()

    def __call__(self, images: int) -> None:
        self._done += images
        now = time.monotonic()
        if now > self._said + EVERY:
            self._said, speed = now, (self._done - self._first) / (now - self._began)
            logger.info("%s: %d of %d images, %.1f images/s, %s left", self._what, self._done, self._total, speed,
                        clock((self._total - self._done) / speed) if speed else "?")
