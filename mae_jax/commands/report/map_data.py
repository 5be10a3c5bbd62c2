"""The data of the page's map in compact form: coordinates, names, labels, neighbors and thumbnails."""

import base64
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from mae_jax.commands.report import projection, thumbnails
from mae_jax.commands.report.figures import uri
from mae_jax.errors import pluralize
from mae_jax.inference import embedding_files
from mae_jax.inference.embedding_files import Record, spread
from mae_jax.runtime import progress

NO_LABEL = "no label"
MAX_NAME = 300  # last characters of a file's name that are kept


class Map(NamedTuple):
    """The map: `data` is JSON for page.js, `notes` are sentences about the shown and the missing images."""

    data: dict[str, Any]
    notes: list[str]


def made(path: epath.Path, most: int, tsne_most: int) -> Map:
    """Reads a file of features and its images, and computes the map.

    Args:
      path: *.parquet or *.npz, as `embed` writes them.
      most: largest number of images, evenly spaced over the file.
      tsne_most: largest number of these for t-SNE, evenly spaced; 0: no t-SNE.

    Raises:
      UserError: the file is not one of `embed`, or its features are not finite.
    """
    about, count, rows = embedding_files.chosen(path, most)
    projection.check(rows.features)
    with progress.doing(f"reading thumbnails of {len(rows.file):,} images"):
        shown = thumbnails.of(about, rows)
    names, numbers = _labels(rows)
    places, share = projection.pca(rows.features)
    near, cosines = projection.neighbors(rows.features)
    some = spread(len(rows.file), tsne_most)
    projections = [{"name": "PCA", "places": packed(places, "<f4")}]
    if len(some) >= projection.LEAST:
        with progress.doing(f"t-SNE of {len(some):,} images"):
            tsne = projection.tsne(rows.features[some])
        projections.append({"name": "t-SNE", "places": packed(tsne, "<f4"), "of": packed(some, "<u4")})
    splits = list(dict.fromkeys(rows.split))
    data = {
        "files": [_short(name) for name in rows.file], "splits": splits,
        "split": packed(np.array([splits.index(split) for split in rows.split]), "<u4"),
        "labels": names, "label": packed(numbers, "<u4"), "projections": projections,
        "neighbors": packed(near, "<u4"), "cosines": packed(np.rint(cosines * 10_000), "<i2"), "k": near.shape[1],
        "side": thumbnails.SIDE, "columns": thumbnails.COLUMNS,
        "sheets": [uri("image/webp", sheet) for sheet in thumbnails.sheets(shown.pixels)]}
    return Map(data, _notes(about, count, rows, shown, share, len(some)))


def _labels(rows: Record) -> tuple[list[str], np.ndarray]:
    """Returns the sorted names of the labels, 'no label' last, and for each row the index of its label, int [n]."""
    given = [name or (f"class {label}" if label >= 0 else NO_LABEL)
             for name, label in zip(rows.label_name, rows.label, strict=True)]
    names = sorted(set(given), key=lambda name: (name == NO_LABEL, name))
    number = {name: k for k, name in enumerate(names)}
    return names, np.array([number[name] for name in given])


def _short(name: str) -> str:
    return name if len(name) <= MAX_NAME else f"…{name[-MAX_NAME:]}"


def _notes(about: dict[str, Any], count: int, rows: Record, shown: thumbnails.Thumbnails, share: float,
           some: int) -> list[str]:
    n, missing = len(rows.file), int((~shown.there).sum())
    what = f"{n:,} image{'s' * (n != 1)}" if n == count else f"{n:,} of {count:,} images, evenly spread"
    step = f", step {about['step']:,}" if about.get("step", -1) >= 0 else ""
    block = f" of block {about['block']}" if about.get("block", -1) >= 0 else ""
    mean = ", the mean of each image's" if len(about["shape"]) > 1 else ""
    notes = [f"{what}. Features: {about['features']}{block}{mean}, {rows.features.shape[1]} values, of "
             f"{about.get('from', '?')}{step}. Neighbors: the {min(projection.NEIGHBORS, n - 1)} highest cosines of "
             "these values, not distances on the map.",
             f"PCA's two directions have {share:.0%} of the variance."]
    if some >= projection.LEAST:
        notes.append(f"t-SNE is of {'all' if some == n else f'{some:,} of these'} images; distances between its far "
                     "groups, and their sizes, mean little.")
    notes.append(f"Thumbnails: {thumbnails.SIDE} x {thumbnails.SIDE} pixels of what the encoder saw.")
    if missing:
        notes.append(f"{missing:,} of these images could not be read again, and {'are' if missing > 1 else 'is'} gray.")
    if about.get("unreadable_count"):
        notes.append(f"{pluralize(about['unreadable_count'], 'image')} could not be read when features were made, and "
                     "have no place here.")
    return [*notes, *filter(None, [shown.note])]


def packed(values: np.ndarray, dtype: str) -> str:
    """Returns an array as base64 of its bytes in a little-endian dtype such as '<f4'."""
    return base64.b64encode(np.ascontiguousarray(values, dtype).tobytes()).decode()
