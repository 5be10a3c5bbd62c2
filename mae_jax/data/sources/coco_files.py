"""Finds the annotations and images of a data set in COCO's format, as laid out by COCO, CVAT, labelme2coco or Roboflow.

The split of an annotation file is given by its name, or by its folder. If neither has a split, a single file holds all
data, and a tenth of its images is held out by a hash of their names.
"""

import functools
import os
import re
from typing import NamedTuple

from etils import epath

from mae_jax.data.sources import splits
from mae_jax.errors import UserError, did_you_mean

OTHER = ("captions_", "person_keypoints_", "panoptic_", "stuff_", "image_info_")  # prefixes of unused COCO files
NO_WORDS = re.compile(r"instances?|annotations?|coco|default|labels?|result|\d{4}")  # parts of names without a split
SAMPLED = 50  # images looked up to find their folder


class Layout(NamedTuple):
    """The annotation files in a folder; the key '' stands for a file of no particular split."""

    root: epath.Path
    files: dict[str, epath.Path]  # role ('train', 'val', 'test') or ''

    def file(self, name: str) -> epath.Path:
        """Returns the annotation file of a split; raises UserError."""
        if "" in self.files:
            return self.files[""]
        role = splits.role(name)
        if role not in self.files:
            raise UserError(f"{self.root} has no annotations of the split {name!r}; {did_you_mean(name, self.files)}")
        return self.files[role]


@functools.lru_cache(maxsize=4)
def layout(path: epath.Path) -> Layout:
    """Finds the annotation files; raises UserError.

    Args:
      path: a folder, or one annotation file.
    """
    if path.is_file():
        return Layout(path.parent, {"": path})
    if not path.is_dir():
        raise UserError(f"data.path={os.fspath(path)!r} is neither a folder nor a file of annotations")
    found: dict[str, list[epath.Path]] = {}
    for folder in (path, *_folders(path)):
        for file in sorted(folder.glob("*.json")):
            if not file.name.startswith((*OTHER, ".")):
                found.setdefault(_role(file, path), []).append(file)
    if not found:
        raise UserError(f"{path} has no annotations: neither it nor its sub-folders have a *.json")
    if set(found) != {""}:
        found.pop("", None)  # beside files of splits, others hold something else
    for role, files in found.items():
        if len(files) > 1:
            names = ", ".join(str(file.relative_to(path)) for file in files[:4])
            raise UserError(f"{path} has several annotations{f' of {role}' if role else ''}: {names}; name one file as "
                            "data.path, or keep only one")
    return Layout(path, {role: files[0] for role, files in found.items()})


def _role(file: epath.Path, root: epath.Path) -> str:
    """Returns the split of an annotation file, '' if neither its name nor its folder has one."""
    for name in (file.stem, *((file.parent.name,) if file.parent != root else ())):
        if role := splits.role(NO_WORDS.sub(" ", name.replace("_", " "))):
            return role
    return ""


def image_folder(file: epath.Path, root: epath.Path, names: list[str]) -> tuple[epath.Path, list[str]]:
    """Returns the folder of the images, and the images' names in it.

    Args:
      file: the annotation file.
      root: the folder of the data set.
      names: image names from `file`; absolute paths of another machine are reduced to their last part.

    Raises:
      UserError: no image is found.
    """
    names = [name.replace("\\", "/") for name in names]
    short = [name.rsplit("/", 1)[-1] for name in names]
    safe = [name if not name.startswith("/") and ".." not in name.split("/") and ":" not in name else last
            for name, last in zip(names, short, strict=True)]
    step = max(1, len(names) // SAMPLED)
    best: tuple[int, epath.Path, list[str]] = (0, root, safe)
    for folder in _candidates(file, root):
        for tried in (safe, short) if safe != short else (safe,):
            there = sum((folder / name).is_file() for name in tried[::step])
            best = (there, folder, tried) if there > best[0] else best
        if best[0] == len(names[::step]):
            break
    if not best[0]:
        raise UserError(f"none of the images of {file} exists, such as {names[0]!r}; looked for in "
                        f"{', '.join(str(folder) for folder in _candidates(file, root)[:6])} ...")
    return best[1], best[2]


def _candidates(file: epath.Path, root: epath.Path) -> list[epath.Path]:
    """Returns folders that may hold the images, most likely first."""
    images = root / "images"
    inside = [each for folder in (root, images) for each in _folders(folder)]
    mine = [each for each in inside if splits.role(each.name) == _role(file, root)]
    return list(dict.fromkeys([*mine, file.parent, images, root, *inside]))


def present(folder: epath.Path, names: list[str]) -> list[bool]:
    """Returns whether the folder has each name; every sub-folder is listed once."""
    listed: dict[str, set[str]] = {}
    for inside in {os.path.dirname(name) for name in names}:
        where = folder / inside
        local = "://" not in str(where)
        listed[inside] = set() if not where.is_dir() else set(os.listdir(where)) if local else {
            each.name for each in where.iterdir()}
    return [os.path.basename(name) in listed[os.path.dirname(name)] for name in names]


def _folders(path: epath.Path) -> list[epath.Path]:
    """Returns the sub-folders of a folder, sorted by name; [] if it does not exist."""
    if "://" in os.fspath(path):  # one request, not one per file
        return sorted(path / name for name in next(iter(path.walk()), (path, [], []))[1])
    return sorted(each for each in path.iterdir() if each.is_dir()) if path.is_dir() else []
