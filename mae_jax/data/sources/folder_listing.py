"""Lists the images and other files under a folder, without the files that file servers and viewers create."""

import functools
import logging
import os
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from etils import epath

from mae_jax.data.reading import EXTENSIONS
from mae_jax.data.sources import listing_index
from mae_jax.data.sources.names import CODING, Collector, Names
from mae_jax.errors import UserError, pluralize, printable
from mae_jax.storage import ranges

log = logging.getLogger(__name__)

MAX_LISTED = 4  # names listed with counts in a line
DROPPINGS = {  # lower-case names that NAS, viewers, archives and file systems create
    "@eadir", "@tmp", "@recycle", "@recently-snapshot", "@sharebin", "@sharesnap", "@appstore", "@database",
    "#recycle", "#snapshot", "~snapshot", "$recycle.bin", "recycler", "system volume information", "lost+found",
    "found.000", "network trash folder", "temporary items", "thedbvolume", "thevolumesettingsfolder", "__macosx",
    "__pycache__", "thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "picasa.ini", "icon\r",
    "lightroom catalog previews.lrdata",
}


@dataclass(frozen=True, eq=False)
class Listing:
    """The files under a folder, relative to it; names are in Unicode's form NFC, and sorted."""

    pictures: Names  # by their extension
    paths: Names  # names on disk; the same object if they are equal
    others: Names
    ignored: tuple[tuple[str, int], ...]  # name that is left out → count

    @classmethod
    def of(cls, arrays: listing_index.Arrays) -> "Listing":
        """Returns the listing from the arrays of `_arrays`."""
        pictures, others = (Names(arrays[f"{what}_letters"], arrays[f"{what}_ends"]) for what in ("picture", "other"))
        paths = Names(arrays["path_letters"], arrays["path_ends"]) if "path_ends" in arrays else pictures
        ignored = Names(arrays["ignored_letters"], arrays["ignored_ends"])
        return cls(pictures, paths, others, tuple(zip(ignored, arrays["ignored_counts"].tolist(), strict=True)))

    @functools.cached_property
    def direct(self) -> tuple[str, ...]:
        """The images directly in the folder."""
        return tuple(name for name in self.pictures if "/" not in name)

    @functools.cached_property
    def folders(self) -> Counter[str]:
        """First-level sub-folder → number of images in it, at any depth."""
        return Counter(name.split("/", 1)[0] for name in self.pictures if "/" in name)

    def only(self, kept: np.ndarray | Sequence[int]) -> "Listing":
        """Returns the listing with only these images, by index."""
        pictures = self.pictures.only(kept)
        return replace(self, pictures=pictures,
                       paths=pictures if self.paths is self.pictures else self.paths.only(kept))


def nfc(name: str) -> str:
    """Returns a name in Unicode's form NFC, for comparison: macOS may encode the same letters differently."""
    return unicodedata.normalize("NFC", name)


def is_dropping(name: str) -> bool:
    """Returns whether a file or folder is hidden, or created by file servers and viewers."""
    return name.startswith((".", "~$")) or name.casefold() in DROPPINGS


def is_hidden(name: str) -> bool:
    """Returns whether a file or folder is hidden; mae_jax 0.1.0 left out only these."""
    return name.startswith(".")


def some(names: Iterable[tuple[str, int]]) -> str:
    """Returns the most frequent names with counts, such as '@eaDir 12, Thumbs.db 1'."""
    found = Counter(dict(names)).most_common()
    more = f", {len(found) - MAX_LISTED} more names" if len(found) > MAX_LISTED else ""
    return ", ".join(f"{printable(name)} {count}" for name, count in found[:MAX_LISTED]) + more


@functools.lru_cache(maxsize=8)  # a run opens a folder several times: for training, evaluation and classes
def files(base: epath.Path, plain: bool = False, formats: str = "all") -> Listing:
    """Lists a folder at any depth.

    Args:
      base: the folder.
      plain: list as mae_jax 0.1.0 did: names as on disk, files of servers and viewers included.
      formats: data.formats, which defines the extensions of images.

    Raises:
      OSError: a sub-folder cannot be listed, so its images would be silently lost.
    """
    place, left_out = os.fspath(base), _Droppings(plain)
    if "://" in place:
        return Listing.of(_arrays(_walk_bucket(base, left_out), left_out, plain, formats))
    return Listing.of(listing_index.kept(place, (plain, formats), lambda folders: _arrays(
        _walk_local(place, left_out, folders), left_out, plain, formats)))


class _Droppings:
    """Predicate of the names that are left out; counts them."""

    def __init__(self, plain: bool):
        self._drop, self.counts = is_hidden if plain else is_dropping, Counter[str]()

    def __call__(self, name: str) -> bool:
        if found := self._drop(name):
            self.counts["._*" if name.startswith("._") else name] += 1
        return found



def pictures(base: epath.Path, plain: bool = False, formats: str = "all") -> Listing:
    """Returns `files` of a folder; raises UserError if there are no images."""
    found = files(base, plain, formats)
    if not found.pictures:
        others = found.others
        what = f"{pluralize(len(others), 'other file')}, such as {printable(others[0])}" if others else "it is empty"
        what += f"; left out: {some(found.ignored)}" if found.ignored else ""
        raise UserError(f"no images ({', '.join(extensions(formats))}) under {base}: {what}")
    return found


def folders(base: epath.Path, plain: bool = False) -> list[str]:
    """Returns the names, as on disk, of the sub-folders of a folder that are not left out, sorted."""
    drop = is_hidden if plain else is_dropping
    return sorted(child.name for child in base.iterdir() if not drop(child.name) and child.is_dir())


def extensions(formats: str) -> tuple[str, ...]:
    """Returns the extensions of image files, in lower case."""
    return EXTENSIONS["common" if formats == "common" else "all"]


Walk = Iterator[tuple[str, list[str], list[str]]]  # a folder ('' or 'a/b/'), and the files and folders in it


def _arrays(walk: Walk, left_out: _Droppings, plain: bool, formats: str) -> listing_index.Arrays:
    """Returns the result of a walk as arrays for `Listing.of`."""
    held = {folder: (b"\0".join(name.encode(*CODING) for name in names), children) for folder, names, children in walk}
    endings = tuple(ending.encode() for ending in extensions(formats))
    pictures, paths, others, same = Collector(), Collector(), Collector(), True
    for name, path in _in_order(held, plain):
        if name.lower().endswith(endings):
            if same and name != path:  # equal for all files before
                same, paths = False, Collector.of(pictures.names())
            pictures.add(name)
            if not same:
                paths.add(path)
        else:
            others.add(name)
    named = {"picture": pictures.names(), "other": others.names(), "ignored": Names.of(left_out.counts)}
    if not same:
        named["path"] = paths.names()
    arrays = {f"{what}_{field}": getattr(found, field) for what, found in named.items()
              for field in ("letters", "ends")}
    return {**arrays, "ignored_counts": np.array(list(left_out.counts.values()), np.int64)}


def _in_order(held: dict[str, tuple[bytes, list[str]]], plain: bool) -> Iterator[tuple[bytes, bytes]]:
    """Yields each file's name and path, sorted."""
    last = (b"", b"")
    for found in _merged(held, plain):
        if found < last:  # two folders have the same name in NFC, so their files interleave
            break
        last = found
    else:
        yield from _merged(held, plain)
        return
    yield from sorted(_merged(held, plain))


def _merged(held: dict[str, tuple[bytes, list[str]]], plain: bool) -> Iterator[tuple[bytes, bytes]]:
    """Yields names and paths folder by folder, where a folder sorts as its name with '/', among other characters."""
    def entries(name: bytes, path: bytes) -> Iterator[tuple[bytes, bytes, bool]]:
        joined, children = held[path.decode(*CODING)]
        own = [(_spelled(each, plain), each, False) for each in (joined.split(b"\0") if joined else ())]
        own += [(_spelled(each, plain), each, True) for each in (f"{child}/".encode(*CODING) for child in children)]
        own.sort()
        return ((name + form, path + each, folder) for form, each, folder in own)

    stack = [entries(b"", b"")]
    while stack:
        found = next(stack[-1], None)
        if found is None:
            stack.pop()
        elif found[2]:
            stack.append(entries(*found[:2]))
        else:
            yield found[:2]


def _spelled(name: bytes, plain: bool) -> bytes:
    """Returns a name in the form that is compared."""
    return name if plain or name.isascii() else nfc(name.decode(*CODING)).encode(*CODING)


def _walk_bucket(base: epath.Path, left_out: Callable[[str], bool]) -> Walk:
    """Walks the folders of a bucket, without names that are left out."""
    if os.fspath(base).startswith("s3://"):
        yield from _walk_objects(os.fspath(base), left_out)
        return
    for folder, children, names in base.walk():
        children[:] = [child for child in children if not left_out(child)]
        inside = os.fspath(folder).removeprefix(os.fspath(base)).strip("/")
        yield f"{inside}/" if inside else "", [name for name in names if not left_out(name)], list(children)


def _walk_objects(base: str, left_out: Callable[[str], bool]) -> Walk:
    """Walks the folders of a bucket by fsspec."""
    import fsspec

    system, inside = fsspec.core.url_to_fs(base.rstrip("/"))
    pending = [""]
    while pending:
        folder = pending.pop()
        found = ranges.asked(base, lambda place=f"{inside}/{folder}": system.ls(place, detail=True))
        kinds = {entry["name"].rstrip("/").rsplit("/", 1)[1]: entry["type"] for entry in found
                 if entry["name"].rstrip("/") != f"{inside}/{folder}".rstrip("/")}
        kinds = {name: kind for name, kind in kinds.items() if not left_out(name)}
        children = [name for name, kind in kinds.items() if kind == "directory"]
        pending += [f"{folder}{name}/" for name in children]
        yield folder, [name for name, kind in kinds.items() if kind != "directory"], children


def _walk_local(base: str, left_out: Callable[[str], bool], folders: listing_index.Folders) -> Walk:
    """Walks a local folder. Symbolic links are followed, except to folders that are read already, which ends loops."""
    top = os.path.realpath(base)
    read, pending, odd = [top], [""], defaultdict(list)
    while pending:
        folder, names, children = pending.pop(), list[str](), list[str]()
        folders.add(base, folder)
        rest = list[os.DirEntry[str]]()
        with os.scandir(os.path.join(base, folder)) as entries:
            for entry in entries:
                if left_out(entry.name):
                    continue
                if entry.is_file(follow_symlinks=False):
                    names.append(entry.name)
                else:
                    rest.append(entry)
        for entry in sorted(rest, key=lambda entry: entry.name):
            name, target = folder + entry.name, os.path.realpath(entry.path) if entry.is_symlink() else ""
            folders.links |= bool(target)
            is_folder = os.path.isdir(target) if target else entry.is_dir()
            if is_folder and target and any(_within(target, one) or _within(one, target) for one in read):
                odd["link", "left out, to a folder that is read already"].append(name)
                continue
            if target and not _within(target, top):
                odd["link", "out of the folder followed"].append(name)
            if is_folder:
                read += [target] if target else []
                pending.append(f"{name}/")
                children.append(entry.name)
            elif os.path.isfile(entry.path) or not os.path.exists(entry.path):
                names.append(entry.name)  # also dangling links: reported as broken images, by name
            else:
                odd["file", "left out, no regular one"].append(name)
        yield folder, names, children
    for (what, why), named in odd.items():
        log.warning("%s: %s %s, such as %s", base, pluralize(len(named), what), why, printable(named[0]))


def _within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)
