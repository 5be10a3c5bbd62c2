"""Average precision of detected boxes and masks; the detections as a file of COCO results and as images."""

import json
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np

from mae_jax.data.objects import Annotations
from mae_jax.errors import pluralize
from mae_jax.evals import average_precision, detected, object_figures
from mae_jax.evals.average_precision import FIGURES, Found
from mae_jax.evals.base import Evaluation
from mae_jax.evals.context import Context
from mae_jax.evals.image_grid import paired, tile
from mae_jax.methods.base import Method
from mae_jax.ops import example_ids

log = logging.getLogger(__name__)


class Detection(Evaluation):
    """COCO's metrics: `box_ap`, `box_ap50` ... and, for data with masks, `mask_ap` ...

    They cover all readable images, in pixels of the original images, with the annotated boxes and areas. `crowded` is
    the mean number of (region, class) pairs per image beyond the method's number of candidates.
    """

    name = "detection"

    def applies(self, method: Method, data: Any) -> bool:
        return method.task == "detection"

    def metric_names(self, method: Method, data: Any) -> list[str]:
        config = method.config.data
        parts = [data.parts.get(split) for split in (config.val_split, config.eval_split) if split]
        found = [each for part in parts if part is not None and (each := _annotations(part))]
        return _names(all(each.masks for each in found)) if found else []

    def scalars(self, ctx: Context) -> dict[str, float]:
        annotations, found = _annotations(_part(ctx)), list(ctx.held_out.rows.get("detections", ()))
        if annotations is None and found:
            log.warning("no average precision: data.source=%r has no annotations",
                        ctx.method.config.data.source)
        if annotations is None or not found:
            return {}
        wanted = min(_part(ctx).size, ctx.method.config.eval.max_examples)
        if len(found) < wanted:
            log.warning("%d of %d images cannot be read, and do not count for average precision", wanted - len(found),
                        wanted)
        truth = [annotations.truth(each.id) for each in found]
        known = [detected.annotated(each.objects) for each in truth]
        ctx.notes[self.name] = {each.id: (objects, each, own.image_id)
                                for objects, each, own in zip(known, found, truth, strict=True)}
        values: list[float] = []
        for masks in (False, True)[:1 + annotations.masks]:
            values += average_precision.figures(known, [each.found for each in found], masks).values()
        values.append(float(np.mean([each.crowded for each in found])))
        return dict(zip(_names(annotations.masks), values, strict=True))

    def files(self, ctx: Context) -> Iterator[tuple[str, str]]:
        annotations, noted = _annotations(_part(ctx)), ctx.notes.get(self.name)
        if annotations and noted:
            _, found, ids = zip(*noted.values(), strict=True)
            yield f"detections_{ctx.part}.json", json.dumps(
                detected.results(list(found), list(ids), annotations.category_ids))

    def images(self, ctx: Context) -> Iterator[tuple[str, np.ndarray]]:
        noted, batch = ctx.notes.get(self.name), {name: np.asarray(value) for name, value in ctx.shown.items()}
        canvases, rows, names = ctx.method.grid.unpatchify(batch["patches"], batch["order"]), [], []
        for i, number in enumerate(example_ids.whole(batch["id"]).tolist()):
            if noted and number in noted:
                rows.append(_row(canvases[i], batch["size"][i], *noted[number][:2], ctx.data.classes))
                names.append(ctx.shown_names[i])
        if rows:
            objects = sum(len(truth.label) for truth, _, _ in noted.values())
            yield "detection", tile(paired(_same_size(rows)), ("truth", "detected") * 2,
                                    f"Detections with a score of {object_figures.SHOWN:g} or more; "
                                    f"{pluralize(objects, 'object')} in all images", below=names)


def _names(masks: bool) -> list[str]:
    return [f"{kind}_{name}" for kind in ("box", "mask")[:1 + masks] for name in FIGURES] + ["crowded"]


def _annotations(part: Any) -> Annotations | None:
    return getattr(part, "annotations", None)


def _part(ctx: Context) -> Any:
    """Returns the Source of the evaluated part; None for cached batches."""
    data = ctx.method.config.data
    return ctx.data.parts.get(data.eval_split if ctx.part == "eval" else data.val_split)


def _row(canvas: np.ndarray, size: np.ndarray, truth: Found, found: detected.Detected,
         classes: tuple[str, ...]) -> tuple[np.ndarray, ...]:
    """Returns the image with its annotated objects, and the image with its detections."""
    image = canvas[:size[0], :size[1]]
    return tuple(object_figures.panel(image, each, classes, found.size) for each in (truth, found.found))


def _same_size(rows: list[tuple[np.ndarray, ...]]) -> list[tuple[np.ndarray, ...]]:
    """Pads the panels with white to the size of the largest one."""
    height, width = (max(panel.shape[axis] for row in rows for panel in row) for axis in (0, 1))
    return [tuple(np.pad(panel, ((0, height - panel.shape[0]), (0, width - panel.shape[1]), (0, 0)),
                         constant_values=255) for panel in row) for row in rows]
