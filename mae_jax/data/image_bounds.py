"""What an image may cost, told from its bytes before anything is decoded.

Files that people and strangers make are small where they cost most: a JPEG of a thousand scans, a PNG of one row, a
text that unpacks to gigabytes. The bounds go by the bytes alone, never by a clock: a bad image is bad on every machine.
Beyond a bound, it is a bad image like any other.
"""

import re
from collections.abc import Iterator

MAX_PIXELS = 50_000_000  # while one is decoded, it takes up to 0.6 GB, as WebP 1 GB (measured)
MAX_SIDE = 65_535  # pixels, as of a JPEG: resizing takes memory for each row and column of the whole image
MAX_BYTES = 500_000_000  # of a file: 50 megapixels of four channels and 16 bits, stored as they are, have 400 MB
MAX_SCANS = 100  # of a JPEG: progressive ones have about 10; each is a pass over all pixels, however short it is
MAX_SCANNED = 1_000_000_000  # pixels over all scans of a JPEG: 20 of 50 megapixels; 3 seconds
MAX_PARTS = 100_000  # chunks of a PNG, segments of a JPEG's header, blocks of a GIF's: PIL takes microseconds for each
TOO_LARGE = f"it declares more than {MAX_PIXELS // 1_000_000} megapixels"
JPEGS = ("JPEG", "MPO")  # as PIL calls them; MPO: with further images, of which the first counts
BEGIN_MARKER, SCAN_MARKER, END_MARKER = b"\xff\xd8", b"\xff\xda", b"\xff\xd9"  # of a JPEG; none occurs within a scan
UNPACKED = (b"iCCP", b"tEXt", b"zTXt", b"iTXt")  # chunks of a PNG that PIL would unpack, and nobody reads
MARKER = re.compile(rb"\xff[\x02-\xcf\xd8-\xfe]")  # the next one of a JPEG, but for those within a scan and fillers


class BadImage(Exception):
    """The bytes are no image that can be used; the text says why."""


def check_bytes(size: int) -> None:
    """Raises BadImage for a file of too many bytes."""
    if size > MAX_BYTES:
        raise BadImage(f"its file has {size} bytes; at most {MAX_BYTES}")


def check_size(width: int, height: int) -> None:
    """Raises BadImage for an image of too many pixels, or too long a side."""
    if width * height > MAX_PIXELS:
        raise BadImage(TOO_LARGE)
    if max(width, height) > MAX_SIDE:
        raise BadImage(f"it declares a side of {max(width, height)} pixels; at most {MAX_SIDE}")


def without_ballast(data: bytes) -> bytes:
    """Returns an image without what PIL would unpack, or join piece by piece, before it looks at a pixel.

    Raises:
      BadImage: it has more than MAX_PARTS parts, each of which PIL would take its time for.
    """
    if data.startswith(b"\x89PNG"):
        return _joined_parts(data, _png_parts(data))
    if data.startswith(b"GIF8"):
        return _joined_parts(data, _gif_parts(data))
    if data.startswith(b"\xff\xd8"):
        _check_segments(data)
    return data


def _joined_parts(data: bytes, parts: Iterator[tuple[int, int, bool]]) -> bytes:
    """Returns the data without the parts (begin, end, kept) that are not kept."""
    view, pieces, place = memoryview(data), [], 0
    for number, (begin, end, kept) in enumerate(parts):
        if number > MAX_PARTS:
            raise BadImage(f"it has more than {MAX_PARTS} parts")
        if not kept:
            pieces.append(view[place:begin])
            place = end
    return b"".join([*pieces, view[place:]]) if pieces else data


def _png_parts(data: bytes) -> Iterator[tuple[int, int, bool]]:
    """Yields begin and end of each chunk of a PNG, and whether it is kept."""
    place = 8
    while place + 12 <= len(data):
        end = place + 12 + int.from_bytes(data[place:place + 4])
        kind = data[place + 4:place + 8]
        yield place, min(end, len(data)), kind not in UNPACKED
        if kind == b"IEND":  # whatever follows is not looked at
            return
        place = end


def _gif_parts(data: bytes) -> Iterator[tuple[int, int, bool]]:
    """Yields begin and end of each block of a GIF before its first frame, and whether it is kept: what says how the
    frame is shown is."""
    if len(data) < 13:
        return
    place = 13 + (3 << (data[10] & 7) + 1 if data[10] & 0x80 else 0)
    while data[place:place + 1] == b"\x21":
        kept, begin = data[place + 1:place + 2] == b"\xf9", place
        place += 2
        while length := int.from_bytes(data[place:place + 1]):
            place += 1 + length
            yield begin, min(place, len(data)), kept
            begin = place
        place += 1
        yield begin, min(place, len(data)), kept


def _check_segments(data: bytes) -> None:
    """Raises BadImage where a JPEG's header has so many segments, or so much between them, that it takes long."""
    place, between = 2, 0
    for _ in range(MAX_PARTS):
        found = MARKER.search(data, place)
        if not found or found[0] == SCAN_MARKER:
            return
        between += found.start() - place
        place = found.end() + (0 if found[0] == BEGIN_MARKER else int.from_bytes(data[found.end():found.end() + 2]))
        if between > MAX_PARTS:
            break
    raise BadImage(f"its header has more than {MAX_PARTS} parts")


def check_scans(data: bytes, pixels: int) -> None:
    """Raises BadImage for a JPEG of so many scans that it takes long to decode."""
    most = min(MAX_SCANS, MAX_SCANNED // max(pixels, 1))
    if data.count(SCAN_MARKER) > most and (scans := sum(marker == SCAN_MARKER for marker in _markers(data))) > most:
        raise BadImage(f"it has {scans} scans; of its size at most {most} are decoded")


def ends(data: bytes) -> bool:
    """Whether a JPEG has its end marker, whatever follows it: phones append films, whose bytes look like markers."""
    last = data.rfind(END_MARKER)
    return last >= 0 and (data.find(SCAN_MARKER, last) < 0 or END_MARKER in _markers(data))


def _markers(data: bytes) -> Iterator[bytes]:
    """Yields the markers of a JPEG in order, to its end marker, where it has one; raises BadImage for too many."""
    place = 2
    for _ in range(MAX_PARTS):
        found = MARKER.search(data, place)
        if not found:
            return
        yield found[0]
        if found[0] == END_MARKER:
            return
        place = found.end() + int.from_bytes(data[found.end():found.end() + 2])  # past the segment, or a scan's header
    raise BadImage(f"it has more than {MAX_PARTS} parts")
