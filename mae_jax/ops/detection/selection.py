"""What one image's boxes become from stage to stage: proposals, regions to train on, detections; in static shapes.

Each takes one image's arrays, and no gradient goes through any of them.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from mae_jax.ops import partitioning
from mae_jax.ops.detection import nms
from mae_jax.ops.detection.assignment import NEITHER, POSITIVE, match, sample
from mae_jax.ops.detection.boxes import clip, decode, encode, iou, sides

Weights = tuple[float, float, float, float]
UNIT: Weights = (1.0, 1.0, 1.0, 1.0)  # of the coder of proposals


class Objects(NamedTuple):
    """The objects of an image, padded.

    Attributes:
      box: float32 [M, 4].
      kind: int32 [M], their classes.
      real: bool [M]; False is padding.
    """

    box: jax.Array
    kind: jax.Array
    real: jax.Array


class Training(NamedTuple):
    """What boxes of an image are trained for.

    Attributes:
      index: int32 [S], which of the candidates they are.
      kind: int32 [S], POSITIVE, NEGATIVE or NEITHER; the positives come first.
      object: int32 [S], the matched object.
    """

    index: jax.Array
    kind: jax.Array
    object: jax.Array


def of_each_image(function: Callable[..., Any], *arrays: Any) -> Any:
    """Returns what a function of one image's arrays gives for each of B images, whose arrays are [B, ...].

    Each device does so for its own images, and none waits for another one. No gradient goes through.
    """
    arrays, each = jax.lax.stop_gradient(arrays), jax.vmap(function)
    rows = P(partitioning.ROWS)
    if len(jax.tree.leaves(arrays)[0]) % partitioning.row_shares():  # few images that all devices hold, for figures
        return each(*arrays)
    return partitioning.on_each_device(each, rows, rows)(*arrays)


def sampled_anchors(key: jax.Array, objects: Objects, there: jax.Array, anchors: jax.Array,
                    overlaps: tuple[float, float], least: float, count: int,
                    positives: int) -> tuple[Training, jax.Array]:
    """Returns the anchors that the proposals' head is trained on, and the targets of their deltas, float32 [S, 4].

    Args:
      key: of the image.
      objects: of the image.
      there: bool [], whether there is an image.
      anchors: float32 [A, 4].
      overlaps: IoU from which on an anchor is positive, and below which it is negative.
      least: see `match`.
      count, positives: see `sample`.
    """
    anchors = jnp.asarray(anchors)
    found = match(iou(objects.box, anchors), objects.real, *overlaps, True, least)
    index, kind = sample(key, jnp.where(there, found.kind, NEITHER), count, positives)
    own = found.object[index]
    return Training(index, kind, own), encode(objects.box[own], anchors[index], UNIT)


def proposals(logits: Sequence[jax.Array], deltas: Sequence[jax.Array], size: jax.Array, anchors: Sequence[jax.Array],
              each: int, total: int, overlap: float) -> tuple[jax.Array, jax.Array]:
    """Returns the likeliest boxes of objects, float32 [total, 4], by descending logit, and which are there: bool.

    Args:
      logits, deltas: of each map of the pyramid, float32 [A] and [A, 4].
      size: int32 [2], (height, width) of the image without padding, to which boxes are cut.
      anchors: of each map, float32 [A, 4].
      each: of each map, the likeliest so many are taken.
      total: of all maps together; those are by their logits alone.
      overlap: IoU above which the less likely of two boxes of one map goes.
    """
    most = min(each, max(len(level) for level in logits))
    found = []
    for level, moved, start in zip(logits, deltas, anchors, strict=True):
        taken = min(most, len(level))
        score, index = jax.lax.top_k(level, taken)
        box = clip(decode(moved[index], jnp.asarray(start)[index], UNIT), size)
        there = (sides(box) > 0).all(-1) & jnp.isfinite(score)
        padding = (0, most - taken)
        found.append((jnp.pad(score, padding), jnp.pad(box, (padding, (0, 0))), jnp.pad(there, padding)))
    score, box, there = (jnp.stack(parts) for parts in zip(*found, strict=True))
    there = jax.vmap(lambda box, there: nms.kept(box, there, overlap))(box, there)
    score = jnp.where(there, score, -jnp.inf).reshape(-1)
    best, index = jax.lax.top_k(score, min(total, len(score)))
    padding = (0, total - len(index))
    kept = jnp.pad(best > -jnp.inf, padding)
    return jnp.where(kept[:, None], jnp.pad(box.reshape(-1, 4)[index], (padding, (0, 0))), 0), kept


def sampled_regions(key: jax.Array, boxes: jax.Array, there: jax.Array, objects: Objects, overlap: float, count: int,
                    positives: int) -> tuple[jax.Array, Training]:
    """Returns the regions that the heads are trained on, float32 [S, 4], and for what: of proposals and the objects.

    Args:
      key: of the image.
      boxes, there: of `proposals`.
      objects: of the image; they are candidates too, so that there are positives from the first step on.
      overlap: IoU from which on a region is positive; below it is negative.
      count, positives: see `sample`.
    """
    boxes, there = jnp.concatenate([boxes, objects.box]), jnp.concatenate([there, objects.real])
    found = match(iou(objects.box, boxes), objects.real, overlap, overlap, False)
    index, kind = sample(key, jnp.where(there, found.kind, NEITHER), count, positives)
    return boxes[index], Training(index, kind, found.object[index])


def relabeled(boxes: jax.Array, before: Training, objects: Objects, overlap: float) -> Training:
    """Returns what regions that a stage has moved are trained for in the next one (1712.00726, section 4)."""
    found = match(iou(objects.box, boxes), objects.real, overlap, overlap, False)
    there = (before.kind != NEITHER) & (sides(boxes) > 0).all(-1)
    return Training(before.index, jnp.where(there, found.kind, NEITHER), found.object)


def detections(scores: jax.Array, deltas: jax.Array, boxes: jax.Array, there: jax.Array, size: jax.Array,
               weights: Weights, threshold: float, overlap: float, candidates: int, most: int) -> dict[str, jax.Array]:
    """Returns what is detected, by descending score and padded to `most` rows.

    All pairs of a region and a class above the threshold are candidates, and of those the likeliest; greedy suppression
    is within a class. It is exact where no more pairs are above the threshold, which `crowded` says.

    Args:
      scores: float32 [R, C], probabilities.
      deltas: float32 [R, C, 4], or [R, 1, 4] for all classes.
      boxes, there: of the regions, [R, 4] and [R].
      size: int32 [2], (height, width) of the image without padding.
      weights: of the boxes' coder.
      threshold: of scores.
      overlap: IoU above which the less likely of two boxes of one class goes.
      candidates: how many pairs at the most.

    Returns:
      `box` float32 [most, 4], `score` float32 [most], `box_class` int32 [most], `detected` float32 [most], 1 or 0 for
      padding; `crowded` float32 [], how many candidates there were too many.
    """
    classes = scores.shape[1]
    flat = jnp.where(there[:, None] & (scores > threshold), scores, -1).reshape(-1)
    score, index = jax.lax.top_k(flat, min(candidates, len(flat)))
    region, kind = index // classes, index % classes
    moved = deltas[region, jnp.minimum(kind, deltas.shape[1] - 1)]
    box = clip(decode(moved, boxes[region], weights), size)
    keep = nms.kept(box, (score > 0) & (sides(box) > 0).all(-1), overlap, kind)
    score, best = jax.lax.top_k(jnp.where(keep, score, -1), min(most, len(score)))
    real, padding = score > 0, (0, most - len(best))
    found = {"box": jnp.where(real[:, None], box[best], 0), "score": jnp.where(real, score, 0),
             "box_class": jnp.where(real, kind[best], 0).astype(jnp.int32), "detected": real.astype(jnp.float32)}
    found = {name: jnp.pad(x, (padding, *((0, 0),) * (x.ndim - 1))) for name, x in found.items()}
    return found | {"crowded": jnp.maximum((flat > 0).sum() - len(index), 0).astype(jnp.float32)}


def positives(training: Training, count: int) -> Training:
    """Returns the first so many of sampled boxes [..., S], among which all positives are; the others as NEITHER."""
    first = Training(*(part[..., :count] for part in training))
    return first._replace(kind=jnp.where(first.kind == POSITIVE, POSITIVE, NEITHER))
