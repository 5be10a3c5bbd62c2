"""folder: the pictures under a folder, at any depth, local or gs://.

Splits are the sub-folders train/ and test/, val/ or validation/, if they are there. Else each picture belongs where the
hash of its relative path says, so that adding files moves none: 'test' is a tenth, if the config uses it, and 'train'
the rest. Classes are the first sub-folders of a split, if there are several and no picture lies beside them. The masks
of data.mask_key lie in a folder of the same shape, as PNG files of the same names.
"""

import functools
import logging
import os
from collections.abc import Iterator

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from mae_jax.data import splits
from mae_jax.data.decode import decode_mask
from mae_jax.data.sizes import check_size
from mae_jax.data.sources import UNLABELLED, Example, Source
from mae_jax.errors import UserError, nearest

log = logging.getLogger(__name__)

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")


def load(data: ConfigDict, split: splits.Split) -> Source:
    """Opens a split; raises UserError when the folder is missing, has no pictures, or has no such split."""
    root = _root(data.path)
    children = _children(root)
    if _has_splits(children):
        base, classes = root / _sub_folder(split.name, children), _classes(_list(root / "train"))
        start, stop = split.shares(0, 1)
    else:
        base = root / "train" if children == {"train"} else root
        classes = _classes(_list(base))
        start, stop = split.shares(*splits.part(split.name, splits.holds_out(data)))
    files = tuple(name for name in _list(base) if start <= splits.share(name) < stop)
    strange = [name for name in files if classes and name.split("/")[0] not in classes]
    if strange:  # no error: where nobody asks for labels, the folders may stand for anything
        log.warning("%d of %d pictures of %r are in no class folder that the training pictures have, such as %s: they "
                    "count as unlabelled", len(strange), len(files), str(split), base / strange[0])
    if str(split) == split.name:
        check_size(data.get("name", ""), split.name, len(files))
    return _source(base, files, classes, _masks(data, root, base, files), data.mask_offset)


def split_name(data: ConfigDict, name: str) -> str:
    """Returns what a split is called in the folder."""
    children = _children(_root(data.path))
    return _sub_folder(name, children) if _has_splits(children) else splits.held_out_name(name)


def _children(root: epath.Path) -> set[str]:
    return {child.name for child in root.iterdir() if child.is_dir() and not child.name.startswith(".")}


def _has_splits(children: set[str]) -> bool:
    return "train" in children and bool(children & set(splits.HELD_OUT))


def _sub_folder(name: str, children: set[str]) -> str:
    """Returns the sub-folder of a split; the held-out one may have any of its names, whatever the config calls it."""
    names = (name, *splits.HELD_OUT) if name in splits.HELD_OUT else (name,)
    for candidate in names:
        if candidate in children:
            return candidate
    raise UserError(f"unknown split {name!r}; {nearest(name, children)}")


def _root(path: str) -> epath.Path:
    root = epath.Path(path).expanduser() if path else None
    if root is None or not root.is_dir():
        raise UserError(f"data.path={path!r} is no folder; data.source='folder' needs one that holds pictures")
    return root


def _masks(data: ConfigDict, root: epath.Path, base: epath.Path, files: tuple[str, ...]) -> epath.Path | None:
    """Returns the folder of a split's masks, which must have that of its first picture; None without masks."""
    if not data.mask_key:
        return None
    masks = epath.Path(data.mask_key).expanduser() / os.path.relpath(base, root)
    if files and not (masks / files[0]).with_suffix(".png").is_file():
        raise UserError(f"data.mask_key={data.mask_key!r} lacks the mask of {files[0]}: "
                        f"{(masks / files[0]).with_suffix('.png')} is not there")
    return masks


def _source(base: epath.Path, files: tuple[str, ...], classes: tuple[str, ...], masks: epath.Path | None,
            offset: int) -> Source:
    index = {name: label for label, name in enumerate(classes)}
    labels = np.array([index.get(name.split("/")[0], UNLABELLED) for name in files], np.int32)

    def read(i: int) -> Example:
        mask = decode_mask((masks / files[i]).with_suffix(".png").read_bytes(), offset) if masks else None
        return Example((base / files[i]).read_bytes(), int(labels[i]), mask=mask)

    return Source(len(files), read, files.__getitem__, classes, ("mask",) if masks else (), lambda i: int(labels[i]))


@functools.lru_cache(maxsize=8)  # a run opens a folder for training, for evaluation and for its classes
def _list(base: epath.Path) -> tuple[str, ...]:
    """Returns the pictures under a folder, relative and sorted; raises UserError when there are none."""
    pictures, others = [], []
    for name in _walk(base):
        (pictures if name.lower().endswith(EXTENSIONS) else others).append(name)
    if not pictures:
        what = f"{len(others)} other files, such as {min(others)}" if others else "it is empty"
        raise UserError(f"no pictures ({', '.join(EXTENSIONS)}) under {base}: {what}")
    return tuple(sorted(pictures))


def _walk(base: epath.Path) -> Iterator[str]:
    """Yields relative paths of files. Hidden ones are skipped, and links that lead out of the folder."""
    local = "://" not in os.fspath(base)
    top, escapes = (os.path.realpath(base) if local else os.fspath(base)), 0
    for folder, children, files in os.walk(top) if local else base.walk():
        children[:] = [child for child in children if not child.startswith(".")]
        for name in files:
            path = os.path.join(os.fspath(folder), name)
            if name.startswith("."):
                continue
            if local and os.path.islink(path) and not os.path.realpath(path).startswith(top + os.sep):
                escapes += 1
                continue
            yield os.path.relpath(path, top).replace(os.sep, "/") if local else path.removeprefix(top).lstrip("/")
    if escapes:
        log.warning("%s: %d links that lead out of the folder are left out", base, escapes)


def _classes(files: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the names of the first sub-folders, () if a picture lies beside them or there is only one."""
    if any("/" not in name for name in files):
        return ()
    classes = sorted({name.split("/")[0] for name in files})
    return tuple(classes) if len(classes) > 1 else ()
