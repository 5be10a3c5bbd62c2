"""Masks as COCO stores them, by the lengths of their runs: of 0 first, then of 1, and so on, column by column.

In text each length, from the third of its kind on the difference to the one two before, is cut into pieces of five
bits, the lowest first; a sixth bit says that more follow, the highest of the last piece is the sign, and 48 is added to
make letters of them.
"""

import numpy as np

FIRST = 48  # letter of the value 0
BITS, MORE = 5, 0x20
MOST_PIECES = 7  # of a length; more than 31 bits need no image
MOST_PIXELS = 2**28  # of an image that runs are of (our choice)


def runs(counts: str | bytes | list[int], size: tuple[int, int]) -> np.ndarray:
    """Returns lengths of runs, int64 [k], of a list or a text of them; raises ValueError where they are none.

    Args:
      counts: as COCO has them.
      size: height, width of the image, which they must fill.
    """
    if isinstance(counts, list):
        if not all(isinstance(run, int) for run in counts):
            raise ValueError("its runs are no whole numbers")
        found = np.array(counts, np.int64)
    else:
        found = _read(counts.encode("ascii", "replace") if isinstance(counts, str) else counts)
    if len(found) and found.min() < 0:
        raise ValueError("a run is shorter than 0")
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
        raise ValueError("its runs are no text of RLE")
    last = (letters & MORE) == 0
    number = np.append(0, np.cumsum(last)[:-1]) if len(letters) else np.zeros(0, np.int64)  # which each letter is of
    starts = np.flatnonzero(np.append(True, last[:-1])) if len(letters) else np.zeros(0, np.int64)
    place = np.arange(len(letters)) - starts[number]
    if len(place) and place.max() >= MOST_PIECES:
        raise ValueError("a run is longer than any image")
    values = np.bincount(number, (letters & (MORE - 1)) << (BITS * place)).astype(np.int64)
    negative = letters[last] & (MORE >> 1) != 0
    values -= negative.astype(np.int64) << (BITS * (place[last] + 1))
    for kind in (1, 2):  # sums of every other difference; the first two, and the third, are lengths themselves
        values[kind::2] = np.cumsum(values[kind::2])
    return values


def decoded(lengths: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Returns the mask bool [height, width] of runs that fill it."""
    values = np.repeat(np.arange(len(lengths)) % 2 == 1, lengths)
    return values.reshape(size[::-1]).T


def encoded(mask: np.ndarray) -> str:
    """Returns the text of a mask [height, width]; not 0 is 1."""
    return encoded_region(mask, 0, 0, mask.shape)


def encoded_region(values: np.ndarray, left: int, top: int, size: tuple[int, int]) -> str:
    """Returns the text of a mask of an image (height, width) that is 0 but for values [h, w] from left and top on."""
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
