"""Token maps precomputed by another tokenizer: the batch field `tokens`. NumPy only.

A file *.npz has one integer array [n, N] per split, named by the split's expression in the config ('train',
'train[90%:]'). Row i holds the tokens of the example with id i, patches in raster order.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from mae_jax.errors import UserError
from mae_jax.storage.npz import opened
from mae_jax.storage.paths import locate

Batch = dict[str, np.ndarray]
FIELD = "tokens"


def load(config: ConfigDict, sizes: dict[str, int], patches: int, vocabulary: int) -> dict[str, np.ndarray]:
    """Loads the token maps of the splits in the config.

    Args:
      config: names the file in data.tokens; its views must show every image as the tokenizer saw it.
      sizes: split expression → number of examples.
      patches: N.
      vocabulary: exclusive upper bound of the tokens.

    Returns:
      Split expression → int32 [n, N].

    Raises:
      UserError: crops or colors are random, or the file lacks an array or has one that does not fit.
    """
    data, file = config.data, locate(config.data.tokens, "data.tokens")
    if (data.augment, data.color) != ("none", "none"):
        raise UserError(f"data.augment={data.augment!r}, data.color={data.color!r}: the tokens of data.tokens are "
                        "those of one fixed view, which a random one does not show; use 'none' for both (the central "
                        "eval.crop_ratio), or tokens that are made of the view (method.target=kmeans)")
    if len(config.eval.crop_ratio) > 1:
        raise UserError(f"eval.crop_ratio={tuple(config.eval.crop_ratio)}: data.tokens has the tokens of one crop; "
                        "give that ratio alone")
    if not data.tokens or not file.is_file():
        raise UserError(f"data.tokens={data.tokens!r} is no file; write one *.npz with an integer array [examples, "
                        f"{patches}] per split, named {' and '.join(map(repr, sizes))}")
    with opened(file) as stored:
        found = {name: stored[name] for name in sizes if name in stored.files}
    for name, size in sizes.items():
        if name not in found:
            raise UserError(f"{file} has no array {name!r}, the tokens of that split")
        _check(file, name, found[name], (size, patches), vocabulary)
    return {name: tokens.astype(np.int32) for name, tokens in found.items()}


def _check(file: epath.Path, name: str, tokens: np.ndarray, shape: tuple[int, int], vocabulary: int) -> None:
    if tokens.shape != shape or not np.issubdtype(tokens.dtype, np.integer):
        raise UserError(f"{file}: {name!r} is {tokens.dtype} {list(tokens.shape)}; expected integers {list(shape)}")
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocabulary:
        raise UserError(f"{file}: {name!r} has tokens from {low} to {high}; expected 0 to method.vocabulary - 1 = "
                        f"{vocabulary - 1}")


def joined(make: Callable[..., Iterator[Batch]], tokens: np.ndarray) -> Callable[..., Iterator[Batch]]:
    """Returns `make` with the field `tokens` int32 [B, N] added to its batches, permuted like their patches."""
    def batches(*args: Any) -> Iterator[Batch]:
        for batch in make(*args):
            yield {**batch, FIELD: np.take_along_axis(tokens[batch["id"]], batch["order"], axis=1)}

    return batches
