"""Reading and replacing the end of a file with lines {"step": 12, ...}, whose steps mostly ascend."""

import io
import os
import re
import shutil

from etils import epath

BLOCK = 1 << 20  # bytes per read, from the end
STEP = re.compile(rb'^\{"step": ?(\d{1,18})[,}]', re.MULTILINE)


def read(file: io.IOBase, step: float) -> tuple[int, bytes]:
    """Reads the end of the file that holds all lines of `step` and later steps.

    It reads blocks backwards until a block has lines of earlier steps only. Single lines of earlier steps, which an
    evaluation of an older checkpoint adds, do not stop it.

    Args:
      file: opened for reading bytes, with random access.
      step: the first step to include.

    Returns:
      The position in bytes, which may be somewhat before the first such line, and the content from there on.
    """
    start, blocks = file.seek(0, os.SEEK_END), []
    while start:
        size = min(BLOCK, start)
        start = file.seek(start - size)
        blocks.append(file.read(size))
        found = STEP.findall(blocks[-1])
        if found and all(int(number) < step for number in found):
            break
    text = b"".join(reversed(blocks))
    cut = text.find(b"\n") + 1 if start else 0  # the block may begin within a line
    return start + cut, text[cut:]


def replace(path: epath.Path, start: int, text: str) -> None:
    """Atomically replaces the content of a local file from the byte `start` on."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        with open(path, "rb") as old, open(partial, "wb") as new:
            shutil.copyfileobj(old, new)
            new.truncate(start)
            new.seek(start)
            new.write(text.encode())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
