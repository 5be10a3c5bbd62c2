"""TIFF files before Pillow opens them: the tags of the first page that say how its pixels are stored, and none else.

Pillow and libtiff read whatever a directory of tags points to, and go through all pages. A small file can point to
itself 65,535 times. So the first page gets a directory of its own, of a few tags whose sizes have been looked at; color
profiles, EXIF and further pages are left out. TIFF 6.0 (Adobe, 1992) numbers the tags, BigTIFF widens their fields.
"""

import struct
from typing import NamedTuple

from mae_jax.data.image_bounds import MAX_PARTS, MAX_SCANNED, SCAN_MARKER, BadImage, check_size

MARKS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # small or big end first, and the same of BigTIFF
# Bytes of the types of values.
SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
LETTERS = {1: "B", 3: "H", 4: "I", 16: "Q"}  # types that numbers have here, as `struct` calls them
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
    """What the tags of the first page say."""

    entries: dict[int, bytes]  # tag → its entry in the directory
    values: dict[int, tuple[int, ...]]  # tag → numbers, of those that are a few
    others: bool  # whether further pages follow

    def first(self, tag: int, default: int) -> int:
        """Returns the first number of a tag."""
        return (self.values.get(tag) or (default,))[0]


class _Form(NamedTuple):
    """How the fields of a directory are stored."""

    end: str  # '<' or '>'
    count: str  # the letter of the number of entries, of offsets
    offset: str

    @property
    def entry(self) -> int:
        """Bytes of an entry: tag, type, count, value or offset."""
        return 4 + 2 * struct.calcsize(self.offset)


def is_tiff(data: bytes) -> bool:
    """Whether bytes begin as a TIFF does."""
    return data[:4] in MARKS


def page(data: bytes) -> Page:
    """Reads the directory of the first page; raises BadImage where it is damaged, or too large."""
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
    """Returns a TIFF that has the first page alone, with the tags that say how its pixels are stored.

    Raises:
      BadImage: it is damaged, beyond a bound, or of pixels that are none of an image of 8 or 16 bits.
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
    """Whether 0 stands for white, which Pillow heeds up to 8 bits alone."""
    return page(data).first(PHOTOMETRIC, 1) == WHITE_IS_ZERO


def _check(data: bytes, found: Page) -> None:
    """Raises BadImage for what is no image of 8 or 16 bits with up to three channels, or takes long to decode."""
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
    """Returns the numbers of an entry, the first 64 of them; raises BadImage for too many, or beyond the end."""
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
