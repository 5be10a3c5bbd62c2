"""What goes on inside an encoder: the tokens between its blocks, its attention weights, maps of patch features."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mae_jax.errors import UserError
from mae_jax.models.blocks import BIAS_TABLE
from mae_jax.models.layers import DenseQKV, layer_norm
from mae_jax.models.vit import Encoder
from mae_jax.ops import relative_bias
from mae_jax.ops.patches import normalize


def block_inputs(encoder: Encoder, params: Any, patches: jax.Array, order: jax.Array,
                 added: jax.Array | None = None) -> Iterator[jax.Array]:
    """Yields the tokens [B, 1 + T, D] before each block, and those after the last one, without the final norm.

    One forward pass, which goes as far as it is asked to. Blocks are unrolled whatever `scan` says.

    Args:
      encoder: the module.
      params: its parameters.
      patches: [B, T, P] normalised pixels.
      order: int32 [B, T], the raster index of each token.
      added: further embeddings of the patches, [..., T, D].
    """
    x = encoder.clone(depth=0, kept=(), gating=()).apply({"params": params}, patches, order, block=0, added=added)
    for index in range(encoder.depth):
        yield x
        x = encoder.block(index, parent=None).apply({"params": params[block_name(index)]}, x)
    yield x


def block_name(index: int) -> str:
    """Returns the name of a block in the encoder's parameters."""
    return f"block_{index:02d}"


def resolve_block(block: int, depth: int) -> int:
    """Returns the index of a block, -1 for the last one; raises UserError when there is none."""
    if not -1 <= block < depth:
        raise UserError(f"there is no block {block}; expected 0 to {depth - 1}, or -1 for the last")
    return block % depth


def attention_weights(encoder: Encoder, params: Any, tokens: jax.Array) -> jax.Array:
    """Returns softmax(q kᵀ / √d) of one block, float32 [B, H, T, T]: queries, then keys; rows sum to 1."""
    return jax.nn.softmax(attention_scores(encoder, params, tokens), -1)


def attention_scores(encoder: Encoder, params: Any, tokens: jax.Array) -> jax.Array:
    """Returns q kᵀ / √d of one block, float32 [B, H, T, T], with its relative position bias where it has one.

    Args:
      encoder: the module.
      params: the block's parameters.
      tokens: [B, T, D], what enters the block.
    """
    x = layer_norm(encoder.dtype, "norm1").apply({"params": params["norm1"]}, tokens)
    q, k, _ = DenseQKV(encoder.dtype).apply({"params": params["attn"]["qkv"]}, x)
    q, k = (part.reshape(*part.shape[:2], encoder.heads, -1) for part in (q, k))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q * q.shape[-1] ** -0.5, k, preferred_element_type=jnp.float32)
    if encoder.bias_grid:
        scores = scores + relative_bias.biases(params["attn"][BIAS_TABLE], encoder.bias_grid)
    return scores


def unshuffle(x: jax.Array, order: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """Puts [B, N, ...] of a batch into raster order: [B, rows, columns, ...]. It gathers, so it is not for training."""
    index = jnp.argsort(order, 1).reshape(*order.shape, *(1,) * (x.ndim - 2))
    return jnp.take_along_axis(x, index, 1).reshape(x.shape[0], *grid, *x.shape[2:])


def pyramid(encoder: Encoder, params: Any, batch: dict[str, jax.Array], blocks: Sequence[int]) -> list[jax.Array]:
    """Returns the patch features of chosen blocks of whole images, for detectors and decoders outside.

    All of them have the stride of a patch. The strides 4, 8, 16 and 32 that a detector makes of them (ViTDet, arXiv
    2203.16527, section 3) are learned, and so the detector's own.

    Args:
      encoder: the module.
      params: its parameters.
      batch: `patches` uint8 [B, N, P] and `order` int32 [B, N].
      blocks: which blocks, in this order; -1 is the last one with the final norm, all others come without it.

    Returns:
      One [B, rows, columns, D] per entry of `blocks`, in raster order whatever the batch's order is.

    Raises:
      UserError: there is no such block.
    """
    numbers = [resolve_block(block, encoder.depth) for block in blocks]
    kept = {}
    for done, x in enumerate(block_inputs(encoder, params, normalize(batch["patches"]), batch["order"])):
        kept[done - 1] = x
        if done > max(numbers):
            break
    norm = layer_norm(encoder.dtype, "norm")
    tokens = [norm.apply({"params": params["norm"]}, kept[number]) if block == -1 else kept[number]
              for block, number in zip(blocks, numbers, strict=True)]
    return [unshuffle(x[:, 1:], batch["order"], encoder.grid) for x in tokens]
