"""Resumable computations: results are stored as chunks of rows, so that an interrupted one repeats and loses no chunk.
"""

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from mae_jax.errors import UserError, printable
from mae_jax.runtime import bounded_json, peers
from mae_jax.storage.file_kinds import unreadable
from mae_jax.storage.npz import opened

MAX_SHOWN = 60  # most characters of a value in a message
Columns = Mapping[str, np.ndarray]  # name → [n, ...], n rows of a batch or chunk


class Chunks:
    """Columns of equal length in a folder, in chunks of `rows` rows; the last chunk may have fewer.

    The files 00000.npz ... hold the columns, about.json describes them, and complete.json, which is written last, holds
    the number of chunks.
    """

    def __init__(self, folder: epath.Path, about: dict[str, Any], rows: int = 0,
                 verify: Callable[[], None] = lambda: None):
        """Creates the chunks of a folder, without touching it.

        Args:
          folder: created by `fill`.
          about: description of the computation, of JSON's types; it must equal that of existing chunks.
          rows: rows per chunk.
          verify: called before each write; raises if this process may not write to the folder.
        """
        self.folder, self.about, self.rows, self._verify = folder, bounded_json.as_read(about), rows, verify

    def files(self) -> list[epath.Path]:
        """Returns the files of the existing chunks, in order."""
        # No glob: characters of the folder's own name would be a pattern.
        return sorted(file for file in self.folder.iterdir() if file.name[0].isdigit() and file.suffix == ".npz")

    def fill(self, batches: Callable[[int], Iterator[Columns]]) -> None:
        """Computes and writes the missing chunks. All processes call it, and process 0 writes.

        Args:
          batches: maps the number of existing rows to an iterator over the columns of all further rows.

        Raises:
          UserError: the folder holds chunks of another computation.
        """
        done, whole = self._begin()
        if whole:
            return
        waiting: list[Columns] = []
        for columns in batches(done * self.rows):
            waiting.append(columns)
            while sum(map(_length, waiting)) >= self.rows:
                done, waiting = done + 1, [self._write(done, _joined(waiting))]
        if sum(map(_length, waiting)):
            self._write(done, _joined(waiting))
        if jax.process_index() == 0:
            (self.folder / "complete.json").write_text(json.dumps(len(self.files())) + "\n")
        peers.broadcast(None)  # a barrier: the others wait until everything is written

    def rows_there(self) -> int:
        """Returns the number of existing rows, counting the last chunk as full; 0 if there is no folder."""
        return len(self.files()) * self.rows if self.folder.is_dir() else 0

    def read(self, names: Collection[str] = ()) -> Iterator[dict[str, np.ndarray]]:
        """Yields the columns of each chunk, all or those in `names`; raises UserError for a damaged file."""
        for path in self.files():
            with opened(path, f"; remove {self.folder}") as stored:
                yield {name: stored[name] for name in names or stored.files}

    def _begin(self) -> tuple[int, bool]:
        """Returns the number of existing chunks and whether all exist, the same on all processes."""
        done, whole, why = 0, False, ""
        if jax.process_index() == 0:  # the folder may not be visible to other processes yet
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._claim()
                done, complete = len(self.files()), self.folder / "complete.json"
                whole = complete.is_file() and complete.read_text().strip() == str(done)
            except UserError as error:
                why = str(error)
        if why := peers.broadcast(why):
            raise UserError(why)
        done, whole = peers.broadcast([done, whole])
        return done, whole

    def _claim(self) -> None:
        """Writes about.json; raises UserError if it exists with another description."""
        file = self.folder / "about.json"
        content = file.read_bytes() if file.is_file() else None
        try:
            there = None if content is None else bounded_json.parse_object(content)
        except ValueError as error:
            raise UserError(f"{unreadable(file, content or b'', error)}; remove {self.folder}") from None
        if there is not None and there != self.about:
            raise UserError(f"{self.folder} has other features, by their {difference(there, self.about)}; name another "
                            "folder, or remove it")
        if there is None:
            file.write_text(json.dumps(self.about) + "\n")

    def _write(self, number: int, columns: Columns) -> Columns:
        """Writes one chunk; returns the rows that exceed it."""
        if jax.process_index() == 0:
            self._verify()
            partial = self.folder / f"partial_{number:05d}.npz"
            kept: dict[str, Any] = {name: column[:self.rows] for name, column in columns.items()}
            with partial.open("wb") as file:
                np.savez(file, **kept)
            partial.replace(self.folder / f"{number:05d}.npz")
        return {name: column[self.rows:] for name, column in columns.items()}


def difference(there: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Returns 'key (old value, now new value)' for the first key whose value differs; '' if none does."""
    return next((f"{key} ({_shortened(there.get(key))}, now {_shortened(now.get(key))})"
                 for key in {**now, **there} if there.get(key) != now.get(key)), "")


def _shortened(value: Any) -> str:
    """Returns a value as text of at most about MAX_SHOWN characters."""
    text = printable(str(value))
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def _length(columns: Columns) -> int:
    return len(next(iter(columns.values())))


def _joined(parts: list[Columns]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
