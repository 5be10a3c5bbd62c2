"""I-JEPA: an encoder that sees a part of an image predicts a teacher's features of other parts (arXiv 2301.08243).

As section 3 and the appendix have it, but for these, our choices. Shapes are static: all targets have the same number
of patches, that of which most shapes are in the ranges of scale and aspect (the released code draws a size for each
batch), and the context keeps V patches, drawn at random (it cuts all contexts of a batch to the smallest); a target
that would leave fewer is drawn again. The encoder keeps a class token, which no loss is asked of. The loss is a mean
over patches and channels, not a sum. As in the released code, not in the paper: each target's feature has its mean and
deviation removed; `distance` may be smooth_l1; weight decay rises by half a cosine, not by a line.
"""

import math
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from mae_jax.data import DataInfo, PatchOrder
from mae_jax.errors import UserError
from mae_jax.methods.base import Batch, Extras, Method, Metrics, Params, check_choices, check_decoder
from mae_jax.models.vit import make_decoder, make_encoder
from mae_jax.ops.flops import blocks_flops
from mae_jax.ops.patches import PatchGrid, normalize

TRIES = 20  # targets drawn before one is put where an earlier one is; our choice
Shape = tuple[int, int]  # patches along (height, width)


def target_shapes(grid: Shape, scale: tuple[float, float], aspect: tuple[float, float]) -> tuple[Shape, ...]:
    """Returns the blocks of K patches in these ranges, for the K of most shapes, or nearest the mean scale; () if none.

    Args:
      scale: the block's share of the image.
      aspect: the block's height / width.
    """
    patches, found = math.prod(grid), {}
    for height, width in np.ndindex(grid[0] + 1, grid[1] + 1):
        size = height * width
        if size and scale[0] <= size / patches <= scale[1] and aspect[0] <= height / width <= aspect[1]:
            found.setdefault(size, []).append((height, width))
    middle = patches * sum(scale) / 2
    return tuple(max(found.values(), key=lambda s: (len(s), -abs(math.prod(s[0]) - middle)), default=()))


def context_shape(grid: Shape, scale: float) -> Shape:
    """Returns the block of the image's own aspect that covers so much of it."""
    return round(grid[0] * math.sqrt(scale)), round(grid[1] * math.sqrt(scale))


class Multiblock(NamedTuple):
    """Draws a context and several targets, which may overlap each other (section 3, Figure 4)."""

    blocks: tuple[int, int]  # M targets of K patches
    shapes: tuple[Shape, ...]  # of targets, each of K patches
    context: tuple[float, float]  # share of the image that the context covers before targets are taken out of it
    name: str = "I-JEPA's multi-block"

    def __call__(self, order: PatchOrder, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Returns raster indices: [N], V of the context and then all others, and [M, K] of the targets."""
        raster, targets = np.arange(math.prod(order.grid)), []
        free = np.zeros(len(raster), bool)
        free[_block(order.grid, context_shape(order.grid, rng.uniform(*self.context)), rng)] = True
        while len(targets) < self.blocks[0]:
            for _ in range(TRIES):
                target = _block(order.grid, self.shapes[rng.integers(len(self.shapes))], rng)
                if free.sum() - free[target].sum() >= len(raster) - order.num_masked:
                    break
            else:
                target = targets[-1]  # the first one always leaves enough (`validate`)
            free[target] = False
            targets.append(target)
        seen = rng.permutation(raster[free])[: len(raster) - order.num_masked]
        return np.concatenate([seen, np.setdiff1d(raster, seen)]), np.stack(targets)


def _block(grid: Shape, shape: Shape, rng: np.random.Generator) -> np.ndarray:
    """Returns the raster indices of a block of patches at a random place."""
    top, left = (rng.integers(whole - part + 1) for whole, part in zip(grid, shape, strict=True))
    return np.arange(math.prod(grid)).reshape(grid)[top:top + shape[0], left:left + shape[1]].ravel()


class IJEPA(Method):
    """Predicts the teacher's features of each target from the context's tokens and the target's positions."""

    defaults: ClassVar[dict[str, Any]] = {
        "targets": 4,  # M; this and the three below: section 3
        "target_scale": (0.15, 0.2),  # share of the image
        "target_aspect": (0.75, 1.5),  # height / width
        "context_scale": (0.85, 1.0),
        "context_ratio": 0.25,  # patches that stay of it, of every image: an average remembered of the paper, unchecked
        "momentum": 0.996,  # of the teacher; rises linearly to 1 (appendix)
        "distance": "l2",  # or smooth_l1, as in the released code
        "decoder_width": 384, "decoder_depth": 6, "decoder_heads": 12,  # the predictor's, for ViT-B
    }
    small: ClassVar[dict[str, Any]] = {"decoder_width": 32, "decoder_depth": 1, "decoder_heads": 2}

    @staticmethod
    def validate(config: ConfigDict) -> None:
        m, sides = config.method, PatchGrid.of(config).shape
        check_decoder(m)
        check_choices(m, distance=("l2", "smooth_l1"))
        for key in ("target_scale", "context_scale", "target_aspect"):
            if len(m[key]) != 2 or not 0 < m[key][0] <= m[key][1] or (key != "target_aspect" and m[key][1] > 1):
                raise UserError(f"method.{key}={tuple(m[key])}; expected two numbers above 0, the smaller one first"
                                f"{'' if key == 'target_aspect' else ', at most 1'}")
        if m.targets < 1 or not 0 <= m.momentum < 1:
            raise UserError(f"method.targets={m.targets}, method.momentum={m.momentum}; expected at least 1 target, "
                            "and 0 to below 1")
        shapes = target_shapes(sides, m.target_scale, m.target_aspect)
        if not shapes:
            raise UserError(f"method.target_scale={tuple(m.target_scale)}, method.target_aspect="
                            f"{tuple(m.target_aspect)}: no block of {sides[0]} x {sides[1]} patches is such a target")
        visible = int(m.context_ratio * math.prod(sides))
        most = math.prod(context_shape(sides, m.context_scale[0])) - math.prod(shapes[0])
        if not 0 < visible <= most:
            raise UserError(f"method.context_ratio={m.context_ratio} is {visible} of {math.prod(sides)} patches; "
                            f"expected 1 to {most}, what a target leaves of the smallest context")

    def __init__(self, config: ConfigDict, data: DataInfo):
        super().__init__(config, data)
        m, self.patches = config.method, self.grid.num_patches
        self.num_visible = int(m.context_ratio * self.patches)
        self.shapes = target_shapes(self.grid.shape, m.target_scale, m.target_aspect)
        self.targets, self.target_patches = m.targets, math.prod(self.shapes[0])
        self.encoder = make_encoder(config)
        self.predictor = make_decoder(config, config.model.width)

    def patch_order(self) -> PatchOrder:
        blocks = (self.targets, self.target_patches)
        kind = Multiblock(blocks, self.shapes, tuple(self.config.method.context_scale))
        return PatchOrder(kind, self.grid.shape, self.patches - self.num_visible)

    def init(self, key: jax.Array, batch: Batch) -> tuple[Params, Extras]:
        keys, order = jax.random.split(key), batch["order"][:1]
        pixels = normalize(batch["patches"][:1, : self.num_visible])
        tokens, encoder = self.encoder.init_with_output(keys[0], pixels, order[:, : self.num_visible])
        asked = order[:, : self.num_visible + self.target_patches]
        predictor = self.predictor.init(keys[1], tokens, asked, self.target_patches)["params"]
        params = {"encoder": encoder["params"], "predictor": predictor}
        return params, {"teacher": {"encoder": jax.tree.map(jnp.copy, params["encoder"])}}

    def fit_extras(self, params: Params, extras: Extras, batches: Any) -> Extras:
        """Starts the teacher as the student, whatever that was loaded from."""
        return {"teacher": {"encoder": params["encoder"]}}

    def wanted(self, extras: Extras, batch: Batch) -> jax.Array:
        """Returns float32 [B · M, K, D], what the teacher makes of the targets where it sees the whole image."""
        weights = {"params": extras["teacher"]["encoder"]}
        tokens = self.encoder.apply(weights, normalize(batch["patches"]), batch["order"])[:, 1:]
        places = batch["blocks"].reshape(len(tokens), -1, 1)
        wanted = jnp.take_along_axis(tokens.astype(jnp.float32), places, 1)  # no gradient passes, so no scatter
        return jax.lax.stop_gradient(jax.nn.standardize(wanted)).reshape(-1, self.target_patches, tokens.shape[-1])

    def predict(self, params: Params, batch: Batch, drop_path_mask: jax.Array | None = None) -> jax.Array:
        """Returns float32 [B · M, K, D], the predicted features of each target."""
        seen, m = batch["order"][:, : self.num_visible], self.targets
        pixels = normalize(batch["patches"][:, : self.num_visible])
        tokens = self.encoder.apply({"params": params["encoder"]}, pixels, seen, drop_path_mask=drop_path_mask)
        asked = jnp.take_along_axis(batch["order"], batch["blocks"].reshape(len(seen), -1), 1)
        asked = jnp.concatenate([jnp.repeat(seen, m, 0), asked.reshape(-1, self.target_patches)], 1)
        return self.predictor.apply({"params": params["predictor"]}, jnp.repeat(tokens, m, 0), asked,
                                    self.target_patches)

    def loss(self, params: Params, extras: Extras, batch: Batch, key: jax.Array, step: jax.Array,
             train: bool) -> tuple[jax.Array, tuple[Metrics, Extras]]:
        """Mean distance of predicted and wanted features (section 3, 'Loss'), over channels, too."""
        drop_path_mask = self.drop_path_mask(key, len(batch["valid"])) if train else None
        error = jnp.abs(self.predict(params, batch, drop_path_mask) - self.wanted(extras, batch))
        each = jnp.square(error)
        if self.config.method.distance == "smooth_l1":
            each = jnp.where(error < 1, each / 2, error - 0.5)
        total, weight = (each.reshape(len(batch["valid"]), -1).mean(1) * batch["valid"]).sum(), batch["valid"].sum()
        return total / jnp.maximum(weight, 1), ({"loss": (total, weight)}, extras)

    def after_update(self, params: Params, extras: Extras, step: jax.Array) -> Extras:
        """Moves the teacher towards the student; the momentum rises linearly to 1."""
        left = (1 - self.config.method.momentum) * (1 - jnp.clip(step / max(self.timeline.total, 1), 0, 1))
        student = {"encoder": params["encoder"]}
        return {"teacher": jax.tree.map(lambda old, new: old + left * (new - old), extras["teacher"], student)}

    def forward_flops(self) -> int:
        d, seen, asked = self.config.method, 1 + self.num_visible, self.target_patches
        join = 2 * (seen + asked) * d.decoder_width * self.config.model.width
        predictor = blocks_flops(seen + asked, d.decoder_width, d.decoder_depth, self.config.model.mlp_ratio)
        return self._encoder_flops(self.num_visible) + self.targets * (join + predictor)

    def frozen_flops(self) -> int:
        return self._encoder_flops(self.patches)

    def _encoder_flops(self, patches: int) -> int:
        m = self.config.model
        embed = 2 * patches * self.grid.patch_dim * m.width
        return embed + blocks_flops(1 + patches, m.width, m.depth, m.mlp_ratio)
