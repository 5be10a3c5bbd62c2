"""The end of a file of lines {"step": 12, ...}, whose steps ascend: read and replaced without the rest."""

import io
import os
import re
import shutil

from etils import epath

BLOCK = 1 << 20  # bytes that are read at a time, from the end
STEP = re.compile(rb'^\{"step": ?(\d{1,18})[,}]', re.MULTILINE)


def read(file: io.IOBase, step: float) -> tuple[int, bytes]:
    """Returns where the lines of `step` and after it begin, or somewhat before, and what is there.

    Lines of an older step among them, which an evaluation of an older checkpoint adds, do not end it: a block without
    newer ones does.

    Args:
      file: opened to read bytes, with random access.
      step: the first one that is asked for.
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
    """Writes a file on a disk so that it always holds the old content or, from the byte `start` on, this text."""
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
