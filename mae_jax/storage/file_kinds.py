"""Describes the kind of an unexpected file by its content: typical faults of copies, downloads and names."""

ENOUGH = 512  # bytes at a file's beginning that `kind` needs
LFS = b"version https://git-lfs"
_COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz",
               b"\x04\x22\x4d\x18": "lz4", b"7z\xbc\xaf\x27\x1c": "7-Zip", b"Rar!": "RAR"}
_OTHERS = {  # first bytes → kind
    b"PK\x03\x04": "a zip archive, such as *.zip, *.npz or PyTorch's *.pth", b"\x89HDF\r\n\x1a\n": "an HDF5 file",
    b"\x93NUMPY": "one NumPy array, as *.npy", b"PAR1": "a Parquet file", b"SQLite format 3\0": "an SQLite database",
    b"\x80\x02": "a Python pickle, such as PyTorch's older *.pth", b"\x80\x04\x95": "a Python pickle",
    b"%PDF": "a PDF document", b"\x89PNG\r\n\x1a\n": "a PNG image", b"\xff\xd8\xff": "a JPEG image",
    b"II*\0": "a TIFF image", b"MM\0*": "a TIFF image", b"8BPS": "a Photoshop image",
    b"\0\0\0\x0cJXL ": "a JPEG XL image", b"\xff\x0a": "a JPEG XL image",
}
_BRANDS = {b"heic": "HEIC", b"heix": "HEIC", b"mif1": "HEIF", b"msf1": "HEIF", b"avif": "AVIF", b"avis": "AVIF",
           b"mp42": "MP4", b"isom": "MP4", b"qt  ": "QuickTime"}


def kind(content: bytes) -> str:
    """Returns the kind of a file by its first bytes, with an article; '' if it is unknown.

    Call it only for files that cannot be read: valid files have kinds too.
    """
    begin = content[:ENOUGH]
    text = begin.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not content:
        return "empty, as after an interrupted copy or download"
    if begin.startswith(LFS):
        return "a pointer of Git LFS, not the file itself; run: git lfs pull"
    if text.startswith((b"<!doctype html", b"<html", b"<head")):
        return "an HTML page, not the file itself: the download returned a web page"
    if text.startswith((b"<?xml", b"<svg", b"<error")):
        return "an XML text, such as a bucket's error message or an SVG drawing"
    if not begin.strip(b"\0"):
        return "all zeros at its beginning, as after a crash or an interrupted download"
    for first, name in _COMPRESSED.items():
        if begin.startswith(first):
            return f"compressed with {name}"
    if begin[4:8] == b"ftyp":
        brand = _BRANDS.get(begin[8:12])
        return f"a file of the kind {brand}" if brand else "a video, or an image from a phone"
    if begin[257:262] == b"ustar":
        return "a tar archive"
    return next((name for first, name in _OTHERS.items() if begin.startswith(first)), "")


def unreadable(file: object, content: bytes, error: object) -> str:
    """Returns the message for a file that cannot be read: its actual kind, or the damage."""
    found = kind(content)
    if found and content:
        return f"{file} is {found}"
    return f"{file} is damaged: {f'it is {found}' if found else error}"
