"""The Vision Transformer encoder and MAE's decoder. Both take tokens in any order."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from mae_jax.models.blocks import Blocks
from mae_jax.models.layers import TOKEN_STD, Dense, embed_positions, layer_norm, sincos_positions
from mae_jax.ops import pos_embed
from mae_jax.ops.linear import linear
from mae_jax.ops.patches import PatchGrid
from mae_jax.ops.routing import Choice


class Encoder(Blocks):
    """A ViT over any subset of an image's patches; a class token without position embedding comes first.

    Attributes:
      grid: patches along (height, width).
      positions: 'fixed': sine-cosine; 'learned': learned from the sine-cosine table (MAE's fine-tuning); 'random':
        learned from noise (DeiT III).
      class_token: whether there is a class token.
    """

    grid: tuple[int, int] = (0, 0)
    positions: str = "fixed"
    class_token: bool = True

    def embed_positions(self, order: jax.Array, grid: tuple[int, int]) -> jax.Array:
        """Returns the position embeddings [B, T, D] of patches with raster indices `order`, int32 [B, T], in `grid`."""
        if self.positions == "fixed":
            return embed_positions(grid, self.width, order, self.dtype)

        def start(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
            noise = nn.initializers.normal(TOKEN_STD)(key, shape)
            return noise if self.positions == "random" else jnp.asarray(sincos_positions(self.grid, self.width))

        table = self.param("pos_embed", start, (self.grid[0] * self.grid[1], self.width))
        # A product with one-hot rows: the gradient of a look-up would be a scatter.
        return linear(jax.nn.one_hot(order, len(table), dtype=self.dtype), table, jnp.zeros(self.width, table.dtype))

    @nn.compact
    def __call__(self, patches: jax.Array, order: jax.Array, mask_tokens: int = 0, block: int = -1,
                 drop_path_mask: jax.Array | None = None, grid: tuple[int, int] | None = None,
                 added: jax.Array | None = None, choices: Mapping[int, Choice | jax.Array] | None = None,
                 maps: tuple[int, ...] = ()) -> jax.Array | list[jax.Array]:
        """Encodes patches.

        Args:
          patches: normalized pixels [B, T, P].
          order: int32 [B, T + mask_tokens], the raster index of each token.
          mask_tokens: number of mask tokens that are appended to the patches, for the rest of `order` (MAE Table 1c).
          block: index of the last block to run, without the final norm; -1 runs all blocks and the norm.
          drop_path_mask: float32 [depth, 2, B] from `layers.drop_path`, for stochastic depth.
          grid: patches along (height, width) of images with another size; only for fixed position embeddings.
          added: further embeddings of the patches, [..., T, D].
          choices: block → `choice` of `blocks.Block`, for the blocks with experts (MoCE).
          maps: ascending indices of blocks; if given, the result is the list of their outputs without the final norm.

        Returns:
          Tokens [B, 1 + T + mask_tokens, D] of dtype `self.dtype`, or with `maps` a list of such arrays. Without
          `class_token`, the first token is missing.
        """
        images = patches.shape[0]
        token_init = nn.initializers.normal(TOKEN_STD)
        x = Dense(self.width, self.dtype, init=self.init_kind, name="patch_embed")(patches)
        if mask_tokens:
            mask_token = self.param("mask_token", token_init, (1, 1, self.width))
            x = jnp.concatenate([x, jnp.broadcast_to(mask_token, (images, mask_tokens, self.width)).astype(x.dtype)], 1)
        x = x + self.embed_positions(order, grid or self.grid)
        if added is not None:
            x = x + added.astype(x.dtype)
        if self.class_token:
            cls_token = self.param("cls_token", token_init, (1, 1, self.width))
            x = jnp.concatenate([jnp.broadcast_to(cls_token, (images, 1, self.width)).astype(x.dtype), x], 1)
        if maps:
            found: list[jax.Array] = []
            self.run_blocks(x, max(maps) + 1, drop_path_mask, choices, found, maps)
            return found
        if block >= 0:
            return self.run_blocks(x, block + 1, drop_path_mask, choices)
        return layer_norm(self.dtype, "norm")(self.run_blocks(x, drop_path_mask=drop_path_mask, choices=choices))


class Decoder(Blocks):
    """MAE's decoder (MAE section 3): predicts masked patches from encoded tokens and mask tokens.

    Attributes:
      grid: patches along (height, width).
      outputs: values per predicted patch.
      describes: whether to return also the mean of all tokens after the norm, a descriptor of the image (SplitMask).
      head_init: initializer of the head, a key of `layers.INITS`.
      class_token: whether the encoded tokens begin with a class token; MixedAE's do not.
    """

    grid: tuple[int, int] = (0, 0)
    outputs: int = 0
    describes: bool = False
    head_init: str = "xavier"
    class_token: bool = True

    @nn.compact
    def __call__(self, tokens: jax.Array, order: jax.Array, num_masked: int) -> jax.Array | tuple[jax.Array, jax.Array]:
        """Predicts the last `num_masked` patches of `order`.

        Args:
          tokens: encoder outputs [B, 1 + T, D]: the class token, if any, and the first T patches of `order`.
          order: int32 [B, N], the raster index of each token; N - T mask tokens are appended.
          num_masked: number of patches to predict. The head runs on these tokens only; so does the norm without
            `describes`.

        Returns:
          Predictions float32 [B, num_masked, outputs]; with `describes`, also descriptors float32 [B, width].
        """
        x = Dense(self.width, self.dtype, name="embed")(tokens)
        mask_token = self.param("mask_token", nn.initializers.normal(TOKEN_STD), (1, 1, self.width))
        first = int(self.class_token)
        missing = first + order.shape[1] - tokens.shape[1]
        masks = jnp.broadcast_to(mask_token, (x.shape[0], missing, self.width)).astype(x.dtype)
        positions = embed_positions(self.grid, self.width, order, self.dtype)
        x = jnp.concatenate([x, masks], 1) + jnp.pad(positions, ((0, 0), (first, 0), (0, 0)))
        shown = order.shape[1] if self.describes else num_masked
        x = layer_norm(self.dtype, "norm")(self.run_blocks(x)[:, -shown:])
        head = Dense(self.outputs, self.dtype, init=self.head_init, name="head")
        predicted = head(x[:, -num_masked:]).astype(jnp.float32)
        return (predicted, x.mean(1, dtype=jnp.float32)) if self.describes else predicted


def make_encoder(config: ConfigDict) -> Encoder:
    """Builds the encoder of `config.model`."""
    m, grid = config.model, PatchGrid.of(config).shape
    biased = config.method.get("relative_position_bias", False)
    return Encoder(m.width, m.depth, m.heads, m.mlp_ratio, m.gelu, jnp.dtype(m.dtype), m.scan, m.remat,
                   m.layer_scale, m.init, bias_grid=grid if biased else None, grid=grid, positions=m.positions)


def with_grid(encoder: Encoder, params: Any, grid: tuple[int, int]) -> tuple[Encoder, Any]:
    """Returns the encoder and its parameters for images with another grid of patches.

    Position embeddings are resized as by `pos_embed.resize`. Fixed ones are resized too, since the encoder was trained
    with the values of its own grid.
    """
    table = params["pos_embed"] if "pos_embed" in params else sincos_positions(encoder.grid, encoder.width)
    rows, columns = (pos_embed.cubic(size, to).astype(np.float32) for size, to in zip(encoder.grid, grid, strict=True))
    table = jnp.einsum("yr,xc,rcd->yxd", rows, columns, table.reshape(*encoder.grid, -1), precision="highest")
    params = {**params, "pos_embed": table.reshape(grid[0] * grid[1], -1)}
    positions = "learned" if encoder.positions == "fixed" else encoder.positions
    return encoder.clone(grid=grid, positions=positions), params


def drop_path_rates(config: ConfigDict) -> np.ndarray:
    """Returns the rate of stochastic depth of each block, float64 [depth]."""
    m = config.model
    return np.linspace(0 if m.drop_path_rates == "linear" else m.drop_path, m.drop_path, m.depth)


def make_decoder(config: ConfigDict, outputs: int, describes: bool = False, head_init: str = "xavier",
                 class_token: bool = True) -> Decoder:
    """Builds the decoder of `config.method`, with `outputs` values per patch; see `Decoder` for the other arguments."""
    m, d = config.model, config.method
    return Decoder(d.decoder_width, d.decoder_depth, d.decoder_heads, m.mlp_ratio, m.gelu, jnp.dtype(m.dtype),
                   m.scan, m.remat, grid=PatchGrid.of(config).shape, outputs=outputs, describes=describes,
                   head_init=head_init, class_token=class_token)
