"""Files as torch.save writes them, made without torch: zip archives, and the layout before PyTorch 1.6."""

import io
import struct
import zipfile
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

STORAGES = {"float32": "FloatStorage", "float16": "HalfStorage", "int64": "LongStorage", "bfloat16": "BFloat16Storage",
            "float64": "DoubleStorage"}


class Global(NamedTuple):
    """A name that a pickle asks for, and what it is called with; None: it is not called."""

    module: str
    name: str
    args: tuple[Any, ...] | None = None


class View(NamedTuple):
    """A tensor that is a view of the storage `key`."""

    key: str
    storage: str
    numbers: int
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Program:
    """A pickle of protocol 2, written an operation at a time."""

    def __init__(self) -> None:
        self.arrays: dict[str, np.ndarray] = {}

    def of(self, value: Any) -> bytes:
        return b"\x80\x02" + self._value(value) + b"."

    def _value(self, value: Any) -> bytes:
        match value:
            case None:
                return b"N"
            case bool():
                return b"\x88" if value else b"\x89"
            case int() if 0 <= value < 2**31:
                return b"J" + struct.pack("<i", value)
            case int():
                data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
                return b"\x8a" + bytes([len(data)]) + data
            case float():
                return b"G" + struct.pack(">d", value)
            case str():
                return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
            case Global(module, name, args):
                found = f"c{module}\n{name}\n".encode()
                return found if args is None else found + self._value(tuple(args)) + b"R"
            case View():
                return self._view(value)
            case tuple():
                return b"(" + b"".join(map(self._value, value)) + b"t"
            case list():
                return b"](" + b"".join(map(self._value, value)) + b"e"
            case Mapping():
                items = b"".join(self._value(key) + self._value(each) for key, each in value.items())
                return b"}(" + items + b"u"
            case np.ndarray():
                key = str(len(self.arrays))
                self.arrays[key] = np.ascontiguousarray(value).reshape(value.shape)
                strides = tuple(stride // value.itemsize for stride in self.arrays[key].strides)
                return self._view(View(key, STORAGES[value.dtype.name], value.size, 0, value.shape, strides))
        raise TypeError(type(value))

    def _view(self, view: View) -> bytes:
        pid = self._value(("storage", Global("torch", view.storage), view.key, "cpu", view.numbers)) + b"Q"
        if self.legacy:
            pid = self._value(("storage", Global("torch", view.storage), view.key, "cpu", view.numbers, None)) + b"Q"
        rest = b"".join(map(self._value, (view.offset, view.shape, view.strides, False,
                                          Global("collections", "OrderedDict", ()))))
        return b"ctorch._utils\n_rebuild_tensor_v2\n(" + pid + rest + b"tR"

    legacy = False


def zipped(value: Any, folder: str = "archive", method: int = zipfile.ZIP_STORED,
           more: Mapping[str, bytes] | None = None) -> bytes:
    """Returns the file of torch.save of a value; arrays are tensors."""
    program, buffer = _Program(), io.BytesIO()
    content = program.of(value)
    with zipfile.ZipFile(buffer, "w", method) as archive:
        archive.writestr(f"{folder}/data.pkl", content)
        archive.writestr(f"{folder}/byteorder", "little")
        for key, array in program.arrays.items():
            archive.writestr(f"{folder}/data/{key}", array.tobytes())
        for name, data in (more or {}).items():
            archive.writestr(f"{folder}/{name}", data)
        archive.writestr(f"{folder}/version", "3\n")
    return buffer.getvalue()


def legacy(value: Any) -> bytes:
    """Returns the file that PyTorch before 1.6 would have written."""
    program = _Program()
    program.legacy = True
    content = program.of(value)
    head = [0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {"int": 4}}]
    keys = list(program.arrays)
    numbers = [struct.pack("<q", program.arrays[key].size) + program.arrays[key].tobytes() for key in keys]
    return b"".join([*map(_Program().of, head), content, _Program().of(keys), *numbers])
