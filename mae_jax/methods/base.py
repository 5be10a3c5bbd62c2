"""The base class of methods: pure functions over nested dicts of arrays, bound to a config."""

import re
from collections.abc import Iterable
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from mae_jax.data.info import DataInfo, DataNeeds
from mae_jax.data.masking import PatchOrder, View, block_shape, with_views
from mae_jax.durations import Timeline
from mae_jax.errors import UserError, did_you_mean
from mae_jax.models.layers import drop_path
from mae_jax.models.vit import drop_path_rates
from mae_jax.ops.patches import PatchGrid, normalize
from mae_jax.param_tree import path
from mae_jax.recipe_version import has

Batch = dict[str, jax.Array]
Params = dict[str, Any]
Extras = dict[str, Any]
Metrics = dict[str, tuple[jax.Array, jax.Array]]  # name → (sum, weight)
Task = Literal["pretraining", "classification", "segmentation", "detection"]
GRAY = 127  # value of hidden patches in figures


def pool(tokens: jax.Array, how: str) -> jax.Array:
    """Pools tokens [B, 1 + N, D], class token first, to features float32 [B, D]: 'cls', or 'mean' over the patches."""
    return tokens[:, 0].astype(jnp.float32) if how == "cls" else tokens[:, 1:].mean(1, dtype=jnp.float32)


def check_choices(m: ConfigDict, **allowed: tuple[str, ...]) -> None:
    """Raises UserError for the first field of the group config.method whose value is not allowed."""
    for key, values in allowed.items():
        if m[key] not in values:
            raise UserError(f"method.{key}={m[key]!r}; {did_you_mean(m[key], values)}")


def check_decoder(m: ConfigDict) -> None:
    """Raises UserError for an invalid width, depth or number of heads of the decoder in config.method."""
    for key in ("decoder_width", "decoder_depth", "decoder_heads"):
        if m[key] < 1:
            raise UserError(f"method.{key}={m[key]}; it must be at least 1")
    if m.decoder_width % m.decoder_heads or m.decoder_width % 4:
        raise UserError(f"method.decoder_width={m.decoder_width}; it must be a multiple of "
                        f"method.decoder_heads={m.decoder_heads} and of 4")


def named_blocks(config: ConfigDict) -> set[int]:
    """Returns the indices of the blocks in method.blocks; raises UserError for an invalid or empty selection."""
    text, depth = config.method.blocks, config.model.depth
    named = {"all": range(depth), "first_half": range(depth // 2), "last_half": range(depth // 2, depth),
             "last_two_odd": range(1, depth, 2)[-2:]}
    if text in named and not named[text]:
        raise UserError(f"method.blocks={text!r} selects none of the {depth} block{'s' if depth > 1 else ''}")
    if text in named:
        return set(named[text])
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        last = int(match[2] or match[1]) if match else depth
        if not match or last >= depth or int(match[1]) > last:
            raise UserError(f"method.blocks={text!r}; expected {', '.join(map(repr, named))}, or some of the blocks "
                            f"0 to {depth - 1} as '0,2' or '6-11'")
        found |= set(range(int(match[1]), last + 1))
    return found


def kind_of_order(config: ConfigDict) -> str:
    """Returns the kind of `PatchOrder` of method.masking; an older recipe_version keeps its own block masking."""
    published = config.method.masking == "block" and has(config, "published_blocks")
    return "published_block" if published else config.method.masking


def mean_square(error: jax.Array, valid: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns (sum over images of the mean square of error [B, M, P], number of valid images)."""
    return (jnp.square(error).mean((1, 2)) * valid).sum(), valid.sum()


class Method:
    """Base class of methods. B images have N patches of P values each; `self.encoder` is the encoder.

    `task` selects the evaluations, and with them the functions that a subclass must have:

    - 'pretraining': none; the features of `encode` are probed.
    - 'classification': `logits(params, extras, batch)` → float32 [B, C], C = `self.classes`.
    - 'segmentation': `pixel_logits(params, extras, batch)` → float32 [B, height, width, C], and `pixel_classes(batch)`
      → uint8 [B, height, width], 255 for pixels without a class. If `test` is 'slide' or 'whole', also
      `cell_logits(params, extras, batch, grid)` → float32 [B, h, w, C] for `patches` and `order` in raster order;
      'whole' requires it for any `grid`.
    - 'detection': `detections(params, extras, batch)`, see `methods/detection.py`.

    If `reconstructs` is True, there is `reconstruct(params, extras, batch)`, whose item 'pixels' has the masked patches
    as normalized pixels, float32 [B, M, P]: the last M patches in the batch's order.
    """

    encoder: Any  # models.vit.Encoder
    classes: int  # number of classes, except in pre-training
    task: ClassVar[Task] = "pretraining"
    reconstructs: ClassVar[bool] = False
    mask_ratio: float | None = None  # share of masked patches, for methods with `at_mask_ratio`
    reconstruction_note: str = "colors are as the method has them"  # note on the colors in captions
    defaults: ClassVar[dict[str, Any]] = {}  # own config fields under config.method
    small: ClassVar[dict[str, Any]] = {}  # their values in `runlocal`; for built-in methods see methods/fields.py
    uses_labels: bool = False  # training uses labels: training and evaluation splits must be disjoint
    has_class_head: bool = False  # the head has one output per class of the data, in the data's order
    loss_spans_batch: bool = False  # the loss has terms across images, and so excludes gradient accumulation
    extra_encode_fields: tuple[str, ...] = ()  # batch fields that `encode` reads besides `patches` and `order`
    num_clusters: int = 1  # number of values of the batch field `cluster`
    test: str = "none"  # segmentation at the original size of images: 'none', 'slide' or 'whole'
    stride: tuple[int, int] = (0, 0)  # distance of the windows of 'slide' along (height, width), in pixels
    background: int = -1  # class of the background in segmentation; -1: none
    # Weight decay applies to parameters whose path ends in one of these names.
    decay_suffixes: ClassVar[tuple[str, ...]] = ("kernel", "cls_token", "mask_token")

    def __init__(self, config: ConfigDict, data: DataInfo):
        """Binds the method to a resolved config (without 'auto') and to the properties of the data."""
        self.config, self.data, self.grid = config, data, PatchGrid.of(config)
        self.timeline = Timeline.of(config, data.num_train)

    @staticmethod
    def validate(config: ConfigDict) -> None:
        """Raises UserError for invalid values of the method's own config fields."""

    @staticmethod
    def class_parameters(config: ConfigDict) -> str:
        """Returns a regular expression of paths of parameters with one part per class, other than `head`; '': none."""
        return ""

    @staticmethod
    def data_needs(config: ConfigDict) -> DataNeeds:
        """Returns the method's requirements of the data; called before the data are opened."""
        return DataNeeds()

    def check_data(self) -> None:
        """Raises UserError for data that the method cannot be trained on."""

    @staticmethod
    def heads(config: ConfigDict) -> dict[str, int]:
        """Returns config field → number of attention heads; `mesh.tensor` must divide each number."""
        m = config.method
        own = {"method.decoder_heads": m.decoder_heads} if "decoder_heads" in m else {}
        return {"model.heads": config.model.heads, **own}

    def patch_order(self) -> PatchOrder:
        """Returns the distribution from which the host draws the batch field `order`."""
        return PatchOrder("identity", self.grid.shape, num_masked=0)

    @property
    def group(self) -> int:
        """Number of consecutive images that share an order; each group stays on one device and in one micro-batch."""
        return self.patch_order().group

    def views(self) -> tuple[View, ...]:
        """Returns the views that replace `patches` and `order` in training batches; () for none."""
        return ()

    def is_trainable(self, path: str) -> bool:
        """Returns whether the parameter at a path is trained; frozen parameters have no optimizer state."""
        return True

    def decays(self, path: str) -> bool:
        """Returns whether weight decay applies to the parameter at a path."""
        return path.rsplit("/", 1)[-1] in self.decay_suffixes

    def stop_frozen_gradients(self, params: Params) -> Params:
        """Returns the parameters with the gradients of frozen ones stopped, so that they are not computed."""
        return jax.tree_util.tree_map_with_path(
            lambda keys, leaf: leaf if self.is_trainable(path(keys)) else jax.lax.stop_gradient(leaf), params)

    def drop_path_mask(self, key: jax.Array, images: int) -> jax.Array | None:
        """Draws the stochastic depth mask of trainable encoder blocks, float32 [depth, 2, B]; None if it is off."""
        if not self.config.model.drop_path:
            return None
        learning = [self.is_trainable(f"encoder/block_{number:02d}/mlp/") for number in range(self.config.model.depth)]
        return drop_path(key, drop_path_rates(self.config) * learning, images)

    def batch_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns name → global shape and dtype of the fields of training batches."""
        return with_views(self.eval_spec(), self.views())

    def eval_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns name → global shape and dtype of the fields of evaluation batches."""
        images, patches = self.config.batch_size, self.grid.num_patches
        shapes = {
            "patches": ((patches, self.grid.patch_dim), jnp.uint8),
            "order": ((patches,), jnp.int32),
            "label": ((), jnp.int32),
            "id": ((2,) if self.data.wide_ids else (), jnp.int32),
            "valid": ((), jnp.float32),
            "replaced": ((), jnp.int32),
        }
        if blocks := block_shape(self.patch_order()):
            shapes["blocks"] = (blocks, jnp.int32)
        return {name: jax.ShapeDtypeStruct((images, *shape), dtype) for name, (shape, dtype) in shapes.items()}

    @property
    def multi_label(self) -> bool:
        """Whether an image can have any number of classes; batches then have `labels`, uint8 [B, C]."""
        return "labels" in self.eval_spec()

    def at_mask_ratio(self, ratio: float) -> "Method":
        """Returns the method with random masking at another ratio, for the same parameters."""
        raise NotImplementedError

    def init(self, key: jax.Array, batch: Batch) -> tuple[Params, Extras]:
        """Returns initial parameters in float32, and the extras (state that is not trained by gradients)."""
        raise NotImplementedError

    def fit_extras(self, params: Params, extras: Extras, batches: Iterable[dict[str, np.ndarray]] | None) -> Extras:
        """Returns the extras with the entries that are computed once before the first step, such as a vocabulary.

        Args:
          params: the initial parameters, after a warm start.
          extras: the extras from `init`.
          batches: global batches of the training split on the host, without augmentation; read only if needed. None if
            only the encoder is used: nothing is computed from images.
        """
        return extras

    def stored_vocabulary(self) -> tuple[str, str, tuple[int, int]] | None:
        """Returns (file, kind, shape (V - 1, P)) of a stored vocabulary for the extras; None without one.

        The run loads it, since methods do no IO.
        """
        return None

    def check_extras(self, extras: Extras) -> None:
        """Raises UserError if restored extras do not match the files that the config names."""

    def loss(self, params: Params, extras: Extras, batch: Batch, key: jax.Array, step: jax.Array,
             train: bool) -> tuple[jax.Array, tuple[Metrics, Extras]]:
        """Computes the loss of a batch.

        Args:
          params, extras: the state.
          batch: the fields of `batch_spec`, or of `eval_spec` where `train` is False.
          key: key of the random numbers of this step.
          step: int32 [], the number of the step.
          train: False for evaluation: no augmentation, no stochastic depth.

        Returns:
          The scalar loss float32 []; metrics, name → (sum, weight), with 'loss' among them; and the new extras.
        """
        raise NotImplementedError

    def after_update(self, params: Params, extras: Extras, step: jax.Array) -> Extras:
        """Returns the extras after an applied update; EMA teachers are updated here."""
        return extras

    def device_augmented(self, batch: Batch, key: jax.Array) -> jax.Array | None:
        """Returns the normalized pixels float32 [B, N, P] that `loss` trains on; None if it does not augment images.

        Args: as for `loss`.
        """
        return None

    def input_images(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Returns the training inputs for figures: caption → uint8 [B, height, width, 3], masked patches in gray.

        Args:
          batch: a training batch on the host, of whole groups. An optional field `augmented`, uint8 [B, N, P], has the
            patches after augmentation on the device.
        """
        views = [(view, n) for view in self.views() for n in range(len(view.colors))]
        if views:
            return {f"{view.name} view {n + 1}": PatchGrid(*view.order.grid, *self.grid.patch).unpatchify(
                batch[f"{view.name}/patches"][:, n], batch[f"{view.name}/order"][:, n]) for view, n in views}
        drawn, patches = self.patch_order(), batch["order"].shape[1]
        masked = np.arange(patches) >= patches - drawn.num_masked
        images = {"input": self.only(batch, True)}
        if "augmented" in batch:
            images["augmented"] = self.only({**batch, "patches": batch["augmented"]}, True)
        if masked.any():
            images["visible"] = self.only(batch, ~masked)
        if "blocks" in batch:
            places = batch["blocks"].reshape(len(batch["blocks"]), -1)
            images["asked for"] = self.only(batch, (places[..., None] == np.arange(len(masked))).any(1))
        return images

    def only(self, batch: dict[str, np.ndarray], shown: np.ndarray | bool) -> np.ndarray:
        """Returns the images uint8 [B, height, width, 3] of a batch on the host, with some patches only.

        Args:
          batch: `patches` and `order`.
          shown: bool, broadcast to [B, N]: which patches are shown, in the batch's order; the others are gray.
        """
        shown = np.broadcast_to(shown, batch["order"].shape)[..., None]
        return self.grid.unpatchify(np.where(shown, batch["patches"], np.uint8(GRAY)), batch["order"])

    def encode(self, params: Params, extras: Extras, batch: Batch, block: int = -1) -> jax.Array:
        """Encodes unmasked images.

        Args:
          params, extras: the state.
          batch: `patches` uint8 [B, N, P], `order` int32 [B, N], and `extra_encode_fields`.
          block: index of the block whose output is returned; -1: the last, after the final norm.

        Returns:
          Tokens [B, 1 + N, D] in the model's dtype, the class token first, then patches in the batch's order.
        """
        pixels, weights = normalize(batch["patches"]), self.eval_params(params, extras)["encoder"]
        return self.encoder.apply({"params": weights}, pixels, batch["order"], block=block)

    def eval_params(self, params: Params, extras: Extras) -> Params:
        """Returns the parameters for evaluation, export and warm starts: the EMA teacher's if the extras have one.

        The extras' `teacher` is a tree with the names of the parameters that it replaces, which
        `param_tree.split_eval_params` also does for checkpoints.
        """
        return {**params, **extras.get("teacher", {})}

    def forward_flops(self) -> int:
        """Returns the FLOPs of the forward pass of one image in training: matrix products, 2 FLOPs per multiply-add."""
        raise NotImplementedError

    def frozen_flops(self) -> int:
        """Returns the FLOPs per image of computations without a backward pass, such as a teacher or a tokenizer."""
        return 0
