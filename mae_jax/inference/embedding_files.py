"""Files of features in Parquet and npz, written chunk by chunk, with a description.

Columns: `file`; `split`; `id` int64, the image's index over all splits in order; `label` int32, -1 if unknown;
`label_name`; `features`, a list of float32 with the same length in each row. The description is a JSON object: in
Parquet the schema's metadata 'mae_jax', in npz the array `about`.
"""

import contextlib
import json
import zipfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from mae_jax.errors import UserError
from mae_jax.runtime import bounded_json
from mae_jax.storage.npz import opened
from mae_jax.storage.paths import make_folder, naming

KEY = b"mae_jax"


class Record(NamedTuple):
    """Rows of one split, as the columns of the file."""

    file: list[str]
    split: str
    id: np.ndarray
    label: np.ndarray
    label_name: list[str]
    features: np.ndarray  # float32 [n, values]


Rows = Callable[[], Iterator[Record]]  # may be called several times
Writer = Callable[[epath.Path, dict[str, Any], int, Rows], None]


def writer_of(to: epath.Path) -> Writer:
    """Returns the writer for a file's ending; raises UserError for an unknown ending or a folder."""
    writers = {".parquet": write_parquet, ".npz": write_npz}
    if to.suffix.lower() not in writers:
        raise UserError(f"--to={to}: the file's name must end in .parquet or .npz")
    if to.is_dir():
        raise UserError(f"--to={to} is a folder; expected the name of a file")
    return writers[to.suffix.lower()]


def about_of(path: epath.Path) -> dict[str, Any]:
    """Returns the description in a file of features; raises UserError if it is not such a file."""
    try:
        if path.suffix.lower() == ".npz":
            with opened(path) as arrays:
                text = str(arrays["about"]) if "about" in arrays.files else ""
        else:
            with path.open("rb") as file:
                text = (pq.read_schema(file).metadata or {}).get(KEY, b"").decode()
        return bounded_json.parse_object(text)
    except (pa.ArrowInvalid, ValueError, OSError, KeyError) as error:
        raise UserError(f"{path} is not a file of features, or damaged: {' '.join(str(error).split())[:200]}") from None


def chosen(path: epath.Path, most: int) -> tuple[dict[str, Any], int, Record]:
    """Reads at most `most` rows, evenly spread over the file, one row group of Parquet at a time.

    Args:
      path: *.parquet or *.npz.
      most: largest number of rows.

    Returns:
      The description; the number of rows in the file; and the rows. In these, `split` is an array with the split of
      each row, and `features` is float32 [n, D], the mean if the features have several vectors (`patches`, `tokens`).

    Raises:
      UserError: it is not a file of features, has no rows, or is damaged.
    """
    about = about_of(path)
    try:
        shape = tuple(map(int, about["shape"]))
        if path.suffix.lower() == ".npz":
            with opened(path) as arrays:
                count = len(arrays["id"])
                records = [_taken({name: arrays[name] for name in Record._fields}, spread(count, most), shape)]
        else:
            with path.open("rb") as stream:
                file = pq.ParquetFile(stream)
                count = file.metadata.num_rows
                records = list(_groups(file, spread(count, most), shape))
    except (pa.ArrowInvalid, ValueError, OSError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a file of features, or damaged: {' '.join(str(error).split())[:200]}") from None
    if not records:
        raise UserError(f"{path} has no images")
    columns: list[Any] = [np.concatenate(parts) for parts in zip(*records, strict=True)]
    return about, count, Record(*columns)


def spread(count: int, most: int) -> np.ndarray:
    """Returns at most `most` integers below `count`, ascending and evenly spread, int64."""
    return np.arange(count) if count <= most else np.arange(most) * count // most


def _groups(file: pq.ParquetFile, rows: np.ndarray, shape: tuple[int, ...]) -> Iterator[Record]:
    first = 0
    for number in range(file.num_row_groups):
        size = file.metadata.row_group(number).num_rows
        wanted = rows[(rows >= first) & (rows < first + size)] - first
        if len(wanted):
            table = file.read_row_group(number, columns=list(Record._fields)).take(wanted)
            columns = {name: table[name].combine_chunks().to_numpy(zero_copy_only=False)
                       for name in Record._fields if name != "features"}
            yield _taken(columns | {"features": table["features"].combine_chunks().flatten().to_numpy()}, slice(None),
                         shape)
        first += size


def _taken(columns: dict[str, Any], rows: Any, shape: tuple[int, ...]) -> Record:
    features = columns["features"].reshape(-1, int(np.prod(shape[:-1])), shape[-1])[rows].mean(1, dtype=np.float32)
    return Record(*(features if name == "features" else columns[name][rows] for name in Record._fields))


def write_parquet(to: epath.Path, about: dict[str, Any], count: int, rows: Rows) -> None:
    """Writes a Parquet file with one row group per chunk."""
    values = int(np.prod(about["shape"]))
    schema = pa.schema([("file", pa.string()), ("split", pa.string()), ("id", pa.int64()), ("label", pa.int32()),
                        ("label_name", pa.string()), ("features", pa.list_(pa.float32(), values))],
                       metadata={KEY: json.dumps(about).encode()})
    with _whole(to) as partial, partial.open("wb") as file, pq.ParquetWriter(file, schema) as writer:
        for record in rows():
            features = pa.FixedSizeListArray.from_arrays(pa.array(record.features.reshape(-1)), values)
            columns = [record.file, [record.split] * len(record.file), record.id.astype(np.int64),
                       record.label.astype(np.int32), record.label_name]
            arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=False)]
            writer.write_table(pa.Table.from_arrays([*arrays, features], schema=schema))


def write_npz(to: epath.Path, about: dict[str, Any], count: int, rows: Rows) -> None:
    """Writes an npz file with one array [n, ...] per column, each in a separate pass over the rows."""
    longest = {"file": 1, "split": 1, "label_name": 1}
    for record in rows():
        texts = {"file": record.file, "split": [record.split], "label_name": record.label_name}
        longest = {name: max(longest[name], *map(len, texts[name])) if texts[name] else longest[name]
                   for name in longest}
    kinds: dict[str, Any] = {name: np.dtype(f"<U{letters}") for name, letters in longest.items()}
    kinds |= {"id": np.dtype("<i8"), "label": np.dtype("<i4"), "features": np.dtype("<f4")}
    with _whole(to) as partial, partial.open("wb") as file, zipfile.ZipFile(file, "w", allowZip64=True) as archive:
        with archive.open("about.npy", "w") as member:
            np.lib.format.write_array(member, np.array(json.dumps(about)))
        for name, kind in kinds.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                _write_array(member, name, kind, about["shape"], count, rows)


def _write_array(member: Any, name: str, kind: np.dtype, shape: list[int], count: int, rows: Rows) -> None:
    whole = (count, *shape) if name == "features" else (count,)
    np.lib.format.write_array_header_2_0(
        member, {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False, "shape": whole})
    for record in rows():
        value = [record.split] * len(record.file) if name == "split" else getattr(record, name)
        member.write(np.ascontiguousarray(value, kind).tobytes())


@contextlib.contextmanager
def _whole(to: epath.Path) -> Iterator[epath.Path]:
    """Context with a temporary path, which is renamed to `to` at the end, so that `to` is always complete."""
    make_folder(to.parent)
    partial = to.with_name(f"{to.name}.partial")
    try:
        with naming(to):
            yield partial
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    partial.replace(to)
