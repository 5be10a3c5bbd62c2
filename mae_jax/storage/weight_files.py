"""Weights of any library: a file, whose kind is detected by its content, or a folder with a file or an index of parts.
"""

import re
from typing import Any

from etils import epath

from mae_jax.errors import UserError, printable
from mae_jax.runtime import bounded_json
from mae_jax.storage import safetensors_file, torch_file
from mae_jax.storage.paths import read_bytes

ENDINGS = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".pytorch", ".pkl")
IN_FOLDERS = ("model.safetensors", "pytorch_model.bin")  # names in folders of transformers and timm
INDEX = ".index.json"  # appended to such a name if the weights are in parts


def file_of(path: epath.Path) -> epath.Path | None:
    """Returns the file of weights at a path or in a folder of another library; None for other folders and workdirs."""
    if path.suffix.lower() in ENDINGS or path.is_file():
        return path
    if not path.is_dir() or (path / "checkpoints").exists():
        return None
    names = (name + ending for name in IN_FOLDERS for ending in ("", INDEX))
    return next((path / name for name in names if (path / name).is_file()), None)


def is_safetensors(file: epath.Path) -> bool:
    """Returns whether to read a file as safetensors: if it is neither like a file of torch.save nor an index of parts.
    """
    if file.name.endswith(INDEX):
        return False
    if not file.is_file():
        return True
    with file.open("rb") as opened:
        begin = opened.read(9)
    # The first bytes of safetensors, the size of the header, may equal those of the other kinds.
    return begin[8:9] == b"{" or (begin[:2] != b"PK" and begin[:1] != b"\x80")


def load(file: epath.Path) -> tuple[dict[str, Any], str]:
    """Reads a file of weights.

    Returns:
      The arrays by name, or for a file of mae_jax a nested dict; and a description of the part of the file that holds
      them, for messages, or ''.

    Raises:
      UserError: the file does not exist, is damaged, or is not a file of weights.
    """
    if file.name.endswith(INDEX):
        return _parts(file), ""
    if is_safetensors(file):
        return safetensors_file.load(file), ""
    state, key = torch_file.state_of(torch_file.load(file), file)
    return state, f"its state dict {key!r}" if key else ""


def _parts(index: epath.Path) -> dict[str, Any]:
    """Returns the arrays of all files in an index."""
    content = read_bytes(index) or b""
    try:
        where = bounded_json.parse_object(content).get("weight_map")
        if not isinstance(where, dict) or not where or not all(
                isinstance(name, str) and re.fullmatch(r"[\w.-]+", name) for name in where.values()):
            raise ValueError("it has no 'weight_map' of names of files")
    except ValueError as error:
        raise UserError(f"{index} is not an index of weights, or damaged: {error}") from None
    found: dict[str, Any] = {}
    for name in sorted(set(where.values())):
        found |= load(index.parent / name)[0]
    if missing := sorted(where.keys() - found.keys()):
        raise UserError(f"{index} names {len(missing)} arrays that are in none of its files, such as "
                        f"{printable(missing[0])}")
    return found
