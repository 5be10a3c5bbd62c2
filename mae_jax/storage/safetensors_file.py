"""Reading and writing of parameters in *.safetensors files, with checksums of the arrays."""

import json
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import safetensors.numpy
from etils import epath

from mae_jax.errors import UserError, root_cause
from mae_jax.param_tree import flatten, nest
from mae_jax.runtime import bounded_json
from mae_jax.storage import file_kinds, paths
from mae_jax.storage.checksum import describe, seal, unseal, verify

DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": ml_dtypes.bfloat16, "I64": "<i8", "I32": "<i4",
          "I16": "<i2", "I8": "i1", "U8": "u1", "BOOL": "?", "U16": "<u2", "U32": "<u4", "U64": "<u8"}


def save(path: epath.PathLike, params: Any, metadata: Mapping[str, str]) -> None:
    """Writes parameters to a *.safetensors file, under names such as 'encoder/block_00/attn/qkv/kernel'.

    Args:
      path: local or gs://; an existing file is replaced.
      params: nested dict of float32 arrays (safetensors' NumPy reader does not support bfloat16).
      metadata: texts for the header, to which the checksums are added under 'checksums'.
    """
    path = epath.Path(path)
    arrays = {name: np.asarray(array, order="C") for name, array in flatten(params).items()}  # scalars stay
    header = {**metadata, "checksums": json.dumps(seal(describe(arrays)))}
    paths.make_folder(path.parent)
    paths.replace_bytes(path, _ordered(safetensors.numpy.save(arrays, header)))


def _ordered(content: bytes) -> bytes:
    """Returns the file's content with sorted metadata; safetensors' own order differs between processes."""
    size = int.from_bytes(content[:8], "little")
    header = bounded_json.parse_object(content[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return b"".join((len(text).to_bytes(8, "little"), text, memoryview(content)[8 + size :]))


def load(path: epath.Path) -> dict[str, Any]:
    """Returns the nested dict of arrays in a file; raises UserError if it does not exist or is damaged."""
    content = paths.read_there(path)
    said = metadata(path, content)
    try:
        arrays = {name: _array(**entry) for name, entry in safetensors.deserialize(content)}
        if sealed := said.get("checksums"):  # files of other libraries have none
            verify(unseal(bounded_json.parse(sealed)), arrays)
    except MemoryError:
        raise
    except Exception as error:
        raise UserError(f"{path} is a safetensors file that is damaged or has unsupported values: "
                        f"{root_cause(error)}") from error
    try:
        return nest(arrays)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _array(dtype: str, shape: list[int], data: bytes) -> np.ndarray:
    """Returns an array of a file; safetensors' own NumPy reader does not support bfloat16."""
    if dtype not in DTYPES:
        raise ValueError(f"an array of {dtype}; supported are {', '.join(DTYPES)}")
    return np.frombuffer(data, DTYPES[dtype]).reshape(shape)


def metadata(path: object, content: bytes, size: int | None = None) -> dict[str, str]:
    """Returns the metadata of a file's header, texts by name.

    Args:
      path: of the file, for messages.
      content: of the file, or at least its header.
      size: of the whole file in bytes; None: the length of `content`.

    Raises:
      UserError: it is not a safetensors file; the message names its kind.
    """
    size, length = len(content) if size is None else size, int.from_bytes(content[:8], "little")
    try:
        if len(content) < 8 or content[8:9] != b"{":
            raise ValueError("it does not begin with a header")
        if length > size - 8:
            raise ValueError(f"its header has {length} bytes, the file {size}: it is cut short")
        said = bounded_json.parse_object(content[8:8 + length]).get("__metadata__", {})
        if not isinstance(said, dict) or not all(isinstance(text, str) for text in said.values()):
            raise ValueError("the header's metadata are not texts by name")
    except ValueError as error:
        found = file_kinds.kind(content)
        raise UserError(f"{path} is {found or f'not a safetensors file, or damaged: {error}'}") from None
    return said
