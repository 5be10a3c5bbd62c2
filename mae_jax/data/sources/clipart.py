"""data.source=clipart: drawings with exact outlines, the PNG files of Debian's package openclipart-png (public domain).

`apt-get install openclipart-png` installs them under /usr/share/openclipart/png; data.path names another folder. The
class is the first folder. The mask is 1 where alpha exceeds 127, else 0. Release 0.18 has 1231 images to train and 330
to test, of about 400 x 400 pixels; 31 of the masks are constant.
"""

import functools
import os
import re

import numpy as np
from etils import epath
from ml_collections import ConfigDict
from PIL import Image

from mae_jax.data.decode import BadImage, open_image, to_rgb
from mae_jax.data.sources import splits
from mae_jax.data.sources.base import Example, Source, known_split, printable_name
from mae_jax.errors import UserError
from mae_jax.storage.paths import locate

FOLDER = "/usr/share/openclipart/png"
# The rule is ours: folders of things, not of icons, shapes, signs, maps or playing cards; at least 16 images a class.
CLASSES = ("animals", "buildings", "containers", "decorations", "education", "electronics", "food", "office", "people",
           "plants", "science", "tools", "transportation")
SIGNS = ("transportation/aiga-symbols", "transportation/roadsigns")
SIDES = (64, 2000)  # smallest and largest side of an image, in pixels
TEST_SHARE = 0.2  # a tenth would leave some classes with one or two images


def load(data: ConfigDict, split: splits.Split) -> Source:
    """Opens 'train', 'test' or a slice in percent; raises UserError if the package is not installed.

    An image's split is a hash of its name without the trailing number, so that variants of a drawing stay together.
    """
    known_split(split, ("train", "test"))
    root = locate(data.path or FOLDER, "data.path")
    files = pictures(root)
    edge = 1 - TEST_SHARE
    low, high = split.shares(*((0.0, edge) if split.name == "train" else (edge, 1.0)))
    files = tuple(name for name in files if low <= splits.share(series(name)) < high)

    return Source(len(files), functools.partial(_read, root, files), functools.partial(printable_name, files), CLASSES,
                  ("pixel_label",), functools.partial(_label, files))


def _read(root: epath.Path, files: tuple[str, ...], i: int) -> Example:
    pixels, mask = _decode((root / files[i]).read_bytes())
    return Example(pixels, _label(files, i), mask=mask)


def _label(files: tuple[str, ...], i: int) -> int:
    return CLASSES.index(files[i].split("/")[0])


def series(name: str) -> str:
    """Returns the common part of the names of a drawing's variants: 'food/apple' for 'food/apple_02.png'."""
    return re.sub(r"[\d_-]*\.png$", "", name)


@functools.lru_cache(maxsize=4)  # a run opens the folder for each split
def pictures(root: epath.Path) -> tuple[str, ...]:
    """Returns the usable images, relative and sorted: those with transparency and a usable size, by their headers."""
    names = [os.path.relpath(os.path.join(folder, name), root).replace(os.sep, "/")
             for label in CLASSES for folder, _, files in os.walk(root / label) for name in files]
    usable = tuple(sorted(name for name in names if _usable(root, name)))
    if not usable:
        raise UserError(f"{root} has no clip art; run: apt-get install openclipart-png, or set data.path to the "
                        "folder of its PNG files")
    return usable


def _usable(root: epath.Path, name: str) -> bool:
    """Returns whether an image is usable; links are not: they repeat an image, often in another class."""
    path = os.path.join(root, name)
    if not name.endswith(".png") or name.startswith(SIGNS) or os.path.islink(path):
        return False
    try:
        with Image.open(path, formats=("PNG",)) as image:
            return SIDES[0] <= min(image.size) and max(image.size) <= SIDES[1] and image.has_transparency_data
    except Image.DecompressionBombError:
        return False  # larger than SIDES[1]
    except Exception:  # PIL raises many types on broken bytes; the bad image is reported when it is read
        return True


def _decode(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Returns the image over white, uint8 [height, width, 3], and its mask, uint8 [height, width]."""
    try:
        image = open_image(data, ("PNG",)).convert("RGBA")
    except Exception as error:
        raise BadImage(f"not a PNG image: {str(error)[:80]}") from error
    return np.asarray(to_rgb(image)), (np.asarray(image)[..., 3] > 127).astype(np.uint8)
