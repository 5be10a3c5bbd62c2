"""Transformer blocks (attention, then an MLP or experts), and the stack of them that encoder and decoder share."""

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mae_jax.models.layers import GELUS, Dense, DenseQKV, LayerScale, ResidualNorm
from mae_jax.models.moe import GATES, Experts, Gating
from mae_jax.ops import relative_bias
from mae_jax.ops.attention import AttentionMask, attention
from mae_jax.ops.normalization import has_kernel
from mae_jax.ops.partitioning import ROWS, constrain, platform
from mae_jax.ops.routing import Choice
from mae_jax.ops.windows import Spatial, join, part, relative_attention

REMATS: dict[str, Callable[..., Any] | None] = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}

RELATIVE = ("rel_pos_h", "rel_pos_w")  # parameters of the decomposed relative positions, named as in Detectron2
BIAS_TABLE = "relative_position_bias"  # parameter of BEiT's relative position bias


class Attention(nn.Module):
    """Multi-head self-attention over tokens [B, T, D]; the softmax is float32.

    Attributes:
      heads: number of heads H, which divides D.
      dtype: of the activations.
      init: a key of `layers.INITS`.
      kept: which keys each query attends to; None: all.
      spatial: windows and decomposed relative positions. With either, the tokens are patches in raster order and
        nothing else; with neither, other tokens may precede the patches.
      bias_grid: rows and columns of patches, for BEiT's relative position bias; the tokens are then a class token and
        these patches in raster order.
    """

    heads: int
    dtype: Any
    init: str = "xavier"
    kept: AttentionMask | None = None
    spatial: Spatial | None = None
    bias_grid: tuple[int, int] | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        given, spatial = x, self.spatial
        if spatial and spatial.window:
            x = part(x, spatial.grid, spatial.window)
        parts = DenseQKV(self.dtype, self.init, name="qkv")(x)
        if spatial:
            tables = self._tables(spatial.sides, x.shape[-1] // self.heads) if spatial.relative else None
            out = relative_attention(*parts, self.heads, tables, spatial.sides)
        elif self.bias_grid:
            shape = (relative_bias.entries(self.bias_grid), self.heads)
            table = self.param(BIAS_TABLE, nn.initializers.zeros, shape)
            out = relative_bias.attention(*parts, relative_bias.biases(table, self.bias_grid), self.heads)
        else:
            out = attention(*parts, self.heads, self.kept)
        out = Dense(given.shape[-1], self.dtype, "in", self.init, name="proj")(out)
        return join(out, spatial.grid, spatial.window) if spatial and spatial.window else out

    def _tables(self, sides: tuple[int, int], depth: int) -> tuple[jax.Array, jax.Array]:
        """Returns the embeddings of relative rows and columns, float32 [2 · side - 1, depth]; zero at first, as ViTDet.
        """
        rows, columns = (self.param(name, nn.initializers.zeros, (2 * side - 1, depth))
                         for name, side in zip(RELATIVE, sides, strict=True))
        return rows, columns


class Mlp(nn.Module):
    """Two linear layers with a GELU between them, over tokens [B, T, D]."""

    ratio: int  # hidden width / D
    gelu: str
    dtype: Any
    init: str = "xavier"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = GELUS[self.gelu](Dense(self.ratio * x.shape[-1], self.dtype, "out", self.init, name="fc1")(x))
        return Dense(x.shape[-1], self.dtype, "in", self.init, name="fc2")(hidden)


class Block(nn.Module):
    """One pre-norm Transformer block over tokens [B, T, D], with optional LayerScale, stochastic depth and experts.

    Its call takes, besides the tokens:
      drop_path_mask: float32 [2, B], the row of `layers.drop_path` for this block; None: no branch is dropped.
      choice: the expert of each image; with a token gate, noise [B, T, E] for the gate's logits, or None.
      last_biases: the biases [D] that `_without_last_biases` sets apart, one per branch.
    """

    heads: int
    mlp_ratio: int
    gelu: str
    dtype: Any
    layer_scale: float = 0.0  # initial factor of LayerScale; 0: no LayerScale
    init: str = "xavier"
    kept: AttentionMask | None = None  # see `Attention`
    gating: Gating | None = None  # experts in place of the MLP
    spatial: Spatial | None = None  # see `Attention`
    bias_grid: tuple[int, int] | None = None  # see `Attention`

    @nn.compact
    def __call__(self, x: jax.Array, drop_path_mask: jax.Array | None = None,
                 choice: Choice | jax.Array | None = None,
                 last_biases: tuple[jax.Array | None, ...] = (None, None)) -> jax.Array:
        def branch(out: jax.Array, number: int) -> jax.Array:
            if self.layer_scale:
                out = LayerScale(self.layer_scale, name=f"ls{number + 1}")(out)
            return out if drop_path_mask is None else out * drop_path_mask[number, :, None, None].astype(out.dtype)

        x = constrain(x, ROWS)
        x, y = ResidualNorm(self.dtype, name="norm1")(x, last_biases[0])
        attended = Attention(self.heads, self.dtype, self.init, self.kept, self.spatial, self.bias_grid, name="attn")(y)
        x = _plus(x, branch(attended, 0))
        x, y = ResidualNorm(self.dtype, name="norm2")(x, last_biases[1])
        shape = (self.mlp_ratio, self.gelu, self.dtype, self.init)
        if self.gating:
            return _plus(x, branch(Experts(self.gating, *shape, name="experts")(y, choice), 1))
        return _plus(x, branch(Mlp(*shape, name="mlp")(y), 1))


def _plus(x: jax.Array, out: jax.Array) -> jax.Array:
    """Returns x + out, [B, T, D].

    On GPUs the sum is of matrices [B · T, D], the shape of the product that `out` comes from: XLA then fuses the sum
    into the product. With any other shape, XLA first copies x.
    """
    if platform() != "gpu":
        return x + out
    width = x.shape[-1]
    return (x.reshape(-1, width) + out.reshape(-1, width)).reshape(x.shape)


def _without_last_biases(params: Any) -> tuple[Any, tuple[jax.Array | None, ...]]:
    """Stops the gradients of the last bias of each branch, and returns these biases separately, with gradients.

    The gradient of a bias that is added to all tokens is the sum of the tokens' gradients. The backward pass of
    `residual_norm` reads these anyway, so it computes the sum too.

    Returns:
      The block's parameters, and the biases [D] of the attention and of the MLP; None for experts.
    """
    def stop(layer: Any) -> Any:
        return layer | {"bias": jax.lax.stop_gradient(layer["bias"])}

    attn = params["attn"] | {"proj": stop(params["attn"]["proj"])}
    if "mlp" not in params:  # experts: each bias is added to the tokens of one expert only
        return params | {"attn": attn}, (params["attn"]["proj"]["bias"], None)
    mlp = params["mlp"] | {"fc2": stop(params["mlp"]["fc2"])}
    return params | {"attn": attn, "mlp": mlp}, (params["attn"]["proj"]["bias"], params["mlp"]["fc2"]["bias"])


class Blocks(nn.Module):
    """Base of encoder and decoder: a stack of blocks with one parameter subtree each, `block_00`, `block_01`, ...

    With `scan`, one block is compiled and the parameters are stacked inside the forward pass, so that checkpoints,
    sharding rules and the optimizer never see a stack. `remat` names a policy of REMATS for recomputing activations in
    the backward pass, or is 'none'.

    `kept`, `gating` and `spatial` hold one entry per block; () stands for None in every block.
    """

    width: int
    depth: int
    heads: int
    mlp_ratio: int
    gelu: str
    dtype: Any
    scan: bool
    remat: str
    layer_scale: float = 0.0
    init_kind: str = "xavier"
    kept: tuple[AttentionMask | None, ...] = ()
    gating: tuple[Gating | None, ...] = ()
    spatial: tuple[Spatial | None, ...] = ()
    bias_grid: tuple[int, int] | None = None  # of every block; see `Attention`

    def block(self, index: int, **options: Any) -> Block:
        """Returns the module of block `index`; `options` go to its constructor."""
        own = (parts[index] if parts else None for parts in (self.kept, self.gating, self.spatial))
        return Block(self.heads, self.mlp_ratio, self.gelu, self.dtype, self.layer_scale, self.init_kind, *own,
                     self.bias_grid, **options)

    def run_blocks(self, x: jax.Array, depth: int | None = None, drop_path_mask: jax.Array | None = None,
                   choices: Mapping[int, Choice | jax.Array] | None = None,
                   after: list[jax.Array] | None = None, wanted: tuple[int, ...] = ()) -> jax.Array:
        """Applies the first `depth` blocks (None: all) to tokens [B, T, D].

        Args:
          x: tokens [B, T, D].
          depth: number of blocks to apply.
          drop_path_mask: float32 [depth, 2, B] from `layers.drop_path`; None: no branch is dropped.
          choices: block → `choice` of `Block`, for the blocks with experts.
          after: list to which the tokens [B, T, D] after each block in `wanted` are appended, in ascending order.
          wanted: indices of blocks.

        Returns:
          Tokens [B, T, D].
        """
        blocks = [self.block(index, name=f"block_{index:02d}") for index in range(self.depth)]
        if self.is_initializing():
            for index, module in enumerate(blocks):
                x = module(x, None, (choices or {}).get(index))
                if after is not None and index in wanted:
                    after.append(x)
            return x
        params = [self.variables["params"][module.name] for module in blocks][:depth]

        def kind(index: int) -> tuple[Any, ...]:
            stage = sum(number < index for number in wanted)
            return blocks[index].kept, blocks[index].gating, blocks[index].spatial, stage

        for _, alike in itertools.groupby(range(len(params)), kind):
            numbers = list(alike)
            inputs = [(params[index], None if drop_path_mask is None else drop_path_mask[index],
                       (choices or {}).get(index)) for index in numbers]
            x, gates = self._alike(x, self.block(numbers[0], parent=None), inputs)
            for number, gate in zip(numbers, gates, strict=True):
                if gate:
                    self.sow(GATES, f"of_block_{number:02d}", gate[GATES]["experts"]["gate"]["probabilities"][0])
            if after is not None and numbers[-1] in wanted:
                after.append(x)
        return x

    def _alike(self, x: jax.Array, block: Block, inputs: list[tuple[Any, ...]]) -> tuple[jax.Array, list[Any]]:
        """Applies consecutive blocks with the same module and different inputs (parameters, drop_path_mask, choice).

        Returns:
          The tokens [B, T, D], and for each block the GATES collection that its gate sowed.
        """
        def apply(x: jax.Array, item: tuple[Any, ...]) -> tuple[jax.Array, Any]:
            p, drop_path_mask, choice = item
            last_biases = (None, None)
            if has_kernel(self.width) and drop_path_mask is None and not self.layer_scale:
                p, last_biases = _without_last_biases(p)
            return block.apply({"params": p}, x, drop_path_mask, choice, last_biases, mutable=[GATES])

        if self.remat != "none":
            apply = jax.checkpoint(apply, policy=REMATS[self.remat], prevent_cse=not self.scan)
        if self.scan:
            x, gates = jax.lax.scan(apply, x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *inputs))
            return x, [jax.tree.map(lambda leaf, i=i: leaf[i], gates) for i in range(len(inputs))]
        mesh = jax.sharding.get_abstract_mesh()
        if platform() == "cpu" and (mesh.empty or mesh.size == 1):  # traced and lowered once; elsewhere not measured
            apply = jax.jit(apply)
        gates = []
        for item in inputs:
            x, gate = apply(x, item)
            gates.append(gate)
        return x, gates
