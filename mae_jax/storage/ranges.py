"""Thread-safe reading of files and of ranges of bytes, on a disk or in a bucket."""

import os
from collections.abc import Callable
from typing import Any

from etils import epath


def read(path: str, start: int, size: int) -> bytes:
    """Returns `size` bytes of a file from the byte `start` on; raises OSError if there are fewer."""
    if "://" in path:
        import fsspec

        system, inside = fsspec.core.url_to_fs(path)
        content = asked(path, lambda: system.cat_file(inside, start=start, end=start + size)) if size else b""
    else:
        file = os.open(path, os.O_RDONLY)
        try:
            content = b""
            while len(content) < size and (part := os.pread(file, size - len(content), start + len(content))):
                content += part
        finally:
            os.close(file)
    if len(content) < size:
        raise OSError(f"{epath.Path(path).name} ends before byte {start + size}")
    return content


def read_whole(path: epath.Path) -> bytes:
    """Returns the content of a file, by one request in a bucket; raises OSError."""
    if "://" not in str(path):
        return path.read_bytes()
    import fsspec

    system, inside = fsspec.core.url_to_fs(str(path))  # `path.read_bytes` asks for the file's size and kind first
    return asked(str(path), lambda: system.cat_file(inside))


def asked(path: str, action: Callable[[], Any]) -> Any:
    """Returns `action()`; errors of s3:// become an OSError of one line."""
    if not path.startswith("s3://"):
        return action()
    from mae_jax.storage import s3

    return s3.plainly(path, action)
