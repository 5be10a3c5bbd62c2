"""Mixup, cutmix and random erasing on the device, on batches of patches in raster order.

Images are mixed within contiguous groups of rows of the global batch: the i-th row of a group with the i-th from the
end. Each group has one draw. With one group for the whole batch, this is timm's scheme.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mae_jax.ops.patches import PatchGrid

ERASE_AREA = (0.02, 1 / 3)  # share of the image; this and the next two as in timm (Random Erasing, arXiv 1708.04896)
ERASE_ASPECT = (0.3, 1 / 0.3)  # height over width, log-uniform
ERASE_TRIES = 10


class Box(NamedTuple):
    """Boxes in pixels: rows top ≤ y < bottom, columns left ≤ x < right; int32 [...] each."""

    top: jax.Array
    bottom: jax.Array
    left: jax.Array
    right: jax.Array


class Pixels(NamedTuple):
    """Pixel coordinates of the values of an image's patches.

    Attributes:
      size: (height, width) of the image in pixels.
      rows: int32 [N, P].
      columns: int32 [N, P].
    """

    size: tuple[int, int]
    rows: np.ndarray
    columns: np.ndarray

    @classmethod
    def of(cls, grid: PatchGrid) -> "Pixels":
        """Returns the coordinates for a grid of patches."""
        return cls(grid.image_size, *grid.coordinates())

    def inside(self, box: Box) -> jax.Array:
        """Returns which values lie inside each of the boxes [...], bool [..., N, P]."""
        top, bottom, left, right = (side[..., None, None] for side in box)
        return (self.rows >= top) & (self.rows < bottom) & (self.columns >= left) & (self.columns < right)


def cutmix_box(lam: jax.Array, center: tuple[jax.Array, jax.Array], size: tuple[int, int]) -> tuple[Box, jax.Array]:
    """Returns cutmix boxes, and the share of each image outside its box (arXiv 1905.04899, section 3.1).

    Half a side of the box is half the image's side times √(1 - lam), truncated, as in timm 0.3.2, which MAE and DeiT
    III use; later versions of timm allow odd sides. Boxes are clipped to the image, and so are the shares.

    Args:
      lam: float32 [...], the intended share outside the box.
      center: (row, column) of the centers, int32 [...] each, in pixels.
      size: (height, width) of the image in pixels.

    Returns:
      Boxes [...] and shares float32 [...].
    """
    cut = jnp.sqrt(1 - lam)
    edges = []
    for middle, side in zip(center, size, strict=True):
        half = (side * cut).astype(jnp.int32) // 2
        edges += [jnp.clip(middle - half, 0, side), jnp.clip(middle + half, 0, side)]
    box = Box(*edges)
    area = (box.bottom - box.top) * (box.right - box.left)
    return box, 1 - area / (size[0] * size[1])


def draw_mix(key: jax.Array, groups: int, where: Pixels, mixup: float, cutmix: float) -> tuple[jax.Array, jax.Array]:
    """Draws for each group either mixup or cutmix, with equal chances if both are on, and its strength.

    Args:
      key: of the draw.
      groups: number of groups.
      where: pixel coordinates of the patches.
      mixup, cutmix: parameters α of Beta(α, α); 0: off. At least one must be on.

    Returns:
      The share that each pixel keeps of its own value, float32 [groups, N, P], and the share that each image keeps of
      its own label, float32 [groups].
    """
    choice, blend, size, *center = jax.random.split(key, 5)
    cuts = jax.random.bernoulli(choice, 0.5 if mixup and cutmix else float(cutmix > 0), (groups,))
    lam = jax.random.beta(blend, mixup or 1.0, mixup or 1.0, (groups,))
    middle = [jax.random.randint(key, (groups,), 0, side) for key, side in zip(center, where.size, strict=True)]
    box, left = cutmix_box(jax.random.beta(size, cutmix or 1.0, cutmix or 1.0, (groups,)), tuple(middle), where.size)
    kept = jnp.where(cuts[:, None, None], ~where.inside(box), lam[:, None, None])
    return kept.astype(jnp.float32), jnp.where(cuts, left, lam)


def mix(values: jax.Array, kept: jax.Array) -> jax.Array:
    """Mixes values [B, ...] with their partners'; `kept`, float32 [groups, ...], is the share of each row's own values.
    """
    own = values.reshape(kept.shape[0], -1, *values.shape[1:])
    share = kept.reshape(kept.shape[0], 1, *kept.shape[1:], *[1] * (own.ndim - kept.ndim - 1))
    return (own * share + own[:, ::-1] * (1 - share)).reshape(values.shape)


def partners(values: jax.Array, group: int) -> jax.Array:
    """Returns the values [B, ...] of each row's partner, for groups of `group` rows."""
    return values.reshape(-1, group, *values.shape[1:])[:, ::-1].reshape(values.shape)


def erase(key: jax.Array, pixels: jax.Array, where: Pixels, probability: float) -> jax.Array:
    """Replaces a random box of some images by normal noise (Random Erasing, arXiv 1708.04896; timm's mode 'pixel').

    The box is the first of ERASE_TRIES draws that is smaller than the image. If there is none, the image is unchanged.

    Args:
      key: of the draw.
      pixels: normalized [B, N, P].
      where: their coordinates.
      probability: of erasing an image.
    """
    images = pixels.shape[0]
    chance, shape, place, noise = jax.random.split(key, 4)
    erased = jax.random.bernoulli(chance, probability, (images,))
    box, fits = draw_erase_box(shape, place, images, where.size)
    hit = where.inside(box) & (erased & fits)[:, None, None]
    return jnp.where(hit, jax.random.normal(noise, pixels.shape, pixels.dtype), pixels)


def draw_erase_box(shape: jax.Array, place: jax.Array, images: int, size: tuple[int, int]) -> tuple[Box, jax.Array]:
    """Draws a box for each of B images.

    Args:
      shape: key of area and aspect ratio.
      place: key of the position.
      images: B.
      size: (height, width) of the images in pixels.

    Returns:
      Boxes [B], and bool [B]: whether a draw fitted into the image.
    """
    area_key, aspect_key = jax.random.split(shape)
    tries = (images, ERASE_TRIES)
    area = jax.random.uniform(area_key, tries, minval=ERASE_AREA[0], maxval=ERASE_AREA[1]) * size[0] * size[1]
    low, high = np.log(ERASE_ASPECT)
    aspect = jnp.exp(jax.random.uniform(aspect_key, tries, minval=low, maxval=high))
    height, width = jnp.rint(jnp.sqrt(area * aspect)), jnp.rint(jnp.sqrt(area / aspect))
    fits = (height < size[0]) & (width < size[1])
    first = fits.argmax(1)[:, None]
    height, width = (jnp.take_along_axis(x, first, 1)[:, 0].astype(jnp.int32) for x in (height, width))
    down, right = jax.random.uniform(place, (2, images))
    top, left = ((share * (side - extent + 1)).astype(jnp.int32)
                 for share, side, extent in ((down, size[0], height), (right, size[1], width)))
    return Box(top, top + height, left, left + width), fits.any(1)
