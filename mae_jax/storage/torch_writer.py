"""Arrays in a file that torch.load reads, with weights_only too, written without torch.

The layout is the zip archive since PyTorch 1.6. The file is {'model': {name: tensor}}, as the published MAE code
has it; `torch_file` reads it.
"""

import io
import pickle
import struct
import zipfile
from collections.abc import Iterable, Mapping

import numpy as np
from etils import epath

from mae_jax.storage import paths

ROOT = "archive"  # of the names in the zip; torch takes any
HOOKS = b"ccollections\nOrderedDict\n" + pickle.EMPTY_TUPLE + pickle.REDUCE  # none


def save(path: epath.Path, state: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """Writes float32 arrays by name.

    Args:
      path: local or gs://; replaced when it exists.
      state: name → float32 array.
      metadata: not written; the layout has no place for it.
    """
    arrays = {name: np.ascontiguousarray(array, "<f4") for name, array in state.items()}
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(f"{ROOT}/data.pkl", _pickle(arrays))
        archive.writestr(f"{ROOT}/byteorder", "little")
        for number, array in enumerate(arrays.values()):
            archive.writestr(f"{ROOT}/data/{number}", array.data.cast("B") if array.size else b"")
        archive.writestr(f"{ROOT}/version", "3\n")
    paths.replace_bytes(path, out.getvalue())


def _pickle(arrays: Mapping[str, np.ndarray]) -> bytes:
    items = b"".join(_text(name) + _tensor(str(number), array) for number, (name, array) in enumerate(arrays.items()))
    state = pickle.EMPTY_DICT + pickle.MARK + items + pickle.SETITEMS
    return b"".join((pickle.PROTO, b"\x02", pickle.EMPTY_DICT, pickle.MARK, _text("model"), state, pickle.SETITEMS,
                     pickle.STOP))


def _tensor(key: str, array: np.ndarray) -> bytes:
    """Returns what makes a tensor of the storage of this key, as torch's own `_rebuild_tensor_v2` takes it."""
    storage = _tuple((_text("storage"), b"ctorch\nFloatStorage\n", _text(key), _text("cpu"), _integer(array.size)))
    strides = [stride // array.itemsize for stride in array.strides]
    made_of = _tuple((storage + pickle.BINPERSID, _integer(0), _tuple(map(_integer, array.shape)),
                      _tuple(map(_integer, strides)), pickle.NEWFALSE, HOOKS))
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + made_of + pickle.REDUCE


def _tuple(parts: Iterable[bytes]) -> bytes:
    return pickle.MARK + b"".join(parts) + pickle.TUPLE


def _text(text: str) -> bytes:
    return pickle.BINUNICODE + struct.pack("<I", len(text.encode())) + text.encode()


def _integer(number: int) -> bytes:
    return pickle.BININT + struct.pack("<i", number)
