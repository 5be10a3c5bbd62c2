"""Bounds on the cost of an image, checked on its bytes before it is decoded.

Malicious and careless files are small where they cost most: a JPEG with a thousand scans, a PNG with one row, a text
chunk that unpacks to gigabytes. The bounds depend only on the bytes, never on a clock: a bad image is bad on every
machine. An image beyond a bound is a bad image like any other.
"""

import re
from collections.abc import Iterator

MAX_PIXELS = 50_000_000  # decoding takes up to 0.6 GB, for WebP 1 GB (measured)
MAX_SIDE = 65_535  # pixels, the limit of JPEG: resizing takes memory per row and column of the whole image
MAX_BYTES = 500_000_000  # of a file: 50 megapixels of four 16-bit channels, uncompressed, have 400 MB
MAX_SCANS = 100  # of a JPEG: progressive files have about 10; each scan, however short, is a pass over all pixels
MAX_SCANNED = 1_000_000_000  # pixels over all scans of a JPEG: 20 of 50 megapixels; 3 seconds
MAX_PARTS = 100_000  # chunks of a PNG, segments of a JPEG's header, blocks of a GIF's: PIL takes microseconds for each
TOO_LARGE = f"it declares more than {MAX_PIXELS // 1_000_000} megapixels"
JPEGS = ("JPEG", "MPO")  # PIL's names; MPO has further images, which are not used
BEGIN_MARKER, SCAN_MARKER, END_MARKER = b"\xff\xd8", b"\xff\xda", b"\xff\xd9"  # of a JPEG; none occurs within a scan
UNPACKED = (b"iCCP", b"tEXt", b"zTXt", b"iTXt")  # unused PNG chunks that PIL would unpack
MARKER = re.compile(rb"\xff[\x02-\xcf\xd8-\xfe]")  # JPEG markers, except those within a scan and fill bytes


class BadImage(Exception):
    """The bytes are no usable image; the text says why."""


def check_bytes(size: int) -> None:
    """Raises BadImage if a file has too many bytes."""
    if size > MAX_BYTES:
        raise BadImage(f"its file has {size} bytes; at most {MAX_BYTES}")


def check_size(width: int, height: int) -> None:
    """Raises BadImage if an image (in pixels) is too large, or has too long a side."""
    if width * height > MAX_PIXELS:
        raise BadImage(TOO_LARGE)
    if max(width, height) > MAX_SIDE:
        raise BadImage(f"it declares a side of {max(width, height)} pixels; at most {MAX_SIDE}")


def without_ballast(data: bytes) -> bytes:
    """Returns an image without the parts that PIL would unpack, or join one by one, before it decodes pixels.

    Raises:
      BadImage: the image has more than MAX_PARTS parts, each of which would cost time.
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
    """Yields begin and end of each chunk of a PNG, and whether to keep it."""
    place = 8
    while place + 12 <= len(data):
        end = place + 12 + int.from_bytes(data[place:place + 4])
        kind = data[place + 4:place + 8]
        yield place, min(end, len(data)), kind not in UNPACKED
        if kind == b"IEND":  # anything after it is ignored
            return
        place = end


def _gif_parts(data: bytes) -> Iterator[tuple[int, int, bool]]:
    """Yields begin and end of each block of a GIF before its first frame, and whether to keep it.

    Only graphic control extensions, which say how the frame is shown, are kept.
    """
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
    """Raises BadImage if a JPEG's header has too many segments, or too many bytes between them."""
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
    """Raises BadImage if a JPEG has so many scans that decoding takes long."""
    most = min(MAX_SCANS, MAX_SCANNED // max(pixels, 1))
    if data.count(SCAN_MARKER) > most and (scans := sum(marker == SCAN_MARKER for marker in _markers(data))) > most:
        raise BadImage(f"it has {scans} scans; of its size at most {most} are decoded")


def ends(data: bytes) -> bool:
    """Returns whether a JPEG has its end marker; phones append videos after it, whose bytes can look like markers."""
    last = data.rfind(END_MARKER)
    return last >= 0 and (data.find(SCAN_MARKER, last) < 0 or END_MARKER in _markers(data))


def _markers(data: bytes) -> Iterator[bytes]:
    """Yields the markers of a JPEG in order, up to its end marker if any; raises BadImage for too many."""
    place = 2
    for _ in range(MAX_PARTS):
        found = MARKER.search(data, place)
        if not found:
            return
        yield found[0]
        if found[0] == END_MARKER:
            return
        place = found.end() + int.from_bytes(data[found.end():found.end() + 2])  # past the segment or scan header
    raise BadImage(f"it has more than {MAX_PARTS} parts")
