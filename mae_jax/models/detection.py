"""The heads of Mask R-CNN (arXiv 1703.06870), as in Detectron2: proposals, boxes, masks."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mae_jax.models.map_norms import map_norm
from mae_jax.models.pyramid import Conv, Deconv, kernel_start
from mae_jax.ops.linear import linear

PROPOSAL_STD = 0.01  # initial deviations of all proposal kernels, and of the last layers for classes, boxes and masks
CLASS_STD, BOX_STD, MASK_STD = 0.01, 0.001, 0.001
BOX_SIDE, MASK_SIDE = 7, 14  # RoIAlign bins along each side of a region


class ProposalHead(nn.Module):
    """The region proposal network (arXiv 1506.01497, section 3.1); one head serves all maps.

    For a map [B, H, W, C] and A anchors per cell it returns objectness logits, float32 [B, H · W · A], and box deltas,
    float32 [B, H · W · A, 4].
    """

    convs: int
    anchors: int  # per cell
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        for number in range(self.convs):
            x = nn.relu(Conv(x.shape[-1], 3, self.dtype, str(PROPOSAL_STD), name=f"conv{number}")(x))
        logits = Conv(self.anchors, 1, self.dtype, str(PROPOSAL_STD), name="logits")(x)
        deltas = Conv(4 * self.anchors, 1, self.dtype, str(PROPOSAL_STD), name="deltas")(x)
        return (logits.reshape(len(x), -1).astype(jnp.float32),
                deltas.reshape(len(x), -1, 4).astype(jnp.float32))


class BoxHead(nn.Module):
    """The box head, on regions [B, R, side, side, C].

    Returns class logits, float32 [B, R, classes + 1] with the background last, and box deltas, float32
    [B, R, classes or 1, 4].
    """

    convs: int
    layers: int
    width: int  # of the fully connected layers
    classes: int
    specific: bool  # whether box deltas are class-specific
    norm: str
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, weight: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """Args: weight: in training, float32 [B, R], 0 for regions that a batch norm ignores; None in evaluation."""
        lead = x.shape[:2]
        x = _convs(x.reshape(-1, *x.shape[2:]), self.convs, self.norm, self.dtype, weight).reshape(*lead, -1)
        for number in range(self.layers):
            x = nn.relu(Linear(self.width, "xavier", self.dtype, name=f"fc{number + 1}")(x))
        x = x.astype(jnp.float32)
        logits = Linear(self.classes + 1, str(CLASS_STD), jnp.float32, name="logits")(x)
        deltas = Linear(4 * (self.classes if self.specific else 1), str(BOX_STD), jnp.float32, name="deltas")(x)
        return logits, deltas.reshape(*lead, -1, 4)


class MaskHead(nn.Module):
    """The mask head: regions [B, R, side, side, C] → logits, float32 [B, R, 2 side, 2 side, classes]."""

    convs: int
    classes: int
    norm: str
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, weight: jax.Array | None = None) -> jax.Array:
        """Args: weight: see `BoxHead`."""
        lead, width = x.shape[:2], x.shape[-1]
        x = _convs(x.reshape(-1, *x.shape[2:]), self.convs, self.norm, self.dtype, weight)
        x = nn.relu(Deconv(width, self.dtype, "msra", name="deconv")(x))
        logits = Conv(self.classes, 1, self.dtype, str(MASK_STD), name="logits")(x)
        return logits.reshape(*lead, *logits.shape[1:]).astype(jnp.float32)


class Linear(nn.Module):
    """A linear layer over the last axis, [..., C] → [..., features]; kernel by `kernel_start`, bias initially 0."""

    features: int
    start: str
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        first_values = kernel_start(self.start, x.shape[-1], self.features)
        kernel = self.param("kernel", first_values, (x.shape[-1], self.features))
        return linear(x.astype(self.dtype), kernel, self.param("bias", nn.initializers.zeros, (self.features,)))


def _convs(x: jax.Array, count: int, norm: str, dtype: Any, weight: jax.Array | None) -> jax.Array:
    """Applies `count` 3 x 3 convolutions, each with a norm and a ReLU, to maps [N, H, W, C]."""
    weight = None if weight is None else weight.reshape(-1)
    for number in range(1, count + 1):
        x = Conv(x.shape[-1], 3, dtype, "msra", norm == "none", name=f"conv{number}")(x)
        x = nn.relu(map_norm(norm, dtype, f"conv{number}_norm")(x, weight))
    return x
