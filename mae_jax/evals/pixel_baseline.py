"""Probes of pixels: the floor that a learned feature must beat."""

from typing import Any

import numpy as np

from mae_jax.evals import knn, linear_probe
from mae_jax.evals.accumulators import HostRows
from mae_jax.evals.base import Evaluation
from mae_jax.evals.context import Context, Pair, Source, labeled_rows
from mae_jax.methods.base import Method
from mae_jax.rng import rng

PIXEL_LIMIT = 12_288  # values of an image up to which raw pixels are probed (64 × 64 × 3)
COMPONENTS = 256  # principal ones, that the linear probe gets (our choice): of all values it takes ten times as long
SAMPLE = 1024  # training images that these are computed of (our choice)
FLAT = 1e-6  # share of the largest variance below which a component is rounding


class PixelBaseline(Evaluation):
    """Both probes on the pixels of small images, where features are probed.

    k-NN has all values as they are. The linear probe has them standardised, as features are, along their principal
    axes: not whitened, its penalty means what it did, and what is left out is what it would penalise most.
    """

    name, when = "pixel_baseline", "first"

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
    """Returns the coefficients of values [n, D], and of others, on their leading principal axes: [n, at most `most`].

    The axes are those of at most SAMPLE of the values, always the same ones, by the eigenvectors of their Gram matrix:
    D may be large.
    """
    sample = values[np.sort(rng(0, "components", 0).permutation(len(values))[:SAMPLE])]
    mean = sample.mean(0)
    sample = sample - mean
    variances, vectors = np.linalg.eigh(sample @ sample.T)  # ascending
    kept = np.flatnonzero(variances > FLAT * variances[-1])[::-1][:most]
    axes = sample.T @ (vectors[:, kept] / np.sqrt(variances[kept]))
    return [(x - mean) @ axes for x in (values, *others)]


def _pixels(ctx: Context, source: Source) -> Pair:
    """Returns (pixels in raster order, float32 [n, values] in 0..1; labels [n]) of the labelled images of a part."""
    rows = HostRows(ctx.mesh)
    for batch in ctx.batches(source):
        rows.add(labeled_rows(batch), batch["patches"], batch["order"], batch["label"])
    if not rows.parts:
        return np.zeros((0, 0), np.float32), np.zeros(0, np.int32)
    patches, order, labels = rows.collect()
    images = ctx.method.grid.unpatchify(patches, order)
    return images.reshape(len(images), np.prod(images.shape[1:])).astype(np.float32) / 255, labels
