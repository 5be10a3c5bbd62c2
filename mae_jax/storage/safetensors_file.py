"""Parameters in a *.safetensors file, with the checksums of their arrays."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors.numpy
from etils import epath

from mae_jax.errors import UserError, root_cause
from mae_jax.param_tree import flatten, nest
from mae_jax.storage import paths
from mae_jax.storage.checksum import describe, seal, unseal, verify


def save(path: epath.PathLike, params: Any, metadata: Mapping[str, str]) -> None:
    """Writes parameters to a *.safetensors file, under names such as 'encoder/block_00/attn/qkv/kernel'.

    Args:
      path: local or gs://; replaced when it exists.
      params: nested dict of arrays (float32; safetensors' NumPy reader knows no bfloat16).
      metadata: texts for the header; the checksums join them under 'checksums'.
    """
    path = epath.Path(path)
    arrays = {name: np.ascontiguousarray(array) for name, array in flatten(params).items()}
    header = {**metadata, "checksums": json.dumps(seal(describe(arrays)))}
    paths.make_folder(path.parent)
    paths.replace_bytes(path, _ordered(safetensors.numpy.save(arrays, header)))


def _ordered(content: bytes) -> bytes:
    """Returns a file with its metadata in the order of names; safetensors' own order differs between processes."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return b"".join((len(text).to_bytes(8, "little"), text, memoryview(content)[8 + size :]))


def load(path: epath.Path) -> dict[str, Any]:
    """Returns the nested dict of arrays in a file; raises UserError where it is not there, or damaged."""
    try:
        content = paths.read_bytes(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    if content is None:
        raise UserError(f"no such file: {path}")
    try:
        arrays = safetensors.numpy.load(content)
        header = json.loads(content[8:8 + int.from_bytes(content[:8], "little")])
        sealed = header.get("__metadata__", {}).get("checksums")
        if sealed:  # a file from elsewhere has none
            verify(unseal(json.loads(sealed)), arrays)
    except Exception as error:
        raise UserError(f"{path} is damaged or no safetensors file: {root_cause(error)}") from error
    return nest(arrays)
