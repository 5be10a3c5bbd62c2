"""Overlap (IoU) of attention maps with the foreground of segmentation masks."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mae_jax.evals.attention_maps import maps
from mae_jax.evals.base import Evaluation
from mae_jax.evals.context import Context
from mae_jax.losses.segmentation import IGNORED
from mae_jax.methods.base import Batch, Method
from mae_jax.ops.partitioning import constrain
from mae_jax.ops.resampling import upsample

MASSES = tuple(np.arange(1, 20) / 20)  # candidate attention masses; DINO (arXiv 2104.14294, 4.2.2) uses 0.6


class AttentionOverlap(Evaluation):
    """The metrics of `iou`; head and mass are chosen on the validation part or, without one, on the training split."""

    name, when = "attention_overlap", "final"

    def applies(self, method: Method, data: Any) -> bool:
        return method.task == "segmentation" and method.background >= 0

    def metric_names(self, method: Method, data: Any) -> list[str]:
        return ["attention_iou", "attention_mass", "attention_head", "foreground_share"]

    def scalars(self, ctx: Context) -> dict[str, float]:
        c = ctx.method.config
        choose = ctx.batches(ctx.data.validate if c.data.val_split else ctx.data.support)
        return iou(ctx.method, ctx.params, ctx.extras, choose, ctx.batches(), c.eval.attention_block,
                   c.eval.attention_query)


def covers(weights: jax.Array, masses: tuple[float, ...]) -> jax.Array:
    """Thresholds attention maps by mass (DINO, section 4.2.2): keeps the fewest pixels whose weights sum to the mass.

    Args:
      weights: float [..., height, width], not negative.
      masses: shares of the total weight, in 0..1.

    Returns:
      bool [len(masses), ..., height, width]. All pixels that tie with the last one are kept.
    """
    flat = weights.reshape(*weights.shape[:-2], -1)
    falling = -jnp.sort(-flat, -1)
    sums = jnp.cumsum(falling, -1) / flat.sum(-1, keepdims=True)
    last = [(sums < mass).sum(-1, keepdims=True).clip(max=flat.shape[-1] - 1) for mass in masses]
    return jnp.stack([weights >= jnp.take_along_axis(falling, index, -1)[..., None] for index in last])


@functools.lru_cache(maxsize=8)
def _overlaps(method: Method, block: int, query: str) -> Callable[..., tuple[jax.Array, ...]]:
    """Returns a compiled function of (params, extras, batch) that sums over the images of a batch.

    It returns the sum of IoU float32 [masses, 1 + H], where map 0 is the mean over heads; the sum of the IoU of
    predicting every pixel, float32 []; and the number of images, float32 []. Only images with foreground (any class
    except the background) count.
    """
    def measure(params: Any, extras: Any, batch: Batch) -> tuple[jax.Array, ...]:
        weights = maps(method, params, extras, batch, block, query).transpose(0, 2, 3, 1)
        weights = jnp.concatenate([weights.mean(-1, keepdims=True), weights], -1)
        kept = covers(upsample(weights, method.grid.patch).transpose(0, 3, 1, 2), MASSES)
        classes = method.pixel_classes(batch)[:, None]
        known = classes != IGNORED
        wanted = known & (classes != method.background)
        union = ((kept & known) | wanted).sum((-2, -1))
        shares = (kept & wanted).sum((-2, -1)) / jnp.maximum(union, 1)
        everything = wanted.sum((-2, -1)) / jnp.maximum(known.sum((-2, -1)), 1)
        counts = wanted.any((-2, -1)).sum(dtype=jnp.float32)
        return jax.tree.map(constrain, (shares.sum(1), everything.sum(), counts))

    return jax.jit(measure)


def iou(method: Method, params: Any, extras: Any, choose: Iterable[Batch], test: Iterable[Batch], block: int = -1,
        query: str = "cls") -> dict[str, float]:
    """Returns the mean IoU over images of thresholded attention and foreground.

    The map (a head, or the mean over heads) and the attention mass are those with the best IoU on `choose`; `test` is
    evaluated once with them.

    Args:
      method: a method of the task 'segmentation'.
      params, extras: the state of the method.
      choose, test: batches of disjoint sets of images.
      block, query: as for `maps`.

    Returns:
      'attention_iou', 'attention_mass' (in 0..1), 'attention_head' (-1: the mean over heads), and the baseline
      'foreground_share', the IoU of predicting every pixel. {} without a background class or without foreground.
    """
    if method.background < 0:
        return {}
    chosen, held_out = (_mean_overlap(method, params, extras, part, block, query) for part in (choose, test))
    if chosen is None or held_out is None:
        return {}
    mass, which = np.unravel_index(chosen[0].argmax(), chosen[0].shape)
    return {"attention_iou": float(held_out[0][mass, which]), "attention_mass": float(MASSES[mass]),
            "attention_head": float(which - 1), "foreground_share": float(held_out[1])}


def _mean_overlap(method: Method, params: Any, extras: Any, batches: Iterable[Batch], block: int,
                  query: str) -> tuple[np.ndarray, float] | None:
    parts = [jax.device_get(_overlaps(method, block, query)(params, extras, batch)) for batch in batches]
    overlaps, everything, count = (sum(column) for column in zip(*parts, strict=True)) if parts else (0, 0, 0)
    return (overlaps / count, everything / count) if count else None
