"""Images at their own size through a model of one size: windows of static shape, and their logits put together.

As mmsegmentation does it (encoder_decoder.py): the image is resized, its ratio kept; the logits of overlapping windows
are averaged, resized to the image's own size, and only then compared. Resizing, averaging and placing are linear and
separable, so that all of them are one matrix for the rows and one for the columns of a window: on the host, strip by
strip, no logits of a whole image are ever in memory.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from mae_jax.data.transforms.scaled_crop import FILL, scaled_size
from mae_jax.ops.resampling import interpolation

STRIP = 2**23  # logits that are made at a time


class Axis(NamedTuple):
    """How windows lie along one side of an image.

    Attributes:
      own: pixels of the image.
      resized: pixels that it is resized to.
      window: pixels of a window; where the side is shorter, the rest of it is filled.
      starts: the first pixel of each window.
    """

    own: int
    resized: int
    window: int
    starts: tuple[int, ...]

    def matrices(self, cells: int) -> list[np.ndarray]:
        """Returns for each window float32 [own, cells]: what its cells' logits add to each pixel of the image."""
        inside = min(self.window, self.resized)
        enlarged = interpolation(cells, self.window)[:inside].astype(np.float64)
        count = np.zeros(self.resized)
        for start in self.starts:
            count[start:start + inside] += 1
        to_own = interpolation(self.resized, self.own).astype(np.float64) / count
        return [(to_own[:, start:start + inside] @ enlarged).astype(np.float32) for start in self.starts]


class Layout(NamedTuple):
    """How windows lie in an image; they come in rows."""

    rows: Axis
    columns: Axis

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of a window."""
        return self.rows.window, self.columns.window

    def __len__(self) -> int:
        return len(self.rows.starts) * len(self.columns.starts)

    def cut(self, image: Image.Image) -> Iterator[np.ndarray]:
        """Yields the windows, uint8 [height, width, 3], of an image of its own size."""
        resized = image.resize((self.columns.resized, self.rows.resized), Image.Resampling.BICUBIC)
        canvas = Image.new("RGB", (max(self.columns.resized, self.columns.window),
                                   max(self.rows.resized, self.rows.window)), FILL)
        canvas.paste(resized)
        pixels = np.asarray(canvas)
        for top in self.rows.starts:
            for left in self.columns.starts:
                yield pixels[top:top + self.rows.window, left:left + self.columns.window]

    def strips(self, logits: np.ndarray) -> Iterator[np.ndarray]:
        """Yields float32 [n, width, C], the logits of the image's own pixels, n rows after the others.

        Args:
          logits: [windows, h, w, C] of the windows' cells.
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
    """An image as it is seen once: at a size, and perhaps mirrored."""

    layout: Layout
    flipped: bool = False

    def cut(self, image: Image.Image) -> Iterator[np.ndarray]:
        """Yields the windows as `Layout.cut`."""
        return self.layout.cut(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self.flipped else image)

    def strips(self, logits: np.ndarray) -> Iterator[np.ndarray]:
        """Yields logits of the image's own pixels as `Layout.strips`, mirrored back."""
        for strip in self.layout.strips(logits):
            yield strip[:, ::-1] if self.flipped else strip


def sliding(size: tuple[int, int], window: tuple[int, int], stride: tuple[int, int], scale: float = 1.0) -> Layout:
    """Returns the windows of an image of a size whose short side becomes `scale` times that of a window.

    Of each side there are max(pixels - window + stride - 1, 0) // stride + 1, the last one shifted back to the end.

    Args:
      size, window, stride: (height, width) in pixels.
    """
    resized = scaled_size(size, scale * min(window))
    axes = []
    for own, pixels, side, step in zip(size, resized, window, stride, strict=True):
        count = max(pixels - side + step - 1, 0) // step + 1
        axes.append(Axis(own, pixels, side, tuple(min(n * step, max(pixels - side, 0)) for n in range(count))))
    return Layout(*axes)


def whole(size: tuple[int, int], model: tuple[int, int], patch: tuple[int, int], fewest: int,
          scale: float = 1.0) -> Layout:
    """Returns the one window of an image whose short side becomes `scale` times that of the model's images.

    Its sides are the nearest multiples of those of a patch, `fewest` patches at least.
    """
    sides = [max(round(pixels / side), fewest) * side
             for pixels, side in zip(scaled_size(size, scale * min(model)), patch, strict=True)]
    return Layout(*(Axis(own, side, side, (0,)) for own, side in zip(size, sides, strict=True)))


def predicted(views: Sequence[View], logits: Sequence[np.ndarray]) -> np.ndarray:
    """Returns the class of each pixel of an image, uint8 [height, width]: the likeliest by the mean of the views'
    probabilities (mmsegmentation's aug_test).

    Args:
      logits: of each view, those of its windows [windows, h, w, C].
    """
    first, *others = [view.strips(each) for view, each in zip(views, logits, strict=True)]
    found = []
    for strip in first:  # a view at a time, whose strips are of the same rows
        if others:
            strip = _softmax(strip)
            for other in others:
                strip += _softmax(next(other))
        found.append(strip.argmax(-1).astype(np.uint8))
    return np.concatenate(found)


def _softmax(logits: np.ndarray) -> np.ndarray:
    """Returns probabilities over the last axis, float32."""
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    return shares / shares.sum(-1, keepdims=True)
