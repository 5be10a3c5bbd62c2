"""What lies under a folder: images, other files, and what file servers and viewers have dropped there."""

import functools
import logging
import os
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from etils import epath

from mae_jax.errors import UserError, pluralize, printable

log = logging.getLogger(__name__)

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")
MAX_LISTED = 4  # names that a line counts one by one
DROPPINGS = {  # names, in small letters, that no person gives: of NAS, viewers, archives and file systems
    "@eadir", "@tmp", "@recycle", "@recently-snapshot", "@sharebin", "@sharesnap", "@appstore", "@database",
    "#recycle", "#snapshot", "~snapshot", "$recycle.bin", "recycler", "system volume information", "lost+found",
    "found.000", "network trash folder", "temporary items", "thedbvolume", "thevolumesettingsfolder", "__macosx",
    "__pycache__", "thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "picasa.ini", "icon\r",
    "lightroom catalog previews.lrdata",
}


@dataclass(frozen=True, eq=False)
class Listing:
    """The files under a folder, relative to it; names are in Unicode's form NFC, and sorted."""

    pictures: tuple[str, ...]  # by their extension
    paths: tuple[str, ...]  # what the disk calls them
    others: tuple[str, ...]
    ignored: tuple[tuple[str, int], ...]  # name of a dropping → how many

    @functools.cached_property
    def direct(self) -> tuple[str, ...]:
        """The images that lie in the folder itself."""
        return tuple(name for name in self.pictures if "/" not in name)

    @functools.cached_property
    def folders(self) -> Counter[str]:
        """The first sub-folders that have images, at any depth → how many."""
        return Counter(name.split("/", 1)[0] for name in self.pictures if "/" in name)

    def only(self, kept: Sequence[int]) -> "Listing":
        """Returns the listing with these images alone."""
        return replace(self, pictures=tuple(self.pictures[i] for i in kept),
                       paths=tuple(self.paths[i] for i in kept))


def nfc(name: str) -> str:
    """Returns a name as it compares: a disk of macOS may spell the same letters otherwise than Linux's."""
    return unicodedata.normalize("NFC", name)


def is_dropping(name: str) -> bool:
    """Whether a file or folder is hidden, or is what file servers and viewers leave behind."""
    return name.startswith((".", "~$")) or name.casefold() in DROPPINGS


def is_hidden(name: str) -> bool:
    """Whether a file or folder is hidden: all that mae_jax 0.1.0 left out."""
    return name.startswith(".")


def some(names: Iterable[tuple[str, int]]) -> str:
    """Returns '@eaDir 12, Thumbs.db 1', the most frequent of the names that are counted."""
    found = Counter(dict(names)).most_common()
    more = f", {len(found) - MAX_LISTED} more names" if len(found) > MAX_LISTED else ""
    return ", ".join(f"{printable(name)} {count}" for name, count in found[:MAX_LISTED]) + more


@functools.lru_cache(maxsize=8)  # a run opens a folder for training, for evaluation and for its classes
def files(base: epath.Path, plain: bool = False) -> Listing:
    """Lists a folder at any depth; plain: as mae_jax 0.1.0 did, by the names on the disk, with the droppings.

    Raises:
      OSError: a folder in it cannot be listed: its images would be lost without a word.
    """
    ignored: Counter[str] = Counter()
    drop = is_hidden if plain else is_dropping

    def left_out(name: str) -> bool:
        if found := drop(name):
            ignored["._*" if name.startswith("._") else name] += 1
        return found

    named = sorted((path if plain else nfc(path), path) for path in _walk(base, left_out))
    pictures = [pair for pair in named if pair[0].lower().endswith(EXTENSIONS)]
    others = tuple(name for name, _ in named if not name.lower().endswith(EXTENSIONS))
    return Listing(tuple(name for name, _ in pictures), tuple(path for _, path in pictures), others,
                   tuple(ignored.items()))


def pictures(base: epath.Path, plain: bool = False) -> Listing:
    """Returns `files` of a folder; raises UserError where there are no images."""
    found = files(base, plain)
    if not found.pictures:
        others = found.others
        what = f"{pluralize(len(others), 'other file')}, such as {printable(others[0])}" if others else "it is empty"
        what += f"; left out: {some(found.ignored)}" if found.ignored else ""
        raise UserError(f"no pictures ({', '.join(EXTENSIONS)}) under {base}: {what}")
    return found


def folders(base: epath.Path, plain: bool = False) -> list[str]:
    """Returns the names on the disk of the folders in a folder, sorted, without those that are left out."""
    drop = is_hidden if plain else is_dropping
    return sorted(child.name for child in base.iterdir() if not drop(child.name) and child.is_dir())


def _walk(base: epath.Path, left_out: Callable[[str], bool]) -> Iterator[str]:
    """Yields relative paths of files, but for names that are left out."""
    if "://" not in os.fspath(base):
        yield from _walk_local(os.fspath(base), left_out)
        return
    for folder, children, names in base.walk():
        children[:] = [child for child in children if not left_out(child)]
        inside = os.fspath(folder).removeprefix(os.fspath(base)).lstrip("/")
        yield from (f"{inside}/{name}" if inside else name for name in names if not left_out(name))


def _walk_local(base: str, left_out: Callable[[str], bool]) -> Iterator[str]:
    """Yields likewise. Links are followed, to folders too, but into no folder that is read already: a loop ends there.
    """
    top = os.path.realpath(base)
    read, pending, odd = [top], [""], defaultdict(list)
    while pending:
        folder = pending.pop()
        with os.scandir(os.path.join(base, folder)) as entries:
            found = sorted((entry for entry in entries if not left_out(entry.name)), key=lambda entry: entry.name)
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
