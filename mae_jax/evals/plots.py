"""Plots by matplotlib as arrays, drawn without a screen and without pyplot's global state."""

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Names come from data: "$" is a dollar, and what a file's name is written in need not be in the font.
LOOK = {"text.parse_math": False, "font.size": 9, "axes.linewidth": 0.6, "axes.titlesize": 9, "path.simplify": True,
        "axes.formatter.limits": (-3, 4), "axes.formatter.use_mathtext": False, "axes.spines.top": False,
        "axes.spines.right": False}
LONGEST = 24  # letters of a class's name
CELL, NAME = 0.32, 0.085  # inches of a cell with a number, and of a letter
SMALL_CELL = 0.13  # inches of a cell without one
NUMBERED = 30  # classes up to which cells have numbers
DARK = 0.5  # share from which a cell's number is white


@contextlib.contextmanager
def look(**more: Any) -> Iterator[None]:
    """Has what is drawn inside look alike, without a word about letters that the font lacks."""
    import matplotlib

    with matplotlib.rc_context({**LOOK, **more}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        yield


def figure(width: float, height: float) -> "Figure":
    """Returns an empty figure of so many inches, which belongs to no window."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout="constrained", dpi=100)
    FigureCanvasAgg(made)
    return made


def pixels(drawn: "Figure") -> np.ndarray:
    """Returns a figure as uint8 [height, width, 3]."""
    canvas: Any = drawn.canvas
    canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3]


def confusion(matrix: np.ndarray, names: Sequence[str], what: str) -> np.ndarray:
    """Draws a table of confusions, as uint8 [height, width, 3].

    A cell is as dark as its share of the row, and says it in percent where there are few classes.

    Args:
      matrix: counts [C, C], true classes down, predicted ones across.
      names: of the classes.
      what: is counted, as "test".
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
