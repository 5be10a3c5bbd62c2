"""Matplotlib plots as arrays, drawn without a display and without pyplot's global state."""

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Names come from the data: "$" is a literal dollar sign, and the font may lack glyphs of a name.
LOOK = {"text.parse_math": False, "font.size": 9, "axes.linewidth": 0.6, "axes.titlesize": 9, "path.simplify": True,
        "axes.formatter.limits": (-3, 4), "axes.formatter.use_mathtext": False, "axes.spines.top": False,
        "axes.spines.right": False}
LONGEST = 24  # maximum length of a class name
CELL, NAME = 0.32, 0.085  # inches: width of a cell with a number, and of a letter
SMALL_CELL = 0.13  # width of a cell without a number, in inches
NUMBERED = 30  # number of classes up to which cells have numbers
DARK = 0.5  # share of the row from which a cell's number is white


@contextlib.contextmanager
def look(**more: Any) -> Iterator[None]:
    """Applies the style LOOK, updated with `more`, and silences warnings about missing glyphs."""
    import matplotlib

    with matplotlib.rc_context({**LOOK, **more}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        yield


def figure(width: float, height: float) -> "Figure":
    """Returns an empty figure of a width and height in inches, with an off-screen canvas."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout="constrained", dpi=100)
    FigureCanvasAgg(made)
    return made


def pixels(drawn: "Figure") -> np.ndarray:
    """Renders a figure to uint8 [height, width, 3]."""
    canvas: Any = drawn.canvas
    canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3]


def confusion(matrix: np.ndarray, names: Sequence[str], what: str) -> np.ndarray:
    """Draws a confusion matrix, uint8 [height, width, 3].

    The color of a cell is its share of the row; with at most NUMBERED classes, cells also have it in percent.

    Args:
      matrix: counts [C, C], true classes as rows, predicted classes as columns.
      names: names of the classes.
      what: name of the evaluated part, such as "test".
    """
    total = matrix.sum(1)
    shares = matrix / np.maximum(total, 1)[:, None]
    numbered = len(names) <= NUMBERED
    short = [name if len(name) <= LONGEST else f"{name[:LONGEST - 3]}..." for name in names]
    side = len(names) * (CELL if numbered else SMALL_CELL)
    margin = NAME * (max(map(len, short)) + 8)
    with look(**{"axes.spines.top": True, "axes.spines.right": True}):
        made = figure(max(side + margin + 0.6, 4.5), side + margin + 0.6)
        axes = made.subplots()
        drawn = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        if not numbered:
            made.colorbar(drawn, label="share of the row", shrink=0.5)
        size = 8 if numbered else 6
        axes.set_xticks(range(len(names)), short, rotation=90, fontsize=size)
        axes.set_yticks(range(len(names)), [f"{name}  {count:,}" for name, count in zip(short, total, strict=True)],
                        fontsize=size)
        axes.tick_params(length=0)
        axes.set_xlabel("predicted class")
        axes.set_ylabel("true class, and its images")
        made.suptitle(f"{what}: classes of {matrix.sum():,} images" + ("; numbers: % of a row" if numbered else ""),
                      fontsize=9)
        for row, column in np.argwhere(shares >= 0.005) if numbered else ():
            axes.text(column, row, f"{100 * shares[row, column]:.0f}", ha="center", va="center", fontsize=7,
                      color="white" if shares[row, column] >= DARK else "black")
        return pixels(made)
