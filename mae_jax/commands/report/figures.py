"""Figures of runs as data URIs: few enough steps of each, and small enough."""

import base64
import io
from collections.abc import Sequence

from etils import epath
from PIL import Image

from mae_jax.errors import printable
from mae_jax.inference.embedding_files import spread
from mae_jax.storage import paths

STEPS = 8  # of a figure, evenly spread, the first and the last among them
WIDTH = 1400  # pixels of a figure
RUN_BYTES = 6_000_000  # of all figures of a run
QUALITY = 82


def shown(files: Sequence[tuple[int, epath.Path]]) -> list[tuple[int, epath.Path]]:
    """Returns at most STEPS of (step, file), the first and the last among them."""
    if len(files) <= STEPS:
        return list(files)
    return [files[int(k)] for k in spread(len(files) - 1, STEPS - 1)] + [files[-1]]


def encoded(file: epath.Path, room: int) -> tuple[str, tuple[int, int]] | str:
    """Returns a figure as a data URI with its width and height; or, as a text, why it is not shown.

    Args:
      file: a PNG.
      room: bytes that are left for it.
    """
    try:
        with Image.open(io.BytesIO(paths.read_bytes(file) or b"")) as opened:
            image = opened.convert("RGB")
    except Exception as error:  # Pillow raises many kinds for what is torn or no image
        return f"{printable(file.name)} cannot be read: {printable(str(error).splitlines()[0] if str(error) else '')}"
    if image.width > WIDTH:
        image = image.resize((WIDTH, max(1, image.height * WIDTH // image.width)), Image.Resampling.LANCZOS)
    content = io.BytesIO()
    image.save(content, "WEBP", quality=QUALITY)
    if content.tell() > room:
        return f"{printable(file.name)} is left out: the figures of a run have {RUN_BYTES / 1e6:g} MB of room"
    return uri("image/webp", content.getvalue()), image.size


def uri(kind: str, content: bytes) -> str:
    """Returns bytes of a media type as a data URI."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
