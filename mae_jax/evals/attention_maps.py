"""Where an encoder looks: attention maps of one block as pictures, and how well they cover the foreground."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import process_allgather

from mae_jax.errors import UserError, nearest
from mae_jax.evals.image_grid import tile
from mae_jax.losses.segmentation import IGNORED, upsample
from mae_jax.methods.base import Batch, Method
from mae_jax.models import intermediates
from mae_jax.ops.partitioning import constrain
from mae_jax.ops.patches import normalize
from mae_jax.state import TrainState

QUERIES = ("cls", "mean")
MASSES = tuple(np.arange(1, 20) / 20)  # shares of the attention that are tried; DINO (arXiv 2104.14294, 4.2.2) has 0.6
# Dark to bright with rising lightness: weights that are twice as large look it, also in grey.
RAMP = np.array([(0, 0, 30), (70, 10, 110), (190, 50, 90), (250, 150, 30), (255, 255, 180)])
BLEND = 0.6  # share of the colour in an overlay


def maps(method: Method, params: Any, extras: Any, batch: Batch, block: int = -1, query: str = "cls") -> jax.Array:
    """Returns how much each patch of whole images is attended to, per head, in raster order.

    Args:
      method: any that has an encoder with a class token.
      params, extras: its state.
      batch: `patches` uint8 [B, N, P], `order` int32 [B, N], and whatever else `encode` reads.
      block: whose attention; -1 is the last.
      query: who looks: 'cls', the class token; or 'mean', the mean over all patches, where nothing trained that token.

    Returns:
      float32 [B, H, rows, columns]. A map sums to 1 less what goes to the class token itself.

    Raises:
      UserError: no such block or query.
    """
    if query not in QUERIES:
        raise UserError(f"unknown query {query!r} of an attention map; {nearest(query, QUERIES)}")
    block = intermediates.chosen(block, method.config.model.depth)
    tokens = _entering(method, params, extras, batch, block)
    encoder = method.judged(params, extras)["encoder"]
    weights = intermediates.attention_weights(method.encoder, encoder[intermediates.block_name(block)], tokens)
    row = weights[:, :, 0] if query == "cls" else weights[:, :, 1:].mean(2)
    patches = intermediates.raster(row[:, :, 1:].swapaxes(1, 2), batch["order"], method.grid.shape)
    return patches.transpose(0, 3, 1, 2)


def _entering(method: Method, params: Any, extras: Any, batch: Batch, block: int) -> jax.Array:
    """Returns the tokens [B, 1 + N, D] that enter a block."""
    if block:
        return method.encode(params, extras, batch, block - 1)
    encoder = method.judged(params, extras)["encoder"]
    return next(intermediates.between_blocks(method.encoder, encoder, normalize(batch["patches"]), batch["order"]))


@functools.lru_cache(maxsize=8)
def _mapper(method: Method, block: int, query: str) -> Callable[..., jax.Array]:
    """Returns the compiled `maps`; kept from one evaluation to the next."""
    return jax.jit(functools.partial(maps, method, block=block, query=query))


def picture(method: Method, params: Any, extras: Any, batch: Batch, block: int = -1, query: str = "cls",
            name: str = "") -> np.ndarray:
    """Returns the grid of `batch`: input, mean over heads laid over it, and each head; uint8 [height, width, 3].

    Its title begins with `name`.
    """
    weights = np.asarray(process_allgather(_mapper(method, block, query)(params, extras, batch), tiled=True))
    patch, heads = method.grid.patch, weights.shape[1]
    inputs = method.grid.unpatchify(np.asarray(batch["patches"]), np.asarray(batch["order"]))
    every = np.concatenate([weights.mean(1, keepdims=True), weights], 1)
    heat = colours(np.asarray(upsample(every.transpose(0, 2, 3, 1), patch)).transpose(0, 3, 1, 2))
    overlays = (BLEND * heat[:, 0] + (1 - BLEND) * inputs.mean(-1, keepdims=True)).astype(np.uint8)
    rows = [(inputs[i], overlays[i], *heat[i, 1:]) for i in range(len(inputs))]
    captions = ("input", "mean of heads", *(f"head {head}" for head in range(heads)))
    number = intermediates.chosen(block, method.config.model.depth)
    who = "class token" if query == "cls" else "mean patch"
    title = f"{name}attention of the {who} in block {number}; each map from its lowest to its highest"
    return tile(rows, captions, title)


def colours(heat: np.ndarray) -> np.ndarray:
    """Returns uint8 [..., height, width, 3] for maps [..., height, width], each spread over the whole ramp."""
    low, high = heat.min((-2, -1), keepdims=True), heat.max((-2, -1), keepdims=True)
    place = np.nan_to_num((heat - low) / np.maximum(high - low, 1e-12)) * (len(RAMP) - 1)
    return np.stack([np.interp(place, np.arange(len(RAMP)), RAMP[:, channel]) for channel in range(3)],
                    -1).astype(np.uint8)


def covers(weights: jax.Array, masses: tuple[float, ...]) -> jax.Array:
    """Returns the fewest pixels that hold each share of a map, bool [len(masses), ..., height, width].

    DINO's thresholding (section 4.2.2) of maps [..., height, width], which are not negative. Ties are all kept.
    """
    flat = weights.reshape(*weights.shape[:-2], -1)
    falling = -jnp.sort(-flat, -1)
    sums = jnp.cumsum(falling, -1) / flat.sum(-1, keepdims=True)
    last = [(sums < mass).sum(-1, keepdims=True).clip(max=flat.shape[-1] - 1) for mass in masses]
    return jnp.stack([weights >= jnp.take_along_axis(falling, index, -1)[..., None] for index in last])


@functools.lru_cache(maxsize=8)
def _overlaps(method: Method, block: int, query: str) -> Callable[[TrainState, Batch], tuple[jax.Array, ...]]:
    """Returns the compiled function to (sums over pictures of IoU [masses, 1 + H], of that of all pixels, pictures).

    A picture counts where it has foreground, any class but the background. The first map is the mean of the heads.
    """
    def measure(state: TrainState, batch: Batch) -> tuple[jax.Array, ...]:
        weights = maps(method, state.ema or state.params, state.extras, batch, block, query).transpose(0, 2, 3, 1)
        weights = jnp.concatenate([weights.mean(-1, keepdims=True), weights], -1)
        kept = covers(upsample(weights, method.grid.patch).transpose(0, 3, 1, 2), MASSES)
        classes = method.pixel_classes(batch)[:, None]
        known = classes != IGNORED
        wanted = known & (classes != method.config.method.background)
        union = ((kept & known) | wanted).sum((-2, -1))
        shares = (kept & wanted).sum((-2, -1)) / jnp.maximum(union, 1)
        everything = wanted.sum((-2, -1)) / jnp.maximum(known.sum((-2, -1)), 1)
        counts = wanted.any((-2, -1)).sum(dtype=jnp.float32)
        return jax.tree.map(constrain, (shares.sum(1), everything.sum(), counts))

    return jax.jit(measure)


def iou(method: Method, state: TrainState, choose: Iterable[Batch], test: Iterable[Batch], block: int = -1,
        query: str = "cls") -> dict[str, float]:
    """Returns how well attention covers the foreground: the mean over pictures of intersection over union.

    The map (a head, or the mean of all) and the share of attention that is kept are those that are best on `choose`;
    `test` is read once with them.

    Args:
      method: `segment`, whose batches have masks.
      state: the train state.
      choose, test: batches of pictures apart.
      block, query: see `maps`.

    Returns:
      'attention_iou', 'attention_mass' (the share), 'attention_head' (-1: the mean), and the floor 'foreground_share':
      the IoU of taking every pixel. {} where nothing is known of foreground.
    """
    if method.config.method.background < 0:
        return {}
    chosen, held_out = (_mean_overlap(method, state, part, block, query) for part in (choose, test))
    if chosen is None or held_out is None:
        return {}
    mass, which = np.unravel_index(chosen[0].argmax(), chosen[0].shape)
    return {"attention_iou": float(held_out[0][mass, which]), "attention_mass": float(MASSES[mass]),
            "attention_head": float(which - 1), "foreground_share": float(held_out[1])}


def _mean_overlap(method: Method, state: TrainState, batches: Iterable[Batch], block: int,
                  query: str) -> tuple[np.ndarray, float] | None:
    parts = [jax.device_get(_overlaps(method, block, query)(state, batch)) for batch in batches]
    overlaps, everything, count = (sum(column) for column in zip(*parts, strict=True)) if parts else (0, 0, 0)
    return (overlaps / count, everything / count) if count else None
