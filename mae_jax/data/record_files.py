"""Checks of TFRecord files before TensorFlow reads them.

TensorFlow allocates the length that a record's header declares, and ends the process if memory is exhausted; it also
must know the compression of a file. For a local file, all headers are read once per run, which also brings the file
into the page cache for TensorFlow. For a file in a bucket, whose objects have checksums, only the first header is read.
"""

import functools
import zlib
from collections.abc import Iterator
from typing import IO, NamedTuple

from etils import epath

from mae_jax.errors import UserError
from mae_jax.storage import file_kinds
from mae_jax.storage.paths import version

FRAME, TAIL = 12, 4  # bytes before a record (length, its checksum) and after it
BUFFER = 1_000_000  # bytes read at a time
NO_HEADER = "the header of record {} is not what its checksum says"
WINDOWS = {"GZIP": 31, "ZLIB": 15}  # TensorFlow's name of a compression → zlib's wbits


class Look(NamedTuple):
    """Properties of a file, from its headers."""

    compression: str  # 'GZIP', 'ZLIB', '': none
    records: int  # complete ones, by their headers
    size: int  # bytes, decompressed
    problem: str  # of the data after these records; '' for none


def look(file: epath.Path | str) -> Look:
    """Reads the headers of all records, once as long as the file stays unchanged.

    Raises:
      UserError: the file cannot be read, or is no TFRecord file.
    """
    file = epath.Path(file)
    with _readable(file):
        return _look(*version(file))


def first_look(file: epath.Path | str) -> str:
    """Returns a file's compression, from its first record's header; raises UserError as `look`."""
    file = epath.Path(file)
    with _readable(file), file.open("rb") as opened:
        begin = opened.read(file_kinds.ENOUGH)
    return _compression(file, begin)


def opening(file: str) -> tuple[str, int]:
    """Returns a file's compression, and how many records TensorFlow may read from it: -1 for all."""
    if not _local(file):
        return first_look(file), -1
    found = look(file)
    return found.compression, found.records if found.problem else -1


class _readable:
    """Context manager that converts an OSError to a UserError naming the file."""

    def __init__(self, file: epath.Path):
        self.file = file

    def __enter__(self) -> None:
        if self.file.is_dir():
            raise UserError(f"{self.file} is a folder; expected a TFRecord file")

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            raise UserError(f"cannot read {self.file}: {error.strerror or error}") from None


def _local(file: epath.PathLike) -> bool:
    return "://" not in str(file)


@functools.lru_cache(maxsize=100_000)
def _look(name: str, size: int, changed: int) -> Look:
    file = epath.Path(name)
    with open(name, "rb", BUFFER) if _local(name) else file.open("rb") as opened:
        compression = _compression(file, opened.read(file_kinds.ENOUGH))
        opened.seek(0)
        if compression:
            return _packed(opened, compression)
        return _plain(opened, size)


def _plain(opened: IO[bytes], size: int) -> Look:
    place = count = 0
    while place < size:
        opened.seek(place)
        header = opened.read(FRAME)
        if len(header) < FRAME:
            return Look("", count, place, f"it ends within the header of record {count}")
        if not _is_header(header):
            return Look("", count, place, NO_HEADER.format(count))
        end = place + FRAME + int.from_bytes(header[:8], "little") + TAIL
        if end > size:
            return Look("", count, place, f"record {count} ends {end - size} bytes past the end of the file")
        place, count = end, count + 1
    return Look("", count, place, "")


def _packed(opened: IO[bytes], compression: str) -> Look:
    """As `_plain`, for a compressed file."""
    held, at, skip, place, count = b"", 0, 0, 0, 0
    try:
        for piece in _unpacked(opened, WINDOWS[compression]):
            held, at = held[at:] + piece, 0
            while True:
                passed = min(skip, len(held) - at)
                at, skip = at + passed, skip - passed
                if skip or len(held) < at + FRAME:
                    break
                if not _is_header(held[at:at + FRAME]):
                    return Look(compression, count, place, NO_HEADER.format(count))
                skip = FRAME + int.from_bytes(held[at:at + 8], "little") + TAIL
                place, count = place + skip, count + 1
    except (zlib.error, EOFError) as error:
        return Look(compression, count - bool(skip), place, f"what is packed is cut short or damaged: {error}")
    if skip:
        return Look(compression, count - 1, place, f"record {count - 1} ends {skip} bytes past the end of the file")
    return Look(compression, count, place, f"it ends within the header of record {count}" if held[at:] else "")


def _unpacked(opened: IO[bytes], window: int) -> Iterator[bytes]:
    """Yields the decompressed data in pieces of bounded size; raises EOFError if the file is truncated."""
    unpack = None
    while packed := opened.read(BUFFER):
        while packed:
            unpack = unpack or zlib.decompressobj(window)
            yield unpack.decompress(packed, BUFFER)
            packed = unpack.unused_data if unpack.eof else unpack.unconsumed_tail
            unpack = None if unpack.eof else unpack
    if unpack:
        raise EOFError("it ends too early")


def _compression(file: epath.Path, begin: bytes) -> str:
    if not begin or _is_header(begin):
        return ""
    if begin[:2] == b"\x1f\x8b":
        return "GZIP"
    if begin[0] & 15 == 8 and int.from_bytes(begin[:2]) % 31 == 0:  # RFC 1950
        return "ZLIB"
    found = file_kinds.kind(begin) or "no TFRecord file, or damaged at its first record: it begins with no header"
    if found.startswith("compressed"):
        found += ", which TensorFlow does not unpack; unpack it, or write it with GZIP"
    raise UserError(f"{file} is {found}{'' if found.startswith('no ') else ', and not a TFRecord file'}")


def _is_header(begin: bytes) -> bool:
    """Returns whether the first 12 bytes are a record's length and its masked CRC-32C."""
    crc = 0xFFFFFFFF
    for byte in begin[:8]:
        crc = crc >> 8 ^ _TABLE[(crc ^ byte) & 255]
    crc ^= 0xFFFFFFFF
    masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
    return len(begin) >= FRAME and int.from_bytes(begin[8:FRAME], "little") == masked


def _crc_of(byte: int) -> int:
    for _ in range(8):
        byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)  # Castagnoli's polynomial, reflected
    return byte


_TABLE = [_crc_of(byte) for byte in range(256)]
