"""Selection of boxes in a two-stage detector, in static shapes: sampled anchors, proposals, regions, detections.

Each function takes the arrays of one image; `of_each_image` maps it over a batch and stops gradients.
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
UNIT: Weights = (1.0, 1.0, 1.0, 1.0)  # factors of the deltas between anchors and proposals


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
    """Sampled boxes of an image and their assignment.

    Attributes:
      index: int32 [S], indices among the candidates.
      kind: int32 [S], POSITIVE, NEGATIVE or NEITHER; positives come first.
      object: int32 [S], index of the matched object.
    """

    index: jax.Array
    kind: jax.Array
    object: jax.Array


def of_each_image(function: Callable[..., Any], *arrays: Any) -> Any:
    """Maps a function of one image's arrays over B images, whose arrays are [B, ...], and stops gradients.

    Each device processes its own images, without communication.
    """
    arrays, each = jax.lax.stop_gradient(arrays), jax.vmap(function)
    rows = P(partitioning.ROWS)
    if len(jax.tree.leaves(arrays)[0]) % partitioning.row_shares():  # a few replicated images, for figures
        return each(*arrays)
    return partitioning.on_each_device(each, rows, rows)(*arrays)


def sampled_anchors(key: jax.Array, objects: Objects, there: jax.Array, size: jax.Array, anchors: jax.Array,
                    overlaps: tuple[float, float], least: float, count: int, positives: int,
                    border: int = -1) -> tuple[Training, jax.Array]:
    """Samples anchors to train the proposal head on; returns them and their target deltas, float32 [S, 4].

    Args:
      key: of the image.
      objects: of the image.
      there: bool [], False for padding of the batch.
      size: int32 [2], (height, width) of the image without padding.
      anchors: float32 [A, 4].
      overlaps: the thresholds `positive` and `negative` of `match`.
      least: see `match`.
      count, positives: see `sample`; S = count.
      border: pixels by which anchors may cross the image's border; others match nothing. -1: any number.
    """
    anchors, near = jnp.asarray(anchors), there
    overlap = iou(objects.box, anchors)
    if border >= 0:
        near = there & (anchors[:, :2] >= -border).all(1) & (anchors[:, 2:] < size[::-1] + border).all(1)
        overlap = jnp.where(near, overlap, 0)
    found = match(overlap, objects.real, *overlaps, True, least)
    index, kind = sample(key, jnp.where(near, found.kind, NEITHER), count, positives)
    own = found.object[index]
    return Training(index, kind, own), encode(objects.box[own], anchors[index], UNIT)


def proposals(logits: Sequence[jax.Array], deltas: Sequence[jax.Array], size: jax.Array, anchors: Sequence[jax.Array],
              each: int, total: int, overlap: float) -> tuple[jax.Array, jax.Array]:
    """Returns the proposals of an image, float32 [total, 4], by descending logit, and bool [total]: False is padding.

    Args:
      logits, deltas: for each map of the pyramid, float32 [A] and [A, 4].
      size: int32 [2], (height, width) of the image without padding, to which boxes are clipped.
      anchors: for each map, float32 [A, 4].
      each: number of boxes with the highest logits to take from each map, before suppression.
      total: number of boxes with the highest logits to keep from all maps together, after suppression.
      overlap: IoU threshold of the suppression, which is within a map.
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
    """Samples regions to train the heads on; returns them, float32 [S, 4], and their assignment to objects.

    Args:
      key: of the image.
      boxes, there: proposals as from `proposals`.
      objects: of the image; their boxes are candidates too, so that there are positives from the first step on.
      overlap: regions with at least this IoU are positive, others negative.
      count, positives: see `sample`; S = count.
    """
    boxes, there = jnp.concatenate([boxes, objects.box]), jnp.concatenate([there, objects.real])
    found = match(iou(objects.box, boxes), objects.real, overlap, overlap, False)
    index, kind = sample(key, jnp.where(there, found.kind, NEITHER), count, positives)
    return boxes[index], Training(index, kind, found.object[index])


def relabeled(boxes: jax.Array, before: Training, objects: Objects, overlap: float) -> Training:
    """Matches the regions [S, 4] that a cascade's stage has refined again, for the next stage (arXiv 1712.00726, 4).

    Args:
      boxes: refined regions, float32 [S, 4].
      before: their assignment in the previous stage; NEITHER stays, and empty boxes become NEITHER.
      objects: of the image.
      overlap: regions with at least this IoU are positive, others negative.
    """
    found = match(iou(objects.box, boxes), objects.real, overlap, overlap, False)
    there = (before.kind != NEITHER) & (sides(boxes) > 0).all(-1)
    return Training(before.index, jnp.where(there, found.kind, NEITHER), found.object)


def detections(scores: jax.Array, deltas: jax.Array, boxes: jax.Array, there: jax.Array, size: jax.Array,
               weights: Weights, threshold: float, overlap: float, candidates: int, most: int) -> dict[str, jax.Array]:
    """Returns the detections of an image, by descending score and padded to `most` rows.

    The candidates are the pairs of a region and a class with a score above the threshold, at most `candidates` of them
    by score. Greedy suppression is within a class. The result is exact if `crowded` is 0.

    Args:
      scores: probabilities float32 [R, C].
      deltas: float32 [R, C, 4] per class, or [R, 1, 4] for all classes.
      boxes, there: regions float32 [R, 4], and bool [R]; False is padding.
      size: int32 [2], (height, width) of the image without padding.
      weights: see `boxes.decode`.
      threshold: lower bound of scores.
      overlap: IoU threshold of the suppression.
      candidates: most pairs to consider.
      most: number of rows of the result.

    Returns:
      `box` float32 [most, 4], `score` float32 [most], `box_class` int32 [most]; `detected` float32 [most], 1 or 0 for
      padding; `crowded` float32 [], the number of pairs above the threshold that were not considered.
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
    """Returns the first `count` of sampled boxes [..., S], which must include all positives; others become NEITHER."""
    first = Training(*(part[..., :count] for part in training))
    return first._replace(kind=jnp.where(first.kind == POSITIVE, POSITIVE, NEITHER))
