"""Reading and writing of patch vocabularies."""

import io

import numpy as np
from etils import epath

from mae_jax.errors import UserError
from mae_jax.storage.npz import opened
from mae_jax.storage.paths import locate, replace_bytes


def save(file: epath.PathLike, entries: np.ndarray, kind: str) -> None:
    """Writes a vocabulary [V - 1, P] and its kind, one of `losses.patch_tokens.KINDS`, as *.npz."""
    path, stored = locate(str(file)), io.BytesIO()
    np.savez(stored, vocabulary=entries, kind=np.array(kind))
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_bytes(path, stored.getvalue())


def load(file: epath.PathLike, kind: str, shape: tuple[int, int]) -> np.ndarray:
    """Reads a vocabulary, float [V - 1, P].

    Raises:
      UserError: the file is not a vocabulary of this kind and shape, or has values that are not finite.
    """
    path = locate(str(file), "method.vocabulary_file")
    if not path.is_file():
        raise UserError(f"method.vocabulary_file={file!r} is not a file; python -m mae_jax cluster writes one")
    with opened(path) as stored:
        if not {"vocabulary", "kind"} <= set(stored.files):
            raise UserError(f"{path} is not a vocabulary: it has {', '.join(stored.files)}")
        entries, found = stored["vocabulary"], str(stored["kind"])
    if found != kind or entries.shape != shape:
        raise UserError(f"{path} holds {found!r} of shape {list(entries.shape)} (tokens minus 1, values per patch); "
                        f"the config has {kind!r} and {list(shape)}")
    if entries.dtype.kind != "f" or not np.isfinite(entries).all():
        raise UserError(f"{path} is not a vocabulary: its values are {entries.dtype}, or not all finite")
    return entries
