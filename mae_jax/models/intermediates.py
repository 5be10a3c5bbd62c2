"""Intermediate activations of an encoder: block inputs, attention weights, feature maps of several blocks."""

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
    """Yields the tokens [B, 1 + T, D] before each block, then those after the last block, without the final norm.

    Each block runs when the next item is requested. Blocks are unrolled even with `encoder.scan`.

    Args:
      encoder: the module.
      params: its parameters.
      patches: normalized pixels [B, T, P].
      order: int32 [B, T], the raster index of each patch.
      added: further embeddings of the patches, [..., T, D].
    """
    x = encoder.clone(depth=0, kept=(), gating=()).apply({"params": params}, patches, order, block=0, added=added)
    for index in range(encoder.depth):
        yield x
        x = encoder.block(index, parent=None).apply({"params": params[block_name(index)]}, x)
    yield x


def block_name(index: int) -> str:
    """Returns the name of a block's subtree in the encoder's parameters."""
    return f"block_{index:02d}"


def resolve_block(block: int, depth: int) -> int:
    """Returns the index of a block from 0 to depth - 1; -1 stands for the last block.

    Raises:
      UserError: the encoder has no such block.
    """
    if not -1 <= block < depth:
        raise UserError(f"there is no block {block}; expected 0 to {depth - 1}, or -1 for the last")
    return block % depth


def attention_weights(encoder: Encoder, params: Any, tokens: jax.Array) -> jax.Array:
    """Returns softmax(q kᵀ / √d) of one block, float32 [B, H, T, T] (queries, keys); arguments of `attention_scores`.
    """
    return jax.nn.softmax(attention_scores(encoder, params, tokens), -1)


def attention_scores(encoder: Encoder, params: Any, tokens: jax.Array) -> jax.Array:
    """Returns q kᵀ / √d of one block, float32 [B, H, T, T] (queries, keys), plus its relative position bias if any.

    Args:
      encoder: the module.
      params: the block's parameters.
      tokens: the block's input [B, T, D].
    """
    x = layer_norm(encoder.dtype, "norm1").apply({"params": params["norm1"]}, tokens)
    q, k, _ = DenseQKV(encoder.dtype).apply({"params": params["attn"]["qkv"]}, x)
    q, k = (part.reshape(*part.shape[:2], encoder.heads, -1) for part in (q, k))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q * q.shape[-1] ** -0.5, k, preferred_element_type=jnp.float32)
    if encoder.bias_grid:
        scores = scores + relative_bias.biases(params["attn"][BIAS_TABLE], encoder.bias_grid)
    return scores


def unshuffle(x: jax.Array, order: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """Reorders x [B, N, ...] from the patch order int32 [B, N] to raster order, [B, rows, columns, ...].

    The gather is slow on TPUs, so training does not use this function.
    """
    index = jnp.argsort(order, 1).reshape(*order.shape, *(1,) * (x.ndim - 2))
    return jnp.take_along_axis(x, index, 1).reshape(x.shape[0], *grid, *x.shape[2:])


def pyramid(encoder: Encoder, params: Any, batch: dict[str, jax.Array], blocks: Sequence[int]) -> list[jax.Array]:
    """Returns the patch features after chosen blocks as maps, for dense decoders outside this package.

    Every map has one cell per patch. A detector's own, learned layers make strides 4 to 32 of them (ViTDet, arXiv
    2203.16527, section 3).

    Args:
      encoder: the module.
      params: its parameters.
      batch: `patches` uint8 [B, N, P] and `order` int32 [B, N] of whole images, in any order.
      blocks: indices of blocks. -1 is the last block followed by the final norm; other entries have no norm.

    Returns:
      One map [B, rows, columns, D] in raster order per entry of `blocks`.

    Raises:
      UserError: the encoder has no such block.
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
