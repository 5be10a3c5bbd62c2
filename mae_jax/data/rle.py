"""COCO's run-length encoding (RLE) of masks: lengths of runs in column order, alternating between 0 and 1, 0 first.

In text, each length from the fourth on is stored as the difference to the length two before. Each value is split into
groups of five bits, lowest first; a sixth bit marks that more follow, and the highest bit of the last group is the
sign. Adding 48 makes each group a printable character.
"""

import numpy as np

FIRST = 48  # character code of the value 0
BITS, MORE = 5, 0x20
MOST_PIECES = 7  # five-bit groups of a length; no image needs more than 31 bits
MOST_PIXELS = 2**28  # pixels of an image with a mask (our choice)


def runs(counts: str | bytes | list[int], size: tuple[int, int]) -> np.ndarray:
    """Returns run lengths, int64 [k], from a list or a text.

    Args:
      counts: as in COCO.
      size: height, width of the image, which the runs must fill.

    Raises:
      ValueError: the counts are not valid runs for this size.
    """
    if isinstance(counts, list):
        if not all(isinstance(run, int) for run in counts):
            raise ValueError("its runs are not whole numbers")
        found = np.array(counts, np.int64)
    else:
        found = _read(counts.encode("ascii", "replace") if isinstance(counts, str) else counts)
    if len(found) and found.min() < 0:
        raise ValueError("a run is negative")
    if size[0] * size[1] >= MOST_PIXELS:
        raise ValueError(f"it is of an image of {size[0]} x {size[1]} pixels")
    if len(found) and found.max() > size[0] * size[1]:
        raise ValueError("a run is longer than its image")
    if found.sum() != size[0] * size[1]:
        raise ValueError(f"its runs have {found.sum()} pixels, the image {size[0] * size[1]}")
    return found


def _read(text: bytes) -> np.ndarray:
    letters = np.frombuffer(text, np.uint8).astype(np.int64) - FIRST
    if len(letters) and (letters.min() < 0 or letters.max() >= 2 * MORE or letters[-1] & MORE):
        raise ValueError("its runs are not RLE text")
    last = (letters & MORE) == 0
    number = np.append(0, np.cumsum(last)[:-1]) if len(letters) else np.zeros(0, np.int64)  # length of each letter
    starts = np.flatnonzero(np.append(True, last[:-1])) if len(letters) else np.zeros(0, np.int64)
    place = np.arange(len(letters)) - starts[number]
    if len(place) and place.max() >= MOST_PIECES:
        raise ValueError("a run is longer than any image")
    values = np.bincount(number, (letters & (MORE - 1)) << (BITS * place)).astype(np.int64)
    negative = letters[last] & (MORE >> 1) != 0
    values -= negative.astype(np.int64) << (BITS * (place[last] + 1))
    for kind in (1, 2):  # cumulative sums of every other value, from the second and third on
        values[kind::2] = np.cumsum(values[kind::2])
    return values


def decoded(lengths: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Returns the mask bool [height, width] of runs that fill an image of `size`."""
    values = np.repeat(np.arange(len(lengths)) % 2 == 1, lengths)
    return values.reshape(size[::-1]).T


def encoded(mask: np.ndarray) -> str:
    """Returns the RLE text of a mask [height, width]; nonzero values are 1."""
    return encoded_region(mask, 0, 0, mask.shape)


def encoded_region(values: np.ndarray, left: int, top: int, size: tuple[int, int]) -> str:
    """Returns the RLE text of a mask of `size` (height, width) that has `values` [h, w] at (left, top) and 0 elsewhere.
    """
    columns = np.zeros((values.shape[1], size[0]), bool)
    columns[:, top:top + len(values)] = values.T != 0
    flat, pixels = np.concatenate([[False], columns.ravel(), [False]]), size[0] * size[1]
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + left * size[0]
    lengths = np.diff(np.concatenate([[0], edges[edges < pixels], [pixels]]))
    differences = lengths.copy()
    differences[3:] -= lengths[1:-2]
    return _text(differences)


def _text(values: np.ndarray) -> str:
    letters = bytearray()
    for value in values.tolist():
        while True:
            piece, value = value & (MORE - 1), value >> BITS
            done = value == (-1 if piece & (MORE >> 1) else 0)
            letters.append((piece if done else piece | MORE) + FIRST)
            if done:
                break
    return letters.decode("ascii")
