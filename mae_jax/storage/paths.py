"""Small files and folders, on a disk or in a bucket: read as a whole, written so that they are whole."""

import importlib.util
import os
import re
from collections.abc import Mapping
from typing import Any
from unicodedata import category

from etils import epath

from mae_jax.errors import UserError, printable
from mae_jax.storage import hub

# Read when etils meets the first gs:// path: gcsfs serves it then, TensorFlow stays out.
os.environ.setdefault("EPATH_USE_TF", "false")

GCS_MISREADS = "*?[]{}\\#"  # gcsfs and the bucket take them for a pattern, or for a generation
ORBAX_MISREADS = "*?[]\\"  # a pattern, as its glob reads them
# Of a config, besides init_from; data.path is as its source reads it.
FIELDS = ("data.tokens", "train.compilation_cache", "method.vocabulary_file", "method.clusters")
# Flags that may name a repository of the hub; config_of and the like have none.
FROM_HUB = ("", "init_from", "--from", "from")
BUCKET = r"(gs|s3)://[a-z0-9][a-z0-9_.-]{1,220}[a-z0-9](/|$)"
PACKAGES = {"gs": ("gcs", "gcsfs", "google.cloud.storage"), "s3": ("s3", "s3fs")}  # the extra, and its modules
READ_ONLY = ("data.path", "data.mask_key")  # fields that may be on s3://, where data are read and nothing is written


def normalized(path: str, flag: str = "") -> str:
    """Returns a path that somebody gave as all of us mean it: `~` is a home; environment variables stay as written.

    Args:
      path: of a file, a folder or a pattern of files, local or gs://.
      flag: that it was given by, as '--workdir' or 'data.path', for messages.

    Raises:
      UserError: it is neither local nor gs:// (of data: nor s3://), `~` is of nobody, or no line can show it.
    """
    said = f"{flag}={printable(path)}" if flag else printable(path)
    if any(category(char) in ("Cc", "Cs", "Zl", "Zp") for char in path):
        raise UserError(f"{said}: a path cannot have line breaks, control characters or what is no UTF-8 in it")
    if path.startswith("s3://") and flag not in READ_ONLY:
        raise UserError(f"{said}: s3:// is read as data alone; a folder is local or gs://BUCKET/FOLDER")
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
    """Returns a file or a folder as a path: what it names is there literally, whatever characters its name has.

    Args: as of `normalized`.

    Raises:
      UserError: as of `normalized`; or it is in a bucket, and the packages for that are missing, the bucket cannot be
        looked into, or gcsfs would take the name for a pattern.
    """
    path = normalized(path, flag)
    if path.startswith(("gs://", "s3://")):
        _refuse(path, GCS_MISREADS, flag)
        check_bucket(path)
    return epath.Path(_here(path))


def _here(path: str) -> str:
    """Returns a normalized path; of a repository of the hub, that of its copy here."""
    return hub.fetched(path) if path.startswith(hub.SCHEME) else path


def output(path: str, flag: str) -> epath.Path | None:
    """Returns a file that a command writes at its end, None without one; raises UserError where it cannot be written.

    A mistake shows before minutes of measuring. What is in the file stays until then.
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
    """Returns the `normalized` path of a folder with checkpoints under it, or of a file.

    Orbax looks for what its processes wrote by a pattern that begins with the folder's name as it is. So nothing of it
    may be a pattern, nor of the current folder where the path is relative: what is saved there could not be read.

    Raises:
      UserError: as of `normalized`, or a part of it would be taken for a pattern.
    """
    path = _here(normalized(path, flag))
    if path.startswith("gs://") or not os.path.isfile(path):
        _refuse(path if path.startswith("gs://") else os.path.abspath(path), ORBAX_MISREADS, flag)
    return path


def locate_checkpoints(path: str, flag: str) -> epath.Path:
    """Returns a path as `locate`; raises UserError as `for_orbax` does, too."""
    return locate(for_orbax(path, flag), flag)


def check_fields(values: Mapping[str, Any]) -> None:
    """Raises UserError for the first field of a config, by dotted name, whose path cannot be meant."""
    for field in ("init_from", *FIELDS):
        normalized(values.get(field, ""), field)


def _refuse(path: str, characters: str, flag: str) -> None:
    """Raises UserError where a path has one of these characters."""
    if found := sorted(set(path) & set(characters)):
        where = f"{flag}: " if flag else ""
        raise UserError(f"{where}{printable(path)}: the path has {' '.join(found)} in it, which would be taken for a "
                        "pattern; name another folder")


def check_bucket(path: str) -> None:
    """Finds out in seconds whether what is named in a bucket, a pattern perhaps, can be looked into; raises UserError.
    """
    if not path.startswith(("gs://", "s3://")):
        return
    kind = path[:2]
    if not re.match(BUCKET, path):
        raise UserError(f"{path}: no name of a bucket; expected {kind}://BUCKET/FOLDER, with 3 or more small letters, "
                        "digits and - _ .")
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
    """Returns a file's whole name, its size in bytes, and when it changed: another content has another one.

    On a disk that is the time of the inode, which copies that keep a file's own time do not keep.

    Raises:
      UserError: it cannot be looked at.
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
    """Makes a folder where there are folders: a bucket has none."""
    if not str(folder).startswith("gs://"):
        folder.mkdir(parents=True, exist_ok=True)


def read_bytes(file: epath.Path) -> bytes | None:
    """Returns what a file holds, None where it is not there."""
    if str(file).startswith("gs://"):
        from mae_jax.storage import gcs

        found = gcs.read(str(file))
        return found.content if found else None
    return file.read_bytes() if file.exists() else None


def read_there(file: epath.Path) -> bytes:
    """Returns what a file that must be there holds; raises UserError where it is not, or cannot be read."""
    try:
        content = read_bytes(file)
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror or error}") from error
    if content is None:
        raise UserError(f"no such file: {file}")
    return content


def read_text(file: epath.Path) -> str | None:
    """Returns the text that a file holds, None where it is not there."""
    content = read_bytes(file)
    return None if content is None else content.decode()


def replace_text(file: epath.Path, text: str) -> None:
    """Writes a file so that it always holds the old text or the new one, also after a kill or on a full disk."""
    replace_bytes(file, text.encode())


def replace_bytes(file: epath.Path, content: bytes, seconds: float = 60.0) -> None:
    """As `replace_text`; a bucket that fails is tried again for so many seconds, and raises OSError."""
    if str(file).startswith("gs://"):  # an object appears when it is complete
        from mae_jax.storage import gcs

        gcs.write(str(file), content, seconds)
        return
    partial = file.with_name(f"{file.name}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(file)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
