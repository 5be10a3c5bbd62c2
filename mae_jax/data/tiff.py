"""Rewrites TIFF files before Pillow opens them: keeps only the first page, and only the tags that define its pixels.

Pillow and libtiff follow every offset in a directory of tags, and go through all pages. A small file can refer to
itself 65,535 times. So the first page gets a new directory of the few tags in KEPT, whose sizes are checked; color
profiles, EXIF and further pages are dropped. Tag numbers are from TIFF 6.0 (Adobe, 1992); BigTIFF has wider fields.
"""

import struct
from typing import NamedTuple

from mae_jax.data.image_bounds import MAX_PARTS, MAX_SCANNED, SCAN_MARKER, BadImage, check_size

MARKS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # little- and big-endian; the same for BigTIFF
# Field type → bytes per value.
SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
LETTERS = {1: "B", 3: "H", 4: "I", 16: "Q"}  # field types read as numbers → `struct` formats
WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, OFFSETS = 256, 257, 258, 259, 262, 273
CHANNELS, ROWS, PLANAR, TILE_WIDTH, TILE_HEIGHT, TILES, EXTRA, KIND = 277, 278, 284, 322, 323, 324, 338, 339
DNG = 50706
KEPT = {WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, 266, OFFSETS, 274, CHANNELS, ROWS, 279, PLANAR, 292, 293, 317,
        320, TILE_WIDTH, TILE_HEIGHT, TILES, 325, 332, EXTRA, KIND, 347, 512, 513, 514, 515, 519, 520, 521, 529, 530,
        531, 532}
WHITE_IS_ZERO, RGB, CMYK, YCBCR = 0, 2, 5, 6
COLORS = {WHITE_IS_ZERO: 1, 1: 1, RGB: 3, 3: 1, CMYK: 4, YCBCR: 3, 8: 3}  # photometric interpretation → channels
JPEG = (6, 7)
KINDS = {2: "signed numbers", 3: "floating-point numbers", 5: "complex numbers", 6: "complex numbers"}


class Page(NamedTuple):
    """The tags of the first page."""

    entries: dict[int, bytes]  # tag → its directory entry
    values: dict[int, tuple[int, ...]]  # tag → its first 64 numbers
    others: bool  # whether further pages follow

    def first(self, tag: int, default: int) -> int:
        """Returns the first number of a tag, or `default` without one."""
        return (self.values.get(tag) or (default,))[0]


class _Form(NamedTuple):
    """Byte order and field widths of a directory."""

    end: str  # '<' or '>'
    count: str  # `struct` format of the number of entries; next, that of offsets
    offset: str

    @property
    def entry(self) -> int:
        """Bytes per entry: tag, type, count, and value or offset."""
        return 4 + 2 * struct.calcsize(self.offset)


def is_tiff(data: bytes) -> bool:
    """Returns whether the data begin with a TIFF signature."""
    return data[:4] in MARKS


def page(data: bytes) -> Page:
    """Reads the directory of the first page; raises BadImage if it is damaged or too large."""
    form = _form(data)
    (place,) = _unpacked(form, form.offset, data, 4 if form.count == "H" else 8)
    (count,) = _unpacked(form, form.count, data, place)
    if count > MAX_PARTS:
        raise BadImage(f"it has more than {MAX_PARTS} parts")
    place += struct.calcsize(form.count)
    entries, values = {}, {}
    for begin in range(place, place + count * form.entry, form.entry):
        entry = data[begin:begin + form.entry]
        if len(entry) < form.entry:
            raise BadImage("TIFF cut off within its list of tags")
        (tag,) = struct.unpack_from(f"{form.end}H", entry)
        if tag == DNG:
            raise BadImage("a raw file of a camera (DNG), not an image")
        if tag in KEPT and tag not in entries:
            entries[tag], values[tag] = entry, _numbers(data, form, entry)
    (following,) = _unpacked(form, form.offset, data, place + count * form.entry)
    return Page(entries, values, following != 0)


def alone(data: bytes) -> bytes:
    """Returns a TIFF that has only the first page, with the tags that define its pixels.

    Raises:
      BadImage: the file is damaged, exceeds a bound, or its pixels are not those of an image with 8 or 16 bits.
    """
    found, form = page(data), _form(data)
    _check(data, found)
    body = b"".join(entry for _, entry in sorted(found.entries.items()))
    directory = struct.pack(form.end + form.count, len(found.entries)) + body + bytes(struct.calcsize(form.offset))
    begin = 4 if form.count == "H" else 8
    place = -(-len(data) // 8) * 8
    offset = struct.pack(form.end + form.offset, place)
    return b"".join([data[:begin], offset, memoryview(data)[begin + len(offset):], bytes(place - len(data)), directory])


def is_inverted(data: bytes) -> bool:
    """Returns whether 0 is white, which Pillow handles only up to 8 bits."""
    return page(data).first(PHOTOMETRIC, 1) == WHITE_IS_ZERO


def _check(data: bytes, found: Page) -> None:
    """Raises BadImage unless the page is an image of up to 16 bits that decodes in bounded time."""
    width, height = found.first(WIDTH, 0), found.first(HEIGHT, 0)
    check_size(width, height)
    bits = set(found.values.get(BITS) or (1,))
    if kind := KINDS.get(found.first(KIND, 1)):
        raise BadImage(f"a TIFF of {kind}; expected whole numbers of 8 or 16 bits, from 0")
    if len(bits) > 1 or max(bits) > 16:
        raise BadImage(f"a TIFF of {' and '.join(map(str, sorted(bits)))} bits; expected 8 or 16")
    if max(bits) > 8 and found.first(PLANAR, 1) == 2 and found.first(CHANNELS, 1) > 1:
        raise BadImage("a TIFF of 16 bits whose channels are stored apart; expected them pixel by pixel")
    channels, of_color = found.first(CHANNELS, 1), COLORS.get(found.first(PHOTOMETRIC, 1), 1)
    alpha = channels == of_color + 1 and found.first(EXTRA, 0) in (1, 2)
    if channels != of_color and not alpha:
        raise BadImage(f"it has {channels} channels; expected one or three, and perhaps transparency")
    if found.first(COMPRESSION, 1) in JPEG:
        tiled = TILES in found.entries
        rows, columns = found.first(TILE_HEIGHT if tiled else ROWS, height), found.first(TILE_WIDTH, width)
        if data.count(SCAN_MARKER) * min(rows, height) * columns > MAX_SCANNED:
            raise BadImage("it has more scans of its JPEGs than are decoded")


def _form(data: bytes) -> _Form:
    end = "<" if data[:1] == b"I" else ">"
    return _Form(end, "Q", "Q") if b"+" in data[:4] else _Form(end, "H", "I")


def _unpacked(form: _Form, letters: str, data: bytes, place: int) -> tuple[int, ...]:
    try:
        return struct.unpack_from(form.end + letters, data, place)
    except (struct.error, OverflowError):
        raise BadImage("TIFF cut off: a place that it names lies beyond its end") from None


def _numbers(data: bytes, form: _Form, entry: bytes) -> tuple[int, ...]:
    """Returns the first 64 numbers of an entry; raises BadImage if there are too many, or they lie beyond the end."""
    kind, count = struct.unpack_from(f"{form.end}H{form.offset}", entry, 2)
    if kind not in SIZES:
        raise BadImage(f"TIFF with a tag of the unknown type {kind}")
    size, width = SIZES[kind] * count, struct.calcsize(form.offset)
    if count > MAX_PARTS:
        raise BadImage(f"it has more than {MAX_PARTS} parts")
    place, where = 4 + width, entry
    if size > width:
        (place,) = struct.unpack_from(form.end + form.offset, entry, place)
        where = data
    if place + size > len(where):
        raise BadImage("TIFF cut off: a place that it names lies beyond its end")
    letter = LETTERS.get(kind)
    return struct.unpack_from(f"{form.end}{min(count, 64)}{letter}", where, place) if letter else ()
