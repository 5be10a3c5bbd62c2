"""Chooses the values that become black and white in images of more than 8 bits, for data.range=auto."""

from ml_collections import ConfigDict

from mae_jax.data import deep_images
from mae_jax.data.decode import StoredImage
from mae_jax.data.identity import SAMPLES
from mae_jax.data.reading import Reading, span
from mae_jax.data.samples import of_sample
from mae_jax.data.sources.base import Example, RecordStream, Source

BITS = (8, 10, 12, 14, 16)  # bit depths of cameras, scanners and monitors
DARK = 4  # times that data.range is wider than images need, from which on `darkened` warns: one step of BITS


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
    found = _highest(source, data)
    bits = _bits(found)
    text = f"0,{(1 << bits) - 1}"
    line = (f"data.range=auto: {text} ({bits} bits), by the largest value, {max(found)}, of {len(found)} images of "
            f"more than 8 bits among {min(source.size, SAMPLES)} of the training split") if found else ""
    return text, line


def darkened(source: Source | RecordStream, data: ConfigDict) -> str:
    """Returns a line if images of more than 8 bits leave most of data.range unused, so that they come out dark.

    Arguments and sample as in `chosen`; the range is one of other images, such as those that an encoder was trained on.
    """
    found = _highest(source, data)
    high = (span(data.range) or (0, deep_images.HIGHEST))[1]
    if not found or (1 << _bits(found)) * DARK > high + 1:
        return ""
    bits = _bits(found)
    return (f"the largest value of {len(found)} images of more than 8 bits is {max(found)}, and the encoder's "
            f"data.range={data.range} makes {255 * max(found) / high:.0f} of 255 of it. To see {bits} bits of them: "
            f"--config=folder --config.data.path=... --config.data.range=0,{(1 << bits) - 1}")


def _highest(source: Source | RecordStream, data: ConfigDict) -> list[int]:
    """Returns the largest value of each sampled image that can be read and has more than 8 bits per channel."""
    reading = Reading.of(data)

    def highest(example: Example) -> int:
        stored = StoredImage(example.image, reading=reading)
        return stored.highest() if stored.deep else -1

    return [value for _, value in of_sample(source, highest) if value >= 0]


def _bits(values: list[int]) -> int:
    """Returns the bit depth of images with these largest values; 16 without any."""
    return next(bits for bits in BITS if max(values, default=deep_images.HIGHEST) < 1 << bits)
