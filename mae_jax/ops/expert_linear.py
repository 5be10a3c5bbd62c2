"""Linear layers with one of E kernels per image, in static shapes and without dropped images."""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from mae_jax.ops import partitioning

# Sums x ⊗ dy over the rows of each group: the rows of both operands are grouped, and the result has an entry per group.
OUTER = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[])
ROWS_OF_A_TILE = 1024  # longer tiles have more padding, shorter ones copy more kernels (benchmarks/experts.py)


@jax.custom_vjp
def expert_linear(x: jax.Array, kernel: jax.Array, bias: jax.Array, expert: jax.Array) -> jax.Array:
    """Returns x · kernel[e] + bias[e], [B, T, F] in the dtype of x, where e is the expert of each image.

    Each device multiplies its own images. TPUs sort the images by expert and use `jax.lax.ragged_dot` (its speed was
    not measured). Elsewhere XLA expands `ragged_dot` to products with all experts, so GPUs put the images into tiles of
    one expert each, and CPUs loop over images, or use tiles if T = 1. benchmarks/experts.py compares these.

    The gradient of the kernel is summed and returned in the kernel's dtype, and reduce-scattered to its shards.

    Args:
      x: [B, T, K], T tokens of each image.
      kernel: [E, K, F].
      bias: [E, F].
      expert: int32 [B], 0 to E - 1.
    """
    return _forward(x, kernel, bias, expert)[0]


def _forward(x: jax.Array, kernel: jax.Array, bias: jax.Array,
             expert: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    whole = partitioning.gather(kernel.astype(x.dtype), "")
    y = _on_each_device(_times, x, whole, expert) + bias.astype(x.dtype)[expert][:, None]
    return y, (x, whole, kernel, bias, expert)


def _backward(saved: tuple[jax.Array, ...], dy: jax.Array) -> tuple[jax.Array | None, ...]:
    x, whole, kernel, bias, expert = saved
    dx = _on_each_device(partial(_times, transposed=True), dy, whole, expert)
    outer = partial(_outer, len(kernel), kernel.dtype)
    if _whole(x):
        dkernel = outer(x, dy, expert)
    else:
        spec = partitioning.kernel_spec(kernel.shape, "", partitioning.sizes())
        dkernel = jax.shard_map(lambda *parts: partitioning.sum_to(outer(*parts), spec),
                                in_specs=(P(partitioning.ROWS),) * 3, out_specs=spec, check_vma=False)(x, dy, expert)
    shares = jax.nn.one_hot(expert, len(bias), dtype=bias.dtype)
    dbias = jnp.einsum("be,bf->ef", shares, dy.sum(1, dtype=bias.dtype), precision="highest")
    return dx, dkernel, dbias, None


expert_linear.defvjp(_forward, _backward)


def _on_each_device(function: Callable[..., jax.Array], x: jax.Array, kernel: jax.Array,
                    expert: jax.Array) -> jax.Array:
    if _whole(x):
        return function(x, kernel, expert)
    rows = P(partitioning.ROWS)
    return jax.shard_map(function, in_specs=(rows, P(), rows), out_specs=rows, check_vma=False)(x, kernel, expert)


def _whole(x: jax.Array) -> bool:
    """Returns whether the images are not sharded: on a single device, or for the single image of shape inference."""
    mesh = partitioning.sizes()
    return not mesh or max(mesh.values()) == 1 or len(x) % math.prod(mesh[axis] for axis in partitioning.ROWS) > 0


def _times(x: jax.Array, kernel: jax.Array, expert: jax.Array, transposed: bool = False) -> jax.Array:
    """Returns x [B, T, K] times each image's kernel, [B, T, F]; `transposed`: x [B, T, F] times its transpose."""
    alone = x.shape[1] == 1  # tokens are routed one by one: a loop over them would be long
    tiled, grouped, one_by_one = (partial(way, transposed=transposed)
                                  for way in (_tiled, _grouped, _one_by_one))
    return jax.lax.platform_dependent(x, kernel, expert, cpu=tiled if alone else one_by_one, tpu=grouped,
                                      default=tiled)


def _turned(kernel: jax.Array, transposed: bool) -> jax.Array:
    return kernel.swapaxes(-1, -2) if transposed else kernel


def _grouped(x: jax.Array, kernel: jax.Array, expert: jax.Array, transposed: bool = False) -> jax.Array:
    order, sizes = _groups(expert, len(kernel), x.shape[1])
    rows = x[order].reshape(-1, x.shape[-1])
    y = jax.lax.ragged_dot(rows, _turned(kernel, transposed), sizes)
    return y.reshape(*x.shape[:2], -1)[jnp.argsort(order)]


def _tiled(x: jax.Array, kernel: jax.Array, expert: jax.Array, transposed: bool = False) -> jax.Array:
    """Puts the images into tiles of one expert each, and multiplies all tiles in one batched product."""
    slot, image, owner = _tiles(expert, len(kernel), x.shape[1])
    tiles = _filled(x, image).reshape(len(owner), -1, x.shape[-1])
    out = tiles @ _turned(kernel[owner], transposed)
    return out.reshape(-1, x.shape[1], out.shape[-1])[slot]


def _one_by_one(x: jax.Array, kernel: jax.Array, expert: jax.Array, transposed: bool = False) -> jax.Array:
    def one(item: tuple[jax.Array, jax.Array]) -> jax.Array:  # transposes one kernel instead of all
        return item[0] @ _turned(jax.lax.dynamic_index_in_dim(kernel, item[1], keepdims=False), transposed)

    return jax.lax.map(one, (x, expert))


def _outer(experts: int, dtype: jnp.dtype, x: jax.Array, dy: jax.Array, expert: jax.Array) -> jax.Array:
    """Returns Σ x ⊗ dy over each expert's tokens, [E, K, F], for x [B, T, K] and dy [B, T, F]."""
    tiled, grouped, one_by_one = (partial(way, experts, dtype)
                                  for way in (_outer_tiled, _outer_grouped, _outer_one_by_one))
    return jax.lax.platform_dependent(x, dy, expert, cpu=tiled if x.shape[1] == 1 else one_by_one, tpu=grouped,
                                      default=tiled)


def _outer_grouped(experts: int, dtype: jnp.dtype, x: jax.Array, dy: jax.Array, expert: jax.Array) -> jax.Array:
    order, sizes = _groups(expert, experts, x.shape[1])
    rows, drows = (part[order].reshape(-1, part.shape[-1]) for part in (x, dy))
    return jax.lax.ragged_dot_general(rows, drows, sizes, OUTER, preferred_element_type=dtype)


def _outer_tiled(experts: int, dtype: jnp.dtype, x: jax.Array, dy: jax.Array, expert: jax.Array) -> jax.Array:
    _, image, owner = _tiles(expert, experts, x.shape[1])
    tiles, dtiles = (_filled(part, image).reshape(len(owner), -1, part.shape[-1]) for part in (x, dy))
    each = jnp.einsum("nrk,nrf->nkf", tiles, dtiles, preferred_element_type=dtype)
    return jax.ops.segment_sum(each, owner, experts, indices_are_sorted=True)


def _outer_one_by_one(experts: int, dtype: jnp.dtype, x: jax.Array, dy: jax.Array, expert: jax.Array) -> jax.Array:
    def add(total: jax.Array, item: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        x, dy, expert = item
        return total.at[expert].add(jnp.matmul(x.T, dy, preferred_element_type=dtype)), None

    # Zeros that XLA cannot fold: a constant would be shared by all layers and copied for each.
    zeros = jnp.broadcast_to((expert[0] < -experts).astype(dtype), (experts, x.shape[-1], dy.shape[-1]))
    return jax.lax.scan(add, zeros, (x, dy, expert))[0]


def _tiles(expert: jax.Array, experts: int, tokens: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Assigns the images to tiles of one expert each.

    An expert has as many tiles as its images need; the last one may be partly empty. The number of tiles suffices for
    any routing, so tiles at the end may be empty.

    Returns:
      The slot of each image, int32 [B]; the image in each slot, int32 [tiles · size], B for an empty slot; the expert
      of each tile, int32 [tiles].
    """
    size = min(max(1, ROWS_OF_A_TILE // tokens), len(expert))  # images
    count = min((len(expert) + experts * (size - 1)) // size, len(expert))
    images = (expert[:, None] == jnp.arange(experts)).sum(0, dtype=jnp.int32)
    used = -(-images // size)
    ends = jnp.cumsum(used)
    order = jnp.argsort(expert, stable=True)
    rank = jnp.arange(len(expert)) - (jnp.cumsum(images) - images)[expert[order]]  # within an expert's images
    place = (ends - used)[expert[order]] * size + rank
    slot = jnp.zeros_like(order).at[order].set(place)
    image = jnp.full(count * size, len(expert)).at[place].set(order)
    owner = jnp.minimum(jnp.searchsorted(ends, jnp.arange(count), side="right"), experts - 1)
    return slot, image, owner


def _filled(x: jax.Array, image: jax.Array) -> jax.Array:
    """Returns the rows of x with the indices `image`; zeros where an index is out of range."""
    return x.at[image].get(mode="fill", fill_value=0)


def _groups(expert: jax.Array, experts: int, tokens: int) -> tuple[jax.Array, jax.Array]:
    """Returns the order of images by expert, int32 [B], and the number of tokens of each expert, int32 [E]."""
    sizes = (expert[:, None] == jnp.arange(experts)).sum(0, dtype=jnp.int32) * tokens
    return jnp.argsort(expert, stable=True), sizes
