"""Predictions of classifiers, segmentation models and detectors, and their metrics on labeled images."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mae_jax.data.reading import Reading
from mae_jax.data.sources.base import Source
from mae_jax.errors import UserError, pluralize, printable
from mae_jax.evals import classification, detected, own_size, segmentation
from mae_jax.evals.accumulators import add
from mae_jax.inference import passes
from mae_jax.inference.encoder import Encoder
from mae_jax.inference.images import ImageLike, as_example, as_list
from mae_jax.inference.parts import Part
from mae_jax.methods.base import Batch
from mae_jax.runtime import progress

SEEN = (*detected.FIELDS, "patches", "order")  # fields of a detector's batch that its predictions need
MAX_NAMED = 1000  # most images without a prediction whose names are kept


class Prediction(NamedTuple):
    """The prediction for one image.

    Attributes:
      name: of the image; '' if it has none.
      classes: names of the most likely classes, in descending order; () for segmentation and detection.
      probabilities: of these classes; a softmax, or sigmoids for models trained with binary cross-entropy.
      mask: for segmentation, the class of each pixel, uint8 [height, width]; in the image's own size if the run is
        evaluated so (method.test), else in the model's image size.
      objects: for detection, the detected objects, in pixels of the original image.
      image: for detection, the model's input image, uint8 [height, width, 3].
      label: name of the true class, or names; '' if unknown.
      error: why there is no prediction; '' if there is one.
    """

    name: str
    classes: tuple[str, ...] = ()
    probabilities: tuple[float, ...] = ()
    mask: np.ndarray | None = None
    objects: detected.Detected | None = None
    image: np.ndarray | None = None
    label: str = ""
    error: str = ""


class Score:
    """Counts of a pass: metrics of labeled images, and images without a prediction.

    Attributes:
      images: number of images with a prediction.
      unreadable: (name, reason) of images without one, at most 1,000.
      unreadable_count: number of images without one.
      counts: sums of the evaluation's counts over labeled images.
      several: logits float32 [n, C] and labels [n, C] of each batch, for several labels per image.
    """

    def __init__(self, encoder: Encoder):
        self._method = encoder.method
        self.images = self.unreadable_count = 0
        self.unreadable: list[tuple[str, str]] = []
        self.counts: dict[str, np.ndarray] = {}
        self.several: list[tuple[np.ndarray, np.ndarray]] = []

    @property
    def confusion(self) -> np.ndarray | None:
        """The confusion matrix [true class, predicted class]; None without labels, or with many classes."""
        found = self.counts.get("confusion")
        return found if found is not None and found.any() else None

    def figures(self) -> dict[str, float]:
        """Returns the metrics of the evaluation, 0 to 1, by name; {} without labels."""
        if self.several:
            logits, labels = (np.concatenate(each) for each in zip(*self.several, strict=True))
            return {"map": classification.mean_ap(logits, labels, "voc11"),
                    "map_all": classification.mean_ap(logits, labels)}
        if own_size.OwnSize.name in self.counts:
            return own_size.named(self.counts[own_size.OwnSize.name], self._method.config)
        if "pixels" in self.counts and self.counts["pixels"].any():
            return segmentation.summary(self.counts["pixels"])
        if "class_totals" in self.counts and self.counts["class_totals"].any():
            return classification.summary(self.counts)
        return {}

    def add(self, prediction: Prediction) -> None:
        """Counts the prediction of an image."""
        if not prediction.error:
            self.images += 1
            return
        self.unreadable_count += 1
        if len(self.unreadable) < MAX_NAMED:
            self.unreadable.append((prediction.name, prediction.error))


def check(encoder: Encoder) -> None:
    """Raises UserError, with a hint, for a pre-trained encoder, which has no predictions."""
    if encoder.method.task == "pretraining":
        raise UserError(f"{encoder.source} has no head: method.name={encoder.config.method.name} pre-trains an "
                        "encoder; fine-tune it (mae_jax train --config=folder_finetune --config.init_from=...), or "
                        "take its features (mae_jax embed)")


def predictions(encoder: Encoder, part: Part, score: Score, top: int = 5) -> Iterator[Prediction]:
    """Yields the prediction of each image of a part, in order; all processes must iterate together.

    Args:
      encoder: with a head.
      part: the images.
      score: updated with each batch.
      top: most classes per image.

    Raises:
      UserError: the encoder has no head, or needs random access to the images.
    """
    check(encoder)
    if encoder.method.test != "none" and not isinstance(part.source, Source):
        raise UserError(f"method.test={encoder.method.test!r} needs random access to the images, which a stream of "
                        "records does not have; give a folder or a pattern (images)")
    if encoder.method.test != "none":
        yield from _of_own_size(encoder, part, score)
        return
    function = _function(encoder)
    with jax.set_mesh(encoder.mesh), progress.doing("predicting", part.size) as line:
        for rows in passes.rows_of(encoder, part, "predict", function, line.advance,
                                   renumber=_renumber(encoder, part)):
            score.counts = add(score.counts, rows.sums)
            outputs, fields = rows.outputs, rows.fields
            if "labels" in fields and _same_classes(encoder, part):
                score.several.append((outputs[fields["valid"]], fields["labels"][fields["valid"]]))
            for row in range(len(fields["valid"])):
                output = jax.tree.map(lambda x: x[row], outputs)  # noqa: B023 (called at once)
                made = _prediction(encoder, part.name(rows.first + row), output, fields, row, top,
                                   rows.reasons.get(row, ""), part.source.classes)
                score.add(made)
                yield made


def _of_own_size(encoder: Encoder, part: Part, score: Score) -> Iterator[Prediction]:
    """Yields masks in the images' own size (method.test)."""
    assert isinstance(part.source, Source)
    numbers, reading = np.arange(part.size), Reading.of(part.config.data)
    with jax.set_mesh(encoder.mesh), progress.doing("predicting", part.size) as line:
        for found in own_size.predictions(encoder.method, encoder.params, encoder.extras, encoder.mesh, part.source,
                                          numbers, reading):
            if found.mask is not None and found.classes is not None:
                counts = own_size.confusion(found.mask, found.classes, encoder.method.classes)
                score.counts = add(score.counts, {own_size.OwnSize.name: counts})
            made = Prediction(part.name(found.number), mask=found.classes, error=found.error)
            score.add(made)
            line.advance()
            yield made


def of_images(encoder: Encoder, images: ImageLike | Sequence[ImageLike], top: int = 5) -> list[Prediction]:
    """Returns the predictions for a caller's images: arrays, PIL images or paths (`images.ImageLike`).

    Raises:
      UserError: the encoder has no head or is a detector, or an image cannot be read.
    """
    check(encoder)
    if encoder.method.task == "detection":
        raise UserError(f"{encoder.source} is a detector, which takes files only: give a folder or a pattern, or use "
                        "mae_jax predict --images=...")
    given = as_list(images)
    names = [str(image) if isinstance(image, str) or hasattr(image, "__fspath__") else "" for image in given]
    if encoder.method.test != "none":
        upright = encoder.config.data.exif != "ignore"
        source = Source(len(given), lambda number: as_example(given[number], upright), names.__getitem__)
        made = list(_of_own_size(encoder, Part(encoder.config, "images", source), Score(encoder)))
        for number, each in enumerate(made):
            if each.error:
                raise UserError(f"{printable(each.name) or f'image {number}'} cannot be read: {each.error}")
        return made
    function = _function(encoder, counted=False)
    program = encoder.compiled("predict images", lambda params, extras, batch: function(params, extras, batch)[0])
    found = [row for outputs in encoder.run(program, given) for row in outputs]
    return [_prediction(encoder, name, output, {}, 0, top, "") for name, output in zip(names, found, strict=True)]


def _function(encoder: Encoder, counted: bool = True) -> Callable[..., tuple[jax.Array, dict[str, jax.Array]]]:
    """Returns the function (params, extras, batch) → (predictions, counts) of the encoder's task.

    The predictions are logits float32 [B, C], masks uint8 [B, height, width], or a detector's outputs with the fields
    SEEN of the batch.
    """
    method: Any = encoder.method

    def function(params: Any, extras: Any, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        if method.task == "detection":
            return method.detections(params, extras, batch) | {name: batch[name] for name in SEEN}, {}
        if method.task == "segmentation":
            logits = method.pixel_logits(params, extras, batch)
            counts = segmentation.Segmentation().counts(method, logits, batch) if "pixel_label" in batch else {}
            return logits.argmax(-1).astype(jnp.uint8), counts
        logits = method.logits(params, extras, batch)
        if not counted or method.multi_label:
            return logits, {}
        return logits, classification.counts(logits, batch["label"], batch["valid"], method.classes)

    return function


def _same_classes(encoder: Encoder, part: Part) -> bool:
    return tuple(part.source.classes) == encoder.classes


def _renumber(encoder: Encoder, part: Part) -> np.ndarray | None:
    """Returns the encoder's class index for each class of the part, -1 for unknown ones; None if they are the same."""
    theirs = tuple(part.source.classes)
    if encoder.method.task != "classification" or not theirs or theirs == encoder.classes:
        return None
    index = {name: number for number, name in enumerate(encoder.class_names)}
    return np.array([index.get(name, -1) for name in theirs], np.int32)


def _prediction(encoder: Encoder, name: str, output: Any, fields: dict[str, np.ndarray], row: int, top: int,
                error: str, several: Sequence[str] = ()) -> Prediction:
    """Returns the prediction of one image from its output and row of the batch's fields.

    `several` are the class names of the data, which `labels` index; `label` indexes the encoder's classes.
    """
    if encoder.method.task == "segmentation":
        return Prediction(name, mask=None if error else output, error=error)
    if encoder.method.task == "detection" and error:
        return Prediction(name, error=error)
    if encoder.method.task == "detection":
        found, = detected.compact({name: value[None] for name, value in output.items()})
        image = encoder.method.grid.unpatchify(output["patches"][None], output["order"][None])[0]
        return Prediction(name, objects=found, image=image[:output["size"][0], :output["size"][1]])
    label, classes = "", encoder.classes
    if "labels" in fields:
        label = ", ".join(several[int(k)] for k in np.flatnonzero(fields["labels"][row]))
    elif "label" in fields and fields["label"][row] >= 0:
        label = classes[fields["label"][row]]
    if not error and not np.isfinite(output).all():
        error = "the model's outputs are not finite"
    if error:
        return Prediction(name, label=label, error=error)
    chosen = np.argsort(-output, kind="stable")[:top]  # among equal logits, the lower index comes first
    shares = probabilities(output, independent=encoder.config.method.get("loss") == "bce")[chosen]
    return Prediction(name, tuple(classes[k] for k in chosen), tuple(map(float, shares)), label=label)


def probabilities(logits: np.ndarray, independent: bool) -> np.ndarray:
    """Converts logits [C] to probabilities float64 [C].

    They are sigmoids if `independent` (for models trained with binary cross-entropy), else a softmax.
    """
    values = logits.astype(np.float64)
    if independent:
        return np.exp(-np.logaddexp(0, -values))
    shares = np.exp(values - values.max())
    return shares / shares.sum()


def told(score: Score) -> str:
    """Returns the summary to print at the end."""
    lost = passes.summary_of_unreadable(score.unreadable, score.unreadable_count)
    figures = ", ".join(f"{name} {value:.4f}" for name, value in score.figures().items())
    said = f"{pluralize(score.images, 'image')} predicted" + (f"; {figures}" if figures else "")
    return "\n".join(filter(None, (lost, said)))
