r"""Writes the features of every image of a source, computed by a frozen encoder.

  mae_jax embed --from=runs/quickstart --to=features.parquet
  mae_jax embed --from=runs/mine --images=/path/to/images --to=features.parquet
  mae_jax embed --from=vit-mae-base/ --images='/path/**/*.jpg' --features=patches --block=8 --to=patches.npz
  mae_jax embed --from=runs/mine --config=folder --config.data.source=tar --config.data.path='shards-{000..127}.tar' \
      --split=train --to=features.parquet

Without --images and --config, the images are those that the run was trained and evaluated on. Columns: file, split, id,
label (-1: not known), label_name, features. The same command resumes after an interruption; until the file is complete,
its rows are in the folder TO.parts. Images that cannot be read have no row: they are listed at the end and in the file.
Several processes compute the features together if they are started like those of a training run (mae_jax train --help).
"""

from absl import flags

from mae_jax.commands import cli
from mae_jax.runtime import launch
from mae_jax.storage import paths

REQUIRED = ("from", "to")
CONFIG = cli.define_config()
FROM = flags.DEFINE_string("from", "", "workdir, one step's folder in it, its best/, an export, or weights of others")
TO = flags.DEFINE_string("to", "", "file to write, *.parquet or *.npz; local or gs://")
IMAGES = flags.DEFINE_string("images", "", "a file, a folder or a pattern of images; local or gs://")
SPLIT = flags.DEFINE_string("split", "", "split of the run's data, or of those of --config; '': all splits of the "
                                         "config")
FEATURES = flags.DEFINE_string("features", "pool", "pool (see model.pool), cls (the class token), mean (of the patch "
                               "tokens), patches (their map) or tokens (all)")
BLOCK = flags.DEFINE_integer("block", -1, "block whose tokens are the features; -1: the encoder's output")
BATCH = flags.DEFINE_integer("batch_size", 0, "images per batch, over all devices; 0: 32 on each CPU, 128 on each "
                             "accelerator", lower_bound=0)
HEADS = flags.DEFINE_integer("heads", 0, "number of attention heads, if weights of others do not state "
                                         "it", lower_bound=0)


def main() -> int:
    names = (FROM, TO, IMAGES, SPLIT, FEATURES, BLOCK, BATCH, HEADS)
    return launch.run(embed, {f"--{flag.name}": flag.value for flag in names}, CONFIG.value)


def embed() -> int:
    """Writes the file. Returns the exit code."""
    from mae_jax.inference import asked, embedding, embedding_files
    from mae_jax.runtime.console import print_once

    to = paths.locate(TO.value, "--to")
    embedding_files.writer_of(to)
    encoder, parts = asked.opened(FROM.value, IMAGES.value, CONFIG.value, SPLIT.value, all_splits=True,
                                  batch_size=BATCH.value, heads=HEADS.value)
    found = embedding.embed(encoder, parts, to, FEATURES.value, BLOCK.value, IMAGES.value)
    print_once(embedding.told(found))
    return asked.exit_code(encoder, found.images, found.unreadable_count)
