"""Patch orders, which define the visible and the masked patches of an image, and views with orders. NumPy only."""

import math
from typing import Any, NamedTuple, Protocol

import numpy as np

from mae_jax.errors import UserError, did_you_mean

BLOCK_PATCHES = 16  # smallest block (BEiT section 2.3, Algorithm 1)
BLOCK_ASPECT = 0.3  # aspect ratios from 0.3 to 1/0.3 (same source)
BLOCK_TRIES = 10  # attempts to place a block, as in BEiT's released code


class Generator(Protocol):
    """A method's own generator of orders, in place of a named kind; it can draw blocks of patches too.

    It is a NamedTuple of plain values, because cached batches store and compare it.
    """

    @property
    def name(self) -> str:
        """Name in messages."""

    @property
    def blocks(self) -> tuple[int, int]:
        """(M, K): M blocks of K patches each, which may overlap; (0, 0) for none."""

    def __call__(self, order: "PatchOrder", rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Returns a permutation [N] of raster indices, masked ones last, and raster indices [M, K] of the blocks."""


class PatchOrder(NamedTuple):
    """How the patches of an image are ordered and masked."""

    # 'random' | 'published_block' | 'block' (of recipe_version 1) | 'grid' | 'identity', or a method's generator
    kind: str | Generator
    grid: tuple[int, int]  # patches along (height, width)
    num_masked: int  # M: the last M patches of the order are masked
    group: int = 1  # G: neighboring rows that share one permutation, the i-th rolled back by i · N / G


class ColorAugmentation(NamedTuple):
    """Probabilities of the color changes of a view, in order of application (DINO, arXiv 2104.14294, after BYOL)."""

    jitter: float
    gray: float
    blur: float
    solarize: float
    radius: tuple[float, float] = (0.1, 2.0)  # range of the blur's standard deviation, in pixels


class View(NamedTuple):
    """Random crops of each image, which replace the config's single view in training.

    The n crops of a view named `x` are the batch fields `x/patches` uint8 [B, n, N, P] and `x/order` int32 [B, n, N].
    """

    name: str
    size: tuple[int, int]  # height, width in pixels
    scale: tuple[float, float]  # share of the image's area
    colors: tuple[ColorAugmentation, ...]  # one per crop, n in all
    order: PatchOrder  # of N patches


def block_shape(order: PatchOrder) -> tuple[int, ...]:
    """Returns (M, K), the shape per image of the batch field `blocks`; () if the order has no blocks."""
    return () if isinstance(order.kind, str) or not order.kind.blocks[0] else order.kind.blocks


def with_views(spec: dict[str, Any], views: tuple[View, ...]) -> dict[str, Any]:
    """Returns the fields of a training batch: those of the views, if any, replace those of the single view.

    Args:
      spec: name → global shape and dtype, of a class that is built from the two.
      views: the method's views.
    """
    if not views:
        return spec
    images, _, values = spec["patches"].shape
    fields = {name: struct for name, struct in spec.items() if name not in ("patches", "order", "blocks")}
    for view in views:
        count = (images, len(view.colors), math.prod(view.order.grid))
        of_view = {"patches": ((*count, values), spec["patches"].dtype), "order": (count, spec["order"].dtype)}
        if block_shape(view.order):
            of_view["blocks"] = ((*count[:2], *block_shape(view.order)), spec["order"].dtype)
        fields |= {f"{view.name}/{name}": type(spec["order"])(*struct) for name, struct in of_view.items()}
    return fields


def check(order: PatchOrder) -> None:
    """Raises UserError if no image can have such an order."""
    height, width = order.grid
    patches = height * width
    if isinstance(order.kind, str) and order.kind not in _KINDS:
        raise UserError(f"unknown patch order {order.kind!r}; {did_you_mean(order.kind, _KINDS)}")
    if not 0 <= order.num_masked <= patches:
        raise UserError(f"cannot mask {order.num_masked} of {patches} patches; expected 0 to {patches}")
    if patches % order.group:
        raise UserError(f"{patches} patches cannot be divided evenly among a group of {order.group} images")
    if not isinstance(order.kind, str):
        _try_out(order, order.kind)
    if order.kind != "grid":
        return
    if height % 2 or width % 2:
        raise UserError(f"grid masking needs an even number of patches along both sides, not {height} x {width}; "
                        f"nearest: {' or '.join(f'{h} x {w}' for h, w in _even(height, width))}")
    if 4 * order.num_masked != 3 * patches:
        raise UserError(f"grid masking masks 3 of 4 patches ({3 * patches // 4} of {patches}), not {order.num_masked}")


def _try_out(order: PatchOrder, generator: Generator) -> None:
    """Raises UserError if a method's generator draws no permutation, or other blocks than it declares."""
    patches = math.prod(order.grid)
    drawn, blocks = generator(order, np.random.default_rng(0))
    if not np.array_equal(np.sort(drawn), np.arange(patches)):
        raise UserError(f"the patch order {generator.name!r} does not draw a permutation of {patches} patches")
    shape = block_shape(order)
    if shape and (blocks.shape != shape or blocks.min() < 0 or blocks.max() >= patches):
        raise UserError(f"the patch order {generator.name!r} draws blocks {list(blocks.shape)} of the patches "
                        f"{blocks.min()} to {blocks.max()}, not {list(shape)} of 0 to {patches - 1}")
    if shape and order.group > 1:
        raise UserError(f"the patch order {generator.name!r} has blocks, which a group of {order.group} images "
                        "cannot share")


def draw(order: PatchOrder, rng: np.random.Generator, member: int = 0) -> dict[str, np.ndarray]:
    """Draws the order of one image.

    Args:
      order: how patches are masked.
      rng: the generator, in the same state for all members of a group.
      member: index within the group, below G.

    Returns:
      `order` int32 [N], a permutation: entry k is the raster index of the k-th patch; the last M are masked. If the
        order has blocks, also `blocks` int32 [M, K]: the indices k of their patches in `order`.
    """
    if isinstance(order.kind, str):
        return {"order": rolled(_KINDS[order.kind](order, rng).astype(np.int32), member, order.group)}
    permutation, blocks = order.kind(order, rng)
    fields = {"order": rolled(permutation.astype(np.int32), member, order.group)}
    return fields | ({"blocks": np.argsort(permutation)[blocks].astype(np.int32)} if block_shape(order) else {})


def rolled(permutation: np.ndarray, member: int, group: int) -> np.ndarray:
    """Returns the order [N] of a group member: the shared permutation, rolled back by `member` · N / G patches."""
    return np.roll(permutation, -member * (len(permutation) // group))


def _even(height: int, width: int) -> list[tuple[int, int]]:
    """Returns the nearest smaller and larger even grids."""
    down = (max(height // 2 * 2, 2), max(width // 2 * 2, 2))
    up = ((height + 1) // 2 * 2, (width + 1) // 2 * 2)
    return sorted({down, up})


def _identity(order: PatchOrder, rng: np.random.Generator) -> np.ndarray:
    return np.arange(math.prod(order.grid))


def _random(order: PatchOrder, rng: np.random.Generator) -> np.ndarray:
    """Returns a uniformly random permutation (MAE section 3, 'Masking')."""
    return rng.permutation(math.prod(order.grid))


def _grid(order: PatchOrder, rng: np.random.Generator) -> np.ndarray:
    """Keeps the first patch of each 2 x 2 visible (MAE Figure 6, 'grid')."""
    hidden = np.ones(order.grid, bool)
    hidden[::2, ::2] = False
    return _visible_first(hidden)


def _published_block(order: PatchOrder, rng: np.random.Generator) -> np.ndarray:
    """Masks rectangles until M patches are masked, as BEiT's released code (Algorithm 1) does.

    The released code stops early if no block fits any more: with M = 75 of 196 patches, it falls short by half a patch
    on average. Here every image has exactly M: the missing patches are added one by one beside masked ones, so that few
    are isolated, as in the published masks.
    """
    hidden = np.zeros(order.grid, bool)
    while (left := order.num_masked - int(hidden.sum())) and _add_published_block(hidden, left, rng):
        pass
    for _ in range(left):
        beside = np.flatnonzero(_touching(hidden) & ~hidden)
        hidden.flat[rng.choice(beside if beside.size else np.flatnonzero(~hidden))] = True
    return _visible_first(hidden)


def _add_published_block(hidden: np.ndarray, left: int, rng: np.random.Generator) -> bool:
    """Masks one more rectangle, smaller than the grid along both sides; returns False if none was found.

    Its area is drawn between 16 and `left`, even if `left` is smaller; it masks at most `left` more patches.
    """
    rows, columns = hidden.shape
    for sized, shaped, down, right in rng.random((BLOCK_TRIES, 4)).tolist():  # one call, to save host time
        area = BLOCK_PATCHES + (left - BLOCK_PATCHES) * sized
        aspect = BLOCK_ASPECT ** (2 * shaped - 1)
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if height >= rows or width >= columns:
            continue
        top, side = int(down * (rows - height + 1)), int(right * (columns - width + 1))
        block = hidden[top:top + height, side:side + width]
        if 0 < block.size - np.count_nonzero(block) <= left:
            block[:] = True
            return True
    return False


def _touching(hidden: np.ndarray) -> np.ndarray:
    """Returns whether each patch has a masked neighbor above, below or beside it: bool [rows, columns]."""
    padded = np.pad(hidden, 1)
    return padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]


def _block(order: PatchOrder, rng: np.random.Generator) -> np.ndarray:
    """Masks rectangles, then single patches: the block masks of recipe_version 1, kept unchanged."""
    hidden = np.zeros(order.grid, bool)
    while (left := order.num_masked - int(hidden.sum())) and _add_block(hidden, left, rng):
        pass
    singles = rng.permutation(np.flatnonzero(~hidden))[:left]
    hidden.flat[singles] = True
    return _visible_first(hidden)


def _add_block(hidden: np.ndarray, left: int, rng: np.random.Generator) -> bool:
    """Masks one more rectangle that adds at most `left` patches; returns False if none was found."""
    if left < BLOCK_PATCHES:
        return False
    rows, columns = hidden.shape
    for _ in range(BLOCK_TRIES):
        area = rng.uniform(BLOCK_PATCHES, left)
        aspect = math.exp(rng.uniform(math.log(BLOCK_ASPECT), -math.log(BLOCK_ASPECT)))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if height > rows or width > columns:
            continue
        top, side = rng.integers(rows - height + 1), rng.integers(columns - width + 1)
        block = hidden[top:top + height, side:side + width]
        if 0 < block.size - block.sum() <= left:
            block[:] = True
            return True
    return False


def _visible_first(hidden: np.ndarray) -> np.ndarray:
    """Converts a mask bool [rows, columns] to an order [N]: visible patches, then masked ones, each in raster order."""
    return np.argsort(hidden.ravel(), kind="stable")


_KINDS = {"random": _random, "published_block": _published_block, "block": _block, "grid": _grid,
          "identity": _identity}
