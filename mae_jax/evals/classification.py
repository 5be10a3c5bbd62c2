"""Classification metrics: top-1, top-5, mean average precision, and the confusion matrix."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mae_jax.errors import UserError
from mae_jax.evals import plots
from mae_jax.evals.base import Evaluation
from mae_jax.evals.context import Context
from mae_jax.methods.base import Batch, Method

CONFUSION_CLASSES = 100  # up to which the confusion matrix is computed


class Classification(Evaluation):
    """The metrics of `summary`; for multi-label data, VOC's mean AP ('map') and the non-interpolated one ('map_all').

    The image is the confusion matrix of the last `scalars`, for at most CONFUSION_CLASSES classes.
    """

    name = "classification"

    def applies(self, method: Method, data: Any) -> bool:
        return method.task == "classification"

    def metric_names(self, method: Method, data: Any) -> list[str]:
        if method.multi_label:
            return ["map", "map_all"]
        return ["top1", *["top5"] * (method.classes > 5), "mean_per_class"]

    def counts(self, method: Method, outputs: jax.Array, batch: Batch) -> dict[str, jax.Array]:
        return counts(outputs, batch["label"], batch["valid"], method.classes)

    def scalars(self, ctx: Context) -> dict[str, float]:
        found, several = ctx.held_out, ctx.method.multi_label
        ctx.notes[self.name] = ctx.part, None if several else found.counts.get("confusion")
        if not several:
            return summary(found.counts) if found.counts else {}
        if not found.rows:
            return {}
        logits, labels = found.rows["logits"], found.rows["labels"]
        return {"map": mean_ap(logits, labels, "voc11"), "map_all": mean_ap(logits, labels)}

    def images(self, ctx: Context) -> Iterator[tuple[str, np.ndarray]]:
        part, confusion = ctx.notes.get(self.name, ("", None))
        if confusion is not None:
            yield "confusion", plots.confusion(confusion, ctx.data.classes, part)


@partial(jax.jit, static_argnames="classes")
def counts(logits: jax.Array, label: jax.Array, valid: jax.Array, classes: int) -> dict[str, jax.Array]:
    """Returns the counts of a batch for `summary`; integers, and so exact on any number of devices.

    Ties between logits go to the class of the lower index. An image with a NaN among its logits is a miss.

    Args:
      logits: float32 [B, C].
      label: int32 [B], -1 for none.
      valid: float32 [B], 0 for a row without an image.
      classes: C.

    Returns:
      int32 'top1' and 'top5' [], the hits; 'class_hits' and 'class_totals' [C]; and, for C up to CONFUSION_CLASSES,
      'confusion' [C, C] with true classes as rows and predicted classes as columns, without images that have a NaN.

    Raises:
      UserError: the logits do not have C classes.
    """
    if logits.shape[1] != classes:
        raise UserError(f"the model's head has {logits.shape[1]} classes, and the evaluated data have {classes}")
    number = jnp.arange(classes)
    truth = (label[:, None] == number) & (valid > 0)[:, None]
    own = jnp.where(truth, logits, -jnp.inf).max(1, keepdims=True)
    before = (logits > own) | (logits == own) & (number < label[:, None])
    defined = truth.any(1) & ~jnp.isnan(logits).any(1)
    rank = jnp.where(defined, before.sum(1), classes + 5)
    out = {"top1": (rank < 1).sum(), "top5": (rank < 5).sum(), "class_totals": truth.sum(0),
           "class_hits": (truth & (rank < 1)[:, None]).sum(0)}
    if classes <= CONFUSION_CLASSES:
        predicted = (logits.argmax(1)[:, None] == number) & defined[:, None]
        # The float32 product is exact: its values are integers up to the batch size.
        out["confusion"] = truth.astype(jnp.float32).T @ predicted.astype(jnp.float32)
    return jax.tree.map(lambda count: count.astype(jnp.int32), out)


def summary(total: dict[str, np.ndarray]) -> dict[str, float]:
    """Returns the metrics of summed `counts`, in 0..1; NaN if nothing was counted.

    'top1'; 'top5' for more than 5 classes; 'mean_per_class', the mean accuracy over the classes that occur.
    """
    hits, totals = total["class_hits"], total["class_totals"]
    examples = int(totals.sum()) or np.nan
    out = {"top1": float(total["top1"] / examples)}
    if len(totals) > 5:
        out["top5"] = float(total["top5"] / examples)
    occurs = totals > 0
    return out | {"mean_per_class": float((hits[occurs] / totals[occurs]).sum() / (occurs.sum() or np.nan))}


def subset_top1(logits: np.ndarray, labels: np.ndarray, classes_present: np.ndarray) -> float:
    """Returns the top-1 accuracy restricted to a subset of the classes, the protocol of ImageNet-A and ImageNet-R.

    Args:
      logits: float [n, C] of all classes; a row with a NaN among the present classes is a miss.
      labels: int [n] in 0..C - 1.
      classes_present: int [k], the classes that occur in the data (arXiv 2006.16241, 1907.07174).
    """
    present = np.unique(classes_present)
    chosen = logits[:, present]
    return float(((present[chosen.argmax(1)] == labels) & ~np.isnan(chosen).any(1)).mean())


def average_precision(scores: np.ndarray, positives: np.ndarray, how: str = "all") -> float:
    """Returns the average precision of a ranking; images of equal score share one rank.

    Args:
      scores: float [n], high for the class.
      positives: bool or 0/1 [n], whether the image has the class.
      how: 'all': sum of precision times the increase of recall, not interpolated (as in scikit-learn); 'voc11': mean
        over the recalls 0, 0.1 ... 1 of the highest precision at that recall or above (VOC2007's official metric:
        Everingham et al. 2010).

    Returns:
      A number in 0..1; NaN without positives.
    """
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.diff(scores[order]) != 0, True)  # whether a row is the last of its run of equal scores
    hits = np.cumsum(positives[order].astype(np.int64))
    precision, hits = (hits / np.arange(1, len(hits) + 1))[last], hits[last]
    if hits[-1] == 0:
        return float("nan")
    if how == "all":
        return float(precision @ np.diff(hits, prepend=0) / hits[-1])
    # Recalls are compared as integers: 3 of 10 must reach a recall of 0.3, but 0.1 · 3 is larger in floating point.
    return float(np.mean([precision[10 * hits >= tenth * hits[-1]].max() for tenth in range(11)]))


def mean_ap(scores: np.ndarray, labels: np.ndarray, how: str = "all") -> float:
    """Returns the mean of `average_precision` over the classes that occur; NaN if none does.

    Args:
      scores: float [n, C].
      labels: uint8 [n, C], 1 for each class of an image.
      how: as for `average_precision`.
    """
    occurs = np.flatnonzero(labels.any(0))
    if not len(occurs):
        return float("nan")
    return float(np.mean([average_precision(scores[:, c], labels[:, c], how) for c in occurs]))
