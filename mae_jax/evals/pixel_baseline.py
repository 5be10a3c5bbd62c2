"""Probes on raw pixels: a baseline that learned features must beat."""

from typing import Any

import numpy as np

from mae_jax.evals import knn, linear_probe
from mae_jax.evals.accumulators import HostRows
from mae_jax.evals.base import Evaluation
from mae_jax.evals.context import Context, Pair, Source, labeled_rows
from mae_jax.methods.base import Method
from mae_jax.rng import rng

PIXEL_LIMIT = 12_288  # maximum number of values of an image (64 × 64 × 3)
COMPONENTS = 256  # principal components for the linear probe (our choice); with all values it takes ten times as long
SAMPLE = 1024  # training images for computing the components (our choice)
FLAT = 1e-6  # share of the largest variance below which a component is a rounding error


class PixelBaseline(Evaluation):
    """The linear and the k-NN probe on the raw pixels of small images.

    k-NN uses all values without scaling. The linear probe uses the leading principal components of standardized pixels.
    They are not whitened: its L2 penalty is that of standardized pixels, and the omitted components are those that it
    penalizes most.
    """

    name, when = "pixel_baseline", "last"

    def applies(self, method: Method, data: Any) -> bool:
        small = np.prod(method.config.data.image_size) * 3 <= PIXEL_LIMIT
        return bool(small) and method.task == "pretraining" and len(data.classes) > 1

    def metric_names(self, method: Method, data: Any) -> list[str]:
        return ["linear/pixels_top1", "knn/pixels_top1"]

    def scalars(self, ctx: Context) -> dict[str, float]:
        train, test = (_pixels(ctx, source) for source in (ctx.data.support, ctx.source))
        if not (len(train[1]) and len(test[1])):
            return {}
        classes, c = len(ctx.data.classes), ctx.method.config.eval
        few, few_tests = principal_components(*linear_probe.standardize(train[0], test[0]))
        linear = linear_probe.top1_as_they_are((few, train[1]), (few_tests, test[1]), classes)
        return {"linear/pixels_top1": linear,
                "knn/pixels_top1": knn.top1(train, test, classes, c.knn_k, c.knn_temperature)}


def principal_components(values: np.ndarray, *others: np.ndarray, most: int = COMPONENTS) -> list[np.ndarray]:
    """Returns the leading principal components [n, at most `most`] of values [n, D], and of `others` on the same axes.

    The axes are fitted on a fixed random sample of at most SAMPLE rows, from the eigenvectors of its Gram matrix, so
    that D can be large.
    """
    sample = values[np.sort(rng(0, "components", 0).permutation(len(values))[:SAMPLE])]
    mean = sample.mean(0)
    sample = sample - mean
    variances, vectors = np.linalg.eigh(sample @ sample.T)  # ascending
    kept = np.flatnonzero(variances > FLAT * variances[-1])[::-1][:most]
    axes = sample.T @ (vectors[:, kept] / np.sqrt(variances[kept]))
    return [(x - mean) @ axes for x in (values, *others)]


def _pixels(ctx: Context, source: Source) -> Pair:
    """Returns pixels in raster order, float32 [n, values] in 0..1, and labels int32 [n] of a part's labeled images."""
    rows = HostRows(ctx.mesh)
    for batch in ctx.batches(source):
        rows.add(labeled_rows(batch), batch["patches"], batch["order"], batch["label"])
    if not rows.parts:
        return np.zeros((0, 0), np.float32), np.zeros(0, np.int32)
    patches, order, labels = rows.collect()
    images = ctx.method.grid.unpatchify(patches, order)
    return images.reshape(len(images), np.prod(images.shape[1:])).astype(np.float32) / 255, labels
