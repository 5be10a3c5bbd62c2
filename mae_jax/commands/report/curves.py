"""Curves of several runs as SVG: one small panel for each metric, all runs in each."""

import io
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from mae_jax.commands.report.record import Points, Record

# Legible on white and on black; then again, with other dashes.
COLORS = ("#4285d6", "#d9822b", "#2f9e72", "#b8519f", "#c94a44", "#7a6bd0", "#97783a", "#7f8792")
DASHES = ("-", "--", ":", "-.")
MAX_POINTS = 600  # of a curve; of more, the least and the greatest of each stretch
MAX_PANELS = 48
INK = "#010203"  # stands for the page's color of text, which is another one at night
FIRST = ("loss", "lr", "images_per_sec", "data_wait", "mfu", "grad_norm")  # of the panels
LOG = 20.0  # of a loss whose greatest value is so many times its least, the axis is logarithmic


class Panel(NamedTuple):
    """One metric: name, and (number of the run, what to say of it in the legend, points)."""

    name: str
    lines: list[tuple[int, str, Points]]


def panels(records: Sequence[Record]) -> list[Panel]:
    """Returns what has curves: metrics of two steps or more; training's and evaluation's loss in one."""
    found: dict[str, list[tuple[int, str, Points]]] = {}
    for number, record in enumerate(records):
        for metric, points in record.series.items():
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


def svg(panel: Panel) -> str:
    """Returns a panel as an SVG element, whose texts are in the page's font and color."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    look = {"svg.fonttype": "none", "svg.hashsalt": panel.name, "font.size": 9, "axes.linewidth": 0.6,
            "text.color": INK, "axes.edgecolor": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
            "axes.spines.top": False, "axes.spines.right": False, "text.parse_math": False, "axes.formatter.limits":
            (-3, 4), "axes.formatter.use_mathtext": False, "path.simplify": True}
    content = io.StringIO()
    with matplotlib.rc_context(look):
        figure = Figure(figsize=(4.2, 2.5), layout="constrained")
        FigureCanvasSVG(figure)
        _draw(figure.subplots(), panel)
        figure.savefig(content, format="svg", transparent=True, metadata={"Date": None, "Creator": None,
                                                                          "Format": None, "Type": None})
    text = content.getvalue()
    text = text[text.index("<svg"):].replace(INK, "currentColor")
    return text.replace("<svg ", '<svg role="img" ', 1)


def _draw(axes: Any, panel: Panel) -> None:
    for number, part, points in panel.lines:
        steps, values = zip(*points, strict=True)
        of_training = part == "train"
        axes.plot(steps, values, color=COLORS[number % len(COLORS)], linewidth=1.2 if of_training else 1,
                  linestyle=DASHES[number // len(COLORS) % len(DASHES)] if of_training else (0, (2, 1)) if
                  panel.name == "loss" else "-", marker=None if of_training else "o", markersize=2.5)
    values = [value for _, _, points in panel.lines for _, value in points if math.isfinite(value)]
    if panel.name == "loss" and min(values) > 0 and max(values) > LOG * min(values):
        axes.set_yscale("log")
    axes.grid(color=INK, alpha=0.12, linewidth=0.5)
    axes.tick_params(length=2, width=0.6)
    axes.margins(x=0.01)
