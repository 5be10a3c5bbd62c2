"""Reading of *.npz files with arrays of numbers and texts, without executing anything in them."""

import contextlib
import errno
import io
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator

import numpy as np
from etils import epath

from mae_jax.errors import UserError
from mae_jax.storage import file_kinds
from mae_jax.storage.paths import read_bytes

CANNOT = (errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOENT, errno.ENOTDIR, errno.EIO, errno.ESTALE, errno.EMFILE,
          errno.ENFILE, errno.ENOMEM)  # errors that do not mean damage; for damaged files zipfile raises EINVAL
DAMAGED = (OSError, ValueError, TypeError, KeyError, EOFError, SyntaxError, RuntimeError, MemoryError, struct.error,
           tokenize.TokenError, zipfile.BadZipFile, zlib.error)  # exceptions of NumPy for damaged files


@contextlib.contextmanager
def opened(path: epath.Path, hint: str = "") -> Iterator[np.lib.npyio.NpzFile]:
    """Context that opens a file; arrays are read when they are accessed, except that files in buckets are read whole.

    Args:
      path: an existing file.
      hint: end of error messages, such as '; remove it'.

    Raises:
      UserError: here or inside the context: the file is damaged, lacks the array, or the array has Python objects,
        for which NumPy would execute code.
    """
    try:
        with io.BytesIO(read_bytes(path) or b"") if "://" in str(path) else path.open("rb") as file:
            arrays = np.load(file, allow_pickle=False)
            if not isinstance(arrays, np.lib.npyio.NpzFile):
                raise ValueError("it holds one array, where *.npz holds named arrays")
            yield arrays
    except DAMAGED as error:
        raise UserError(f"{_why(path, error)}{hint}") from None


def _why(path: epath.Path, error: Exception) -> str:
    """Returns in one line why a file cannot be read."""
    text = str(error) or type(error).__name__
    if isinstance(error, OSError) and str(path).startswith("gs://"):
        return text  # a BucketError, which names the path
    if isinstance(error, OSError) and error.errno in CANNOT:
        return f"cannot read {path}: {error.strerror}"
    if isinstance(error, MemoryError):
        return f"{path} has an array that does not fit into memory, or is damaged: {text}"
    if isinstance(error, KeyError) and "is not a file in the archive" in text:
        return f"{path} lacks an array: {text.split(' is not ')[0].lstrip(chr(34) + chr(39))}"
    begin = b""
    with contextlib.suppress(OSError), path.open("rb") as file:
        begin = file.read(file_kinds.ENOUGH)
    if "pickle" in text and begin[:2] == b"PK":
        text = "it has Python objects, which are never loaded"
    elif "pickle" in text:  # NumPy's guess of any file that is no archive
        text = f"it is {file_kinds.kind(begin) or 'no archive of arrays'}"
    elif begin[:2] != b"PK" and not begin.startswith(b"\x93NUMPY") and (found := file_kinds.kind(begin)):
        text = f"it is {found}"
    return f"{path} is damaged, or not a file of arrays (*.npz): {text}"
