"""Inspects a data set: counts, broken images, speed, and a grid of model inputs; or stores it once, resized.

  mae_jax inspect --config=folder --config.data.path=/images --to=grid.png --images_per_second=6000
  mae_jax inspect --config=folder --config.data.path=/images --write=tfrecord --size=256 --to=DIR
  mae_jax inspect --config=quickstart --write=batches --steps=200 --to=DIR

Read the output of --write=tfrecord with data.source=tfrecord and data.path=DIR; that of array_record, which has random
access, with data.source=tfds, data.name=pictures and data.path=DIR; that of batches, which need no TensorFlow, with
data.source=batches and data.path=DIR. Every image is decoded in full; broken ones are listed by name and are not
written. Copies are images with the same bytes: an image that was saved again does not count as one.
"""

import io
import os
from typing import TYPE_CHECKING

from absl import flags
from etils import epath
from ml_collections import ConfigDict

from mae_jax import errors
from mae_jax.commands import cli
from mae_jax.commands.inspect import report as inspect_report
from mae_jax.commands.inspect.speed import speed_lines
from mae_jax.errors import UserError, printable
from mae_jax.runtime import progress
from mae_jax.runtime.memory import peak_memory
from mae_jax.storage import paths

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mae_jax.data import Batch, Inputs, OpenedData
    from mae_jax.data.sources.base import RecordStream, Source
    from mae_jax.methods.base import Method

REQUIRED = ("config",)
CONFIG = cli.define_config()
TO = flags.DEFINE_string("to", "", "figure of the grid (default: inspect.png); with --write, the folder to write; "
                                   "local or gs://")
WRITE = flags.DEFINE_enum("write", None, ["tfrecord", "array_record", "batches"], "store the data as this, instead of "
                                                                                  "drawing them")
SIZE = flags.DEFINE_integer("size", 256, "with --write=tfrecord or array_record: most pixels of the short side of "
                            "an image", lower_bound=1)
STEPS = flags.DEFINE_integer("steps", 100, "with --write=batches: number of batches", lower_bound=1)
WANTED = flags.DEFINE_float("images_per_second", 0.0, "rate of the devices, by mae_jax bench or mae_jax plan; prints "
                                                      "the number of cores that it needs", lower_bound=0.0)

MAX_LISTED_CLASSES = 20


def main() -> int:
    from mae_jax import methods
    from mae_jax.config import resolved, validate
    from mae_jax.training.warm_shape import with_shape

    config = with_shape(CONFIG.value)
    if WRITE.value and not TO.value:
        raise UserError("--write needs --to=FOLDER")
    to = paths.locate(TO.value or "inspect.png", "--to")  # fail before all images are read
    if not WRITE.value:
        check_writable(to)
    validate(config)
    config = resolved(config)
    if WRITE.value in ("tfrecord", "array_record"):
        report_broken(write_images(config, WRITE.value, to, SIZE.value))
        print(inspect_report.written(WRITE.value, to))
        return errors.FINISHED
    method, opened = methods.with_data(config)
    inputs = opened.batches(method.eval_spec(), method.patch_order(), method.views())
    print(inputs.description, flush=True)  # reading every image may take long
    warn_of_data(opened, method)
    if WRITE.value == "batches":
        from mae_jax.data.writers import write_batches

        write_batches(opened, inputs, method.eval_spec(), method.patch_order(), method.views(), to, STEPS.value)
        print(inspect_report.written(WRITE.value, to))
        return errors.FINISHED
    more = f" and {len(inputs.classes) - MAX_LISTED_CLASSES} more" if len(inputs.classes) > MAX_LISTED_CLASSES else ""
    print(f"classes: {', '.join(map(printable, inputs.classes[:MAX_LISTED_CLASSES])) or 'none'}{more}")
    if config.data.source != "batches":
        report(opened.config, inputs.parts, to)
    try:
        with progress.doing("measuring the speed of the input"):
            lines = speed_lines(config, opened, method, inputs, WANTED.value)
        print("\n".join(lines), flush=True)
        save_grid(next(inputs.train(0)), method, inputs, to)
    except UserError as error:  # of the data, already reported above
        print(f"no speed and no images, and training would stop: {error}")
        return errors.FINISHED
    print(f"peak host memory {peak_memory() / 2**20:.0f} MiB; the first images of the run, as the model sees them: "
          f"{to}")
    return errors.FINISHED


def save_grid(batch: "Batch", method: "Method", inputs: "Inputs", path: epath.Path) -> None:
    """Writes the first images of a batch, as the encoder sees them, as a PNG with their names and classes."""
    from PIL import Image

    from mae_jax.evals import input_grid

    part, most = inputs.parts.get(method.config.data.train_split), input_grid.GRID_SIDE**2
    captions = [input_grid.caption(batch, i, inputs.classes, part) for i in range(min(most, len(batch["id"])))]
    content = io.BytesIO()
    Image.fromarray(input_grid.drawn(method, batch, captions, "")).save(content, "PNG")
    paths.make_folder(path.parent)
    paths.replace_bytes(path, content.getvalue())


def warn_of_data(opened: "OpenedData", method: "Method") -> None:
    """Prints what would stop training, labels or classes of masks that are missing; logs if anchors fit few objects."""
    try:
        if method.task == "classification" and "labels" not in method.eval_spec():
            opened.check_labels()
        elif method.task == "segmentation":
            opened.check_masks(method.classes)
        elif method.task == "detection":
            opened.warn_of_sizes()
    except UserError as error:
        print(f"training would stop: {error}")


def check_writable(file: epath.Path) -> None:
    """Creates the folder of a file; raises UserError if the file evidently cannot be written."""
    if file.is_dir():
        raise UserError(f"--to={file} is a folder; expected the name of a figure, *.png")
    paths.make_folder(file.parent)
    if not str(file).startswith("gs://") and not os.access(file.parent, os.W_OK):
        raise UserError(f"--to={file}: no permission to write into {file.parent}")


def splits(config: ConfigDict) -> dict[str, str]:
    """Returns name of the stored split → the config's expression for it, as 'train[90%:]'."""
    named = {"train": config.data.train_split, "val": config.data.val_split, "test": config.data.eval_split}
    return {name: expression for name, expression in named.items() if expression}


def report(config: ConfigDict, parts: "Mapping[str, Source | RecordStream]", grid: epath.Path) -> None:
    """Decodes every image and prints a report; a long list of broken images also goes to a file.

    Args:
      config: of the run.
      parts: expression of a split → its source.
      grid: figure beside which the list goes.
    """
    from mae_jax.data.audit import audit
    from mae_jax.data.readers import random_access
    from mae_jax.data.reading import Reading
    from mae_jax.data.sources import folder as sources_folder
    from mae_jax.data.sources import mixture

    audits = {}
    for name, expression in splits(config).items():
        audits[name] = audit(parts[expression], random_access.threads(config.data), name, Reading.of(config.data))
        print("\n".join(inspect_report.split_lines(name, audits[name], config.data.image_size)), flush=True)
    unread = [line for part in mixture.parts(config.data) for line in sources_folder.unread(
        part, splits(config).values())] if config.data.source == "folder" else []
    for line in inspect_report.leak_lines(audits) + unread:
        print(line)
    train, limit = audits.get("train"), config.guard.max_bad_fraction
    if train and len(train.broken) > limit * train.source.size:
        print(f"training would stop: {len(train.broken)} of {train.source.size} images of train are broken, more "
              f"than guard.max_bad_fraction={limit}")
    if max(len(seen.broken) for seen in audits.values()) > inspect_report.MAX_LISTED_IMAGES:
        names = grid.with_suffix(".broken.txt")
        broken = [f"{split} {name}\n" for split, seen in audits.items() for name in seen.broken]
        paths.replace_text(names, "".join(broken))
        print(f"all broken images by name: {names}")


def write_images(config: ConfigDict, kind: str, folder: epath.Path, size: int) -> dict[str, list[str]]:
    """Stores the splits as `kind`, 'tfrecord' or 'array_record'; returns split → names of broken images, left out."""
    from mae_jax.data import value_range, writers
    from mae_jax.data.readers import random_access
    from mae_jax.data.reading import Reading
    from mae_jax.data.sources import registry

    found = {name: registry.load(config.data, expression) for name, expression in splits(config).items()}
    if any(getattr(part, "annotations", None) for part in found.values()):
        print("the images are stored without their objects, which data.source=coco alone reads")
    writer = {"tfrecord": writers.write_tfrecord, "array_record": writers.write_array_record}[kind]
    data = config.data.copy_and_resolve_references()
    if data.range == "auto":
        data.range, text = value_range.chosen(next(iter(found.values())), data)
        if text:
            print(text)
    return writer(found, folder, size, random_access.threads(data), Reading.of(data))


def report_broken(broken: dict[str, list[str]]) -> None:
    """Prints the names of the first 50 broken images of each split."""
    for split, names in broken.items():
        print("\n".join([f"{split}: {len(names)} broken images", *inspect_report.broken_names(names)]))
