"""Writing of arrays for torch.load, also with weights_only, without torch.

The layout is the zip archive of PyTorch 1.6 and later. The file holds {'model': {name: tensor}}, as those of MAE's
released code; `torch_file` reads it.
"""

import io
import struct
import zipfile
from collections.abc import Iterable, Mapping

import numpy as np
from etils import epath

from mae_jax.storage import paths

# Opcodes of pickles (listed in Python's pickletools).
PROTO, STOP, MARK, REDUCE, BINPERSID, NEWFALSE = b"\x80", b".", b"(", b"R", b"Q", b"\x89"
EMPTY_DICT, SETITEMS, EMPTY_TUPLE, TUPLE, BINUNICODE, BININT = b"}", b"u", b")", b"t", b"X", b"J"
ROOT = "archive"  # first part of the names in the zip; torch accepts any
HOOKS = b"ccollections\nOrderedDict\n" + EMPTY_TUPLE + REDUCE  # no backward hooks


def save(path: epath.Path, state: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """Writes float32 arrays by name.

    Args:
      path: local or gs://; an existing file is replaced.
      state: name → float32 array.
      metadata: not written; the layout has no place for it.
    """
    arrays = {name: np.asarray(array, "<f4", order="C") for name, array in state.items()}
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(f"{ROOT}/data.pkl", _pickle(arrays))
        archive.writestr(f"{ROOT}/byteorder", "little")
        for number, array in enumerate(arrays.values()):
            archive.writestr(f"{ROOT}/data/{number}", array.tobytes())
        archive.writestr(f"{ROOT}/version", "3\n")
    paths.replace_bytes(path, out.getvalue())


def _pickle(arrays: Mapping[str, np.ndarray]) -> bytes:
    items = b"".join(_text(name) + _tensor(str(number), array) for number, (name, array) in enumerate(arrays.items()))
    state = EMPTY_DICT + MARK + items + SETITEMS
    return b"".join((PROTO, b"\x02", EMPTY_DICT, MARK, _text("model"), state, SETITEMS,
                     STOP))


def _tensor(key: str, array: np.ndarray) -> bytes:
    """Returns the opcodes that create a tensor from the storage `key` by torch's `_rebuild_tensor_v2`."""
    storage = _tuple((_text("storage"), b"ctorch\nFloatStorage\n", _text(key), _text("cpu"), _integer(array.size)))
    strides = [stride // array.itemsize for stride in array.strides]
    made_of = _tuple((storage + BINPERSID, _integer(0), _tuple(map(_integer, array.shape)),
                      _tuple(map(_integer, strides)), NEWFALSE, HOOKS))
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + made_of + REDUCE


def _tuple(parts: Iterable[bytes]) -> bytes:
    return MARK + b"".join(parts) + TUPLE


def _text(text: str) -> bytes:
    return BINUNICODE + struct.pack("<I", len(text.encode())) + text.encode()


def _integer(number: int) -> bytes:
    return BININT + struct.pack("<i", number)
