r"""Clusters images by an encoder's features, for MoCE, or patches, into a vocabulary for masked prediction.

  mae_jax cluster --from=runs/mae --clusters=64 --to=runs/clusters

Images: clusters of nearly equal size, from the encoder of a workdir and the data that it was trained on (or the data of
--config). configs/moce.py takes them as --config.method.clusters=runs/clusters. Features are computed once and kept in
the folder, in chunks of 16,384 images: the same command resumes after an interruption. clusters.png shows the images
nearest to each centroid. Several processes compute the features together if they are started like those of a training
run (python -m mae_jax.main --help).

  mae_jax cluster --config=splitmask_small:folder --config.data.path=/path/to/images \
      --config.method.vocabulary=1024 --to=runs/vocabulary.npz

Patches: the vocabulary of the tokens that SplitMask and BEiT predict. A run without one builds the same before its
first step; several runs share one with the same flags and --config.method.vocabulary_file=runs/vocabulary.npz.
--config.method.target chooses its kind: kmeans, patches or projection. Beside the file, vocabulary.png shows the
entries, the most frequent first.
"""

import math

import numpy as np
from absl import flags
from PIL import Image

from mae_jax import errors
from mae_jax.commands import cli
from mae_jax.runtime import launch
from mae_jax.storage import paths

REQUIRED = ("to",)
CONFIG = cli.define_config()
TO = flags.DEFINE_string("to", "", "folder to write; for a vocabulary of patches a file *.npz; local or gs://")
FROM = flags.DEFINE_string("from", "", "workdir of the encoder, or one step's folder in it; clusters its images")
CLUSTERS = flags.DEFINE_integer("clusters", 256, "number of clusters of images", lower_bound=2)
BLOCK = flags.DEFINE_integer("block", -1, "block whose tokens are the features; -1: the encoder's output")
RATIO = flags.DEFINE_float("ratio", 3.0, "largest allowed size of a cluster, relative to the smallest one; it is "
                           "an error if it cannot be reached",
                           lower_bound=1.5)
SEED = flags.DEFINE_integer("seed", 0, "seed of the first centroids", lower_bound=0)
MAX_SHOWN_ENTRIES = 1024  # entries in vocabulary.png
ENTRIES_PER_ROW = 32
MIN_ENTRY_PIXELS = 16  # least width of an entry
SAMPLE = 65_536  # patches that are tokenized to count how often each entry is used


def main() -> int:
    from mae_jax.errors import UserError

    if FROM.value:
        from mae_jax.commands.cluster.images import cluster

        if TO.value.endswith(".npz"):
            raise UserError(f"--to={TO.value}: clusters of images are a folder; leave out --from for a vocabulary "
                            "of patches")
        if not math.isfinite(RATIO.value):
            raise UserError(f"--ratio={RATIO.value} must be finite")
        given = (FROM.value, TO.value, CLUSTERS.value, BLOCK.value, RATIO.value, SEED.value)
        same = dict(zip(("--from", "--to", "--clusters", "--block", "--ratio", "--seed"), given, strict=True))
        return launch.run(lambda: cluster(*given, CONFIG.value), same, CONFIG.value)
    if launch.here():
        raise UserError("a vocabulary of patches is built by one process; start one, with --coordinator=off")
    if CONFIG.value is None:
        raise UserError("--from=WORKDIR clusters images, --config=RECIPE patches; --help shows examples")
    for flag in (CLUSTERS, BLOCK, RATIO, SEED):
        if flag.present:
            raise UserError(f"--{flag.name} is for clusters of images, with --from=WORKDIR; for "
                            "patches use --config.method and --config.seed")
    return vocabulary()


def vocabulary() -> int:
    """Writes the vocabulary of the config's method. Returns the exit code."""
    import jax.numpy as jnp

    from mae_jax import methods
    from mae_jax.config import resolved, validate
    from mae_jax.errors import UserError
    from mae_jax.losses import patch_tokens
    from mae_jax.methods.patch_targets import PatchTargets
    from mae_jax.storage import vocabulary as storage_vocabulary

    config, file = CONFIG.value, paths.locate(TO.value, "--to")
    if file.suffix != ".npz":
        raise UserError(f"--to={TO.value}: the file's name must end in .npz")
    picture = file.with_suffix(".png")
    for path in (file, picture):
        if path.exists():
            raise UserError(f"{path} exists, and runs may read it; name another file, or remove it")
    validate(config)
    if config.method.get("target") not in patch_tokens.KINDS:
        raise UserError(f"method.name={config.method.name!r} with method.target={config.method.get('target')!r} has no "
                        f"vocabulary; use splitmask or beit, and one of {', '.join(patch_tokens.KINDS)}")
    if config.method.vocabulary_file:
        raise UserError(f"method.vocabulary_file={config.method.vocabulary_file!r} is already a vocabulary; leave it "
                        "empty")
    method, opened = methods.with_data(resolved(config))
    inputs = opened.batches(method.eval_spec(), method.patch_order())
    print(inputs.description, flush=True)
    entries, sample = PatchTargets(config).build(inputs.support())
    storage_vocabulary.save(file, entries, config.method.target)
    print(f"{file}: {len(entries)} entries and the token of constant patches")
    if config.method.target != "projection":  # directions of a projection cannot be shown as pixels
        named = np.asarray(patch_tokens.tokenize(jnp.asarray(sample[:SAMPLE]), jnp.asarray(entries),
                                                 config.method.target))
        most = np.argsort(-np.bincount(named, minlength=1 + len(entries))[1:], kind="stable")[:MAX_SHOWN_ENTRIES]
        with picture.open("wb") as drawn:
            Image.fromarray(_sheet(entries[most], tuple(config.model.patch))).save(drawn, "PNG")
        print(picture)
    return errors.FINISHED


def _sheet(entries: np.ndarray, patch: tuple[int, int]) -> np.ndarray:
    """Returns entries, float [n, P], as an image of patches in rows of ENTRIES_PER_ROW, uint8 [height, width, 3]."""
    from mae_jax.ops.patches import denormalize

    pixels = denormalize(entries).clip(0, 255).round().astype(np.uint8).reshape(-1, *patch, 3)
    scale = -(-MIN_ENTRY_PIXELS // patch[1])
    pixels = pixels.repeat(scale, 1).repeat(scale, 2)
    pixels = np.pad(pixels, ((0, -len(pixels) % ENTRIES_PER_ROW), (0, 1), (0, 1), (0, 0)), constant_values=255)
    rows = pixels.reshape(-1, ENTRIES_PER_ROW, *pixels.shape[1:]).swapaxes(1, 2)
    return rows.reshape(rows.shape[0] * rows.shape[1], ENTRIES_PER_ROW * pixels.shape[2], 3)
