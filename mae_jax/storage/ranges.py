"""Parts of files, from any thread."""

import os

from etils import epath


def read(path: str, start: int, size: int) -> bytes:
    """Returns `size` bytes of a file on a disk or in a bucket, from the byte `start` on; raises OSError for fewer."""
    if "://" in path:
        import fsspec

        system, inside = fsspec.core.url_to_fs(path)
        content = system.cat_file(inside, start=start, end=start + size) if size else b""
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
