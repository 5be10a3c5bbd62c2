"""Attention maps of one encoder block, as images."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather

from mae_jax.config.field_values import CHOICES
from mae_jax.errors import UserError, did_you_mean
from mae_jax.evals.base import Evaluation
from mae_jax.evals.context import Context
from mae_jax.evals.image_grid import tile
from mae_jax.methods.base import Batch, Method
from mae_jax.models import intermediates
from mae_jax.ops.patches import normalize
from mae_jax.ops.resampling import upsample

# Colors from dark to bright with increasing lightness, so that the order of weights is also visible in grayscale.
RAMP = np.array([(0, 0, 30), (70, 10, 110), (190, 50, 90), (250, 150, 30), (255, 255, 180)])
BLEND = 0.6  # opacity of the map in an overlay


class AttentionMaps(Evaluation):
    """Draws the attention maps of block eval.attention_block and query eval.attention_query; no metrics."""

    name = "attention_maps"

    def applies(self, method: Method, data: Any) -> bool:
        return method.task != "detection"  # its blocks use windowed attention and have no class token

    def images(self, ctx: Context) -> Iterator[tuple[str, np.ndarray]]:
        c = ctx.method.config.eval
        yield "attention", picture(ctx.method, ctx.params, ctx.extras, ctx.shown, c.attention_block, c.attention_query,
                                   names=ctx.shown_names)


def maps(method: Method, params: Any, extras: Any, batch: Batch, block: int = -1, query: str = "cls") -> jax.Array:
    """Returns the attention weight of each patch of unmasked images, per head, in raster order.

    Args:
      method: a method whose encoder has a class token.
      params, extras: the state of the method.
      batch: `patches` uint8 [B, N, P], `order` int32 [B, N], and all other fields that `encode` reads.
      block: index of the block; -1 is the last.
      query: 'cls', the class token; or 'mean', the mean over all patches, for encoders with an untrained class token.

    Returns:
      float32 [B, H, rows, columns]. A map sums to 1 minus the weight of the class token.

    Raises:
      UserError: the block or the query does not exist.
    """
    queries = CHOICES["eval.attention_query"]
    if query not in queries:
        raise UserError(f"unknown query {query!r} of an attention map; {did_you_mean(query, queries)}")
    block = intermediates.resolve_block(block, method.config.model.depth)
    tokens = _entering(method, params, extras, batch, block)
    encoder = method.eval_params(params, extras)["encoder"]
    weights = intermediates.attention_weights(method.encoder, encoder[intermediates.block_name(block)], tokens)
    row = weights[:, :, 0] if query == "cls" else weights[:, :, 1:].mean(2)
    patches = intermediates.unshuffle(row[:, :, 1:].swapaxes(1, 2), batch["order"], method.grid.shape)
    return patches.transpose(0, 3, 1, 2)


def _entering(method: Method, params: Any, extras: Any, batch: Batch, block: int) -> jax.Array:
    """Returns the inputs of a block, tokens [B, 1 + N, D]."""
    if block:
        return method.encode(params, extras, batch, block - 1)
    encoder = method.eval_params(params, extras)["encoder"]
    return next(intermediates.block_inputs(method.encoder, encoder, normalize(batch["patches"]), batch["order"]))


@functools.lru_cache(maxsize=8)
def _mapper(method: Method, block: int, query: str) -> Callable[..., jax.Array]:
    """Returns the compiled `maps`, cached across evaluations."""
    return jax.jit(functools.partial(maps, method, block=block, query=query))


def picture(method: Method, params: Any, extras: Any, batch: Batch, block: int = -1, query: str = "cls",
            name: str = "", names: Sequence[str] = ()) -> np.ndarray:
    """Draws the attention maps of a batch: the input, an overlay of the mean over heads, and each head.

    Args:
      method, params, extras, batch, block, query: as for `maps`.
      name: prefix of the title.
      names: captions of the images.

    Returns:
      uint8 [height, width, 3].
    """
    weights = np.asarray(process_allgather(_mapper(method, block, query)(params, extras, batch), tiled=True))
    patch, heads = method.grid.patch, weights.shape[1]
    inputs = method.grid.unpatchify(np.asarray(batch["patches"]), np.asarray(batch["order"]))
    every = np.concatenate([weights.mean(1, keepdims=True), weights], 1)
    heat = colors(np.asarray(upsample(every.transpose(0, 2, 3, 1), patch)).transpose(0, 3, 1, 2))
    overlays = (BLEND * heat[:, 0] + (1 - BLEND) * inputs.mean(-1, keepdims=True)).astype(np.uint8)
    rows = [(inputs[i], overlays[i], *heat[i, 1:]) for i in range(len(inputs))]
    captions = ("input", "mean of heads", *(f"head {head}" for head in range(heads)))
    number = intermediates.resolve_block(block, method.config.model.depth)
    who = "class token" if query == "cls" else "mean patch"
    title = f"{name}Attention of the {who} in block {number}; each map from its lowest, dark, to its highest"
    return tile(rows, captions, title, below=names)


def colors(heat: np.ndarray) -> np.ndarray:
    """Returns uint8 [..., height, width, 3] for maps [..., height, width], each scaled to the full color range."""
    low, high = heat.min((-2, -1), keepdims=True), heat.max((-2, -1), keepdims=True)
    place = np.nan_to_num((heat - low) / np.maximum(high - low, 1e-12)) * (len(RAMP) - 1)
    return np.stack([np.interp(place, np.arange(len(RAMP)), RAMP[:, channel]) for channel in range(3)],
                    -1).astype(np.uint8)
