"""Files of predictions: CSV or JSON, PNG masks, images with detected objects, the confusion matrix."""

import contextlib
import csv
import io
import json
from collections.abc import Iterator
from typing import Any, TextIO

import numpy as np
from etils import epath
from PIL import Image

from mae_jax.errors import UserError
from mae_jax.evals import detected, object_figures, plots
from mae_jax.evals.segmentation import legend, palette
from mae_jax.inference.encoder import Encoder
from mae_jax.inference.prediction import Prediction, Score
from mae_jax.storage.paths import make_folder, naming, replace_bytes, replace_text

ENDINGS = (".csv", ".json")
LEGEND = 600  # pixels of the width of classes.png


def check(to: epath.Path, task: str) -> None:
    """Raises UserError if --to does not name a file or folder that fits the task."""
    if task == "segmentation":
        if to.suffix or to.is_file():
            raise UserError(f"--to={to}: each mask is a file; name a folder for them")
    elif task == "detection":
        if to.suffix.lower() not in ("", ".json") or (to.is_dir() if to.suffix else to.is_file()):
            raise UserError(f"--to={to}: detections are written to a file *.json, or to a folder with it and images")
    elif to.suffix.lower() not in ENDINGS:
        raise UserError(f"--to={to}: the file's name must end in .csv or .json")
    elif to.is_dir():
        raise UserError(f"--to={to} is a folder; expected the name of a file")


def write(to: epath.Path, encoder: Encoder, found: Iterator[Prediction], score: Score, top: int,
          about: dict[str, Any]) -> list[str]:
    """Writes predictions as they are computed, in bounded memory; returns the paths of the files.

    Args:
      to: the file, or the folder for masks or for a detector's images and JSON.
      encoder: that made the predictions.
      found: one prediction per image.
      score: complete when `found` is exhausted.
      top: most classes per image.
      about: further fields of the JSON object.
    """
    if encoder.method.task == "segmentation":
        return [str(to), str(_masks(to, encoder, found))]
    if encoder.method.task == "detection" and not to.suffix:
        folder, to = to, to / "detections.json"
        found = _drawn(folder, encoder, found)
    make_folder(to.parent)
    partial = to.with_name(f"{to.name}.partial")
    try:
        with naming(to), partial.open("wb") as raw, io.TextIOWrapper(raw, "utf-8", newline="") as file:
            if to.suffix.lower() == ".csv":
                _csv(file, found, min(top, len(encoder.classes)))
            else:
                _json(file, found, score, about, encoder.classes)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    partial.replace(to)
    return [str(to), *_confusion(to, encoder, score)]


def _csv(file: TextIO, found: Iterator[Prediction], top: int) -> None:
    """Writes the columns file, label, class and probability of the most likely classes in turn, error."""
    writer = csv.writer(file, lineterminator="\n")
    numbers = ["", *(f"_{number}" for number in range(2, top + 1))]
    writer.writerow(["file", "label", *(name + number for number in numbers for name in ("class", "probability")),
                     "error"])
    for each in found:
        said = [cell for name, share in zip(each.classes, each.probabilities, strict=True)
                for cell in (name, f"{share:.6g}")]
        writer.writerow([each.name, each.label, *said, *[""] * (2 * top - len(said)), each.error])


def _json(file: TextIO, found: Iterator[Prediction], score: Score, about: dict[str, Any],
          classes: tuple[str, ...]) -> None:
    """Writes a JSON object with the fields of `about`, `images` (one line per image), `figures` and `unreadable`."""
    file.write(json.dumps(about)[:-1] + ',\n"images": [')
    for number, each in enumerate(found):
        said: dict[str, Any] = {"file": each.name}
        if each.label:
            said["label"] = each.label
        if each.error:
            said["error"] = each.error
        elif each.objects:
            said |= {"size": each.objects.size, "objects": [
                {"class": classes[one.pop("category_id")], **one} for one in _coco(each.objects, len(classes))]}
        else:
            said["predictions"] = [{"class": name, "probability": share} for name, share in
                                   zip(each.classes, each.probabilities, strict=True)]
        file.write((",\n" if number else "\n") + json.dumps(said, ensure_ascii=False))
    figures = {name: None if np.isnan(value) else value for name, value in score.figures().items()}
    file.write(f'\n],\n"figures": {json.dumps(figures)},\n"unreadable": {score.unreadable_count}}}\n')


def _coco(found: detected.Detected, classes: int) -> list[dict[str, Any]]:
    """Returns the detections of an image in COCO's format of results, without image_id and with class indices."""
    entries = detected.results([found], [0], tuple(range(classes)))
    return [{name: value for name, value in entry.items() if name != "image_id"} for entry in entries]


def _drawn(folder: epath.Path, encoder: Encoder, found: Iterator[Prediction]) -> Iterator[Prediction]:
    """Writes a PNG of each image with its boxes, masks and scores, and yields the predictions unchanged."""
    for each in found:
        if each.objects and each.image is not None:
            content = io.BytesIO()
            panel = object_figures.panel(each.image, each.objects.found, encoder.classes, each.objects.size)
            Image.fromarray(panel).save(content, "PNG")
            place = folder / f"{_inside(each.name)}.png"
            make_folder(place.parent)
            replace_bytes(place, content.getvalue())
        yield each


def _inside(name: str) -> str:
    """Returns a relative path for a name from the data, without parts that would lead out of the folder."""
    return "/".join(part for part in name.split("/") if part not in ("", ".", ".."))


def _confusion(to: epath.Path, encoder: Encoder, score: Score) -> list[str]:
    """Writes the confusion matrix beside the predictions, as CSV and as a figure; returns the paths."""
    table = score.confusion
    if table is None:
        return []
    text, drawn = io.StringIO(), io.BytesIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["true \\ predicted", *encoder.classes])
    writer.writerows([name, *map(int, row)] for name, row in zip(encoder.classes, table, strict=True))
    Image.fromarray(plots.confusion(table, encoder.classes, "predictions")).save(drawn, "PNG")
    places = [to.with_name(f"{to.stem}_confusion{ending}") for ending in (".csv", ".png")]
    replace_text(places[0], text.getvalue())
    replace_bytes(places[1], drawn.getvalue())
    return [str(place) for place in places]


def _masks(to: epath.Path, encoder: Encoder, found: Iterator[Prediction]) -> epath.Path:
    """Writes a PNG mask with a palette for each image, and masks.csv, which lists them; returns that path.

    classes.png says which color is which class.
    """
    colors, rows = palette(encoder.method.classes), io.StringIO()
    writer = csv.writer(rows, lineterminator="\n")
    writer.writerow(["file", "mask", "error"])
    make_folder(to)
    content = io.BytesIO()  # written first: should the mask of an image be called so, that one stays
    Image.fromarray(legend(encoder.method.classes, encoder.classes, LEGEND)).save(content, "PNG")
    replace_bytes(to / "classes.png", content.getvalue())
    for each in found:
        inside = ""
        if each.mask is not None:
            inside = f"{_inside(each.name)}.png"
            content, drawn = io.BytesIO(), Image.fromarray(each.mask)
            drawn.putpalette(colors.tobytes())
            drawn.save(content, "PNG")
            make_folder((to / inside).parent)
            replace_bytes(to / inside, content.getvalue())
        writer.writerow([each.name, inside, each.error])
    replace_text(to / "masks.csv", rows.getvalue())
    return to / "masks.csv"
