"""Chooses the values that become black and white in images of more than 8 bits, for data.range=auto."""

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from ml_collections import ConfigDict

from mae_jax.data.decode import StoredImage
from mae_jax.data.identity import SAMPLES, sampled
from mae_jax.data.image_bounds import BadImage
from mae_jax.data.reading import Reading
from mae_jax.data.sources.base import READERS, Example, RecordStream, Source

BITS = (8, 10, 12, 14, 16)  # bit depths of cameras, scanners and monitors


def _values(source: Source | RecordStream, highest: Callable[[Example], int]) -> list[int]:
    """Returns `highest` of the sampled images; -1 for images of a Source that cannot be read."""
    if isinstance(source, RecordStream):
        from mae_jax.data.readers import record_stream

        images = (fields[0] for _, fields in record_stream.stored(source, []))
        return [highest(Example(image)) for image in itertools.islice(images, SAMPLES)]

    def value(index: int) -> int:
        try:
            return highest(source.read(index))
        except (BadImage, OSError):
            return -1

    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(value, map(int, sampled(source.size))))


def chosen(source: Source | RecordStream, data: ConfigDict) -> tuple[str, str]:
    """Chooses the range of values from the training images.

    The sample has 64 images: evenly spaced with random access, the first ones of a stream. The range starts at 0 and
    has as many bits as the largest value needs, so that the same data give the same range on every machine.

    Args:
      source: the training split.
      data: the config group `data`.

    Returns:
      The range, as '0,4095', and a line about it, '' if no sampled image has more than 8 bits.
    """
    reading = Reading.of(data)

    def highest(example: Example) -> int:
        try:
            stored = StoredImage(example.image, reading=reading)
            return stored.highest() if stored.deep else -1
        except BadImage:
            return -1

    found = [value for value in _values(source, highest) if value >= 0]
    bits = next(bits for bits in BITS if max(found, default=65_535) < 1 << bits)
    span = f"0,{(1 << bits) - 1}"
    line = (f"data.range=auto: {span} ({bits} bits), by the largest value, {max(found)}, of {len(found)} images of "
            f"more than 8 bits among {min(source.size, SAMPLES)} of the training split") if found else ""
    return span, line
