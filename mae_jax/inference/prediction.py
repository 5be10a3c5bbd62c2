"""What a classifier, a segmentation or a detector says of images, and how often it is right where labels exist."""

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

SEEN = (*detected.FIELDS, "patches", "order")  # fields of a detector's batch, that what is found is told with
MAX_NAMED = 1000  # images without a prediction that are kept by name


class Prediction(NamedTuple):
    """What is said of one image.

    Attributes:
      name: of the image; '' where it has none.
      classes: the names of the likeliest classes, the likeliest first; () of a segmentation.
      probabilities: of these, float64; of several labels each in 0..1 on its own.
      mask: of a segmentation, uint8 [height, width], the class of each pixel: in the image's own size where the run is
        evaluated so (method.test), else in the model's image size.
      objects: of a detector, what was found, in pixels of the image itself.
      image: of a detector, the image as it saw it, uint8 [height, width, 3].
      label: the name of the true class, or names; '' where it is not known.
      error: why there is no prediction, '' where there is one.
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
    """What is counted of a pass: figures where labels exist, and images without a prediction.

    Attributes:
      images: with a prediction.
      unreadable: (name, reason) of the others, the first 1,000; unreadable_count: how many these are.
      counts: sums of the tables of the evaluation, of images with labels.
    """

    def __init__(self, encoder: Encoder):
        self._method = encoder.method
        self.images = self.unreadable_count = 0
        self.unreadable: list[tuple[str, str]] = []
        self.counts: dict[str, np.ndarray] = {}
        self.several: list[tuple[np.ndarray, np.ndarray]] = []  # logits and labels, of several labels per image

    @property
    def confusion(self) -> np.ndarray | None:
        """The table of confusions of classes, true ones down, where labels exist and the classes are few."""
        found = self.counts.get("confusion")
        return found if found is not None and found.any() else None

    def figures(self) -> dict[str, float]:
        """Returns the figures of the evaluation, in 0..1; {} without labels."""
        if self.several:
            logits, labels = (np.concatenate(each) for each in zip(*self.several, strict=True))
            return {"map": classification.mean_ap(logits, labels, "voc11"),
                    "map_all": classification.mean_ap(logits, labels)}
        if own_size.OwnSize.name in self.counts:
            return own_size.named(self.counts[own_size.OwnSize.name])
        if "pixels" in self.counts and self.counts["pixels"].any():
            return segmentation.summary(self.counts["pixels"])
        if "class_totals" in self.counts and self.counts["class_totals"].any():
            return classification.summary(self.counts)
        return {}

    def add(self, prediction: Prediction) -> None:
        """Counts an image."""
        if not prediction.error:
            self.images += 1
            return
        self.unreadable_count += 1
        if len(self.unreadable) < MAX_NAMED:
            self.unreadable.append((prediction.name, prediction.error))


def check(encoder: Encoder) -> None:
    """Raises UserError for a run that predicts nothing of images, with what to do."""
    if encoder.method.task == "pretraining":
        raise UserError(f"{encoder.source} has no head: method.name={encoder.config.method.name} pre-trains an "
                        "encoder; fine-tune it (mae_jax train --config=folder_finetune --config.init_from=...), or "
                        "take its features (mae_jax embed)")


def predictions(encoder: Encoder, part: Part, score: Score, top: int = 5) -> Iterator[Prediction]:
    """Yields what is said of each image of a part, in order; all processes go along.

    Args:
      encoder: with a head.
      part: the images.
      score: counts them, and how many are right.
      top: classes of each image, at most.
    """
    check(encoder)
    if encoder.method.test != "none" and not isinstance(part.source, Source):
        raise UserError(f"method.test={encoder.method.test!r} asks for images by their numbers, which a stream of "
                        "records has not; name a folder or a pattern (images)")
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
    """Yields masks in the images' own size, as the run is evaluated."""
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
    """Returns what is said of a program's own images: arrays, PIL images or paths; raises UserError."""
    check(encoder)
    if encoder.method.task == "detection":
        raise UserError(f"{encoder.source} is a detector, which is asked of files: a folder or a pattern, or mae_jax "
                        "predict --images=...")
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
    """Returns the function of (params, extras, batch) to logits [B, C], masks uint8 [B, height, width] or what a
    detector gives with SEEN, and counts.
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
    """Returns the encoder's number of each class of the part, -1 for one that it does not know; None for the same."""
    theirs = tuple(part.source.classes)
    if encoder.method.task != "classification" or not theirs or theirs == encoder.classes:
        return None
    index = {name: number for number, name in enumerate(encoder.class_names)}
    return np.array([index.get(name, -1) for name in theirs], np.int32)


def _prediction(encoder: Encoder, name: str, output: Any, fields: dict[str, np.ndarray], row: int, top: int,
                error: str, several: Sequence[str] = ()) -> Prediction:
    """Returns what is said of one image, of its output and its batch's fields.

    `several` are the classes of the data, which `labels` are numbers of; `label` is a number of the encoder's classes.
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
        error = "the model's numbers for it are not finite"
    if error:
        return Prediction(name, label=label, error=error)
    chosen = np.argsort(-output, kind="stable")[:top]  # of equal ones, the class of the lower number comes first
    shares = probabilities(output, independent=encoder.config.method.get("loss") == "bce")[chosen]
    return Prediction(name, tuple(classes[k] for k in chosen), tuple(map(float, shares)), label=label)


def probabilities(logits: np.ndarray, independent: bool) -> np.ndarray:
    """Returns float64 [C] of logits [C]: the softmax, or, of what learned by binary cross-entropy, each one's sigmoid.
    """
    values = logits.astype(np.float64)
    if independent:
        return np.exp(-np.logaddexp(0, -values))
    shares = np.exp(values - values.max())
    return shares / shares.sum()


def told(score: Score) -> str:
    """Returns what to print at the end."""
    lost = passes.summary_of_unreadable(score.unreadable, score.unreadable_count)
    figures = ", ".join(f"{name} {value:.4f}" for name, value in score.figures().items())
    said = f"{pluralize(score.images, 'image')} predicted" + (f"; {figures}" if figures else "")
    return "\n".join(filter(None, (lost, said)))
