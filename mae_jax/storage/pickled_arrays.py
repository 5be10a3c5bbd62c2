"""NumPy arrays in pickles, such as those of Detectron2's model zoo, without calling the functions that a pickle names.

`torch_file` substitutes these classes and functions for NumPy's. Their arguments are checked when an array is read: it
must hold plain little-endian numbers, as many as its shape requires.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

CODES = {"f8": "<f8", "f4": "<f4", "f2": "<f2", "i8": "<i8", "i4": "<i4", "i2": "<i2", "i1": "i1", "u1": "u1",
         "b1": "?"}
DIMENSIONS = 32  # most dimensions of an array


class Dtype:
    """Substitute for `numpy.dtype`."""

    def __init__(self, *args: Any):
        self.code, self.order = args[0] if args and isinstance(args[0], str) else "", "="

    def __setstate__(self, state: Any) -> None:
        self.order = state[1] if isinstance(state, tuple) and len(state) > 1 else ""

    def known(self) -> np.dtype:
        """Returns the dtype; raises ValueError for objects, texts, records and big-endian numbers."""
        code = self.code.lstrip("<|")
        if code not in CODES or self.order not in ("<", "|", "="):
            raise ValueError("an array does not hold plain little-endian numbers")
        return np.dtype(CODES[code])


class Array:
    """Substitute for an array, whose arguments are checked when it is read."""

    def __init__(self, content: Any = b"", dtype: Any = None, shape: Any = (), order: Any = "C"):
        self.content, self.dtype, self.shape, self.by_columns = content, dtype, shape, order == "F"

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) == 5:
            _, self.shape, self.dtype, self.by_columns, self.content = state

    def read(self) -> np.ndarray:
        """Returns the array; raises ValueError if it is damaged or does not hold plain numbers."""
        if not isinstance(self.dtype, Dtype) or not isinstance(self.shape, tuple) or len(self.shape) > DIMENSIONS:
            raise ValueError("an array is not described as NumPy does it")
        if not all(type(size) is int and 0 <= size < 2**48 for size in self.shape):
            raise ValueError("an array is not described as NumPy does it")
        dtype = self.dtype.known()
        size = math.prod(self.shape) * dtype.itemsize
        content = self.content
        if isinstance(content, Encoded) and isinstance(content.text, str) and len(content.text) == size:
            content = content.text.encode("latin1")  # raises ValueError for other characters
        if not isinstance(content, bytes | bytearray) or len(content) != size:
            raise ValueError(f"an array of shape {list(self.shape)} has the wrong number of bytes")
        return np.frombuffer(bytes(content), dtype).reshape(self.shape, order="F" if self.by_columns else "C")


class Call:
    """A function that a pickle may call, but not change: the opcode BUILD would set attributes of the function."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]):
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setstate__(self, state: Any) -> None:
        raise ValueError("it changes a function")


def reconstruct(*args: Any) -> Array:
    """Substitute for NumPy's `_reconstruct`, which creates an array whose content follows."""
    return Array()


def from_buffer(content: Any = b"", dtype: Any = None, shape: Any = (), order: Any = "C") -> Array:
    """Substitute for NumPy's `_frombuffer`, which pickles of protocol 5 call."""
    return Array(content, dtype, shape, order)


class Encoded:
    """Substitute for the result of `_codecs.encode`, by which pickles of protocol 2 write bytes as Latin-1 text.

    The text is encoded when its array is read, since a pickle may encode one long text many times.
    """

    def __init__(self, text: Any = "", *codec: Any):
        self.text = text

    def __setstate__(self, state: Any) -> None:
        raise ValueError("it changes bytes")


class Kind:
    """Substitute for `numpy.ndarray`, which pickles name as an argument."""

    def __setstate__(self, state: Any) -> None:
        raise ValueError("it changes a class")


KNOWN: dict[str, Any] = {
    **{f"numpy.{core}.multiarray._reconstruct": Call(reconstruct) for core in ("core", "_core")},
    **{f"numpy.{core}.numeric._frombuffer": Call(from_buffer) for core in ("core", "_core")},
    "numpy.ndarray": Kind, "numpy.dtype": Dtype, "_codecs.encode": Call(Encoded),
}
