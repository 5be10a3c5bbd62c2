r"""Writes a self-contained HTML page about runs and images, which a browser shows without a network.

  mae_jax report --from=runs/quickstart --to=report.html
  mae_jax report --from=runs/one --from=runs/two --to=report.html                # side by side
  mae_jax report --from=runs/mine --images=/path/to/images --to=report.html      # with a map of these images
  mae_jax report --from=mae_pretrain_vit_base.pth --images=/path/to/images --to=report.html
  mae_jax report --from=runs/mine --embeddings=features.parquet --to=report.html

For a run, finished or not: its config, curves, reconstructions and attention over time, parameters and versions. For
images: a map of their features (PCA, t-SNE), with zoom, search by name and label, and nearest neighbors of an image.
--images first embeds, as mae_jax embed does, to a file beside the page (report.parquet), and resumes after an
interruption; --config=folder --config.data.path=... embeds images of any source. The page is one file, with thumbnails.
"""

from absl import flags

from mae_jax.commands import cli

REQUIRED = ("to",)
CONFIG = cli.define_config()
FROM = flags.DEFINE_multi_string("from", [], "workdir; may be repeated for several runs. With --images also an "
                                 "export, or weights of others")
TO = flags.DEFINE_string("to", "", "page to write, *.html; local or gs://")
EMBEDDINGS = flags.DEFINE_string("embeddings", "", "features of mae_jax embed, *.parquet or *.npz, for the map")
IMAGES = flags.DEFINE_string("images", "", "a file, a folder or a pattern of images to embed first, by --from")
MOST = flags.DEFINE_integer("max_images", 10_000, "largest number of images on the map; of more, evenly spread ones "
                                                  "are shown", lower_bound=1,
                            upper_bound=30_000)
TSNE = flags.DEFINE_integer("tsne_images", 3_000, "largest number of these that t-SNE is computed of; 0: no t-SNE",
                            lower_bound=0, upper_bound=30_000)


def main() -> int:
    from mae_jax.commands.report import writing

    return writing.write(FROM.value, TO.value, EMBEDDINGS.value, IMAGES.value, CONFIG.value,
                         MOST.value, TSNE.value)
