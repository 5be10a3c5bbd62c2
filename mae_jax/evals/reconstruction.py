"""Images of reconstructed masked patches."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather

from mae_jax.evals.base import Evaluation
from mae_jax.evals.context import Context
from mae_jax.evals.image_grid import paired, tile
from mae_jax.methods.base import GRAY, Batch, Method
from mae_jax.methods.mixedae import MixedAE
from mae_jax.ops.patches import denormalize

RATIOS = (0.25, 0.5, 0.75, 0.9)  # masking ratios of `at_ratios`
CAPTIONS = ("input", "visible patches", "reconstruction") * 2


class Reconstruction(Evaluation):
    """Images of reconstructed masked patches or, for MixedAE, of reconstructed mixed images; no metrics."""

    name = "reconstruction"

    def applies(self, method: Method, data: Any) -> bool:
        return method.reconstructs

    def images(self, ctx: Context) -> Iterator[tuple[str, np.ndarray]]:
        about = ctx.method, ctx.params, ctx.extras, ctx.shown
        if isinstance(ctx.method, MixedAE):
            yield "reconstruct", mixtures(*about)
        else:
            yield "reconstruct", reconstructions(*about, ctx.shown_names)
        if ctx.method.mask_ratio is not None and ctx.method.group == 1:
            yield "ratios", at_ratios(*about)


@functools.lru_cache(maxsize=8)
def predictor(method: Method) -> Callable[..., dict[str, jax.Array]]:
    """Returns the compiled `reconstruct` of the method, cached across evaluations."""
    return jax.jit(method.reconstruct)


@functools.lru_cache(maxsize=8)
def masking(method: Method, ratio: float) -> Method:
    """Returns the method at another masking ratio, cached across evaluations."""
    return method if ratio == method.mask_ratio else method.at_mask_ratio(ratio)


def panels(method: Method, params: Any, extras: Any, batch: Batch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns input, masked input, and prediction with the visible patches copied in; uint8 [B, height, width, 3]."""
    predicted = process_allgather(predictor(method)(params, extras, batch)["pixels"], tiled=True)
    patches, order = np.asarray(batch["patches"]), np.asarray(batch["order"])
    visible = patches.shape[1] - predicted.shape[1]
    masked, pasted = patches.copy(), patches.copy()
    masked[:, visible:] = GRAY
    pixels = np.nan_to_num(denormalize(predicted), nan=GRAY)  # predictions of a diverged model are drawn, too
    pasted[:, visible:] = np.clip(np.rint(pixels), 0, 255).astype(np.uint8)
    original, masked, pasted = (method.grid.unpatchify(x, order) for x in (patches, masked, pasted))
    return original, masked, pasted


def reconstructions(method: Method, params: Any, extras: Any, batch: Batch, names: Sequence[str] = ()) -> np.ndarray:
    """Draws input, visible patches and reconstruction of each image, two images per row; uint8 [height, width, 3].

    `names` are the captions of the images.
    """
    rows = list(zip(*panels(method, params, extras, batch), strict=True))
    share = "" if method.mask_ratio is None else f"{method.mask_ratio:.0%} of the patches are masked; "
    title = f"Reconstructions: {share}visible patches are copied; {method.reconstruction_note}"
    return tile(paired(rows), CAPTIONS, title, below=names)


def mixtures(method: MixedAE, params: Any, extras: Any, batch: Batch) -> np.ndarray:
    """Draws each mixed image of a batch of whole groups, its source images and their reconstructions.

    Returns:
      uint8 [height, width, 3].
    """
    group = method.group
    sources, _, predicted = panels(method, params, extras, batch)
    patches, order = (np.asarray(method.mixed(np.asarray(batch[name]))) for name in ("patches", "order"))
    mixed = method.grid.unpatchify(patches, order)
    rows = [(mixed[i], *sources[i * group : (i + 1) * group], *predicted[i * group : (i + 1) * group])
            for i in range(len(mixed))]
    captions = ["mixed", *(f"source {i + 1}" for i in range(group)), *(f"reconstruction {i + 1}" for i in range(group))]
    title = f"Reconstructions: {group} images are mixed, {1 - 1 / group:.0%} of each is masked; " \
            f"{method.reconstruction_note}"
    return tile(rows, captions, title)


def at_ratios(method: Method, params: Any, extras: Any, batch: Batch) -> np.ndarray:
    """Draws the last two images of a batch at several masking ratios, one row each, with one random order of patches.

    Returns:
      uint8 [height, width, 3].
    """
    # A new order: that of block and grid masking is valid for the training ratio only.
    shuffle = np.random.default_rng(0).permutation(batch["order"].shape[1])
    # All images, though only two are drawn: at the trained ratio this batch shape is already compiled.
    shuffled = batch | {name: batch[name][:, shuffle] for name in ("patches", "order")}
    rows = []
    for ratio in RATIOS:
        shown = zip(*(images[-2:] for images in panels(masking(method, ratio), params, extras, shuffled)), strict=True)
        rows.append([panel for image in shown for panel in image])
    title = f"Reconstructions at several mask ratios: trained at {method.mask_ratio:.0%}; {method.reconstruction_note}"
    return tile(rows, CAPTIONS, title, [f"{ratio:.0%} masked" for ratio in RATIOS])
