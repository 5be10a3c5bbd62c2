"""Curves of several runs as SVG: one small panel per metric, with a curve for each run."""

import io

from mae_jax.evals import plots
from mae_jax.training.curves import Panel, draw

INK = "#010203"  # placeholder for the page's text color, which differs in dark mode


def svg(panel: Panel) -> str:
    """Returns a panel as an SVG element, with text in the page's font and color."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    colors = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    content = io.StringIO()
    with plots.look(**{"svg.fonttype": "none", "svg.hashsalt": panel.name, **dict.fromkeys(colors, INK)}):
        figure = plots.figure(4.2, 2.5)
        FigureCanvasSVG(figure)
        draw(figure.subplots(), panel, INK)
        figure.savefig(content, format="svg", transparent=True, metadata={"Date": None, "Creator": None,
                                                                          "Format": None, "Type": None})
    text = content.getvalue()
    text = text[text.index("<svg"):].replace(INK, "currentColor")
    return text.replace("<svg ", '<svg role="img" ', 1)
