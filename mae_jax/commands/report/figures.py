"""Figures of runs as data URIs, limited in number and size."""

import base64
import io
from collections.abc import Sequence

from etils import epath
from PIL import Image

from mae_jax.errors import printable
from mae_jax.inference.embedding_files import spread
from mae_jax.storage import paths

STEPS = 8  # per figure, evenly spaced, including the first and the last
WIDTH = 1400  # largest width of a figure in pixels
RUN_BYTES = 6_000_000  # of all figures of a run
QUALITY = 82  # of WebP


def shown(files: Sequence[tuple[int, epath.Path]]) -> list[tuple[int, epath.Path]]:
    """Returns at most STEPS of (step, file), evenly spaced, including the first and the last."""
    if len(files) <= STEPS:
        return list(files)
    return [files[int(k)] for k in spread(len(files) - 1, STEPS - 1)] + [files[-1]]


def encoded(file: epath.Path, room: int) -> tuple[str, tuple[int, int]] | str:
    """Returns (data URI, (width, height)) of a figure, or the reason why it is not shown, as a text.

    Args:
      file: a PNG.
      room: the largest number of bytes of the encoded image.
    """
    try:
        with Image.open(io.BytesIO(paths.read_bytes(file) or b"")) as opened:
            image = opened.convert("RGB")
    except Exception as error:  # Pillow raises many kinds for a truncated file or one that is no image
        return f"{printable(file.name)} cannot be read: {printable(str(error).splitlines()[0] if str(error) else '')}"
    if image.width > WIDTH:
        image = image.resize((WIDTH, max(1, image.height * WIDTH // image.width)), Image.Resampling.LANCZOS)
    content = io.BytesIO()
    image.save(content, "WEBP", quality=QUALITY)
    if content.tell() > room:
        return f"{printable(file.name)} is left out: the figures of a run have {RUN_BYTES / 1e6:g} MB of room"
    return uri("image/webp", content.getvalue()), image.size


def uri(kind: str, content: bytes) -> str:
    """Returns content of a media type such as 'image/webp' as a data URI."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
