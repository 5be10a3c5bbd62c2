"""Supervised training: fine-tuning, probes, and training from scratch (MAE A.1; DeiT III, arXiv 2204.07118)."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from mae_jax.data.info import DataInfo, DataNeeds
from mae_jax.errors import UserError
from mae_jax.methods import fields
from mae_jax.methods.base import Batch, Extras, Method, Metrics, Params, check_choices, pool
from mae_jax.models.heads import Classifier
from mae_jax.models.vit import make_encoder
from mae_jax.ops import batch_norm, mixup
from mae_jax.ops.flops import blocks_flops
from mae_jax.ops.patches import normalize

HEADS = ("linear", "probe")
LOSSES = ("cross_entropy", "bce")


class Supervised(Method):
    """An encoder with a linear classifier; trains all parameters, the last blocks, or the classifier only."""

    task = "classification"
    defaults = fields.SUPERVISED
    decay_suffixes = ("kernel",)
    uses_labels = has_class_head = True

    @staticmethod
    def validate(config: ConfigDict) -> None:
        m, depth = config.method, config.model.depth
        check_choices(m, head=HEADS, loss=LOSSES)
        for key, most in (("smoothing", 0.999), ("erase", 1), ("mixup", np.inf), ("cutmix", np.inf),
                          ("head_std", np.inf), ("classes", np.inf)):
            if not 0 <= m[key] <= most:
                raise UserError(f"method.{key}={m[key]}; expected 0 to {most}")
        if m.train_blocks not in (-1, 0.5, *range(depth + 1)):
            raise UserError(f"method.train_blocks={m.train_blocks}; expected -1 (all), 0, 0.5 or up to {depth} blocks")
        if m.loss == "bce" and m.smoothing:
            raise UserError(f"method.smoothing={m.smoothing} would make every class positive in the binary "
                            "cross-entropy; use 0")
        if m.multi_label and m.loss != "bce":
            raise UserError("method.multi_label needs method.loss=bce")
        rows = config.batch_size // config.train.accumulate
        mixes = m.mixup or m.cutmix
        if mixes and (rows % (m.mix_group or rows) or (m.mix_group or rows) % 2):
            raise UserError(f"method.mix_group={m.mix_group}; expected an even number that divides the {rows} rows of "
                            "a batch (or of a micro-batch)")
        if mixes and m.mix_group and config.data.repeats > 1 and -(-rows // config.data.repeats) < m.mix_group:
            raise UserError(f"method.mix_group={m.mix_group} would mix an image with its own repeats; "
                            f"use at most {rows // config.data.repeats // 2 * 2}")

    @staticmethod
    def data_needs(config: ConfigDict) -> DataNeeds:
        m = config.method
        return DataNeeds(m.mix_group or 1 if m.mixup or m.cutmix else 1)

    def check_data(self) -> None:
        m, data = self.config.method, self.data
        wanted, there = m.classes, len(data.classes if m.multi_label else data.single_label_classes)
        if there < 2:
            raise UserError(f"method.name=supervised needs images with one label each, of at least two classes; the "
                            f"data have {there}. A folder needs two class sub-folders or more, and images with "
                            "several labels need method.multi_label=True")
        if wanted not in (0, there):
            raise UserError(f"method.classes={wanted}, but the data has {there} classes; leave it 0, or use other data")

    def __init__(self, config: ConfigDict, data: DataInfo):
        super().__init__(config, data)
        m = config.method
        self.classes = m.classes or len(data.classes)
        self.loss_spans_batch = m.head == "probe"
        self.encoder = make_encoder(config)
        # The mean of patch tokens is normalized after pooling, instead of by the encoder's final norm.
        self.norm_pooled = config.model.pool == "mean" and m.head == "linear"
        self.last_block = config.model.depth - 1 if self.norm_pooled else -1
        self.classifier = Classifier(self.classes, self.norm_pooled, m.head_std)
        self.where = mixup.Pixels.of(self.grid)

    def eval_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        labels = {"labels": jax.ShapeDtypeStruct((self.config.batch_size, self.classes), jnp.uint8)}
        return super().eval_spec() | (labels if self.config.method.multi_label else {})

    def init(self, key: jax.Array, batch: Batch) -> tuple[Params, Extras]:
        encoder_key, head_key = jax.random.split(key)
        one = normalize(batch["patches"][:1])
        encoder = self.encoder.init(encoder_key, one, batch["order"][:1], block=self.last_block)["params"]
        width = self.config.model.width
        params = {"encoder": encoder, **self.classifier.init(head_key, jnp.zeros((1, width)))["params"]}
        return params, {"batch_norm": batch_norm.start(width)} if self.config.method.head == "probe" else {}

    def is_trainable(self, path: str) -> bool:
        """See `Method.is_trainable`; with method.train_blocks above 0, the norms after the blocks are trained, too.

        Source: partial fine-tuning (MAE 4.3).
        """
        blocks, depth = self.config.method.train_blocks, self.config.model.depth
        if blocks < 0 or not path.startswith("encoder/"):
            return True
        found = re.match(r"encoder/block_(\d+)/(\w+)", path)
        if not found:
            return blocks > 0 and path.startswith("encoder/norm/")
        number, part = int(found[1]), found[2]
        if blocks == 0.5:
            return number == depth - 1 and part in ("mlp", "norm2", "ls2")
        return number >= depth - blocks

    def encode(self, params: Params, extras: Extras, batch: Batch, block: int = -1,
               drop_path_mask: jax.Array | None = None) -> jax.Array:
        """See `Method.encode`; block -1 skips the final norm if the mean is normalized after pooling.

        A batch field `pixels`, normalized float32 [B, N, P], takes precedence over `patches`. `drop_path_mask` is the
        stochastic depth mask float32 [depth, 2, B]; None: off.
        """
        block = self.last_block if block == -1 else block
        pixels = batch["pixels"] if "pixels" in batch else normalize(batch["patches"])
        return self.encoder.apply({"params": params["encoder"]}, pixels, batch["order"], block=block,
                                  drop_path_mask=drop_path_mask)

    def logits(self, params: Params, extras: Extras, batch: Batch) -> jax.Array:
        """Returns the logits float32 [B, C] of images without augmentation, for evaluation."""
        features = pool(self.encode(params, extras, batch), self.config.model.pool)
        if "batch_norm" in extras:
            features = batch_norm.apply(features, extras["batch_norm"])
        return self.classify(params, features)

    def classify(self, params: Params, features: jax.Array) -> jax.Array:
        own = {name: value for name, value in params.items() if name != "encoder"}
        return self.classifier.apply({"params": own}, features)

    def loss(self, params: Params, extras: Extras, batch: Batch, key: jax.Array, step: jax.Array,
             train: bool) -> tuple[jax.Array, tuple[Metrics, Extras]]:
        """See `Method.loss`; the mean over labeled images. Evaluation does not smooth labels."""
        weight = self.weight(batch)
        if train:
            weight = weight * self.partners_weight(weight)
            logits, targets, extras = self.training_logits(params, extras, batch, key, weight)
        else:
            logits, targets = self.logits(params, extras, batch), self.targets(batch, 0.0)
        each = self.losses(logits, targets)
        total, weight = (each * weight).sum(), weight.sum()
        return total / jnp.maximum(weight, 1), ({"loss": (total, weight)}, extras)

    def weight(self, batch: Batch) -> jax.Array:
        """Returns the weights of images float32 [B]: 1 with a label, 0 without one and for padding."""
        return batch["valid"] if self.config.method.multi_label else batch["valid"] * (batch["label"] >= 0)

    def partners_weight(self, weight: jax.Array) -> jax.Array:
        """Returns float32 [B]: the weight of each image's mixing partner; 1 without mixing."""
        m = self.config.method
        return mixup.partners(weight, m.mix_group or len(weight)) if m.mixup or m.cutmix else jnp.ones_like(weight)

    def targets(self, batch: Batch, smoothing: float) -> jax.Array:
        """Returns the targets float32 [B, C]: multi-hot labels, or one-hot labels with label smoothing."""
        if self.config.method.multi_label:
            return batch["labels"].astype(jnp.float32)
        return optax.smooth_labels(jax.nn.one_hot(batch["label"], self.classes), smoothing)

    def losses(self, logits: jax.Array, targets: jax.Array) -> jax.Array:
        """Returns the loss of each image, float32 [B], for logits and targets float32 [B, C].

        Binary cross-entropy is a mean over classes, and any target above 0 counts as 1 (DeiT III).
        """
        if self.config.method.loss == "bce":
            return optax.sigmoid_binary_cross_entropy(logits, (targets > 0).astype(jnp.float32)).mean(-1)
        return optax.softmax_cross_entropy(logits, targets)

    def training_logits(self, params: Params, extras: Extras, batch: Batch, key: jax.Array,
                        weight: jax.Array) -> tuple[jax.Array, jax.Array, Extras]:
        """Returns logits and targets float32 [B, C] of augmented images (erasing, mixup, cutmix), and new extras."""
        params = self.stop_frozen_gradients(params)
        erase_key, mix_key, drop_key = jax.random.split(key, 3)
        pixels, targets = self.augmented(batch, erase_key, mix_key)
        drop_path_mask = self.drop_path_mask(drop_key, len(pixels))
        tokens = self.encode(params, extras, {**batch, "pixels": pixels}, drop_path_mask=drop_path_mask)
        features = pool(tokens, self.config.model.pool)
        if "batch_norm" in extras:
            features, moments = batch_norm.train(features, weight, extras["batch_norm"])
            extras = {**extras, "batch_norm": moments}
        return self.classify(params, features), targets, extras

    def augmented(self, batch: Batch, erase_key: jax.Array, mix_key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns normalized pixels float32 [B, N, P] and targets [B, C] after random erasing, mixup and cutmix."""
        m = self.config.method
        pixels, targets = normalize(batch["patches"]), self.targets(batch, m.smoothing)
        if m.erase:
            pixels = mixup.erase(erase_key, pixels, self.where, m.erase)
        if m.mixup or m.cutmix:
            groups = len(pixels) // (m.mix_group or len(pixels))
            kept, share = mixup.draw_mix(mix_key, groups, self.where, m.mixup, m.cutmix)
            pixels, targets = mixup.mix(pixels, kept), mixup.mix(targets, share)
        return pixels, targets

    def device_augmented(self, batch: Batch, key: jax.Array) -> jax.Array | None:
        m = self.config.method
        erase_key, mix_key, _ = jax.random.split(key, 3)  # as `training_logits` does
        return self.augmented(batch, erase_key, mix_key)[0] if m.erase or m.mixup or m.cutmix else None

    def forward_flops(self) -> int:
        m, patches = self.config.model, self.grid.num_patches
        embed = 2 * patches * self.grid.patch_dim * m.width
        return embed + blocks_flops(1 + patches, m.width, m.depth, m.mlp_ratio) + 2 * m.width * self.classes
