"""Probes of raw pixels: the floor that a learned feature must beat."""

from typing import Any

import numpy as np

from mae_jax.evals.accumulators import HostRows
from mae_jax.evals.base import Evaluation
from mae_jax.evals.context import Context, Pair, Source, labeled_rows
from mae_jax.evals.frozen_probes import probes
from mae_jax.methods.base import Method

PIXEL_LIMIT = 12_288  # values of an image up to which raw pixels are probed (64 × 64 × 3)


class PixelBaseline(Evaluation):
    """Both probes on the pixels of small images, where features are probed."""

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
        return probes(train, test, len(ctx.data.classes), ctx.method.config.eval, "pixels_top1")


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
