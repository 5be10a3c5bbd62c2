"""Embedding: writes the features of all images to one file, in bounded memory and resumable."""

import logging
import os
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from mae_jax import __version__
from mae_jax.data.cluster_ids import fingerprint
from mae_jax.errors import UserError, pluralize
from mae_jax.inference import embedding_files, passes
from mae_jax.inference.chunks import Chunks, Columns, difference
from mae_jax.inference.embedding_files import Record
from mae_jax.inference.encoder import Encoder
from mae_jax.inference.parts import Part, data_of, stored
from mae_jax.runtime import bounded_json, peers, progress
from mae_jax.storage import workdir_lock

logger = logging.getLogger(__name__)
FORMAT = 1  # version of the file's description
CHUNK_BYTES, CHUNK_ROWS = 64 * 2**20, 16_384  # most bytes of features, and most rows, per chunk
MAX_NAMED = 1000  # most unreadable images whose names the file holds
# Fields of the description that may differ when a call resumes: the encoder's location, and results.
NOT_COMPARED = ("from", "mae_jax", "images", "unreadable", "unreadable_count")


class Embedded(NamedTuple):
    """The result of `embed`.

    Attributes:
      path: of the file.
      images: number of rows.
      unreadable: (name, reason) of the images without a row, at most 1,000.
      unreadable_count: number of images without a row.
    """

    path: str
    images: int
    unreadable: list[tuple[str, str]]
    unreadable_count: int


def embed(encoder: Encoder, parts: list[Part], to: epath.Path, features: str = "pool", block: int = -1,
          images: str = "") -> Embedded:
    """Writes the features of all images of the parts to a file. The same call resumes an interrupted one.

    Until the file is complete, its rows are in the folder <to>.parts.

    Args:
      encoder: with a mesh of all devices.
      parts: the images, in order.
      to: *.parquet or *.npz.
      features, block: as in `Encoder.__call__`.
      images: the path or pattern that names the images, if any.

    Raises:
      UserError: the file or the folder holds other features, the processes have different encoders or images, or
        features are not finite.
    """
    writer = embedding_files.writer_of(to)
    about = bounded_json.as_read(_about(encoder, parts, features, block, images))
    if peers.first_true(peers.broadcast(about) != about):
        raise UserError("the processes do not see the same encoder or images; name one step's folder, on storage that "
                        "all of them share")
    if there := _there(to, about):
        return there
    row_bytes = 4 * int(np.prod(encoder.shape(features)))
    rows = max(1, min(CHUNK_ROWS, CHUNK_BYTES // row_bytes))
    folder, total = _parts_of(to), sum(part.size for part in parts)
    lease = workdir_lock.lease_of(folder, ends_process=False, what="--to")
    with workdir_lock.taken(lease):
        chunks = [Chunks(folder / str(number), {**about, "split": part.split, "chunk_rows": rows}, rows,
                         lease.wait_until_verified) for number, part in enumerate(parts)]
        done = peers.broadcast(sum(min(each.rows_there(), part.size) for each, part in zip(chunks, parts, strict=True))
                               if jax.process_index() == 0 else 0)
        with jax.set_mesh(encoder.mesh), progress.doing("embedding", total, done) as line:
            for each, part in zip(chunks, parts, strict=True):
                each.fill(partial(_columns, encoder, part, features, block, line.advance))
        found = Embedded(str(to), 0, [], 0)
        if jax.process_index() == 0:
            found = _unreadable(parts, chunks, str(to))
            more = {"from": encoder.source, "mae_jax": __version__, "images": found.images,
                    "unreadable": found.unreadable, "unreadable_count": found.unreadable_count}
            lease.wait_until_verified()
            writer(to, {**about, **more}, found.images, lambda: _records(parts, chunks, _classes(parts)))
            _remove(folder)
    return Embedded(*peers.broadcast(list(found)))


def _parts_of(to: epath.Path) -> epath.Path:
    return to.with_name(f"{to.name}.parts")


def _remove(folder: epath.Path) -> None:
    """Removes the folder of chunks while this process still holds its lease.

    In a bucket, the lock is not removed here; giving back the lease deletes it.
    """
    for each in folder.iterdir() if str(folder).startswith("gs://") else [folder]:
        if each.is_dir():
            each.rmtree()


def _classes(parts: list[Part]) -> tuple[str, ...]:
    """Returns the names of the classes that labels index: those of the first part with classes."""
    return next((part.source.classes for part in parts if part.source.classes), ())


def _about(encoder: Encoder, parts: list[Part], features: str, block: int, images: str) -> dict[str, Any]:
    """Returns the description of the file: everything that its rows depend on."""
    config = encoder.config
    source = {"images": _absolute(images)} if images else data_of(parts[0].config)
    classes = _classes(parts)
    for part in parts:
        if part.source.classes and tuple(part.source.classes) != tuple(classes):
            raise UserError(f"the splits {parts[0].split!r} and {part.split!r} have other classes; embed one at a "
                            "time, with --split")
    return {"format": FORMAT, "encoder": fingerprint(jax.device_get({"encoder": encoder.params["encoder"]})),
            "step": encoder.step, "method": config.method.name, "features": features, "block": block,
            "shape": encoder.shape(features), "dtype": config.model.dtype, "image_size": config.data.image_size,
            "crop_ratio": config.eval.crop_ratio[0], "source": source, "classes": classes,
            "splits": [[part.split, part.size] for part in parts],
            "examples": [part.source.digest() for part in parts],
            "config": {} if images else stored(parts[0].config)}


def _absolute(images: str) -> str:
    """Returns an absolute path or pattern."""
    return images if "://" in images else os.path.abspath(images)


def _there(to: epath.Path, about: dict[str, Any]) -> Embedded | None:
    """Returns the result for a complete file if it exists already; raises UserError if it holds other features."""
    said, why = None, ""
    if jax.process_index() == 0 and to.exists():
        try:
            said = embedding_files.about_of(to)
            mine, theirs = ({key: value for key, value in each.items() if key not in NOT_COMPARED}
                            for each in (about, said))
            if differ := difference(theirs, mine):
                why = f"{to} holds other features, by their {differ}; name another file, or remove it"
        except UserError as error:
            why = f"{error}; name another file, or remove it"
    said, why = peers.broadcast([said, why])
    if why:
        raise UserError(why)
    if said is None:
        return None
    logger.info("%s: there already", to)
    if jax.process_index() == 0 and (left := _parts_of(to)).is_dir():  # left by a call that was stopped at its very end
        left.rmtree()
    return Embedded(str(to), said["images"], [tuple(each) for each in said["unreadable"]], said["unreadable_count"])


def _columns(encoder: Encoder, part: Part, features: str, block: int, tell: progress.Tell, first: int
             ) -> Iterator[Columns]:
    function = passes.features_of(encoder, features, block)
    for rows in passes.rows_of(encoder, part, ("embed", features, block), function, tell, first):
        reasons = [rows.reasons.get(row, "") for row in range(len(rows.outputs))]
        for row in np.flatnonzero(rows.fields["valid"] & ~np.isfinite(rows.outputs).all(1)):
            raise UserError(f"the features of {part.name(rows.first + int(row))} by {encoder.source} are not finite; "
                            "nothing is written: its weights are damaged, or too large for "
                            f"model.dtype={encoder.config.model.dtype}")
        yield {"features": rows.outputs, "reason": np.array(reasons, np.str_), **rows.fields}


def _unreadable(parts: list[Part], chunks: list[Chunks], to: str) -> Embedded:
    """Returns the number of rows, and the names of the images without one."""
    images, named, lost = 0, list[tuple[str, str]](), 0
    for part, each in zip(parts, chunks, strict=True):
        first = 0
        for columns in each.read(("valid", "reason")):
            bad = np.flatnonzero(~columns["valid"])
            named += [(part.name(first + int(row)), str(columns["reason"][row]))
                      for row in bad[:max(0, MAX_NAMED - len(named))]]
            images, lost, first = images + int(columns["valid"].sum()), lost + len(bad), first + len(columns["valid"])
    return Embedded(to, images, named, lost)


def _records(parts: list[Part], chunks: list[Chunks], classes: tuple[str, ...]) -> Iterator[Record]:
    """Yields the rows of the file, chunk by chunk."""
    offset = 0
    for part, each in zip(parts, chunks, strict=True):
        first = 0
        for columns in each.read():
            kept = np.flatnonzero(columns["valid"])
            label = columns["label"][kept]
            yield Record([part.name(first + int(row)) for row in kept], part.split, offset + first + kept, label,
                         _names(label, columns.get("labels"), kept, classes), columns["features"][kept])
            first += len(columns["valid"])
        offset += part.size


def _names(label: np.ndarray, labels: np.ndarray | None, kept: np.ndarray, classes: tuple[str, ...]) -> list[str]:
    """Returns the names of each row's label or labels, comma-separated; '' without a label."""
    if labels is not None:
        return [", ".join(classes[k] for k in np.flatnonzero(labels[row])) for row in kept]
    return [classes[each] if 0 <= each < len(classes) else "" for each in label]


def told(found: Embedded) -> str:
    """Returns the summary to print at the end."""
    lost = passes.summary_of_unreadable(found.unreadable, found.unreadable_count)
    return "\n".join(filter(None, (lost, f"{found.path}: features of {pluralize(found.images, 'image')}")))


