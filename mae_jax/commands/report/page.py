"""The body of the page: its sections on the map, runs, curves, figures, parameters and environment."""

import json
import math
from collections.abc import Sequence
from typing import Any

from mae_jax import __version__
from mae_jax.commands.report import curves, figures, record
from mae_jax.commands.report.html import json_script, table, text
from mae_jax.commands.report.html import page as whole_page
from mae_jax.commands.report.map_data import Map
from mae_jax.commands.report.record import Record
from mae_jax.training.curves import COLORS, MAX_PANELS, panels

LONGEST = 200  # characters of a value in a table, at most
TITLES = {"reconstruct": "Reconstructions", "ratios": "Reconstructions at other mask ratios",
          "attention": "Attention", "confusion": "Confusion"}


def made(records: Sequence[Record], drawn: Map | None, source: str = "") -> str:
    """Returns the page as HTML.

    Args:
      records: the runs.
      drawn: the map, if there is one.
      source: the name of the encoder or of the file of features, the title if no run is shown.
    """
    title = " · ".join(each.name for each in records) or source
    sections = [("Map", _map(drawn) if drawn else ""), ("Runs", _runs(records)), ("Curves", _curves(records)),
                ("Figures", _figures(records)), ("Parameters", _parameters(records)),
                ("Environment", _environment(records))]
    sections = [(name, body) for name, body in sections if body]
    links = "".join(f'<a href="#{name.lower()}">{name}</a>' for name, _ in sections)
    body = "".join(f'<section id="{name.lower()}"><h2>{name}</h2>{content}</section>' for name, content in sections)
    data = json_script("map-data", drawn.data) if drawn else ""
    return whole_page(title, f'<header><h1>{_legend(records) or text(source)}</h1><nav>{links}</nav></header>'
                      f"<main>{body}</main><footer>mae_jax {__version__}. This page fetches nothing: all of it is in "
                      f"this file.</footer>{data}")


def _legend(records: Sequence[Record]) -> str:
    if len(records) == 1:
        return text(records[0].name)
    return " ".join(f'<span class="run">{_swatch(k)}{text(each.name)}</span>' for k, each in enumerate(records))


def _swatch(number: int) -> str:
    color = COLORS[number % len(COLORS)]
    dash = ("solid", "dashed", "dotted", "dashed")[number // len(COLORS) % 4]
    return f'<i class="swatch" style="border-top:3px {dash} {color}"></i>'


def _map(drawn: Map) -> str:
    notes = " ".join(text(note) for note in drawn.notes)
    return f"""<p class="note">{notes}</p>
<noscript><p class="warning">The map needs JavaScript.</p></noscript>
<form class="bar" id="controls">
<span class="choice" id="projections" role="radiogroup" aria-label="Projection"></span>
<label>Label <select id="label"></select></label>
<label>Name <input id="search" type="search" placeholder="part of a name" autocomplete="off"></label>
<output id="count"></output>
<span class="zoom"><button type="button" id="out" aria-label="Zoom out">−</button><button type="button" id="in"
aria-label="Zoom in">+</button><button type="button" id="fit">Whole map</button></span>
</form>
<div class="map"><div class="plane"><canvas id="canvas" tabindex="0" role="application"
aria-label="Map of images: drag to move, wheel or pinch to zoom, click an image for its neighbors"></canvas>
<div id="tip" hidden></div></div><aside id="panel" aria-live="polite"></aside></div>"""


def _runs(records: Sequence[Record]) -> str:
    if not records:
        return ""
    head = ["", *(_swatch(k) * (len(records) > 1) + text(each.name) for k, each in enumerate(records))]
    rows = [["Workdir", *(text(each.path) for each in records)], ["State", *(text(each.state) for each in records)],
            ["Method", *(text(each.config.method.name) for each in records)],
            ["Data", *(text(_data(each)) for each in records)],
            ["Batch, length", *(text(f"{each.config.batch_size} images, {each.config.train.duration}")
                                for each in records)]]
    speeds = [_speed(each) for each in records]
    if any(speeds):
        rows.append(["Speed", *map(text, speeds)])
    rows += _last_figures(records)
    names = sorted({name for each in records for name in each.changed} - {"method.name", "batch_size"})
    values = [[_value(each.changed.get(name, _default(each, name))) for each in records] for name in names]
    fields = [[f"<code>{text(name)}</code>", *(f"<code>{text(value)}</code>" for value in row)]
              for name, row in zip(names, values, strict=True)]
    fields = [[f'<span class="differs" title="the runs differ">{row[0]}</span>' if len(set(row[1:])) > 1 else row[0],
               *row[1:]] for row in fields]
    wrong = "".join(f'<p class="warning">{text(each.name)}: {text(line)}.</p>' for each in records
                    for line in record.troubles(each))
    return (wrong + table(head, rows) + f"<details{' open' * (len(records) > 1)}><summary>{len(names)} fields that "
            f"are not the defaults</summary>{table(head, fields)}</details>")


def _default(each: Record, name: str) -> Any:
    from mae_jax.param_tree import flat

    return flat(each.config).get(name, "")


def _value(value: Any) -> str:
    said = value if isinstance(value, str) else json.dumps(value, default=str)
    return said if len(said) <= LONGEST else f"{said[:LONGEST]}…"


def _data(each: Record) -> str:
    data, known = each.config.data, each.stored.get("data") or {}
    what = [f"{data.source}{f' {data.name}' if data.name else ''}", str(data.path or "")]
    what += [f"{known['pictures']:,} images"] if isinstance(known.get("pictures"), int) else []
    what += [f"{len(known['classes'])} classes"] if known.get("classes") else []
    return ", ".join(filter(None, [*what, f"{' x '.join(map(str, data.image_size))} pixels"]))


def _speed(each: Record) -> str:
    """Returns the median speed of the later half of the run: the first figures include loading and compilation."""
    said = []
    for name, form in (("images_per_sec", "{:,.0f} images/s"), ("data_wait", "{:.0%} of the time waiting for data"),
                       ("mfu", "{:.1%} of the devices' peak")):
        values = [value for _, value in each.series.get(f"train/{name}", ()) if math.isfinite(value)]
        if values:
            later = sorted(values[len(values) // 2:])
            said.append(form.format(later[len(later) // 2]))
    return ", ".join(said)


def _last_figures(records: Sequence[Record]) -> list[list[str]]:
    """Returns one row per metric: its last finite value in each run, with the step."""
    names = [name for name in dict.fromkeys(name for each in records for name in each.series)
             if name == "train/loss" or not name.startswith("train/")]
    rows = []
    for name in sorted(names, key=lambda name: (name != "train/loss", name)):
        row = []
        for each in records:
            found = [(step, value) for step, value in each.series.get(name, ()) if math.isfinite(value)]
            row.append(f'{found[-1][1]:.4g} <small>step {found[-1][0]:,}</small>' if found else "")
        rows.append([text(name), *row])
    if len(rows) <= MAX_PANELS:
        return rows
    return [*rows[:MAX_PANELS], [f"and {len(rows) - MAX_PANELS} more in metrics.jsonl"]]


def _curves(records: Sequence[Record]) -> str:
    found = panels([each.series for each in records])
    if not found:
        return '<p class="note">There are no curves yet.</p>' if records else ""
    drawn = "".join(f"<figure><figcaption>{text(panel.name)}</figcaption>{curves.svg(panel)}</figure>"
                    for panel in found[:MAX_PANELS])
    left = len(found) - MAX_PANELS
    more = f" {left} more are in metrics.jsonl." if left > 0 else ""
    lines = "" if len(records) == 1 else f'<p class="legend">{_legend(records)}</p>'
    return (f'{lines}<p class="note">Over steps. Of the loss, lines are training\'s, dots evaluations\'.{more}</p>'
            f'<div class="panels">{drawn}</div>')


def _figures(records: Sequence[Record]) -> str:
    names = list(dict.fromkeys(name for each in records for name in each.figures if name != "curves"))  # drawn above
    names.sort(key=lambda name: (list(TITLES).index(name) if name in TITLES else len(TITLES), name))
    room = [figures.RUN_BYTES] * len(records)
    parts = []
    for name in names:
        columns = []
        for k, each in enumerate(records):
            if files := each.figures.get(name):
                caption = f"{_swatch(k)}{text(each.name)}" if len(records) > 1 else ""
                shown, room[k] = _steps(files, caption, room[k])
                columns.append(shown)
        parts.append(f'<div><h3>{text(TITLES.get(name, name))}</h3><div class="columns">{"".join(columns)}</div></div>')
    return f'<div class="{"beside" if len(records) == 1 else "below"}">{"".join(parts)}</div>' if parts else ""


def _steps(files: Any, caption: str, room: int) -> tuple[str, int]:
    """Returns one figure at several steps, of which page.js shows one at a time, and the bytes left of `room`."""
    images, lost = [], []
    for step, file in figures.shown(files):
        found = figures.encoded(file, room)
        if isinstance(found, str):
            lost.append(f'<p class="warning">{text(found)}</p>')
            continue
        uri, (width, height) = found
        room -= len(uri)
        images.append(f'<figure data-step="{step}"><figcaption>step {step:,}</figcaption>'
                      f'<img src="{uri}" width="{width}" height="{height}" alt="step {step}"></figure>')
    return f'<div class="steps"><p>{caption}</p>{"".join(images)}{"".join(lost)}</div>', room


def _parameters(records: Sequence[Record]) -> str:
    tables: dict[str, list[str]] = {}
    for each in records:
        tables.setdefault(record.parameters(each), []).append(each.name)
    return "".join((f"<h3>{text(', '.join(names))}</h3>" if len(tables) > 1 else "")
                   + f'<details{" open" * (len(said.splitlines()) < 3)}><summary>{text(said.splitlines()[-1])}'
                   f'</summary><div class="wide"><pre>{_lines(said)}</pre></div></details>'
                   for said, names in tables.items())


def _lines(said: str) -> str:
    return "\n".join(text(line) for line in said.splitlines())


def _environment(records: Sequence[Record]) -> str:
    if not records:
        return ""
    versions = [each.stored.get("versions") or {} for each in records]
    rows = [["devices", *(text(each.stored.get("devices") or "not on record") for each in records)],
            *([text(name), *(text(each.get(name) or "") for each in versions)]
              for name in dict.fromkeys(name for each in versions for name in each)),
            ["commit", *(f"<code>{text(str(each.stored.get('git_commit') or '')[:12])}</code>" for each in records)]]
    head = ["at its last start", *(text(each.name) for each in records)]
    return table(head, rows)
