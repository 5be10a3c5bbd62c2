"""Small files and folders, on a disk or in a bucket: read as a whole, written so that they are whole."""

import importlib.util
import os
import re

from etils import epath

from mae_jax.errors import UserError

# Read when etils meets the first gs:// path: gcsfs serves it then, TensorFlow stays out.
os.environ.setdefault("EPATH_USE_TF", "false")

BUCKET = r"gs://[a-z0-9][a-z0-9_.-]{1,220}[a-z0-9](/|$)"


def locate(folder: str) -> epath.Path:
    """Returns the folder as a path.

    Raises:
      UserError: it is in a bucket, and the packages for that are missing, or the bucket cannot be looked into.
    """
    if re.match(r"\w+:/|gs:", folder) and not folder.startswith("gs://"):
        raise UserError(f"{folder}: a folder is local or gs://BUCKET/FOLDER")
    if folder.startswith("gs://") and set(folder) & set("*?[#"):  # gcsfs takes them for a pattern, or for a generation
        raise UserError(f"{folder}: a folder in a bucket cannot have *, ?, [ or # in its name")
    check_bucket(folder)
    return epath.Path(folder)


def check_bucket(path: str) -> None:
    """Finds out in seconds whether what is named on gs://, a pattern perhaps, can be looked into; raises UserError."""
    if not path.startswith("gs://"):
        return
    if not re.match(BUCKET, path):
        raise UserError(f"{path}: no name of a bucket; expected gs://BUCKET/FOLDER, with 3 or more small letters, "
                        "digits and - _ .")
    missing = [name for name in ("gcsfs", "google.cloud.storage") if not _importable(name)]
    if missing:
        raise UserError(f"{path}: a bucket needs {' and '.join(missing)}; run: pip install 'mae_jax[gcs]'")
    from mae_jax.storage import gcs

    gcs.check(re.split(r"[*?\[{]", path)[0])


def _importable(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


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
