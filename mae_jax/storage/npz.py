"""Reading *.npz files, which hold arrays of numbers and texts: nothing in them is ever executed."""

import contextlib
import io
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator

import numpy as np
from etils import epath

from mae_jax.errors import UserError
from mae_jax.storage.paths import read_bytes

DAMAGED = (OSError, ValueError, TypeError, KeyError, EOFError, SyntaxError, RuntimeError, MemoryError, struct.error,
           tokenize.TokenError, zipfile.BadZipFile, zlib.error)  # what broken bytes make NumPy raise


@contextlib.contextmanager
def opened(path: epath.Path, hint: str = "") -> Iterator[np.lib.npyio.NpzFile]:
    """Opens a file whose arrays are read when they are asked for; one on gs:// as a whole, with its checksum.

    Args:
      path: the file, which is there.
      hint: ends the message of what is wrong, as '; remove it'.

    Raises:
      UserError: here or in the block that reads: the file is damaged, lacks the array, or has one of Python objects,
        which NumPy would execute code to make.
    """
    try:
        with io.BytesIO(read_bytes(path) or b"") if str(path).startswith("gs://") else path.open("rb") as file:
            arrays = np.load(file, allow_pickle=False)
            if not isinstance(arrays, np.lib.npyio.NpzFile):
                raise ValueError("one array, where *.npz has several with a name each")
            yield arrays
    except DAMAGED as error:
        text = "it has Python objects, which are never loaded" if "pickle" in str(error) else str(error)
        raise UserError(f"{path} is damaged, or no file of arrays: {text or type(error).__name__}{hint}") from None
