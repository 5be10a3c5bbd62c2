"""The results of a suite of transfers: a table, a plot and a JSON file."""

import io
import json
from collections import Counter
from typing import Any, NamedTuple

from etils import epath

from mae_jax.errors import UserError
from mae_jax.runtime import bounded_json
from mae_jax.storage.file_kinds import unreadable

QUICK = "quick"  # the protocol that does not train
ALL = "all"  # blocks


class Cell(NamedTuple):
    """One training or probe: a cell of the suite."""

    data: str  # a name, or 'NAME=PATH'
    protocol: str = ""  # '': the recipe without a protocol
    blocks: str = ""  # '': the recipe's number of blocks

    @property
    def folder(self) -> str:
        """Name of the cell's folder in that of the suite; it contains only the last part of a path."""
        name, _, path = self.data.partition("=")
        data = "-".join(filter(None, (name, path.rstrip("/").rpartition("/")[-1])))
        protocol = self.protocol.replace(":", "_")
        return "_".join(filter(None, (data, protocol, self.blocks and f"blocks_{self.blocks}")))


class Row(NamedTuple):
    """One line of the table."""

    cell: Cell
    metric: str
    value: float | None  # in 0..1
    step: int | None
    lr: float | None  # the chosen learning rate
    problem: str = ""
    fits: bool = True  # False: the protocol lacks the data set, and nothing was run


def series(rows: list[Row]) -> dict[str, list[Row]]:
    """Groups the successful rows that are comparable over data sets: protocol, blocks and probe in words → rows."""
    groups: dict[str, list[Row]] = {}
    counts = Counter(row.cell for row in rows)
    several = {cell.protocol for cell, count in counts.items() if count > 1} | {QUICK}
    for row in rows:
        if row.value is not None:
            words = (row.cell.protocol, row.cell.blocks and f"{row.cell.blocks} blocks",
                     row.metric if row.cell.protocol in several else "")
            groups.setdefault(" ".join(filter(None, words)), []).append(row)
    return groups


def table(rows: list[Row]) -> str:
    """Returns a Markdown table, with means over data sets, followed by the failed cells and their errors."""
    lines = [("data", "protocol", "blocks", "metric", "value", "steps", "lr")]
    for row in rows:
        lines.append((*row.cell, row.metric, f"{row.value:.2%}" if row.value is not None else
                      "failed" if row.fits else "left out",
                      "" if row.step is None else str(row.step), "" if row.lr is None else f"{row.lr:g}"))
    for words, group in series(rows).items():
        if len(group) > 1:
            mean = sum(row.value for row in group) / len(group)
            lines.append((f"mean of {len(group)}", words, "", "", f"{mean:.2%}", "", ""))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = ["| " + " | ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)) + " |"
            for line in lines]
    text.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    failed = [f"{row.cell.folder}: {row.problem}" for row in rows if row.problem]
    return "\n".join([*text, *([""] if failed else []), *failed])


def stored(to: epath.Path, source: str) -> list[Row]:
    """Reads the rows of earlier calls with the same encoder; raises UserError for a damaged file."""
    file = to / "results.json"
    if not file.is_file():
        return []
    content = file.read_bytes()
    try:
        found = bounded_json.parse_object(content)
        rows = found["results"] if found["from"] == source else []
        return [Row(Cell(*(row.pop(field) for field in Cell._fields)), **row) for row in rows]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{unreadable(file, content, error)}; remove it, and name another folder or run all cells "
                        "again") from None


def joined(old: list[Row], new: list[Row]) -> list[Row]:
    """Merges rows: new ones replace old ones of the same cell, unless the cell had a value and then failed."""
    figures = {row.cell for row in old if row.value is not None}
    new = [row for row in new if row.value is not None or row.cell not in figures]
    again = {row.cell for row in new}
    return [row for row in old if row.cell not in again] + new


def write(rows: list[Row], to: epath.Path, source: str, depth: int) -> None:
    """Writes results.json, results.md and, if there is a value, transfer.png."""
    from mae_jax.storage.paths import replace_text

    to.mkdir(parents=True, exist_ok=True)
    found = [{**row.cell._asdict(), **{k: v for k, v in row._asdict().items() if k != "cell"}} for row in rows]
    replace_text(to / "results.json", json.dumps({"from": source, "results": found}, indent=2) + "\n")
    replace_text(to / "results.md", f"{table(rows)}\n")
    if any(row.value is not None for row in rows):
        (to / "transfer.png").write_bytes(plot(rows, depth))


def plot(rows: list[Row], depth: int) -> bytes:
    """Returns a PNG: bars for each data set, and curves over the number of fine-tuned blocks for cells with blocks."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    measured_rows = [row for row in rows if row.value is not None]
    bars = [row for row in measured_rows if not row.cell.blocks]
    lines = [row for row in measured_rows if row.cell.blocks]
    panels = [(draw, some) for draw, some in ((draw_bars, bars), (draw_curves, lines)) if some]
    height = max(4.0, 1.0 + 0.22 * len(bars))
    figure = Figure(figsize=(7 * len(panels), height), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    for axes, (draw, some) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        draw(axes, some, depth)
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


def draw_bars(axes: Any, rows: list[Row], depth: int) -> None:
    """Draws one group of bars per data set, with one color per protocol or probe."""
    names = list(dict.fromkeys(row.cell.data for row in rows))
    groups = series(rows)
    thick = 0.8 / len(groups)
    for k, (words, group) in enumerate(groups.items()):
        places = [names.index(row.cell.data) + (k - (len(groups) - 1) / 2) * thick for row in group]
        drawn = axes.barh(places, [100 * row.value for row in group], thick, label=words or "as the recipe says")
        axes.bar_label(drawn, [f"{100 * row.value:.1f}" for row in group], padding=2, fontsize=8)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, 108)
    axes.set_xlabel("%, in the metric of the data set")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3, fontsize=8)


def draw_curves(axes: Any, rows: list[Row], depth: int) -> None:
    """Draws the metric over the number of fine-tuned blocks, evenly spaced; one curve per data set and protocol."""
    def blocks(text: str) -> float:
        return float(depth) if text == ALL else float(text)

    ticks = sorted({blocks(row.cell.blocks) for row in rows})
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        name = " ".join(filter(None, (row.cell.data, row.cell.protocol, f"({row.metric})")))
        curves.setdefault(name, []).append((ticks.index(blocks(row.cell.blocks)), 100 * row.value))
    for name, points in curves.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
    axes.set_xticks(range(len(ticks)), [f"{tick:g}" for tick in ticks])
    axes.set_xlabel(f"blocks fine-tuned, of {depth}")
    axes.set_ylabel("%")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3, fontsize=8)
