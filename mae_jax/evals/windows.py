"""Sliding windows: images of any size for a model of one input size, and the merging of the windows' logits.

The protocol is mmsegmentation's (encoder_decoder.py): the image is resized with its aspect ratio kept; the logits of
overlapping windows are averaged and resized to the original size, before the argmax. Resizing, averaging and placing
are linear and separable, and so are combined in one matrix for the rows and one for the columns of a window. They are
applied on the host in strips of rows: the logits of a whole image are never in memory.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from mae_jax.data.transforms.scaled_crop import FILL, scaled_size
from mae_jax.ops.resampling import interpolation

STRIP = 2**23  # maximum number of logits of a strip


class Axis(NamedTuple):
    """The positions of windows along one side of an image, in pixels.

    Attributes:
      own: side of the original image.
      resized: side of the resized image.
      window: side of a window; a shorter image is padded.
      starts: first pixel of each window in the resized image.
    """

    own: int
    resized: int
    window: int
    starts: tuple[int, ...]

    def matrices(self, cells: int) -> list[np.ndarray]:
        """Returns a matrix float32 [own, cells] for each window: the weights of its cells in the image's pixels."""
        inside = min(self.window, self.resized)
        enlarged = interpolation(cells, self.window)[:inside].astype(np.float64)
        count = np.zeros(self.resized)
        for start in self.starts:
            count[start:start + inside] += 1
        to_own = interpolation(self.resized, self.own).astype(np.float64) / count
        return [(to_own[:, start:start + inside] @ enlarged).astype(np.float32) for start in self.starts]


class Layout(NamedTuple):
    """The positions of windows in an image; windows are ordered row by row."""

    rows: Axis
    columns: Axis

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of a window."""
        return self.rows.window, self.columns.window

    def __len__(self) -> int:
        return len(self.rows.starts) * len(self.columns.starts)

    def cut(self, image: Image.Image) -> Iterator[np.ndarray]:
        """Yields the windows, uint8 [height, width, 3], of an image at its original size."""
        resized = image.resize((self.columns.resized, self.rows.resized), Image.Resampling.BICUBIC)
        canvas = Image.new("RGB", (max(self.columns.resized, self.columns.window),
                                   max(self.rows.resized, self.rows.window)), FILL)
        canvas.paste(resized)
        pixels = np.asarray(canvas)
        for top in self.rows.starts:
            for left in self.columns.starts:
                yield pixels[top:top + self.rows.window, left:left + self.columns.window]

    def strips(self, logits: np.ndarray) -> Iterator[np.ndarray]:
        """Yields the logits of the original image's pixels in strips float32 [n, width, C], from top to bottom.

        Args:
          logits: float [windows, h, w, C], the logits of the cells of each window.
        """
        height, width, classes = logits.shape[1:]
        down, across = self.rows.matrices(height), self.columns.matrices(width)
        logits = logits.reshape(len(down), len(across), height, width * classes).astype(np.float32)
        most = max(1, STRIP // (self.columns.own * classes))
        for top in range(0, self.rows.own, most):
            total = np.zeros((min(most, self.rows.own - top), self.columns.own, classes), np.float32)
            for rows, in_row in zip(down, logits, strict=True):
                part = rows[top:top + most]
                for columns, cells in zip(across, in_row if part.any() else (), strict=bool(part.any())):
                    total += columns @ (part @ cells).reshape(len(part), width, classes)
            yield total


class View(NamedTuple):
    """One view of an image in test-time augmentation: a size, optionally mirrored."""

    layout: Layout
    flipped: bool = False

    def cut(self, image: Image.Image) -> Iterator[np.ndarray]:
        """Yields the windows of the view, as `Layout.cut`."""
        return self.layout.cut(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self.flipped else image)

    def strips(self, logits: np.ndarray) -> Iterator[np.ndarray]:
        """Yields strips of logits as `Layout.strips`, mirrored back for a mirrored view."""
        for strip in self.layout.strips(logits):
            yield strip[:, ::-1] if self.flipped else strip


def sliding(size: tuple[int, int], window: tuple[int, int], stride: tuple[int, int], scale: float = 1.0) -> Layout:
    """Returns the sliding windows of an image whose short side is resized to `scale` times that of a window.

    Each side has max(pixels - window + stride - 1, 0) // stride + 1 windows; the last one is shifted back to the edge.

    Args:
      size, window, stride: (height, width) in pixels.
      scale: size of the resized image relative to a window.
    """
    resized = scaled_size(size, scale * min(window))
    axes = []
    for own, pixels, side, step in zip(size, resized, window, stride, strict=True):
        count = max(pixels - side + step - 1, 0) // step + 1
        axes.append(Axis(own, pixels, side, tuple(min(n * step, max(pixels - side, 0)) for n in range(count))))
    return Layout(*axes)


def whole(size: tuple[int, int], model: tuple[int, int], patch: tuple[int, int], fewest: int,
          scale: float = 1.0) -> Layout:
    """Returns one window for a whole image whose short side is resized to `scale` times that of the model's images.

    Its sides are rounded to multiples of the patch's sides, at least `fewest` patches.

    Args:
      size, model, patch: (height, width) in pixels, of the image, the model's images and a patch.
      fewest: minimum number of patches along a side.
      scale: size of the resized image relative to the model's images.
    """
    sides = [max(round(pixels / side), fewest) * side
             for pixels, side in zip(scaled_size(size, scale * min(model)), patch, strict=True)]
    return Layout(*(Axis(own, side, side, (0,)) for own, side in zip(size, sides, strict=True)))


def predicted(views: Sequence[View], logits: Sequence[np.ndarray]) -> np.ndarray:
    """Returns the predicted class of each pixel, uint8 [height, width].

    It is the argmax of the mean of the views' probabilities (mmsegmentation's aug_test).

    Args:
      views: the views of the image.
      logits: for each view, logits float [windows, h, w, C] of its windows.
    """
    first, *others = [view.strips(each) for view, each in zip(views, logits, strict=True)]
    found = []
    for strip in first:  # all views have strips of the same rows
        if others:
            strip = _softmax(strip)
            for other in others:
                strip += _softmax(next(other))
        found.append(strip.argmax(-1).astype(np.uint8))
    return np.concatenate(found)


def _softmax(logits: np.ndarray) -> np.ndarray:
    """Returns the softmax over the last axis, float32."""
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    return shares / shares.sum(-1, keepdims=True)
