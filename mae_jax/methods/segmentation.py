"""Dense probe: a linear classifier of patches, its logits upsampled to pixels."""

import re

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from mae_jax.data.info import DataInfo
from mae_jax.errors import UserError
from mae_jax.losses import segmentation
from mae_jax.methods import fields
from mae_jax.methods.base import Batch, Extras, Method, Metrics, Params
from mae_jax.models.heads import Head
from mae_jax.models.vit import make_encoder
from mae_jax.ops.flops import blocks_flops
from mae_jax.ops.patches import normalize

HEAD_STD = 0.01  # initial deviation of the head's kernel, as MAE's linear probe has it (A.1)
EPS = 1e-6  # of the norm before the head


class Segment(Method):
    """Gives every pixel a class, from the patch tokens of one block: DINOv2's linear protocol (arXiv 2304.07193, 7.4).

    Before the classifier comes the encoder's norm, or after an earlier block a layer norm without parameters, where
    DINOv2 has a batch norm (our choice: no statistics of other images are needed).
    """

    task = "segmentation"
    uses_labels = True
    defaults = fields.SEGMENT

    @staticmethod
    def validate(config: ConfigDict) -> None:
        m, depth = config.method, config.model.depth
        if not 2 <= m.classes <= segmentation.IGNORED:
            raise UserError(f"method.classes={m.classes}; expected 2 to {segmentation.IGNORED}")
        if not -1 <= m.background < m.classes:
            raise UserError(f"method.background={m.background}; expected 0 to {m.classes - 1}, or -1 for none")
        if not -1 <= m.block < depth:
            raise UserError(f"method.block={m.block}; expected 0 to {depth - 1}, or -1 for the last")
        if not -1 <= m.train_blocks <= depth:
            raise UserError(f"method.train_blocks={m.train_blocks}; expected 0 to {depth}, or -1 for the whole encoder")

    def __init__(self, config: ConfigDict, data: DataInfo):
        super().__init__(config, data)
        self.encoder = make_encoder(config)
        self.classes, self.background = config.method.classes, config.method.background
        self.head = Head(self.classes, HEAD_STD)
        self.depth = config.method.block + 1 or config.model.depth  # how many blocks run

    def eval_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        spec = super().eval_spec()
        shape = (*spec["order"].shape, self.grid.patch_dim // 3)
        return spec | {"pixel_label": jax.ShapeDtypeStruct(shape, jnp.uint8)}

    def is_trainable(self, path: str) -> bool:
        trained, block = self.config.method.train_blocks, re.search(r"block_(\d+)/", path)
        if path.startswith("head/"):
            return True
        if block:
            return int(block[1]) < self.depth and (trained < 0 or int(block[1]) >= self.depth - trained)
        if path.startswith("encoder/norm/"):
            return trained != 0 and self.config.method.block == -1
        return trained < 0

    def init(self, key: jax.Array, batch: Batch) -> tuple[Params, Extras]:
        encoder_key, head_key = jax.random.split(key)
        tokens, encoder = self.encoder.init_with_output(
            encoder_key, normalize(batch["patches"][:1]), batch["order"][:1])
        head = self.head.init(head_key, tokens.astype(jnp.float32))
        return {"encoder": encoder["params"], "head": head["params"]}, {}

    def encode(self, params: Params, extras: Extras, batch: Batch, block: int = -1,
               drop_path_mask: jax.Array | None = None) -> jax.Array:
        pixels = normalize(batch["patches"])
        return self.encoder.apply({"params": params["encoder"]}, pixels, batch["order"], block=block,
                                  drop_path_mask=drop_path_mask)

    def pixel_logits(self, params: Params, extras: Extras, batch: Batch,
                     drop_path_mask: jax.Array | None = None) -> jax.Array:
        """Returns float32 [B, height, width, C]; `drop_path_mask` is that of the encoder."""
        tokens = self.encode(params, extras, batch, self.config.method.block, drop_path_mask)[:, 1:].astype(jnp.float32)
        if self.config.method.block >= 0:
            tokens = jax.nn.standardize(tokens, epsilon=EPS)
        logits = self.head.apply({"params": params["head"]}, tokens)
        return segmentation.upsample(logits.reshape(-1, *self.grid.shape, logits.shape[-1]), self.grid.patch)

    def pixel_classes(self, batch: Batch) -> jax.Array:
        """Returns uint8 [B, height, width]: classes, or 255 for pixels without one and all of invalid images."""
        mask = segmentation.pixels(batch["pixel_label"], self.grid)
        known = (mask < self.classes) & (batch["valid"] > 0)[:, None, None]
        return jnp.where(known, mask, jnp.uint8(segmentation.IGNORED))

    def loss(self, params: Params, extras: Extras, batch: Batch, key: jax.Array, step: jax.Array,
             train: bool) -> tuple[jax.Array, tuple[Metrics, Extras]]:
        """Cross-entropy, the mean over all pixels of the batch that have a class."""
        params = self.stop_frozen_gradients(params)
        drop_path_mask = self.drop_path_mask(key, len(batch["order"])) if train else None
        logits, classes = self.pixel_logits(params, extras, batch, drop_path_mask), self.pixel_classes(batch)
        weight = (classes != segmentation.IGNORED).sum(dtype=jnp.float32)
        total = segmentation.cross_entropy(logits, classes).sum()
        right = (logits.argmax(-1) == classes).sum(dtype=jnp.float32)
        metrics = {"loss": (total, weight), "pixel_accuracy": (right, weight)}
        return total / jnp.maximum(weight, 1), (metrics, extras)

    def forward_flops(self) -> int:
        m, classes, patches = self.config.model, self.classes, self.grid.num_patches
        height, width = self.grid.image_size
        embed_and_head = 2 * patches * m.width * (self.grid.patch_dim + classes)
        upsampling = 2 * height * self.grid.columns * (self.grid.rows + width) * classes
        return embed_and_head + blocks_flops(1 + patches, m.width, self.depth, m.mlp_ratio) + upsampling
