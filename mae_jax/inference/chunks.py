"""Rows of a long computation, on disk in chunks: it goes on where it was cut off, and loses or repeats none."""

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

MAX_SHOWN = 60  # letters of a value that differs, in a message
Columns = Mapping[str, np.ndarray]  # name → [n, ...], the rows of one batch or chunk


class Chunks:
    """Columns of equal length under a folder, `rows` rows in each chunk but the last one.

    Files 00000.npz ... have the columns; about.json says what they are of, complete.json the number of chunks.
    """

    def __init__(self, folder: epath.Path, about: dict[str, Any], rows: int = 0,
                 verify: Callable[[], None] = lambda: None):
        """Binds chunks to a folder.

        Args:
          folder: made by `fill`.
          about: what the rows are of, which must be that of those that are there.
          rows: as above.
          verify: returns where the folder is sure to be this process's to write, raises elsewhere.
        """
        self.folder, self.about, self.rows, self._verify = folder, bounded_json.as_read(about), rows, verify

    def files(self) -> list[epath.Path]:
        """Returns the chunks that are there, in order."""
        # Not by a glob, for which the folder's own name would be a pattern too.
        return sorted(file for file in self.folder.iterdir() if file.name[0].isdigit() and file.suffix == ".npz")

    def fill(self, batches: Callable[[int], Iterator[Columns]]) -> None:
        """Writes the chunks that are missing; what is there is not computed again.

        All processes call it, and the first one writes.

        Args:
          batches: the number of rows that are there → the columns of the others, a few rows at a time.

        Raises:
          UserError: the folder holds rows of something else.
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
        peers.broadcast(None)  # the others wait until all is there

    def rows_there(self) -> int:
        """Returns how many rows are there, at least so many but for the last chunk; 0 where the folder is not."""
        return len(self.files()) * self.rows if self.folder.is_dir() else 0

    def read(self, names: Collection[str] = ()) -> Iterator[dict[str, np.ndarray]]:
        """Yields the columns of each chunk, all or those of some names; raises UserError for a damaged one."""
        for path in self.files():
            with opened(path, f"; remove {self.folder}") as stored:
                yield {name: stored[name] for name in names or stored.files}

    def _begin(self) -> tuple[int, bool]:
        """Returns how many chunks are there, and whether these are all; on all processes alike."""
        done, whole, why = 0, False, ""
        if jax.process_index() == 0:  # alone: to the others, the folder need not show yet
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
        """Notes what the rows are of; raises UserError where there are others."""
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
        """Writes one chunk; returns the rows that are too many for it."""
        if jax.process_index() == 0:
            self._verify()
            partial = self.folder / f"partial_{number:05d}.npz"
            kept: dict[str, Any] = {name: column[:self.rows] for name, column in columns.items()}
            with partial.open("wb") as file:
                np.savez(file, **kept)
            partial.replace(self.folder / f"{number:05d}.npz")
        return {name: column[self.rows:] for name, column in columns.items()}


def difference(there: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Returns 'key (before, now after)' of the first key whose value is another one, '' for none."""
    return next((f"{key} ({_shortened(there.get(key))}, now {_shortened(now.get(key))})"
                 for key in {**now, **there} if there.get(key) != now.get(key)), "")


def _shortened(value: Any) -> str:
    """Returns a value as text that fits into a line."""
    text = printable(str(value))
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def _length(columns: Columns) -> int:
    return len(next(iter(columns.values())))


def _joined(parts: list[Columns]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
