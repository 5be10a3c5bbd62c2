"""Checksums of arrays: 64 bits that depend on every bit of an array, and not on its sharding."""

import json
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mae_jax.errors import UserError, did_you_mean, root_cause

NO_DAMAGE = ("PermissionError", "PERMISSION_DENIED", "UNAUTHENTICATED", "MemoryError", "RESOURCE_EXHAUSTED",
             "Too many open files")  # parts of the messages of failed reads that do not mean damage
Record = dict[str, list]  # path → [shape, dtype, word, word]


class Damaged(Exception):
    """Arrays or files differ from what was saved; the text names the first one."""


def damage(what: object, error: Exception) -> Damaged:
    """Converts an error while reading `what` to Damaged.

    Raises:
      UserError: the error is not damage but, for example, a missing permission. It must not make the caller fall back
        to an older step.
    """
    why = root_cause(error)
    if any(word in why for word in NO_DAMAGE):
        raise UserError(f"cannot read {what}, which may be good: {why}") from None
    return Damaged(f"{what}: {why}")


def describe(arrays: Mapping[str, Any]) -> Record:
    """Returns the shape, the dtype and the two checksum words of every array."""
    # One at a time: many concurrent programs with collectives could block all threads of simulated devices.
    return {path: [list(array.shape), str(array.dtype), *map(int, jax.device_get(checksum(array)))]
            for path, array in arrays.items()}


def verify(record: Record, arrays: dict[str, Any]) -> dict[str, Any]:
    """Returns the arrays; raises Damaged, which names the first difference, unless they match `record`."""
    found = describe(arrays)
    for path in sorted(record.keys() | found.keys()):
        if record.get(path) != found.get(path):
            there, here = record.get(path, ["none"])[:2], found.get(path, ["none"])[:2]
            raise Damaged(f"{path}: " + ("its checksum differs from the one saved" if there == here else
                                         f"saved as {there}, read as {here}"))
    return arrays


def check_same_model(folder: Any, record: Record, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> None:
    """Raises UserError, which names the first array that differs, unless a checkpoint has the wanted arrays.

    Args:
      folder: of the checkpoint, for the message.
      record: of the checkpoint.
      wanted: path → shape and dtype of the model in the config.
    """
    # Parameters first: the differences in the optimizer state follow from theirs.
    for path in sorted(record.keys() | wanted.keys(), key=lambda path: (not path.startswith("params/"), path)):
        if path not in wanted:
            raise UserError(f"{folder} is of another model or optimizer: it has {path}, this config does not; "
                            f"{did_you_mean(path, wanted)[:200]}")
        if path not in record:
            raise UserError(f"{folder} is of another model or optimizer: this config has {path}, it does not; "
                            f"{did_you_mean(path, record)[:200]}")
        there, here = record[path][:2], [list(wanted[path].shape), str(wanted[path].dtype)]
        if there != here:
            raise UserError(f"{folder} is of another model: {path} is {there[1]}{there[0]} there and "
                            f"{here[1]}{here[0]} in this config")


def seal(record: Record) -> dict[str, Any]:
    """Adds a checksum of the record itself, so that a damaged record does not look like another model."""
    return {"arrays": record, "crc32": zlib.crc32(json.dumps(record, sort_keys=True).encode())}


def unseal(sealed: dict[str, Any]) -> Record:
    """Returns the record from `seal`; raises Damaged if its own checksum does not match."""
    if seal(sealed["arrays"])["crc32"] != sealed["crc32"]:
        raise Damaged("the list of checksums is damaged")
    return sealed["arrays"]


@jax.jit
def checksum(array: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns two uint32 [] words that depend on every bit of every element and its global index, not on the sharding.

    Each word is the sum, modulo 2³², of a bijection of each element's bits, which the element's index selects. So a
    change of one element always changes both words, and any other change goes undetected with probability 2⁻⁶⁴. The
    function is compiled once per shape, which for a ViT costs a sixth of compiling one function for the whole tree.

    Args:
      array: float, integer or bool [...] of at most 32 bits per element, with any sharding.
    """
    if array.dtype == jnp.bool_:
        array = array.astype(jnp.uint8)
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[array.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)
    index = jnp.zeros(bits.shape, jnp.uint32)
    for axis, size in enumerate(bits.shape):
        index = index * np.uint32(size % 2**32) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    key = _mix(index + np.uint32(0x9E3779B9), 0x7FEB352D, 0x846CA68B)
    first = _mix(bits ^ key, 0x7FEB352D, 0x846CA68B)
    second = _mix(bits + key * np.uint32(0x85EBCA6B), 0x21F0AAAD, 0xD35A2D97)
    return jnp.sum(first, dtype=jnp.uint32), jnp.sum(second, dtype=jnp.uint32)


def _mix(bits: jax.Array, first: int, second: int) -> jax.Array:
    """Applies a bijection of uint32 (xor-shift and multiply, with constants of C. Wellons' hash-prospector)."""
    bits = (bits ^ (bits >> 16)) * np.uint32(first)
    bits = (bits ^ (bits >> 15)) * np.uint32(second)
    return bits ^ (bits >> 16)
