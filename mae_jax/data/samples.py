"""Looks at a few examples of a split before a run."""

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from mae_jax.data.identity import SAMPLES, sampled
from mae_jax.data.image_bounds import BadImage
from mae_jax.data.sources.base import READERS, Example, RecordStream, Source

Found = TypeVar("Found")


def of_sample(source: Source | RecordStream, measure: Callable[[Example], Found]) -> list[tuple[int, Found]]:
    """Returns the number of an example and `measure` of it, for up to 64 that can be read.

    They are evenly spaced with random access, the first ones of a stream. `measure` may raise BadImage.
    """
    if isinstance(source, RecordStream):
        from mae_jax.data.readers import record_stream

        first = itertools.islice(record_stream.stored(source, []), SAMPLES)
        found = [_tried(number, lambda fields=fields: measure(source.example(*fields))) for number, fields in first]
    else:
        with ThreadPoolExecutor(READERS) as pool:
            found = list(pool.map(lambda number: _tried(number, lambda: measure(source.read(number))),
                                  map(int, sampled(source.size))))
    return [each for each in found if each is not None]


def _tried(number: int, measured: Callable[[], Found]) -> tuple[int, Found] | None:
    try:
        return number, measured()
    except (BadImage, OSError):
        return None
