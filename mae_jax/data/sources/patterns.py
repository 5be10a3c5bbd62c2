"""Finds the files of a split by a pattern: '{split}' for its name, braces for ranges and choices, * ? [] as in a shell.
"""

import functools
import glob
import logging
import re
from collections.abc import Iterable, Iterator

from etils import epath

from mae_jax.data.sources import splits
from mae_jax.errors import UserError, pluralize, printable

log = logging.getLogger(__name__)

SPLIT = "{split}"
HELD = ("val", "test")  # roles of held-out splits
MAX_FILES = 1_000_000  # largest number that braces can stand for
OF = re.compile(r"-(\d+)-of-(\d+)(?=[.-]|$)")  # in a file's name: its index and the number of files
BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")  # {000..127} or {a,b}


def expand(pattern: str) -> list[str]:
    """Expands the braces of a pattern, in order; raises UserError for too many results.

    Numbers have as many digits as the first one: {000..127}.
    """
    found = [pattern]
    while any(BRACES.search(each) for each in found):
        found = [text for each in found for text in _expanded(each)]
        if len(found) > MAX_FILES:
            raise UserError(f"data.path={pattern!r} matches more than {MAX_FILES:,} files")
    return found


def _expanded(pattern: str) -> Iterator[str]:
    match = BRACES.search(pattern)
    if not match:
        yield pattern
        return
    first, last, several = match.groups()
    if several is not None:
        texts: Iterator[str] = iter(several.split(","))
    else:
        stop = min(int(last), int(first) + MAX_FILES + 1)
        texts = (f"{number:0{len(first)}d}" for number in range(int(first), stop + 1))
    for text in texts:
        yield pattern[:match.start()] + text + pattern[match.end():]


def by_split(path: str, ending: str) -> bool:
    """Returns whether the files are separated by split: by '{split}', or in a folder by their names."""
    if SPLIT in path or not _is_folder(path):
        return SPLIT in path
    return any(_role(file) for file in _inside(path, ending))


def split_name(path: str, ending: str, name: str) -> str:
    """Returns the name of a split in the files; several names may mean the same split.

    If no file has the name, it is that of the single held-out split in the files, under any of its usual names.
    """
    if not by_split(path, ending):
        return splits.held_out_name(name)
    if SPLIT not in path:
        there = {role for file in _inside(path, ending) if (role := _role(file))}
        return _one_of(splits.role(name) or name, there)
    words = [name, *splits.ROLES.get(splits.role(name), ())]
    found = next((word for word in words if _there(path, word)), "")
    others = {word for role in ("val", "test") for word in splits.ROLES[role]}
    return found or _one_of(name, {word for word in others if _there(path, word)})


def _there(path: str, word: str) -> bool:
    """Returns whether the first expansion of the pattern with this word matches a file."""
    first = expand(path.replace(SPLIT, word))[0]
    return _is_file(first) or bool(_glob(first))


def _one_of(name: str, there: set[str]) -> str:
    """Returns the name, or that of the single held-out split that exists in its place."""
    held = [each for each in there if splits.role(each) in HELD]
    return held[0] if name not in there and splits.role(name) in HELD and len(held) == 1 else name


def files(path: str, ending: str, split: str) -> list[epath.Path]:
    """Returns the files of a split, sorted by name within each pattern.

    Args:
      path: data.path: a pattern, a file, or a folder, of which files with this ending are read; if these are named by
        splits ('train-000.tar', 'val-000.tar'), those of the split.
      ending: the extension, such as '.tar'.
      split: the split's name.

    Raises:
      UserError: there are no files, braces name a missing file, or a pattern joins files of several splits.
    """
    called = split_name(path, ending, split) if by_split(path, ending) else split
    if _is_folder(path):
        found = _inside(path, ending)
        if found:
            _check_whole(found)
        roles = {file: _role(file) for file in found}
        if any(roles.values()):
            found = [file for file, role in roles.items() if role == called]
            if not found:
                raise UserError(f"data.path={path!r} has no *{ending} of the split {split!r}, only of "
                                f"{', '.join(sorted({role for role in roles.values() if role}))}")
            _tell_strays(path, tuple(file.name for file, role in roles.items() if not role))
    else:
        found = _matching(path.replace(SPLIT, called))
        mixed = sorted({role for file in found if (role := _role(file))})
        if len(mixed) > 1 and SPLIT not in path:
            raise UserError(f"data.path={path!r} matches files of several splits, {', '.join(mixed)}; write "
                            f"{SPLIT} in their place, or match the files of one")
    if not found:
        raise UserError(f"no file matches data.path={path!r} for the split {split!r}; expected a folder of *{ending}, "
                        f"or a pattern such as '/data/{{split}}-*{ending}' or '/data/train-{{000..127}}{ending}'"
                        f"{_below(path, ending)}")
    return found


def count(path: str, ending: str, expressions: Iterable[str]) -> int:
    """Returns the number of files of all splits in some split expressions, such as 'train[:90%]'."""
    names = {part.name for expression in expressions for part in splits.parts(expression)}
    return len({file for name in names for file in files(path, ending, name)})


def _below(path: str, ending: str) -> str:
    """Returns the end of a message that names a folder in `path` with such files, as in a clone of the hub; '' if none.
    """
    folders = sorted(epath.Path(path).iterdir(), key=str) if _is_folder(path) else []
    found = next((folder for folder in folders if folder.is_dir() and _inside(str(folder), ending)), None)
    return f"; there are some in {printable(str(found))}" if found else ""


@functools.cache
def _tell_strays(path: str, names: tuple[str, ...]) -> None:
    if names:
        log.warning("%s: %s not read, because the name has no split, such as %s", path, pluralize(len(names), "file"),
                    names[0])


def _matching(pattern: str) -> list[epath.Path]:
    found, missing = list[epath.Path](), list[str]()
    expanded = expand(pattern)
    for each in expanded:
        names = [each] if _is_file(each) else _glob(each)
        if not names and len(expanded) > 1:
            missing.append(each)
        found += map(epath.Path, names)
    if found and missing:
        raise UserError(f"{pluralize(len(missing), 'file')} of {len(expanded)} that data.path names are missing, such "
                        f"as {printable(missing[0])}")
    return list(dict.fromkeys(found))


def promised(names: set[str]) -> set[str]:
    """Returns the names of all files that some names ('-00003-of-00008') imply."""
    found = set()
    for name in names:
        of = OF.search(name)
        if of and int(of[2]) <= MAX_FILES:
            digits, total = len(of[1]), int(of[2])
            found |= {f"{name[:of.start(1)]}{number:0{digits}d}{name[of.end(1):]}" for number in range(total)}
    return found


def _check_whole(found: list[epath.Path]) -> None:
    names = {file.name for file in found}
    if missing := sorted(promised(names) - names):
        raise UserError(f"{pluralize(len(missing), 'file')} missing in {found[0].parent} by the names of the others, "
                        f"such as {missing[0]}")


def _glob(pattern: str) -> list[str]:
    if "://" not in pattern:
        return sorted(glob.glob(pattern))
    import fsspec

    system, inside = fsspec.core.url_to_fs(pattern)
    return sorted(system.unstrip_protocol(name) for name in system.glob(inside)) if set("*?[") & set(pattern) else []


def _is_file(path: str) -> bool:
    return epath.Path(path).is_file()


def _is_folder(path: str) -> bool:
    return bool(path) and not ("://" in path and set("*?[{") & set(path)) and epath.Path(path).is_dir()


def _inside(folder: str, ending: str) -> list[epath.Path]:
    return sorted((file for file in epath.Path(folder).iterdir() if file.name.lower().endswith(ending)
                   and not file.name.startswith(".") and file.is_file()), key=lambda file: file.name)


def _role(file: epath.Path) -> str:
    """Returns the split in a file name: 'train' for imagenet-train-000012.tar."""
    words = re.findall(r"[^\W\d_]+", file.name.split(".")[0])
    return next((role for word in words if (role := splits.role(word))), "")
