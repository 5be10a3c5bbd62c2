"""Curves of metrics over steps: one panel per metric, for one run or several."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mae_jax.evals import plots

# Colors that are legible on white and on black; further runs repeat them with other line styles.
COLORS = ("#4285d6", "#d9822b", "#2f9e72", "#b8519f", "#c94a44", "#7a6bd0", "#97783a", "#7f8792")
DASHES = ("-", "--", ":", "-.")
MAX_POINTS = 600  # maximum number of points of a curve; longer ones keep the extremes of each interval
MAX_PANELS = 48
ACROSS = 3  # panels per row
FIRST = ("loss", "lr", "images_per_sec", "data_wait", "mfu", "grad_norm")  # the first panels
LOG = 20.0  # ratio of the largest to the smallest loss above which its axis is logarithmic

Points = list[tuple[int, float]]  # (step, value) by ascending step; NaN for values that were not finite


class Panel(NamedTuple):
    """The curves of one metric: its name, and (number of the run, label of the legend, points) of each curve."""

    name: str
    lines: list[tuple[int, str, Points]]


def panels(runs: Sequence[Mapping[str, Points]]) -> list[Panel]:
    """Returns the panels of all metrics that change over the steps; training and evaluation loss share one panel.

    Args:
      runs: metric → points, of each run.
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
    """Returns at most MAX_POINTS points, the minimum and maximum of each interval, so that spikes stay visible."""
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
    """Draws a panel on matplotlib axes: solid lines for training, markers for evaluations."""
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
    """Draws the curves of a run, uint8 [height, width, 3]; None without curves.

    Args:
      series: metric → points.
      title: text above the panels.
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
