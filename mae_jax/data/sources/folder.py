"""folder: the images under a folder, at any depth, local or gs://.

Splits are the sub-folders train/ and test/, val/ or validation/, if they are there. Else each image belongs where the
hash of its relative path says, so that adding files moves none: 'test' is a tenth, if the config uses it, and 'train'
the rest. Classes are the first sub-folders of a split, if there are several and no image lies beside them. The masks
of data.mask_key lie in a folder of the same shape, as PNG files of the same names. Links are followed, to read.
"""

import functools
import logging
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from mae_jax.data.decode import decode_mask, read_file
from mae_jax.data.sources import splits
from mae_jax.data.sources.base import UNLABELED, Example, Source
from mae_jax.data.sources.expected_sizes import check_size
from mae_jax.errors import UserError, did_you_mean, pluralize, printable
from mae_jax.storage.paths import locate

log = logging.getLogger(__name__)

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")
MAX_LISTED_EXTENSIONS = 5  # extensions of other files that are counted one by one


def load(data: ConfigDict, split: splits.Split) -> Source:
    """Opens a split; raises UserError when the folder is missing, has no images, or has no such split."""
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
    raise UserError(f"unknown split {name!r}; {did_you_mean(name, children)}")


def _root(path: str) -> epath.Path:
    root = epath.Path(path).expanduser() if path else None
    if root is None or not root.is_dir():
        raise UserError(f"data.path={path!r} is no folder; data.source='folder' needs one that holds pictures")
    return root


def _masks(data: ConfigDict, root: epath.Path, base: epath.Path, files: tuple[str, ...]) -> epath.Path | None:
    """Returns the folder of a split's masks, which must have that of its first image; None without masks."""
    if not data.mask_key:
        return None
    masks = locate(data.mask_key).expanduser() / os.path.relpath(base, root)
    if files and not (masks / files[0]).with_suffix(".png").is_file():
        raise UserError(f"data.mask_key={data.mask_key!r} lacks the mask of {files[0]}: "
                        f"{(masks / files[0]).with_suffix('.png')} is not there")
    return masks


def _source(base: epath.Path, files: tuple[str, ...], classes: tuple[str, ...], masks: epath.Path | None,
            offset: int) -> Source:
    index = {name: label for label, name in enumerate(classes)}
    labels = np.array([index.get(name.split("/")[0], UNLABELED) for name in files], np.int32)

    def read(i: int) -> Example:
        mask = decode_mask(read_file((masks / files[i]).with_suffix(".png")), offset) if masks else None
        return Example(read_file(base / files[i]), int(labels[i]), mask=mask)

    return Source(len(files), read, lambda i: printable(files[i]), classes, ("pixel_label",) if masks else (),
                  lambda i: int(labels[i]))


def unread(data: ConfigDict, expressions: Iterable[str]) -> list[str]:
    """Returns lines about what lies in the folder and is in none of these splits, by sub-folder or by extension."""
    root = _root(data.path)
    children, lost, lines = _children(root), [], []
    if _has_splits(children) or children == {"train"}:
        names = {part.name for text in expressions for part in splits.parts(text)}
        read = {_sub_folder(name, children) for name in names} if _has_splits(children) else children
        others = [f"{base}/{name}" for base in sorted(read) for name in _files(root / base)[1]]
        lost = [f"{base}/{name}" for base in sorted(children - read) for name in _files(root / base)[0]]
        beside = (file.name for file in root.iterdir() if not file.name.startswith("."))
        lost += sorted(name for name in beside if name.lower().endswith(EXTENSIONS))
    else:
        others = _files(root)[1]
    if lost:
        lines.append(f"{pluralize(len(lost), 'picture')} in no split of the config, such as {printable(lost[0])}")
    if others:
        kinds = Counter(printable(os.path.splitext(name)[1].lower()) or "none" for name in others)
        counts = ", ".join(f"{kind} {count}" for kind, count in kinds.most_common(MAX_LISTED_EXTENSIONS))
        lines.append(f"{pluralize(len(others), 'file')} not looked at, no picture by the extension ({counts}), such as "
                     f"{printable(others[0])}")
    return lines


def _list(base: epath.Path) -> tuple[str, ...]:
    """Returns the images under a folder, relative and sorted; raises UserError when there are none."""
    pictures, others = _files(base)
    if not pictures:
        what = f"{pluralize(len(others), 'other file')}, such as {printable(others[0])}" if others else "it is empty"
        raise UserError(f"no pictures ({', '.join(EXTENSIONS)}) under {base}: {what}")
    return pictures


@functools.lru_cache(maxsize=8)  # a run opens a folder for training, for evaluation and for its classes
def _files(base: epath.Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns the images under a folder, by their extension, and the other files; relative and sorted."""
    parts: tuple[list[str], list[str]] = [], []
    for name in sorted(_walk(base)):
        parts[not name.lower().endswith(EXTENSIONS)].append(name)
    return tuple(parts[0]), tuple(parts[1])


def _walk(base: epath.Path) -> Iterator[str]:
    """Yields relative paths of files, but hidden ones."""
    if "://" not in os.fspath(base):
        yield from _walk_local(os.fspath(base))
        return
    for folder, children, files in base.walk():
        children[:] = [child for child in children if not child.startswith(".")]
        inside = os.fspath(folder).removeprefix(os.fspath(base)).lstrip("/")
        yield from (f"{inside}/{name}" if inside else name for name in files if not name.startswith("."))


def _walk_local(base: str) -> Iterator[str]:
    """Yields likewise. Links are followed, to folders too, but into no folder that is read already: a loop ends there.

    A folder that cannot be listed raises OSError: its images would be lost without a word.
    """
    top = os.path.realpath(base)
    read, pending, odd = [top], [""], defaultdict(list)
    while pending:
        folder = pending.pop()
        with os.scandir(os.path.join(base, folder)) as entries:
            found = sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
        for entry in found:
            name, target = folder + entry.name, os.path.realpath(entry.path) if entry.is_symlink() else ""
            is_folder = os.path.isdir(target) if target else entry.is_dir()
            if is_folder and target and any(_within(target, one) or _within(one, target) for one in read):
                odd["link", "left out, to a folder that is read already"].append(name)
                continue
            if target and not _within(target, top):
                odd["link", "out of the folder followed"].append(name)
            if is_folder:
                read += [target] if target else []
                pending.append(f"{name}/")
            elif entry.is_file(follow_symlinks=False) or os.path.isfile(entry.path) or not os.path.exists(entry.path):
                yield name  # also what a link promises and is not there: a broken image, by name
            else:
                odd["file", "left out, no regular one"].append(name)
    for (what, why), names in odd.items():
        log.warning("%s: %s %s, such as %s", base, pluralize(len(names), what), why, printable(names[0]))


def _within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


def _classes(files: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the names of the first sub-folders, () if an image lies beside them or there is only one."""
    if any("/" not in name for name in files):
        return ()
    classes = sorted({name.split("/")[0] for name in files})
    return tuple(classes) if len(classes) > 1 else ()
