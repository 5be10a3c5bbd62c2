"""Detection and instance segmentation: Mask R-CNN (arXiv 1703.06870) on a plain ViT, as in ViTDet (2203.16527)."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from mae_jax.data.info import DataInfo
from mae_jax.errors import UserError
from mae_jax.losses import detection as losses
from mae_jax.methods import fields
from mae_jax.methods.base import Batch, Extras, Method, Metrics, Params, check_choices
from mae_jax.methods.detection_fields import check, decays, flops, learns
from mae_jax.models.detection import BOX_SIDE, MASK_SIDE, BoxHead, MaskHead, ProposalHead
from mae_jax.models.map_norms import MOMENTS
from mae_jax.models.pyramid import PYRAMIDS
from mae_jax.models.vit import make_encoder
from mae_jax.ops.detection import crops, instance_masks, selection
from mae_jax.ops.detection.anchors import anchors
from mae_jax.ops.detection.assignment import NEITHER, POSITIVE
from mae_jax.ops.detection.boxes import clip, decode, encode
from mae_jax.ops.detection.roi_align import roi_align
from mae_jax.ops.detection.selection import Objects, Training, of_each_image
from mae_jax.ops.patches import normalize
from mae_jax.ops.windows import Spatial

CODERS: tuple[selection.Weights, ...] = ((10, 10, 5, 5), (20, 20, 10, 10), (30, 30, 15, 15))  # delta weights per stage
NORMS = ("layer", "group", "batch", "none")
CANONICAL = 14  # side, in patches, of regions assigned to the map of one patch per cell: 224 pixels for patches of 16


class Detection(Method):
    """Mask R-CNN on a plain ViT: predicts boxes, classes and masks of objects.

    A batch has patches in raster order. The image is in the upper left corner of its canvas; `size` int32 [B, 2] is its
    (height, width), and pixels outside it are 0 after normalization. Objects are padded to M = data.max_objects: `box`
    float32 [B, M, 4], (x1, y1, x2, y2) in pixels of the canvas; `box_class` int32 [B, M]; `box_valid` float32 [B, M],
    1, or 0 for padding; `box_mask` uint8 [B, M, 1568], the packed bits of the mask, 112 x 112 in the frame of the box
    (`ops/detection/instance_masks.py`).

    The loss is a mean over the global batch; Detectron2's mask loss is a mean over the masks of each GPU. Batch norms
    also use the global batch; their running moments are extras, by part of the model.
    """

    task = "detection"
    defaults = fields.DETECTION
    uses_labels = has_class_head = True
    loss_spans_batch = True  # the mask loss is divided by the number of masks in the batch

    @staticmethod
    def class_parameters(config: ConfigDict) -> str:
        boxes = "logits|deltas" if config.method.class_boxes else "logits"
        return rf"(boxes\d*/({boxes})|masks/logits)/(kernel|bias)"

    @staticmethod
    def validate(config: ConfigDict) -> None:
        check_choices(config.method, pyramid=tuple(PYRAMIDS), norm=NORMS, box_norm=("", *NORMS),
                      box_loss=("l1", "giou"), decayed=("detectron2", "all", "matrices", "kernels"),
                      upsampling_norm=("group", "batch"))
        check(config)

    def check_data(self) -> None:
        wanted, there = self.config.method.classes, len(self.data.classes)
        if not there:
            raise UserError("method.name=detection needs data with boxes and classes; these have no classes")
        if wanted not in (0, there):
            raise UserError(f"method.classes={wanted}, but the data has {there} classes; leave it 0, or use other data")

    def __init__(self, config: ConfigDict, data: DataInfo):
        super().__init__(config, data)
        m, model = config.method, config.model
        dtype = jnp.dtype(model.dtype)
        self.classes = m.classes or len(data.classes)
        spatial = [Spatial(self.grid.shape, 0 if not m.window or block in m.global_blocks else m.window,
                           m.relative_positions) for block in range(model.depth)]
        self.encoder = make_encoder(config).clone(class_token=m.class_token, spatial=tuple(spatial))
        self.blocks = m.map_blocks if m.pyramid == "blocks" else (model.depth - 1,)
        extra = len(m.anchor_sizes) - len(m.scales)
        self.pyramid = PYRAMIDS[m.pyramid](m.scales, extra, m.channels, m.norm, m.upsampling_norm, dtype)
        strides = [model.patch[0] / scale for scale in m.scales]
        strides += [strides[-1] * 2**number for number in range(1, extra + 1)]
        self.strides = strides[:len(m.scales)]
        self.anchors = anchors(self.grid.image_size, strides, m.anchor_sizes, m.anchor_ratios)
        self.canonical = (CANONICAL * model.patch[0], model.patch[0])
        self.proposal_head = ProposalHead(m.proposal_convs, len(m.anchor_ratios), dtype)
        box_head = BoxHead(m.box_convs, m.box_layers, m.box_width, self.classes, m.class_boxes,
                           m.box_norm or m.norm, dtype)
        self.box_heads = {f"boxes{number or ''}": box_head for number in range(len(m.stage_overlaps))}
        self.mask_head = MaskHead(m.mask_convs, self.classes, m.norm, dtype)
        self.positives = int(m.regions * m.region_positives)
        self.max_detections = m.max_detections

    def eval_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        spec = super().eval_spec()
        del spec["label"]
        objects = self.config.data.max_objects
        own = {"box": ((objects, 4), jnp.float32), "box_class": ((objects,), jnp.int32),
               "box_valid": ((objects,), jnp.float32), "box_mask": ((objects, crops.PACKED), jnp.uint8),
               "size": ((2,), jnp.int32), "original_size": ((2,), jnp.int32)}
        return spec | {name: jax.ShapeDtypeStruct((self.config.batch_size, *shape), dtype)
                       for name, (shape, dtype) in own.items()}

    def is_trainable(self, path: str) -> bool:
        return learns(self.config.method.train_blocks, self.config.model.depth, path)

    def decays(self, path: str) -> bool:
        return decays(self.config.method.decayed, path)

    def init(self, key: jax.Array, batch: Batch) -> tuple[Params, Extras]:
        keys = iter(jax.random.split(key, 4 + len(self.box_heads)))
        found, encoder = self.encoder.init_with_output(
            next(keys), normalize(batch["patches"][:1]), batch["order"][:1], maps=self.blocks)
        maps, pyramid = self.pyramid.init_with_output(next(keys), self.as_maps(found))
        region = jnp.zeros((1, 1, BOX_SIDE, BOX_SIDE, self.config.method.channels))
        parts = {"encoder": encoder, "pyramid": pyramid, "proposals": self.proposal_head.init(next(keys), maps[-1]),
                 **{name: head.init(next(keys), region) for name, head in self.box_heads.items()},
                 "masks": self.mask_head.init(next(keys), region)}
        moments = {name: part[MOMENTS] for name, part in parts.items() if MOMENTS in part}
        return {name: part["params"] for name, part in parts.items()}, {MOMENTS: moments} if moments else {}

    def run(self, part: str, params: Params, extras: Extras, x: Any, weight: jax.Array | None) -> tuple[Any, Extras]:
        """Applies a part of the model to x, and returns its output and the new extras.

        Args:
          part: 'pyramid', 'masks' or a key of `box_heads`.
          params, extras: the state.
          x: the input of the part.
          weight: in training, weights of images or regions in batch norms, 0 for invalid ones; None in evaluation.
        """
        module = {"pyramid": self.pyramid, "masks": self.mask_head, **self.box_heads}[part]
        moments = extras.get(MOMENTS, {})
        if part not in moments:
            return module.apply({"params": params[part]}, x), extras
        state = {"params": params[part], MOMENTS: moments[part]}
        if weight is None:
            return module.apply(state, x), extras
        out, changed = module.apply(state, x, weight, mutable=[MOMENTS])
        return out, {**extras, MOMENTS: {**moments, part: changed[MOMENTS]}}

    def as_maps(self, found: list[jax.Array]) -> list[jax.Array]:
        """Reshapes the tokens of blocks [B, N, D] to maps [B, rows, columns, D], without the class token."""
        first = int(self.config.method.class_token)
        return [x[:, first:].reshape(len(x), *self.grid.shape, -1) for x in found]

    def pixels(self, batch: Batch) -> jax.Array:
        """Returns normalized pixels, float32 [B, N, P], 0 outside the size of each image."""
        place = np.arange(self.grid.num_patches)
        height, width = self.grid.patch
        rows = place[:, None] // self.grid.columns * height + np.repeat(np.arange(height), width * 3)
        columns = place[:, None] % self.grid.columns * width + np.tile(np.repeat(np.arange(width), 3), height)
        inside = (jnp.asarray(rows, jnp.uint16) < batch["size"][:, :1, None]) & (
            jnp.asarray(columns, jnp.uint16) < batch["size"][:, 1:, None])
        return jnp.where(inside, normalize(batch["patches"]), 0)

    def maps(self, params: Params, extras: Extras, batch: Batch, drop_path_mask: jax.Array | None = None,
             weight: jax.Array | None = None) -> tuple[list[jax.Array], Extras]:
        """Returns the maps of the pyramid, each [B, rows, columns, channels], the finest first, and the new extras."""
        found = self.encoder.apply({"params": params["encoder"]}, self.pixels(batch), batch["order"],
                                   drop_path_mask=drop_path_mask, maps=self.blocks)
        return self.run("pyramid", params, extras, self.as_maps(found), weight)

    def encode(self, params: Params, extras: Extras, batch: Batch, block: int = -1) -> jax.Array:
        """See `Method.encode`; no final norm is applied, and without a class token the mean of the patches is first."""
        pixels = self.pixels(batch) if "size" in batch else normalize(batch["patches"])
        block = block if block >= 0 else self.config.model.depth - 1
        tokens = self.encoder.apply({"params": params["encoder"]}, pixels, batch["order"], block=block)
        if self.config.method.class_token:
            return tokens
        return jnp.concatenate([tokens.mean(1, keepdims=True, dtype=jnp.float32).astype(tokens.dtype), tokens], 1)

    def loss(self, params: Params, extras: Extras, batch: Batch, key: jax.Array, step: jax.Array,
             train: bool) -> tuple[jax.Array, tuple[Metrics, Extras]]:
        """See `Method.loss`; the weighted sum of the mean losses of objectness, proposals, classes, boxes and masks."""
        drop_key, anchor_key, region_key = jax.random.split(key, 3)
        images = len(batch["order"])
        # One key per position in the global batch: an image's random numbers do not depend on other images.
        anchor_keys, region_keys = (jax.vmap(partial(jax.random.fold_in, key))(np.arange(images))
                                    for key in (anchor_key, region_key))
        params, there = self.stop_frozen_gradients(params), batch["valid"] > 0
        objects = Objects(batch["box"], batch["box_class"], (batch["box_valid"] > 0) & there[:, None])
        drop_path_mask, weight = (self.drop_path_mask(drop_key, images), batch["valid"]) if train else (None, None)
        maps, extras = self.maps(params, extras, batch, drop_path_mask, weight)
        logits, deltas = self.ask_anchors(params, maps)
        terms = dict(zip(("objectness", "proposals"), self.proposal_losses(
            anchor_keys, logits, deltas, objects, there, batch["size"]), strict=True))
        boxes, real = self.propose(logits, deltas, batch["size"], train=True)
        regions, training = of_each_image(partial(
            selection.sampled_regions, overlap=self.config.method.stage_overlaps[0], count=self.config.method.regions,
            positives=self.positives), region_keys, boxes, real & there[:, None], objects)
        own, extras = self.box_losses(params, extras, maps, regions, training, objects, batch["size"], train)
        terms |= own
        terms["masks"], extras = self.mask_loss(params, extras, maps, regions, training, objects, batch["box_mask"],
                                                train)
        total = sum(weight * value / jnp.maximum(count, 1) for (value, count), weight in (
            (term, self.weights().get(name, 1.0)) for name, term in terms.items()))
        count = there.sum(dtype=jnp.float32)
        proposed = (training.kind == POSITIVE) & (training.index < boxes.shape[1])  # the true boxes come behind them
        metrics = {"loss": (total * count, count), **{f"loss_{name}": term for name, term in terms.items()},
                   "positive_regions": (proposed.sum(dtype=jnp.float32), count)}
        return total, (metrics, extras)

    def weights(self) -> dict[str, float]:
        """Returns name of a loss term → its weight; terms that are missing have weight 1."""
        m = self.config.method
        stages = [("" if not number else str(number + 1), weight) for number, weight in enumerate(m.stage_weights)]
        return {f"classes{stage}": weight for stage, weight in stages} | {
            f"boxes{stage}": weight * m.box_weight for stage, weight in stages}

    def ask_anchors(self, params: Params, maps: list[jax.Array]) -> tuple[list[jax.Array], list[jax.Array]]:
        """Returns the objectness logits [B, A] and box deltas [B, A, 4] of the A anchors of each map, float32."""
        asked = [self.proposal_head.apply({"params": params["proposals"]}, x) for x in maps]
        return [logits for logits, _ in asked], [deltas for _, deltas in asked]

    def proposal_losses(self, keys: jax.Array, logits: list[jax.Array], deltas: list[jax.Array], objects: Objects,
                        there: jax.Array, size: jax.Array) -> tuple[losses.Term, losses.Term]:
        """Returns the loss terms of objectness and of the boxes of anchors.

        Args:
          keys: keys [B], one per image, for sampling anchors.
          logits, deltas: the result of `ask_anchors`.
          objects: the annotated objects.
          there: bool [B], valid images.
          size: int32 [B, 2], (height, width) of the images.
        """
        m = self.config.method
        training, targets = of_each_image(partial(
            selection.sampled_anchors, anchors=np.concatenate(self.anchors), overlaps=m.anchor_overlaps,
            least=m.least_overlap, count=m.anchor_samples, positives=int(m.anchor_samples * m.anchor_positives),
            border=m.allowed_border), keys, objects, there, size)
        logits, deltas = jnp.concatenate(logits, 1), jnp.concatenate(deltas, 1)
        return losses.proposal_losses(_at(logits, training.index), _at(deltas, training.index), training.kind, targets,
                                      there.sum(dtype=jnp.float32), m.beta)

    def propose(self, logits: list[jax.Array], deltas: list[jax.Array], size: jax.Array,
                train: bool) -> tuple[jax.Array, jax.Array]:
        """Returns the proposals: boxes float32 [B, R, 4], in pixels of the canvas, and bool [B, R], False for padding.

        Args:
          logits, deltas: the result of `ask_anchors`.
          size: int32 [B, 2], (height, width) of the images.
          train: selects method.candidates and method.proposals of training or of evaluation.
        """
        m = self.config.method
        return of_each_image(partial(selection.proposals, anchors=self.anchors, each=m.candidates[not train],
                                     total=m.proposals[not train], overlap=m.proposal_overlap), logits, deltas, size)

    def features(self, maps: list[jax.Array], boxes: jax.Array, side: int) -> jax.Array:
        """Returns the RoIAlign features [B, R, side, side, channels] of boxes [B, R, 4].

        Maps that only have anchors, those beyond method.scales, are not used.
        """
        return roi_align(maps[:len(self.strides)], self.strides, boxes, side, self.config.method.samples,
                         self.canonical)

    def box_losses(self, params: Params, extras: Extras, maps: list[jax.Array], boxes: jax.Array, training: Training,
                   objects: Objects, size: jax.Array, train: bool) -> tuple[dict[str, losses.Term], Extras]:
        """Returns name → loss term of the classes and boxes of each stage, and the new extras."""
        m, terms = self.config.method, {}
        logits = deltas = jnp.zeros(())
        for number, name in enumerate(self.box_heads):
            if number:
                known = jnp.where(training.kind == POSITIVE, _at(objects.kind, training.object), -1)
                boxes = self.refined(number, boxes, logits, deltas, size, known)
                training = of_each_image(partial(selection.relabeled, overlap=m.stage_overlaps[number]), boxes,
                                         training, objects)
            features = _scaled_gradient(self.features(maps, boxes, BOX_SIDE), 1 / len(self.box_heads))
            weight = (training.kind != NEITHER).astype(jnp.float32) if train else None
            (logits, deltas), extras = self.run(name, params, extras, features, weight)
            coder = CODERS[number]
            targets = encode(_at(objects.box, training.object), boxes, coder)
            stage = str(number + 1) if number else ""
            decoded = partial(decode, proposals=boxes, weights=coder) if m.box_loss == "giou" else None
            terms[f"classes{stage}"], terms[f"boxes{stage}"] = losses.region_losses(
                logits, deltas, training.kind, _at(objects.kind, training.object), targets, decoded)
        return terms, extras

    def refined(self, stage: int, boxes: jax.Array, logits: jax.Array, deltas: jax.Array, size: jax.Array,
                known: jax.Array | int = -1) -> jax.Array:
        """Returns the regions of a cascade stage, float32 [B, R, 4]: the decoded boxes of the previous stage.

        Gradients are stopped.

        Args:
          stage: number of the stage, at least 1.
          boxes: float32 [B, R, 4], regions of the previous stage.
          logits: float32 [B, R, C + 1], classes of the previous stage.
          deltas: float32 [B, R, C or 1, 4], box deltas of the previous stage.
          size: int32 [B, 2], (height, width) of the images, to which boxes are clipped.
          known: int32 [B, R], the classes of positives, -1 for other regions. With class-specific boxes, a region uses
            the deltas of this class, and other regions those of their likeliest class (MMDetection's rule).
        """
        if self.config.method.class_boxes:
            kind = jnp.where(known < 0, logits[..., :-1].argmax(-1), known)
            deltas = jnp.take_along_axis(deltas, kind[..., None, None], 2)
        moved = decode(deltas[:, :, 0], boxes, CODERS[stage - 1])
        return jax.lax.stop_gradient(clip(moved, size))

    def mask_loss(self, params: Params, extras: Extras, maps: list[jax.Array], boxes: jax.Array, training: Training,
                  objects: Objects, packed: jax.Array, train: bool) -> tuple[losses.Term, Extras]:
        """Returns the loss term of the masks of positive regions, and the new extras.

        Args:
          boxes, training: the regions of the first stage, positives first.
          packed: uint8 [B, M, 1568], the annotated masks.
          params, extras, maps, objects, train: as for `box_losses`.
        """
        training, boxes = selection.positives(training, self.positives), boxes[:, :self.positives]
        weight = (training.kind == POSITIVE).astype(jnp.float32) if train else None
        logits, extras = self.run("masks", params, extras, self.features(maps, boxes, MASK_SIDE), weight)

        def targets(packed: jax.Array, box: jax.Array, boxes: jax.Array, own: jax.Array) -> jax.Array:
            return instance_masks.targets(instance_masks.unpack(packed[own]), box[own], boxes, 2 * MASK_SIDE)

        wanted = of_each_image(targets, packed, objects.box, boxes, training.object)
        term = losses.mask_loss(logits, _at(objects.kind, training.object), wanted, training.kind == POSITIVE)
        return term, extras

    def detections(self, params: Params, extras: Extras, batch: Batch) -> dict[str, jax.Array]:
        """Returns the detections of each image by descending score, padded to K = method.max_detections.

        Returns:
          `box` float32 [B, K, 4], (x1, y1, x2, y2) in pixels of the canvas, clipped to the image; `score` float32
          [B, K]; `box_class` int32 [B, K]; `detected` float32 [B, K], 1, or 0 for padding; `mask` float32 [B, K, 28,
          28], probabilities in the frame of the box; `crowded` float32 [B], (region, class) pairs beyond CANDIDATES.
        """
        m, size = self.config.method, batch["size"]
        maps, _ = self.maps(params, extras, batch)
        boxes, real = self.propose(*self.ask_anchors(params, maps), size, train=False)
        scores: list[jax.Array] = []
        logits = deltas = jnp.zeros(())
        for number, name in enumerate(self.box_heads):
            if number:
                boxes = self.refined(number, boxes, logits, deltas, size)
            (logits, deltas), _ = self.run(name, params, extras, self.features(maps, boxes, BOX_SIDE), None)
            scores.append(jax.nn.softmax(logits)[..., :-1])
        found = of_each_image(partial(
            selection.detections, weights=CODERS[len(scores) - 1], threshold=m.score, overlap=m.overlap,
            candidates=CANDIDATES, most=m.max_detections), sum(scores) / len(scores), deltas, boxes, real, size)
        logits, _ = self.run("masks", params, extras, self.features(maps, found["box"], MASK_SIDE), None)
        own = jnp.einsum("brhwc,brc->brhw", logits, jax.nn.one_hot(found["box_class"], self.classes),
                         precision="highest")
        return found | {"mask": jax.nn.sigmoid(own)}

    def forward_flops(self) -> int:
        return flops(self)


CANDIDATES = 1000  # maximum number of (region, class) pairs per image (our choice; Detectron2 has no limit)


def _at(values: jax.Array, index: jax.Array) -> jax.Array:
    """Gathers rows [B, S, ...] of values [B, N, ...] at indices [B, S] of the second axis."""
    return jnp.take_along_axis(values, index.reshape(*index.shape, *(1,) * (values.ndim - 2)), 1)


def _scaled_gradient(x: jax.Array, scale: float) -> jax.Array:
    """Returns x with its gradient scaled, so that the stages together contribute as much as one (Detectron2)."""
    fixed = jax.lax.stop_gradient(x)
    return x if scale == 1 else fixed + scale * (x - fixed)
