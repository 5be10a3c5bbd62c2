"""Pictures of what the model makes of hidden patches."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image, ImageDraw

from mae_jax.methods import Method, get
from mae_jax.methods.base import Batch
from mae_jax.ops.patches import assemble, denormalize, grid

GREY = 127  # of a patch that the model does not see
RATIOS = (0.25, 0.5, 0.75, 0.9)  # of the picture at several masking ratios
CELL = 128  # smallest side of a picture in a grid, in screen pixels
GAP, CAPTION = 4, 18  # screen pixels between pictures, and for the line of text above


def panels(method: Method, params: Any, extras: Any, batch: Batch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns (input, masked input, prediction with the visible patches pasted in), uint8 [B, height, width, 3]."""
    predicted = jax.jit(method.reconstruct)(params, extras, batch)["pixels"]
    patches, order = np.asarray(batch["patches"]), np.asarray(batch["order"])
    hidden = predicted.shape[1]
    shape = grid(method.config), tuple(method.config.model.patch)
    masked, pasted = patches.copy(), patches.copy()
    masked[:, -hidden:] = GREY
    pasted[:, -hidden:] = np.clip(np.rint(denormalize(np.asarray(predicted))), 0, 255).astype(np.uint8)
    original, masked, pasted = (assemble(x, order, *shape) for x in (patches, masked, pasted))
    return original, masked, pasted


def tile(rows: Sequence[Sequence[np.ndarray]], captions: Sequence[str], title: str) -> np.ndarray:
    """Lays rows of equally large uint8 pictures out with a caption above each column and a title at the top."""
    height, width = rows[0][0].shape[:2]
    scale = max(1, -(-CELL // min(height, width)))
    step_y, step_x = height * scale + GAP, width * scale + GAP
    canvas = Image.new("RGB", (step_x * len(rows[0]) + GAP, 2 * CAPTION + step_y * len(rows) + GAP), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((GAP, 3), title, fill="black")
    for column, caption in enumerate(captions):
        draw.text((GAP + column * step_x, CAPTION + 3), caption, fill="black")
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            large = Image.fromarray(picture).resize((width * scale, height * scale), Image.Resampling.NEAREST)
            canvas.paste(large, (GAP + x * step_x, 2 * CAPTION + y * step_y))
    return np.asarray(canvas)


def note(config: ConfigDict) -> str:
    """Returns what a reader must know about the colours of the predictions."""
    if config.method.target == "norm_pix":
        return "hidden patches un-normalised with their own true mean and deviation"
    return "plain pixels, nothing known of the hidden patches" if config.method.target == "pixel" else "PCA of pixels"


def reconstructions(method: Method, params: Any, extras: Any, batch: Batch) -> np.ndarray:
    """Returns the grid of `batch`: input, masked input, prediction."""
    columns = panels(method, params, extras, batch)
    title = f"{method.config.method.mask_ratio:.0%} hidden; {note(method.config)}"
    return tile(list(zip(*columns, strict=True)), ("input", "visible", "prediction"), title)


def at_ratios(method: Method, params: Any, extras: Any, batch: Batch) -> np.ndarray:
    """Returns the first picture of `batch` at several masking ratios, one row each, with the same random order."""
    first = {name: value[:1] for name, value in batch.items()}
    rows = []
    for ratio in RATIOS:
        config = method.config.copy_and_resolve_references()
        config.method.update(mask_ratio=ratio, masking="random")
        other = get(config.method.name)(config)
        rows.append([*(column[0] for column in panels(other, params, extras, first))])
    title = f"hidden, from the top: {', '.join(f'{ratio:.0%}' for ratio in RATIOS)}; trained at " \
            f"{method.config.method.mask_ratio:.0%}; {note(method.config)}"
    return tile(rows, ("input", "visible", "prediction"), title)
