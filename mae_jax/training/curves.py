"""Curves of metrics over steps: one small panel for each metric, of one run or of several."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mae_jax.evals import plots

# Legible on white and on black; then again, with other dashes.
COLORS = ("#4285d6", "#d9822b", "#2f9e72", "#b8519f", "#c94a44", "#7a6bd0", "#97783a", "#7f8792")
DASHES = ("-", "--", ":", "-.")
MAX_POINTS = 600  # of a curve; of more, the least and the greatest of each stretch
MAX_PANELS = 48
ACROSS = 3  # panels in a row of the figure
FIRST = ("loss", "lr", "images_per_sec", "data_wait", "mfu", "grad_norm")  # of the panels
LOG = 20.0  # of a loss whose greatest value is so many times its least, the axis is logarithmic

Points = list[tuple[int, float]]  # (step, value), ascending; NaN where it was not finite


class Panel(NamedTuple):
    """One metric: name, and (number of the run, what to say of it in the legend, points)."""

    name: str
    lines: list[tuple[int, str, Points]]


def panels(runs: Sequence[Mapping[str, Points]]) -> list[Panel]:
    """Returns what has curves: metrics of two steps or more; training's and evaluation's loss in one.

    Args:
      runs: of each its metrics, name → points.
    """
    found: dict[str, list[tuple[int, str, Points]]] = {}
    for number, series in enumerate(runs):
        for metric, points in series.items():
            part, _, base = metric.partition("/")
            known = [(step, value) for step, value in points if math.isfinite(value)]
            if len(known) > 1 and any(value != known[0][1] for _, value in known):
                title = base if part == "train" or base == "loss" else metric
                found.setdefault(title, []).append((number, part, thinned(points)))
    order = sorted(found, key=lambda name: (FIRST.index(name) if name in FIRST else len(FIRST), name))
    return [Panel(name, found[name]) for name in order]


def thinned(points: Points) -> Points:
    """Returns at most MAX_POINTS points, extremes among them: a spike is seen however long the run is."""
    if len(points) <= MAX_POINTS:
        return points
    kept, stretches = [], MAX_POINTS // 2
    for k in range(stretches):
        part = points[k * len(points) // stretches:(k + 1) * len(points) // stretches]
        finite = [point for point in part if math.isfinite(point[1])]
        ends = {min(finite, key=lambda p: p[1]), max(finite, key=lambda p: p[1])} if finite else {part[0]}
        kept += sorted(ends)
    return kept


def draw(axes: Any, panel: Panel, ink: str = "black") -> None:
    """Draws a panel on matplotlib's axes: training's lines are whole, evaluations' have dots."""
    for number, part, points in panel.lines:
        steps, values = zip(*points, strict=True)
        of_training = part == "train"
        axes.plot(steps, values, color=COLORS[number % len(COLORS)], linewidth=1.2 if of_training else 1,
                  linestyle=DASHES[number // len(COLORS) % len(DASHES)] if of_training else (0, (2, 1)) if
                  panel.name == "loss" else "-", marker=None if of_training else "o", markersize=2.5)
    finite = [value for _, _, points in panel.lines for _, value in points if math.isfinite(value)]
    if panel.name == "loss" and min(finite) > 0 and max(finite) > LOG * min(finite):
        axes.set_yscale("log")
    axes.grid(color=ink, alpha=0.12, linewidth=0.5)
    axes.tick_params(length=2, width=0.6)
    axes.margins(x=0.01)


def figure(series: Mapping[str, Points], title: str) -> np.ndarray | None:
    """Returns a run's curves, as uint8 [height, width, 3]; None where it has none.

    Args:
      series: metric → its points.
      title: what to say above.
    """
    found = panels([series])[:MAX_PANELS]
    if not found:
        return None
    rows = -(-len(found) // ACROSS)
    with plots.look():
        made = plots.figure(3.6 * ACROSS, 2.2 * rows + 0.6)
        made.suptitle(title)
        places = made.subplots(rows, ACROSS, squeeze=False).ravel()
        for axes, panel in zip(places, found, strict=False):
            draw(axes, panel)
            axes.set_title(panel.name)
            axes.set_xlabel("step")
            parts = list(dict.fromkeys(part for _, part, _ in panel.lines))
            if len(parts) > 1:
                axes.legend(parts, fontsize=7, frameon=False)
        for axes in places[len(found):]:
            axes.axis("off")
        return plots.pixels(made)
