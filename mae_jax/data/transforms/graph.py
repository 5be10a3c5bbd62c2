"""TensorFlow graph from JPEGs to permuted patches: decodes partially, resizes and patchifies many images per call.

The filter is the recipe's, antialiased bicubic (a = -0.5) as in PIL, in float32. Per direction, a block of as many rows
as a patch has is a product of two matrices: the filter weights, and the rows of the image that the block reads.
`tf.image.resize(antialias=True)` takes about twice as long.
"""

import functools
from typing import NamedTuple

import numpy as np

from mae_jax.data.tensorflow_cpu import tf
from mae_jax.data.transforms.sampling import RATIOS, SUPPORT
from mae_jax.ops.patches import PatchGrid


class Job(NamedTuple):
    """The arguments of the graph for one JPEG."""

    data: bytes
    window: tuple[int, int, int, int]  # top, left, height, width, in pixels after the decoder shrinks the image
    ratio: int  # factor by which the decoder shrinks the image
    rows: np.ndarray  # float32 [H], centers of the view's rows, in pixels of the window
    columns: np.ndarray  # float32 [W] likewise
    scales: tuple[float, float]  # pixels of the window per pixel of the view, down and across
    bounds: tuple[int, int, int, int]  # rows (low, high), then columns, of the window that the filter may read
    order: np.ndarray  # int32 [N], of the patches


def patches(grid: PatchGrid, jobs: list[Job]) -> np.ndarray:
    """Returns the permuted patches of JPEGs, uint8 [jobs, N, P].

    Raises:
      tf.errors.OpError: a JPEG does not decode.
    """
    made = _compiled(grid)(
        tf.constant([job.data for job in jobs]), np.array([job.window for job in jobs], np.int32),
        np.array([RATIOS.index(job.ratio) for job in jobs], np.int32), np.stack([job.rows for job in jobs]),
        np.stack([job.columns for job in jobs]), np.array([job.scales for job in jobs], np.float32),
        np.array([job.bounds for job in jobs], np.int32), np.stack([job.order for job in jobs]))
    return made.numpy()


@functools.cache
def _compiled(grid: PatchGrid) -> tf.types.experimental.ConcreteFunction:
    """Returns the graph as a function of the fields of `Job`, each with a leading batch dimension."""
    height, width = grid.image_size
    signature = [tf.TensorSpec([None, *shape], dtype) for shape, dtype in (
        ([], tf.string), ([4], tf.int32), ([], tf.int32), ([height], tf.float32), ([width], tf.float32),
        ([2], tf.float32), ([4], tf.int32), ([grid.num_patches], tf.int32))]
    out = tf.TensorSpec([grid.num_patches, grid.patch_dim], tf.uint8)

    def one(job: tuple[tf.Tensor, ...]) -> tf.Tensor:
        data, window, ratio, rows, columns, scales, bounds, order = job
        pixels = tf.switch_case(ratio, [functools.partial(_decoded, data, window, each) for each in RATIOS])
        return tf.gather(_cut(pixels, rows, columns, scales, bounds, grid), order)

    def many(*jobs: tf.Tensor) -> tf.Tensor:
        return tf.map_fn(one, jobs, parallel_iterations=1, fn_output_signature=out)

    return tf.function(many, input_signature=signature, autograph=False).get_concrete_function()


def _decoded(data: tf.Tensor, window: tf.Tensor, ratio: int) -> tf.Tensor:
    return tf.raw_ops.DecodeAndCropJpeg(
        contents=data, crop_window=window, channels=3, ratio=ratio, fancy_upscaling=True, try_recover_truncated=False,
        acceptable_fraction=1, dct_method="INTEGER_ACCURATE")


def _cut(pixels: tf.Tensor, rows: tf.Tensor, columns: tf.Tensor, scales: tf.Tensor, bounds: tf.Tensor,
         grid: PatchGrid) -> tf.Tensor:
    """Returns the patches of a view in raster order, uint8 [N, P]; the arguments are those of `Job`.

    Args:
      pixels: uint8 [h, w, 3], the window.
    """
    (high, wide), (down, across) = grid.image_size, grid.patch
    shape = tf.shape(pixels)
    places, weights = _band(rows, scales[0], bounds[:2], down)
    read = tf.gather(tf.reshape(pixels, [shape[0], shape[1] * 3]), places)
    tall = tf.matmul(weights, tf.cast(read, tf.float32))
    turned = tf.transpose(tf.reshape(tall, [high, shape[1], 3]), [1, 0, 2])
    places, weights = _band(columns, scales[1], bounds[2:], across)
    view = tf.matmul(weights, tf.gather(tf.reshape(turned, [shape[1], high * 3]), places))
    view = tf.reshape(view, [wide // across, across, high // down, down, 3])
    cut = tf.reshape(tf.transpose(view, [2, 0, 3, 1, 4]), [grid.num_patches, grid.patch_dim])
    return tf.cast(tf.clip_by_value(tf.round(cut), 0, 255), tf.uint8)


def _band(centers: tf.Tensor, scale: tf.Tensor, bounds: tf.Tensor, block: int) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns the rows that each block of the view reads, int32 [blocks, K], and their weights [blocks, block, K]."""
    stretch = tf.maximum(scale, 1.0)
    centers = tf.reshape(centers, [-1, block])
    low, high = bounds[0], bounds[1]
    first = tf.cast(tf.floor(tf.reduce_min(centers, 1) - SUPPORT * stretch), tf.int32)
    last = tf.cast(tf.math.ceil(tf.reduce_max(centers, 1) + SUPPORT * stretch), tf.int32)
    first, last = tf.maximum(first, low), tf.minimum(last, high)
    width = tf.reduce_max(last - first)
    places = tf.minimum(first, high - width)[:, None] + tf.range(width)
    weights = _bicubic((tf.cast(places, tf.float32)[:, None, :] + 0.5 - centers[:, :, None]) / stretch)
    return places, weights / tf.reduce_sum(weights, 2, keepdims=True)


def _bicubic(x: tf.Tensor) -> tf.Tensor:
    """Keys' cubic convolution with a = -0.5 ('Cubic convolution interpolation', 1981, equation 15)."""
    x = tf.abs(x)
    near, far = (1.5 * x - 2.5) * x * x + 1.0, ((2.5 - 0.5 * x) * x - 4.0) * x + 2.0
    return tf.where(x < 1.0, near, tf.where(x < 2.0, far, 0.0))
