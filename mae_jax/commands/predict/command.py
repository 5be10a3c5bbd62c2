r"""Predicts images by a classifier, a segmentation or a detector, and measures accuracy on labeled images.

  mae_jax predict --from=runs/classifier --images=/path/to/images --to=predictions.csv
  mae_jax predict --from=runs/classifier --images='/path/*.jpg' --top_k=3 --to=predictions.json
  mae_jax predict --from=runs/classifier/best --to=test.csv
  mae_jax predict --from=runs/dense --images=/path/to/images --to=masks/
  mae_jax predict --from=runs/detect --images=/path/to/images --to=found/

Without --images and --config, the images are those of the run's evaluation split. The file has a line for each image,
in order: file, label if known, the likeliest classes with probabilities, and the error if it could not be read. An
image in a folder with the name of a class has that label. With labels, accuracy is printed, and a confusion matrix is
written beside the file (*_confusion.csv, *_confusion.png). Masks are PNGs, in the size of the images if the run is
evaluated so (method.test), else in that of the model. Detections are a JSON file: boxes as x, y, width, height and
masks in COCO's run-length encoding, both in pixels of the original image. In a folder this file is detections.json,
beside PNGs of the images with their detections.
"""

from absl import flags

from mae_jax.commands import cli
from mae_jax.runtime import launch
from mae_jax.storage import paths

REQUIRED = ("from", "to")
CONFIG = cli.define_config()
FROM = flags.DEFINE_string("from", "", "workdir, one step's folder in it, its best/, an export, or weights of others")
TO = flags.DEFINE_string("to", "", "file to write, *.csv or *.json; for a segmentation a folder, for a detector a "
                                   "folder or *.json; local or gs://")
IMAGES = flags.DEFINE_string("images", "", "a file, a folder or a pattern of images; local or gs://")
SPLIT = flags.DEFINE_string("split", "", "split of the run's data, or of those of --config; '': the evaluation split, "
                                         "or without one the training split")
TOP_K = flags.DEFINE_integer("top_k", 5, "number of classes that are written for each image", lower_bound=1)
BATCH = flags.DEFINE_integer("batch_size", 0, "images per batch, over all devices; 0: 32 on each CPU, 128 on each "
                             "accelerator", lower_bound=0)
HEADS = flags.DEFINE_integer("heads", 0, "number of attention heads, if weights of others do not state "
                                         "it", lower_bound=0)


def main() -> int:
    from mae_jax.errors import UserError

    if launch.here():
        raise UserError("predictions are made by one process, on all of its devices; use --coordinator=off")
    return predict()


def predict() -> int:
    """Writes the predictions. Returns the exit code."""
    from mae_jax.inference import asked, prediction, prediction_files

    to = paths.locate(TO.value, "--to")
    encoder, parts = asked.opened(FROM.value, IMAGES.value, CONFIG.value, SPLIT.value, all_splits=False,
                                  batch_size=BATCH.value, heads=HEADS.value)
    prediction.check(encoder)
    prediction_files.check(to, encoder.method.task)
    score, part = prediction.Score(encoder), parts[0]
    print(f"{part.size} images of {IMAGES.value or part.split}", flush=True)
    about = {"from": FROM.value, "step": encoder.step, "images_of": IMAGES.value or part.split,
             "classes": encoder.classes}
    found = prediction.predictions(encoder, part, score, TOP_K.value)
    written = prediction_files.write(to, encoder, found, score, TOP_K.value, about)
    print(prediction.told(score))
    print(", ".join(written))
    return asked.exit_code(encoder, score.images, score.unreadable_count)
