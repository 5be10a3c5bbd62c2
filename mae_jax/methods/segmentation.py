"""Semantic segmentation: a linear head on patch tokens, or UperNet on the outputs of four encoder blocks."""

import re

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from mae_jax.data.info import DataInfo
from mae_jax.errors import UserError
from mae_jax.losses import segmentation
from mae_jax.methods import fields
from mae_jax.methods.base import Batch, Extras, Method, Metrics, Params, check_choices
from mae_jax.models import upernet
from mae_jax.models.blocks import BIAS_TABLE
from mae_jax.models.heads import Head
from mae_jax.models.layers import layer_norm
from mae_jax.models.map_norms import MOMENTS
from mae_jax.models.vit import make_encoder, with_grid
from mae_jax.ops import batch_norm, resampling
from mae_jax.ops.flops import blocks_flops
from mae_jax.ops.patches import PatchGrid, normalize

HEAD_STD = 0.01  # initial standard deviation of the head's kernel, that of MAE's linear probe (A.1)
EPS = 1e-6  # of the norm before the linear head
HEADS, NORMS, TESTS = ("linear", "probe", "upernet"), ("batch", "layer"), ("none", "slide", "whole")


class Segment(Method):
    """Semantic segmentation with the head of `method.head`.

    'linear': classifies the patch tokens of one block, normalized by the encoder's final norm or, after an earlier
    block, by a layer norm without parameters.
    'probe': the same behind a batch norm, as in DINOv2's linear protocol (arXiv 2304.07193, 7.4), but without scale and
    shift, which the layer has itself. Patches of small encoders may have one large vector in common, which it removes.
    'upernet': the protocol of MAE and BEiT on ADE20K, and later variants (docs/segmentation.md).
    """

    task = "segmentation"
    uses_labels = True
    defaults = fields.SEGMENT
    # BEiT's code excludes one-dimensional parameters from weight decay; this code also excludes positions.
    decay_suffixes = (*Method.decay_suffixes, BIAS_TABLE)

    @staticmethod
    def class_parameters(config: ConfigDict) -> str:
        return r"upernet/(main|aux)_classes/.*"

    @staticmethod
    def validate(config: ConfigDict) -> None:
        m, depth = config.method, config.model.depth
        check_choices(m, head=HEADS, norm=NORMS, test=TESTS)
        if not 2 <= m.classes <= segmentation.IGNORED:
            raise UserError(f"method.classes={m.classes}; expected 2 to {segmentation.IGNORED}")
        if not -1 <= m.background < m.classes:
            raise UserError(f"method.background={m.background}; expected 0 to {m.classes - 1}, or -1 for none")
        if not -1 <= m.block < depth:
            raise UserError(f"method.block={m.block}; expected 0 to {depth - 1}, or -1 for the last")
        if not -1 <= m.train_blocks <= depth:
            raise UserError(f"method.train_blocks={m.train_blocks}; expected 0 to {depth}, or -1 for the whole encoder")
        if len(m.stride) != 2 or not all(0 <= step <= side
                                         for step, side in zip(m.stride, config.data.image_size, strict=True)):
            raise UserError(f"method.stride={tuple(m.stride)}; expected two numbers of pixels, at most those of "
                            f"data.image_size={tuple(config.data.image_size)}, or 0")
        _check_upernet(config)

    def __init__(self, config: ConfigDict, data: DataInfo):
        super().__init__(config, data)
        m = config.method
        self.classes, self.background = m.classes, m.background
        self.encoder = make_encoder(config)
        self.maps = upernet.map_blocks(config) if m.head == "upernet" else ()
        self.depth = max(self.maps) + 1 if self.maps else m.block + 1 or config.model.depth  # blocks that run
        self.head = Head(self.classes, HEAD_STD)
        factors = upernet.OF_PATCH_8 if upernet.has_small_patches(config) else upernet.FACTORS
        self.upernet = upernet.UperNet(self.classes, m.head_width or config.model.width, m.aux_width, m.norm,
                                       self.encoder.dtype, factors)
        self.loss_spans_batch = m.head == "probe" or (m.head == "upernet" and m.norm == "batch")
        self.test = m.test
        self.stride: tuple[int, int] = tuple(step or side * 2 // 3 for step, side in
                                             zip(m.stride, self.grid.image_size, strict=True))

    def eval_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        spec = super().eval_spec()
        shape = (*spec["order"].shape, self.grid.patch_dim // 3)
        return spec | {"pixel_label": jax.ShapeDtypeStruct(shape, jnp.uint8)}

    def is_trainable(self, path: str) -> bool:
        trained, block = self.config.method.train_blocks, re.search(r"block_(\d+)/", path)
        if path.startswith(("head/", "upernet/")):
            return True
        if block:
            return int(block[1]) < self.depth and (trained < 0 or int(block[1]) >= self.depth - trained)
        if path.startswith("encoder/norm/"):
            used = self.config.method.encoder_norm if self.maps else self.config.method.block == -1
            return trained != 0 and used
        return trained < 0

    def init(self, key: jax.Array, batch: Batch) -> tuple[Params, Extras]:
        encoder_key, head_key = jax.random.split(key)
        tokens, encoder = self.encoder.init_with_output(
            encoder_key, normalize(batch["patches"][:1]), batch["order"][:1])
        if not self.maps:
            head = self.head.init(head_key, tokens.astype(jnp.float32))
            extras = {"batch_norm": batch_norm.start(tokens.shape[-1])} if self.config.method.head == "probe" else {}
            return {"encoder": encoder["params"], "head": head["params"]}, extras
        maps = [jnp.zeros((1, *self.grid.shape, tokens.shape[-1]), tokens.dtype)] * upernet.MAPS
        head = self.upernet.init(head_key, maps)
        extras = {MOMENTS: head[MOMENTS]} if MOMENTS in head else {}
        return {"encoder": encoder["params"], "upernet": head["params"]}, extras

    def encode(self, params: Params, extras: Extras, batch: Batch, block: int = -1,
               drop_path_mask: jax.Array | None = None) -> jax.Array:
        pixels = normalize(batch["patches"])
        return self.encoder.apply({"params": params["encoder"]}, pixels, batch["order"], block=block,
                                  drop_path_mask=drop_path_mask)

    def cell_logits(self, params: Params, extras: Extras, batch: Batch, grid: tuple[int, int] | None = None
                    ) -> jax.Array:
        """Returns the logits float32 [B, h, w, C] of cells (patches or smaller), before upsampling to pixels.

        Args:
          params, extras: the state.
          batch: `patches` and `order`.
          grid: (rows, columns) of the patches; positions are resized to it. None: the model's grid.
        """
        if self.maps:
            return self._upernet_logits(params, extras, batch, grid)[0][0]
        return self._linear_logits(params, extras, batch, grid)[0]

    def pixel_logits(self, params: Params, extras: Extras, batch: Batch) -> jax.Array:
        """Returns the logits of pixels float32 [B, height, width, C], at the model's image size."""
        return resampling.resize(self.cell_logits(params, extras, batch), self.grid.image_size)

    def pixel_classes(self, batch: Batch) -> jax.Array:
        """Returns the true classes uint8 [B, height, width]; 255 for ignored pixels and for invalid images."""
        mask = segmentation.pixels(batch["pixel_label"], self.grid)
        known = (mask < self.classes) & (batch["valid"] > 0)[:, None, None]
        return jnp.where(known, mask, jnp.uint8(segmentation.IGNORED))

    def loss(self, params: Params, extras: Extras, batch: Batch, key: jax.Array, step: jax.Array,
             train: bool) -> tuple[jax.Array, tuple[Metrics, Extras]]:
        """See `Method.loss`; the mean cross-entropy over pixels with a class, plus UperNet's weighted auxiliary loss.

        mmsegmentation divides by the number of all pixels, ignored ones included, which makes its loss smaller.
        """
        params = self.stop_frozen_gradients(params)
        if self.maps:
            logits, extras = self._upernet_logits(params, extras, batch, key=key if train else None)
        else:
            cells, extras = self._linear_logits(params, extras, batch, key=key, train=train)
            logits = (cells,)
        classes = self.pixel_classes(batch)
        weight = (classes != segmentation.IGNORED).sum(dtype=jnp.float32)
        total, right = segmentation.over_pixels(logits[0], classes)
        metrics = {"pixel_accuracy": (right, weight)}
        for aux in logits[1:]:
            own, _ = segmentation.over_pixels(aux, classes)
            metrics |= {"main_loss": (total, weight), "aux_loss": (own, weight)}
            total = total + self.config.method.aux_weight * own
        return total / jnp.maximum(weight, 1), ({"loss": (total, weight), **metrics}, extras)

    def _linear_logits(self, params: Params, extras: Extras, batch: Batch, grid: tuple[int, int] | None = None,
                       key: jax.Array | None = None, train: bool = False) -> tuple[jax.Array, Extras]:
        """Returns the logits float32 [B, h, w, C] of patches and new extras; `key` is of stochastic depth."""
        encoder, weights = self._at(params, grid)
        block = self.config.method.block
        drop_path_mask = self.drop_path_mask(key, len(batch["order"])) if train and key is not None else None
        tokens = encoder.apply({"params": weights}, normalize(batch["patches"]), batch["order"], block=block,
                               drop_path_mask=drop_path_mask)[:, 1:].astype(jnp.float32)
        if block >= 0:
            tokens = jax.nn.standardize(tokens, epsilon=EPS)
        if "batch_norm" in extras and train:
            tokens, moments = batch_norm.train(tokens, batch["valid"], extras["batch_norm"])
            extras = {**extras, "batch_norm": moments}
        elif "batch_norm" in extras:
            tokens = batch_norm.apply(tokens, extras["batch_norm"])
        logits = self.head.apply({"params": params["head"]}, tokens)
        return logits.reshape(-1, *encoder.grid, logits.shape[-1]), extras

    def _upernet_logits(self, params: Params, extras: Extras, batch: Batch, grid: tuple[int, int] | None = None,
                        key: jax.Array | None = None) -> tuple[tuple[jax.Array, jax.Array], Extras]:
        """Returns the logits float32 [B, h, w, C] of the main and the auxiliary head, and new extras.

        `key` is the key of dropout and stochastic depth; None in evaluation.
        """
        m, images = self.config.method, len(batch["order"])
        encoder, weights = self._at(params, grid)
        wanted = tuple(sorted(set(self.maps)))
        found = encoder.apply({"params": weights}, normalize(batch["patches"]), batch["order"], maps=wanted,
                              drop_path_mask=None if key is None else self.drop_path_mask(key, images))
        tokens = dict(zip(wanted, found, strict=True))
        if m.encoder_norm:
            norm = layer_norm(encoder.dtype, "norm")
            tokens = {number: norm.apply({"params": weights["norm"]}, x) for number, x in tokens.items()}
        maps = [tokens[number][:, 1:].reshape(images, *encoder.grid, -1) for number in self.maps]
        state = {"params": params["upernet"], **({MOMENTS: extras[MOMENTS]} if MOMENTS in extras else {})}
        if key is None:
            return self.upernet.apply(state, maps), extras
        kept = None, None
        if m.dropout:
            kept = tuple(jax.random.bernoulli(jax.random.fold_in(key, n), 1 - m.dropout, (images, width))
                         / (1 - m.dropout) for n, width in enumerate((self.upernet.width, m.aux_width), 1))
        logits, changed = self.upernet.apply(state, maps, batch["valid"], kept, mutable=[MOMENTS])
        return logits, {**extras, MOMENTS: changed[MOMENTS]} if MOMENTS in extras else extras

    def _at(self, params: Params, grid: tuple[int, int] | None) -> tuple:
        """Returns the encoder and its parameters for a grid of patches, with resized positions; None: the model's."""
        if grid is None or grid == self.grid.shape:
            return self.encoder, params["encoder"]
        return with_grid(self.encoder, params["encoder"], grid)

    def forward_flops(self) -> int:
        m, classes, patches = self.config.model, self.classes, self.grid.num_patches
        height, width = self.grid.image_size
        encoder = 2 * patches * m.width * self.grid.patch_dim + blocks_flops(1 + patches, m.width, self.depth,
                                                                             m.mlp_ratio)
        if not self.maps:
            head = 2 * patches * m.width * classes
            return encoder + head + upsampling_flops(self.grid.shape, (height, width), classes)
        largest = tuple(int(side * self.upernet.factors[0]) for side in self.grid.shape)
        third = tuple(int(side * self.upernet.factors[2]) for side in self.grid.shape)
        upsampling = sum(upsampling_flops(cells, (height, width), classes) for cells in (largest, third))
        return encoder + upernet.flops(self.grid.shape, m.width, self.upernet) + upsampling


def upsampling_flops(cells: tuple[int, int], size: tuple[int, int], classes: int) -> int:
    """Returns the FLOPs of the two matrix products that upsample logits [h, w, C] to [height, width, C]."""
    return 2 * size[0] * cells[1] * (cells[0] + size[1]) * classes


def _check_upernet(config: ConfigDict) -> None:
    m = config.method
    if m.head != "upernet":
        for field in ("blocks", "encoder_norm", "relative_position_bias"):
            if m[field] != fields.SEGMENT[field]:
                raise UserError(f"method.{field}={m[field]!r} is read with method.head=upernet only; other heads have "
                                "method.block")
        return
    if m.block != -1:
        raise UserError(f"method.block={m.block} is not read with method.head=upernet, which has method.blocks")
    upernet.map_blocks(config)
    for field, least in (("head_width", 0), ("aux_width", 1)):
        if m[field] < least:
            raise UserError(f"method.{field}={m[field]}; it must be at least {least}")
    if not 0 <= m.dropout < 1:
        raise UserError(f"method.dropout={m.dropout}; expected 0 to below 1")
    if m.aux_weight < 0:
        raise UserError(f"method.aux_weight={m.aux_weight}; it must not be negative")
    grid, smallest = PatchGrid.of(config).shape, 4 if upernet.has_small_patches(config) else 2
    if min(grid) < smallest:
        raise UserError(f"method.head=upernet halves the maps, and data.image_size has only {grid[0]} x {grid[1]} "
                        f"patches; expected at least {smallest} x {smallest}")
    if m.relative_position_bias and m.test == "whole":
        raise UserError("method.relative_position_bias fits one image size; use method.test=slide")
