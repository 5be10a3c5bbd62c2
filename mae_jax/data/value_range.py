"""Which values of images of more than 8 bits become black and white, where data.range=auto leaves it to the data."""

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from ml_collections import ConfigDict

from mae_jax.data.decode import StoredImage
from mae_jax.data.identity import SAMPLES, sampled
from mae_jax.data.image_bounds import BadImage
from mae_jax.data.reading import Reading
from mae_jax.data.sources.base import READERS, Example, RecordStream, Source

BITS = (8, 10, 12, 14, 16)  # of cameras, scanners and monitors


def _values(source: Source | RecordStream, highest: Callable[[Example], int]) -> list[int]:
    """Returns `highest` of the images that are looked at, and that can be read."""
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
    """Returns the range, as '0,4095', and a line about it; '' where no image looked at has more than 8 bits.

    64 images are looked at: of data with random access as far apart as may be, the first ones of a stream. From 0, the
    range has as many bits as the largest value needs: the same data decide the same, on every machine.

    Args:
      source: the training split.
      data: the group `data` of a config.
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
