"""data.source=letters: a white letter, A to Z, on a dark part of a photograph; the class is the letter.

The fonts are those that matplotlib installs, the photographs those of scikit-image and scikit-learn. No font is in both
splits, though others of its family are, and no pixel of a photograph: training uses the left of each, test the right
(`scenes`). Position, size, slant, font and background are independent of the class. 26,000 images to train and 2,600 to
test, 32 x 32; each is a function of its split and number alone. All values are our choice.
"""

import functools
import string

import numpy as np
from ml_collections import ConfigDict
from PIL import Image, ImageDraw, ImageFont

from mae_jax.data.sources import scenes
from mae_jax.data.sources.base import Example, Source, known_split, numbered_name, package_folder
from mae_jax.data.sources.splits import Split
from mae_jax.rng import rng

FONTS = {  # a font is in one split only; others of its family may be in the other
    "train": ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-BoldOblique", "DejaVuSansMono", "DejaVuSansMono-Oblique",
              "DejaVuSansMono-BoldOblique", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic",
              "STIXGeneral", "STIXGeneralItalic", "STIXGeneralBolIta", "cmb10", "cmmi10", "cmr10", "cmtt10"),
    "test": ("DejaVuSans-Oblique", "DejaVuSansMono-Bold", "DejaVuSerif", "STIXGeneralBol", "cmss10", "cmti10"),
}
CLASSES = tuple(string.ascii_uppercase)
SIZES = {"train": 26_000, "test": 2_600}
SIDE = 32  # of an image, in pixels
GLYPH_SIDE = 64  # of the square around a letter, in pixels
GLYPH_HEIGHT = 2 / 3  # height of a capital letter, as a share of the square
HEIGHTS = (0.5, 0.75)  # smallest and largest height of a capital, as shares of the image
WIDTHS = (0.8, 1.2)  # smallest and largest width, as shares of the font's
SLANT = 10  # degrees in either direction
GROUND_SIDES = (24, 64)  # smallest and largest part of a background, in pixels
BRIGHTNESS, CONTRAST = 0.5, 0.35  # factors of the background's mean color, and of the deviation from it
SAMPLES = 2  # samples per pixel, in each direction


def load(data: ConfigDict, split: Split) -> Source:
    """Opens 'train' (26,000 images) or 'test' (2,600), or a slice; neighbors have different letters.

    Raises:
      UserError: the split is unknown, or matplotlib, scikit-image or scikit-learn is not installed.
    """
    known_split(split, tuple(SIZES))
    return Source(SIZES[split.name], functools.partial(_read, split.name),
                  functools.partial(numbered_name, f"letters/{split.name}"), CLASSES, label=label).sliced(split)


def label(i: int) -> int:
    """Returns the class of the i-th image: the letters alternate."""
    return i % len(CLASSES)


def _read(split: str, i: int) -> Example:
    draws = rng(0, f"letters/{split}", i)
    faces = _faces(split)
    ink = _placed(faces[int(draws.integers(len(faces)))][label(i)], draws)[..., None] / np.float32(255)
    ground = _ground(scenes.backgrounds(split), draws)
    return Example((ground + (255 - ground) * ink).astype(np.uint8), label(i))


def _ground(backgrounds: list[np.ndarray], draws: np.random.Generator) -> np.ndarray:
    """Returns a darkened part of a random photograph with reduced contrast, float32 [32, 32, 3] in 0..255."""
    whole = backgrounds[int(draws.integers(len(backgrounds)))]
    side = int(draws.integers(GROUND_SIDES[0], GROUND_SIDES[1] + 1))
    top, left = draws.integers(scenes.SIDE - side + 1, size=2)
    part = Image.fromarray(whole[top:top + side, left:left + side]).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    pixels = np.asarray(part, np.float32)
    mean = pixels.mean((0, 1))
    return BRIGHTNESS * mean + CONTRAST * (pixels - mean)


def _placed(glyph: Image.Image, draws: np.random.Generator) -> np.ndarray:
    """Returns a letter at random size, width, slant and position, uint8 [32, 32]: the ink coverage of each pixel."""
    height = draws.uniform(*HEIGHTS) * SIDE
    width, angle = draws.uniform(*WIDTHS), np.deg2rad(draws.uniform(-SLANT, SLANT))
    center = SIDE / 2 + draws.uniform(-1, 1, 2) * (SIDE - height) / 2
    zoom = GLYPH_SIDE * GLYPH_HEIGHT / height  # pixels of the glyph per pixel of the image
    # From the image to the glyph, as PIL expects it.
    matrix = zoom * np.array([[np.cos(angle) / width, np.sin(angle) / width], [-np.sin(angle), np.cos(angle)]])
    offset = GLYPH_SIDE / 2 - matrix @ center
    rows = np.column_stack([matrix / SAMPLES, offset])
    large = glyph.transform((SIDE * SAMPLES,) * 2, Image.Transform.AFFINE, tuple(rows.ravel().tolist()),
                            Image.Resampling.BILINEAR)
    return np.asarray(large.reduce(SAMPLES))


@functools.cache
def _faces(split: str) -> list[list[Image.Image]]:
    """Returns the letters of each font of a split, white on black."""
    folder = package_folder("matplotlib", "matplotlib", "letters") / "mpl-data" / "fonts" / "ttf"
    fonts = [ImageFont.truetype(str(folder / f"{name}.ttf"), GLYPH_SIDE) for name in FONTS[split]]
    return [[_glyph(font, letter) for letter in CLASSES] for font in fonts]


def _glyph(font: ImageFont.FreeTypeFont, letter: str) -> Image.Image:
    """Returns a letter, white on black, in a square; capitals of all fonts have the same height."""
    left, _, right, _ = font.getbbox(letter)
    _, top, _, bottom = font.getbbox("H")
    side = (bottom - top) / GLYPH_HEIGHT
    large = Image.new("L", (2 * GLYPH_SIDE,) * 2)
    at = GLYPH_SIDE - (left + right) / 2, GLYPH_SIDE - (top + bottom) / 2
    ImageDraw.Draw(large).text(at, letter, fill=255, font=font)
    box = (GLYPH_SIDE - side / 2,) * 2 + (GLYPH_SIDE + side / 2,) * 2
    return large.resize((GLYPH_SIDE,) * 2, Image.Resampling.BICUBIC, box)
