"""Weights of any library: what a file holds is told by its content; a folder has one, or its parts and their index."""

import re
from typing import Any

from etils import epath

from mae_jax.errors import UserError, printable
from mae_jax.runtime import bounded_json
from mae_jax.storage import safetensors_file, torch_file
from mae_jax.storage.paths import read_bytes

ENDINGS = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".pytorch", ".pkl")
IN_FOLDERS = ("model.safetensors", "pytorch_model.bin")  # as transformers and timm call them; and, in parts:
INDEX = ".index.json"


def file_of(path: epath.Path) -> epath.Path | None:
    """Returns the file of weights that a path is, or that lies in a folder of another library; None for our folders."""
    if path.suffix.lower() in ENDINGS or path.is_file():
        return path
    if not path.is_dir() or (path / "checkpoints").exists():
        return None
    names = (name + ending for name in IN_FOLDERS for ending in ("", INDEX))
    return next((path / name for name in names if (path / name).is_file()), None)


def is_safetensors(file: epath.Path) -> bool:
    """Whether a file is to be read as safetensors: what begins neither as torch.save's do nor is an index of parts."""
    if file.name.endswith(INDEX):
        return False
    if not file.is_file():
        return True
    with file.open("rb") as opened:
        begin = opened.read(9)
    # The size of a safetensors header may begin as the others do.
    return begin[8:9] == b"{" or (begin[:2] != b"PK" and begin[:1] != b"\x80")


def load(file: epath.Path) -> tuple[dict[str, Any], str]:
    """Returns the arrays of a file by name, and what to say of where in it they were, '' for nothing.

    A file of ours holds a nested dict.

    Raises:
      UserError: it is not there, damaged, or no file of weights.
    """
    if file.name.endswith(INDEX):
        return _parts(file), ""
    if is_safetensors(file):
        return safetensors_file.load(file), ""
    state, key = torch_file.state_of(torch_file.load(file), file)
    return state, f"its state dict {key!r}" if key else ""


def _parts(index: epath.Path) -> dict[str, Any]:
    """Returns the arrays of all files that an index names."""
    content = read_bytes(index) or b""
    try:
        where = bounded_json.parse_object(content).get("weight_map")
        if not isinstance(where, dict) or not where or not all(
                isinstance(name, str) and re.fullmatch(r"[\w.-]+", name) for name in where.values()):
            raise ValueError("it has no 'weight_map' of names of files")
    except ValueError as error:
        raise UserError(f"{index} is no index of weights, or damaged: {error}") from None
    found: dict[str, Any] = {}
    for name in sorted(set(where.values())):
        found |= load(index.parent / name)[0]
    if missing := sorted(where.keys() - found.keys()):
        raise UserError(f"{index} names {len(missing)} arrays that are in none of its files, such as "
                        f"{printable(missing[0])}")
    return found
