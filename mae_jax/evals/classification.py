"""Classification metrics: top-1, top-5, mean AP, confusion; over batches, and on paper."""

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

CONFUSION_CLASSES = 100  # up to which the whole table of confusions is kept


class Classification(Evaluation):
    """The figures of `summary`; of several labels per image, VOC's mean average precision ('map') and the plain one.

    The figure is the table of confusions of the last `scalars`, where there are few classes.
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
    """Counts what a batch adds to the figures of `summary`; sums of whole numbers, so exact on any number of devices.

    Of equal logits the class of the lower index comes first. A picture with a NaN among its logits is a miss.

    Args:
      logits: float32 [B, C].
      label: int32 [B], -1 for none.
      valid: float32 [B], 0 for a row that is no picture.
      classes: C.

    Returns:
      int32 'top1' and 'top5' [], hits; 'class_hits' and 'class_totals' [C]; and 'confusion' [C, C], true classes down,
      predicted ones across, without the pictures that have a NaN, where C is at most CONFUSION_CLASSES.

    Raises:
      UserError: the logits are not of C classes.
    """
    if logits.shape[1] != classes:
        raise UserError(f"the model's head has {logits.shape[1]} classes and the evaluated data {classes}")
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
        # A product in float32 is exact: whole numbers, up to the batch size.
        out["confusion"] = truth.astype(jnp.float32).T @ predicted.astype(jnp.float32)
    return jax.tree.map(lambda count: count.astype(jnp.int32), out)


def summary(total: dict[str, np.ndarray]) -> dict[str, float]:
    """Returns the shares, in 0..1, of summed `counts`; NaN where nothing was counted.

    'top1'; 'top5' where there are more than 5 classes; 'mean_per_class', the mean accuracy of the classes that occur.
    """
    hits, totals = total["class_hits"], total["class_totals"]
    examples = int(totals.sum()) or np.nan
    out = {"top1": float(total["top1"] / examples)}
    if len(totals) > 5:
        out["top5"] = float(total["top5"] / examples)
    occurs = totals > 0
    return out | {"mean_per_class": float((hits[occurs] / totals[occurs]).sum() / (occurs.sum() or np.nan))}


def subset_top1(logits: np.ndarray, labels: np.ndarray, classes_present: np.ndarray) -> float:
    """Returns the accuracy among some of the classes that a head knows, as ImageNet-A and ImageNet-R are measured.

    Args:
      logits: float [n, C] of all classes; a row with a NaN among those present is a miss.
      labels: int [n] in 0..C - 1.
      classes_present: int [k], the classes that the data has (arXiv 2006.16241, 1907.07174).
    """
    present = np.unique(classes_present)
    chosen = logits[:, present]
    return float(((present[chosen.argmax(1)] == labels) & ~np.isnan(chosen).any(1)).mean())


def average_precision(scores: np.ndarray, positives: np.ndarray, how: str = "all") -> float:
    """Returns the average precision of a ranking; pictures of equal score are ranked as one.

    Args:
      scores: float [n], high for the class.
      positives: bool or 0/1 [n], whether the picture has the class.
      how: 'all': sum of the precision at each positive rank times the recall it adds, not interpolated (as scikit-learn
        has it); 'voc11': mean over the recalls 0, 0.1 ... 1 of the highest precision at that recall or a higher one
        (VOC2007, its official figure: Everingham et al. 2010).

    Returns:
      A number in 0..1; NaN without positives.
    """
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.diff(scores[order]) != 0, True)  # of a run of equal scores
    hits = np.cumsum(positives[order].astype(np.int64))
    precision, hits = (hits / np.arange(1, len(hits) + 1))[last], hits[last]
    if hits[-1] == 0:
        return float("nan")
    if how == "all":
        return float(precision @ np.diff(hits, prepend=0) / hits[-1])
    # Recall is compared in whole numbers: 3 of 10 reach a recall of 0.3, which 0.1 · 3 exceeds.
    return float(np.mean([precision[10 * hits >= tenth * hits[-1]].max() for tenth in range(11)]))


def mean_ap(scores: np.ndarray, labels: np.ndarray, how: str = "all") -> float:
    """Returns the mean over the classes that occur of `average_precision`; scores float [n, C], labels uint8 [n, C]."""
    occurs = np.flatnonzero(labels.any(0))
    if not len(occurs):
        return float("nan")
    return float(np.mean([average_precision(scores[:, c], labels[:, c], how) for c in occurs]))
