"""Paths of files and folders, local or in a bucket, and atomic reading and writing of small files."""

import contextlib
import errno
import importlib.util
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any
from unicodedata import category

from etils import epath

from mae_jax.errors import UserError, printable
from mae_jax.storage import hub

# etils reads this when it first opens a gs:// path, and then uses gcsfs without importing TensorFlow.
os.environ.setdefault("EPATH_USE_TF", "false")

GCS_MISREADS = "*?[]{}\\#"  # gcsfs interprets these as patterns or as a generation
ORBAX_MISREADS = "*?[]\\"  # orbax's glob interprets these as patterns
# Config fields with paths, besides init_from and data.path, whose syntax depends on the source.
FIELDS = ("data.tokens", "train.compilation_cache", "method.vocabulary_file", "method.clusters")
# Flags and fields that may name a repository of the hub.
FROM_HUB = ("", "init_from", "--from", "from")
BUCKET = r"(gs|s3)://[a-z0-9][a-z0-9_.-]{1,220}[a-z0-9](/|$)"
PACKAGES = {"gs": ("gcs", "gcsfs", "google.cloud.storage"), "s3": ("s3", "s3fs")}  # scheme → extra and its modules
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a disk, a quota or a file is full
READ_ONLY = ("data.path", "data.mask_key")  # fields that may be on s3://, which is only read


def normalized(path: str, flag: str = "") -> str:
    """Checks a path from the user, and expands `~`; environment variables are not expanded.

    Args:
      path: of a file, a folder or a pattern of files, local or gs://.
      flag: the flag or field with the path, such as '--workdir' or 'data.path', for messages.

    Raises:
      UserError: the path is neither local nor gs:// (for data also s3://), has an unknown user after `~`, or has
        characters that cannot be printed.
    """
    said = f"{flag}={printable(path)}" if flag else printable(path)
    if any(category(char) in ("Cc", "Cs", "Zl", "Zp") for char in path):
        raise UserError(f"{said}: a path must be valid UTF-8, without line breaks or control characters")
    if path.startswith("s3://") and flag not in READ_ONLY:
        raise UserError(f"{said}: s3:// is supported for data only; a folder is local or gs://BUCKET/FOLDER")
    if path.startswith(hub.SCHEME) and flag in FROM_HUB:
        hub.check(path, flag)
        return path
    if re.match(r"[\w.+-]+:/|gs:|s3:", path) and not path.startswith(("gs://", "s3://")):
        raise UserError(f"{said}: a folder is local or gs://BUCKET/FOLDER")
    if path.startswith(("gs://", "s3://")):
        if {".", ".."} & set(path.split("/")):
            raise UserError(f"{said}: a path in a bucket cannot have the parts . and ..")
        return path
    expanded = os.path.expanduser(path)
    if path.startswith("~") and expanded == path:
        raise UserError(f"{said}: there is no user {path.split('/')[0][1:]!r}; a folder of this name is "
                        f"./{printable(path)}")
    return expanded


def locate(path: str, flag: str = "") -> epath.Path:
    """Returns the path of a file or folder, whose name is literal, not a pattern.

    Args:
      path, flag: as in `normalized`.

    Raises:
      UserError: as in `normalized`; or the path is in a bucket, and the packages for buckets are missing, the bucket
        cannot be listed, or gcsfs would interpret the name as a pattern.
    """
    path = normalized(path, flag)
    if path.startswith(("gs://", "s3://")):
        _refuse(path, GCS_MISREADS, flag)
        check_bucket(path)
    return epath.Path(_here(path))


def _here(path: str) -> str:
    """Returns a normalized path; for a repository of the hub, that of its local copy."""
    return hub.fetched(path) if path.startswith(hub.SCHEME) else path


def output(path: str, flag: str) -> epath.Path | None:
    """Checks, before a command's work, the file that the command writes at its end; None for an empty path.

    The content of an existing file stays until then.

    Raises:
      UserError: as in `locate`, or the file cannot be written.
    """
    if not path:
        return None
    file = locate(path, flag)
    if file.is_dir():
        raise UserError(f"{flag}={path} is a folder; expected the name of a file")
    try:
        make_folder(file.parent)
        if not str(file).startswith("gs://"):
            with open(file, "ab"):
                pass
    except OSError as error:
        raise UserError(f"{flag}={path} cannot be written: {error.strerror or error}") from None
    return file


def for_orbax(path: str, flag: str = "") -> str:
    """Returns the `normalized` path of a file, or of a folder that contains checkpoints.

    Orbax finds the files of its processes by a glob pattern that begins with the folder's absolute path. So the path
    must not contain characters of patterns: checkpoints saved there could not be read.

    Raises:
      UserError: as in `normalized`, or orbax would interpret a part of the path as a pattern.
    """
    path = _here(normalized(path, flag))
    if path.startswith("gs://") or not os.path.isfile(path):
        _refuse(path if path.startswith("gs://") else os.path.abspath(path), ORBAX_MISREADS, flag)
    return path


def locate_checkpoints(path: str, flag: str) -> epath.Path:
    """Returns a path as `locate` does; raises UserError as `for_orbax` does too."""
    return locate(for_orbax(path, flag), flag)


def check_fields(values: Mapping[str, Any]) -> None:
    """Raises UserError for the first config field, by dotted name, whose path `normalized` refuses."""
    for field in ("init_from", *FIELDS):
        normalized(values.get(field, ""), field)


def _refuse(path: str, characters: str, flag: str) -> None:
    """Raises UserError if a path has one of these characters."""
    if found := sorted(set(path) & set(characters)):
        where = f"{flag}: " if flag else ""
        raise UserError(f"{where}{printable(path)}: the path contains {' '.join(found)}, which would be taken for a "
                        "pattern; name another folder")


def check_bucket(path: str) -> None:
    """Checks within seconds that a path or pattern in a bucket can be listed; raises UserError otherwise."""
    if not path.startswith(("gs://", "s3://")):
        return
    kind = path[:2]
    if not re.match(BUCKET, path):
        raise UserError(f"{path}: not a valid bucket; expected {kind}://BUCKET/FOLDER, with 3 or more lower-case "
                        "letters, digits and - _ .")
    extra, *modules = PACKAGES[kind]
    missing = [name for name in modules if not _importable(name)]
    if missing:
        raise UserError(f"{path}: a bucket needs {' and '.join(missing)}; run: pip install 'mae_jax[{extra}]'")
    place = re.split(r"[*?\[{]", path)[0]
    if kind == "s3":
        from mae_jax.storage import s3

        s3.check(place)
    else:
        from mae_jax.storage import gcs

        gcs.check(place)


def _importable(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def version(file: epath.Path) -> tuple[str, int, int]:
    """Returns a file's absolute path, size in bytes and time of change (ns on a disk, else s), to detect changes.

    On a disk, the time includes that of the inode, which changes even if a copy keeps the modification time.

    Raises:
      UserError: the file's status cannot be read.
    """
    try:
        if "://" not in str(file):
            found = os.stat(file)
            return os.path.abspath(file), found.st_size, max(found.st_mtime_ns, found.st_ctime_ns)
        stat = file.stat()
        return str(file), stat.length, int(stat.mtime)
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror or error}") from None


def make_folder(folder: epath.Path) -> None:
    """Creates a local folder and its parents; does nothing for a bucket, which has no folders."""
    if not str(folder).startswith("gs://"):
        folder.mkdir(parents=True, exist_ok=True)


def read_bytes(file: epath.Path) -> bytes | None:
    """Returns the content of a file; None if it does not exist."""
    if str(file).startswith("gs://"):
        from mae_jax.storage import gcs

        found = gcs.read(str(file))
        return found.content if found else None
    return file.read_bytes() if file.exists() else None


def read_there(file: epath.Path) -> bytes:
    """Returns the content of a file; raises UserError if it does not exist or cannot be read."""
    try:
        content = read_bytes(file)
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror or error}") from error
    if content is None:
        raise UserError(f"no such file: {file}")
    return content


def read_text(file: epath.Path) -> str | None:
    """Returns the content of a UTF-8 file as text; None if it does not exist."""
    content = read_bytes(file)
    return None if content is None else content.decode()


def replace_text(file: epath.Path, text: str) -> None:
    """Replaces a file atomically: it holds the old or the new text, even after a kill or on a full disk."""
    replace_bytes(file, text.encode())


def replace_bytes(file: epath.Path, content: bytes, seconds: float = 60.0) -> None:
    """Replaces a file atomically; retries a failing bucket for `seconds`. Raises OSError."""
    if str(file).startswith("gs://"):  # objects are written atomically
        from mae_jax.storage import gcs

        gcs.write(str(file), content, seconds)
        return
    partial = file.with_name(f"{file.name}.partial")
    try:
        with naming(file):
            partial.write_bytes(content)
            partial.replace(file)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def naming(path: object) -> Iterator[None]:
    """Context in which the error of a full disk, which comes from a write and names no file, names `path`."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_ROOM and error.filename is None:
            error.filename = str(path)
        raise
