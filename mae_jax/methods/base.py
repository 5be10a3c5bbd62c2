"""What every method provides: pure functions over plain nested dicts, bound to a config."""

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
GRAY = 127  # of a patch that a figure does not show


def pool(tokens: jax.Array, how: str) -> jax.Array:
    """Pools tokens [B, 1 + N, D], class token first, to float32 features [B, D]: 'cls' or 'mean' of the patches."""
    return tokens[:, 0].astype(jnp.float32) if how == "cls" else tokens[:, 1:].mean(1, dtype=jnp.float32)


def check_choices(m: ConfigDict, **allowed: tuple[str, ...]) -> None:
    """Raises UserError for the first field of the group config.method that has none of its allowed values."""
    for key, values in allowed.items():
        if m[key] not in values:
            raise UserError(f"method.{key}={m[key]!r}; {did_you_mean(m[key], values)}")


def check_decoder(m: ConfigDict) -> None:
    """Raises UserError for a decoder of the group config.method that cannot be built."""
    for key in ("decoder_width", "decoder_depth", "decoder_heads"):
        if m[key] < 1:
            raise UserError(f"method.{key}={m[key]}; it must be at least 1")
    if m.decoder_width % m.decoder_heads or m.decoder_width % 4:
        raise UserError(f"method.decoder_width={m.decoder_width}; it must be a multiple of "
                        f"method.decoder_heads={m.decoder_heads} and of 4")


def named_blocks(config: ConfigDict) -> set[int]:
    """Returns the blocks that method.blocks names; raises UserError for what names none."""
    text, depth = config.method.blocks, config.model.depth
    named = {"all": range(depth), "first_half": range(depth // 2), "last_half": range(depth // 2, depth),
             "last_two_odd": range(1, depth, 2)[-2:]}
    if text in named and not named[text]:
        raise UserError(f"method.blocks={text!r} names none of the {depth} block{'s' if depth > 1 else ''}")
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
    """Returns the kind of `PatchOrder` of method.masking: blocks as published, or as a stored run began with."""
    published = config.method.masking == "block" and has(config, "published_blocks")
    return "published_block" if published else config.method.masking


def mean_square(error: jax.Array, valid: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns (sum over images of the mean square of error [B, M, P], number of valid images)."""
    return (jnp.square(error).mean((1, 2)) * valid).sum(), valid.sum()


class Method:
    """Base of all methods; B images, N patches of P values each. A method has its encoder as `self.encoder`.

    Its `task` says what it is evaluated by: 'pretraining' by probes of its features; 'classification' by its
    `logits(params, extras, batch)`, float32 [B, C] of `self.classes`; 'segmentation' by its `pixel_logits(params,
    extras, batch)`, float32 [B, height, width, C] of `self.classes`, and `pixel_classes(batch)`, uint8 [B, height,
    width], 255 for none; where one of the classes is no foreground, by its `background`. Where its `test` is 'slide' or
    'whole', also at the images' own size, by its `cell_logits(params, extras, batch, grid)`, float32 [B, h, w, C] of
    `patches` and `order` in raster order, of any `grid` where it is 'whole'; 'detection' by its `detections(params,
    extras, batch)`, see `methods/detection.py`, of `self.classes`.
    One that `reconstructs` has `reconstruct(params, extras, batch)`, whose item 'pixels' are the masked patches as
    normalised pixels, float32 [B, M, P]: the last M in the batch's order.
    """

    encoder: Any  # models.vit.Encoder
    classes: int  # of a classification or a segmentation
    task: ClassVar[Task] = "pretraining"
    reconstructs: ClassVar[bool] = False
    mask_ratio: float | None = None  # share that is masked, where `at_mask_ratio` gives another
    reconstruction_note: str = "colors are as the method has them"  # what is said of images of masked patches
    defaults: ClassVar[dict[str, Any]] = {}  # own config fields under config.method
    small: ClassVar[dict[str, Any]] = {}  # what `runlocal` makes of these; ours are in methods/fields.py
    uses_labels: bool = False  # what it is evaluated on must not be trained on
    has_class_head: bool = False  # its head has a row for each class of the data, in their order
    class_parameters: str = ""  # besides a head: paths, as a regular expression, of what has a part for each class
    loss_spans_batch: bool = False  # the loss has terms across images: accumulation is refused
    extra_encode_fields: tuple[str, ...] = ()  # batch fields that `encode` reads besides images and orders
    num_clusters: int = 1  # ids that the batch field `cluster` may have, where there is one
    test: str = "none"  # of a segmentation: how images are evaluated at their own size, if they are
    stride: tuple[int, int] = (0, 0)  # of 'slide': pixels from window to window
    background: int = -1  # of a segmentation's classes, what is around things; -1: none
    # Weight decay, by last name of the path; what `decays` goes by.
    decay_suffixes: ClassVar[tuple[str, ...]] = ("kernel", "cls_token", "mask_token")

    def __init__(self, config: ConfigDict, data: DataInfo):
        """Binds the method to a config without 'auto', and to what the data have."""
        self.config, self.data, self.grid = config, data, PatchGrid.of(config)
        self.timeline = Timeline.of(config, data.num_train)

    @staticmethod
    def validate(config: ConfigDict) -> None:
        """Raises UserError for own fields that cannot work."""

    @staticmethod
    def data_needs(config: ConfigDict) -> DataNeeds:
        """Returns what the method asks of the data before they are opened."""
        return DataNeeds()

    def check_data(self) -> None:
        """Raises UserError for data that the method cannot be trained on."""

    @staticmethod
    def heads(config: ConfigDict) -> dict[str, int]:
        """Returns config field → number of attention heads, each of which `mesh.tensor` must divide."""
        m = config.method
        own = {"method.decoder_heads": m.decoder_heads} if "decoder_heads" in m else {}
        return {"model.heads": config.model.heads, **own}

    def patch_order(self) -> PatchOrder:
        """Returns how the host draws `order`."""
        return PatchOrder("identity", self.grid.shape, num_masked=0)

    @property
    def group(self) -> int:
        """How many neighbours of the batch share an order, and so stay together on a device and in a micro-batch."""
        return self.patch_order().group

    def views(self) -> tuple[View, ...]:
        """Returns the views that the batches of training have in place of `patches` and `order`, if there are any."""
        return ()

    def is_trainable(self, path: str) -> bool:
        """Says whether the optimizer changes the parameter of a path; the others have no optimizer state."""
        return True

    def decays(self, path: str) -> bool:
        """Says whether weight decay applies to the parameter of a path."""
        return path.rsplit("/", 1)[-1] in self.decay_suffixes

    def stop_frozen_gradients(self, params: Params) -> Params:
        """Returns the parameters such that no gradient reaches, or is computed for, those that do not learn."""
        return jax.tree_util.tree_map_with_path(
            lambda keys, leaf: leaf if self.is_trainable(path(keys)) else jax.lax.stop_gradient(leaf), params)

    def drop_path_mask(self, key: jax.Array, images: int) -> jax.Array | None:
        """Draws stochastic depth of the encoder's blocks that learn, float32 [depth, 2, B]; None where it is off."""
        if not self.config.model.drop_path:
            return None
        learning = [self.is_trainable(f"encoder/block_{number:02d}/mlp/") for number in range(self.config.model.depth)]
        return drop_path(key, drop_path_rates(self.config) * learning, images)

    def batch_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns name → global shape and dtype of the fields of training's batches."""
        return with_views(self.eval_spec(), self.views())

    def eval_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns name → global shape and dtype of the fields of evaluations' batches."""
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
        """Whether an image has any number of classes, which batches have as `labels`, uint8 [B, C]."""
        return "labels" in self.eval_spec()

    def at_mask_ratio(self, ratio: float) -> "Method":
        """Returns the method, for the same parameters, with another share of randomly masked patches."""
        raise NotImplementedError

    def init(self, key: jax.Array, batch: Batch) -> tuple[Params, Extras]:
        """Returns initial float32 parameters and the extras (state that no gradient touches)."""
        raise NotImplementedError

    def fit_extras(self, params: Params, extras: Extras, batches: Iterable[dict[str, np.ndarray]] | None) -> Extras:
        """Returns the extras with what is computed once, before the first step, of parameters and training images.

        Args:
          params: those that training starts from.
          extras: as `init` made them.
          batches: of the training split as evaluations see it, with their global rows, on the host; none is
            read where nothing is computed. None: the encoder alone is of interest, and nothing is.
        """
        return extras

    def stored_vocabulary(self) -> tuple[str, str, tuple[int, int]] | None:
        """Returns file, kind and shape (V - 1, P) of the vocabulary that the extras begin with, where one is given.

        The run reads it: a method does no IO.
        """
        return None

    def check_extras(self, extras: Extras) -> None:
        """Raises UserError where restored extras do not belong to what the config names."""

    def loss(self, params: Params, extras: Extras, batch: Batch, key: jax.Array, step: jax.Array,
             train: bool) -> tuple[jax.Array, tuple[Metrics, Extras]]:
        """Returns the scalar loss, the metrics (among them 'loss') and new extras."""
        raise NotImplementedError

    def after_update(self, params: Params, extras: Extras, step: jax.Array) -> Extras:
        """Returns the extras after an accepted update; an EMA teacher lives here."""
        return extras

    def device_augmented(self, batch: Batch, key: jax.Array) -> jax.Array | None:
        """Returns normalised pixels, float32 [B, N, P], as `loss` trains on them, where it changes images; else None.

        Args: as of `loss`.
        """
        return None

    def input_images(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Returns what training makes of images, for figures: caption → uint8 [B, height, width, 3], masks in gray.

        Args:
          batch: of training, on the host: whole groups of rows. `augmented`, where there is one, is what the device
            makes of `patches`, likewise uint8.
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
        """Returns images uint8 [B, height, width, 3] of a batch on the host.

        Args:
          batch: `patches` and `order`.
          shown: bool, to broadcast to [B, N]: of which patches, in their order; the others are gray.
        """
        shown = np.broadcast_to(shown, batch["order"].shape)[..., None]
        return self.grid.unpatchify(np.where(shown, batch["patches"], np.uint8(GRAY)), batch["order"])

    def encode(self, params: Params, extras: Extras, batch: Batch, block: int = -1) -> jax.Array:
        """Returns tokens [B, 1 + N, D] of whole, unmasked images, class token first, patches in the batch's order."""
        pixels, weights = normalize(batch["patches"]), self.eval_params(params, extras)["encoder"]
        return self.encoder.apply({"params": weights}, pixels, batch["order"], block=block)

    def eval_params(self, params: Params, extras: Extras) -> Params:
        """Returns the parameters that evaluations, exports and warm starts are of: where the extras have a `teacher`, a
        tree of parameters by their own names, these in place of the student's (`param_tree.split_eval_params` reads
        them so).
        """
        return {**params, **extras.get("teacher", {})}

    def forward_flops(self) -> int:
        """Returns the FLOPs of one image's forward pass in training: matrix products, 2 per multiply-add."""
        raise NotImplementedError

    def frozen_flops(self) -> int:
        """Returns the FLOPs of one image's share of what has no backward pass: a teacher, the naming of tokens."""
        return 0
