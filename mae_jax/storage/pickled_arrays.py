"""NumPy's arrays in a pickle, as Detectron2's model zoo has them, made without calling what the pickle names.

`torch_file` gives a pickle these in place of NumPy's own names. What they take is checked when an array is read: plain
numbers, little end first, in rows, as many as its shape says.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

CODES = {"f8": "<f8", "f4": "<f4", "f2": "<f2", "i8": "<i8", "i4": "<i4", "i2": "<i2", "i1": "i1", "u1": "u1",
         "b1": "?"}
DIMENSIONS = 32  # of an array, at the most


class Dtype:
    """What a pickle makes of `numpy.dtype`."""

    def __init__(self, *args: Any):
        self.code, self.order = args[0] if args and isinstance(args[0], str) else "", "="

    def __setstate__(self, state: Any) -> None:
        self.order = state[1] if isinstance(state, tuple) and len(state) > 1 else ""

    def known(self) -> np.dtype:
        """Returns the dtype; raises ValueError for one of objects, texts or records, or of big ends."""
        code = self.code.lstrip("<|")
        if code not in CODES or self.order not in ("<", "|", "="):
            raise ValueError("an array is not of plain numbers, little end first")
        return np.dtype(CODES[code])


class Array:
    """What a pickle makes of an array: its numbers are looked at when it is read."""

    def __init__(self, content: Any = b"", dtype: Any = None, shape: Any = (), order: Any = "C"):
        self.content, self.dtype, self.shape, self.by_columns = content, dtype, shape, order == "F"

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) == 5:
            _, self.shape, self.dtype, self.by_columns, self.content = state

    def read(self) -> np.ndarray:
        """Returns the array; raises ValueError for one that is damaged, or not of plain numbers."""
        if not isinstance(self.dtype, Dtype) or not isinstance(self.shape, tuple) or len(self.shape) > DIMENSIONS:
            raise ValueError("an array is not described as NumPy does it")
        if not all(type(size) is int and 0 <= size < 2**48 for size in self.shape):
            raise ValueError("an array is not described as NumPy does it")
        dtype = self.dtype.known()
        size = math.prod(self.shape) * dtype.itemsize
        content = self.content
        if isinstance(content, Encoded) and isinstance(content.text, str) and len(content.text) == size:
            content = content.text.encode("latin1")  # of as many letters; others raise ValueError
        if not isinstance(content, bytes | bytearray) or len(content) != size:
            raise ValueError(f"an array of {list(self.shape)} has not as many numbers")
        return np.frombuffer(bytes(content), dtype).reshape(self.shape, order="F" if self.by_columns else "C")


class Call:
    """A function that a pickle may call, and not change: BUILD would set attributes of the function itself."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]):
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setstate__(self, state: Any) -> None:
        raise ValueError("it changes what it may only call")


def reconstruct(*args: Any) -> Array:
    """Stands for NumPy's `_reconstruct`: an array whose content follows."""
    return Array()


def from_buffer(content: Any = b"", dtype: Any = None, shape: Any = (), order: Any = "C") -> Array:
    """Stands for NumPy's `_frombuffer`, of pickles of protocol 5."""
    return Array(content, dtype, shape, order)


class Encoded:
    """Stands for what `_codecs.encode` gives, by which protocol 2 writes bytes: Latin-1, made when it is read.

    A pickle may encode one long text many times over.
    """

    def __init__(self, text: Any = "", *codec: Any):
        self.text = text

    def __setstate__(self, state: Any) -> None:
        raise ValueError("it changes bytes")


class Kind:
    """Stands for `numpy.ndarray`, which is only named."""

    def __setstate__(self, state: Any) -> None:
        raise ValueError("it changes a kind of arrays")


KNOWN: dict[str, Any] = {
    **{f"numpy.{core}.multiarray._reconstruct": Call(reconstruct) for core in ("core", "_core")},
    **{f"numpy.{core}.numeric._frombuffer": Call(from_buffer) for core in ("core", "_core")},
    "numpy.ndarray": Kind, "numpy.dtype": Dtype, "_codecs.encode": Call(Encoded),
}
