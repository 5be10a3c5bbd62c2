"""Resumable computations: results are stored as chunks of rows, so that an interrupted one repeats and loses no chunk.
"""

import json
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from mae_jax.errors import UserError, printable
from mae_jax.runtime import bounded_json, peers
from mae_jax.storage.file_kinds import unreadable
from mae_jax.storage.npz import opened
from mae_jax.storage.paths import naming

MAX_SHOWN = 60  # most characters of a value in a message
SAVE_SECONDS = 30.0  # after which the rows of an unfinished chunk are saved: the most that a kill -9 loses
Columns = Mapping[str, np.ndarray]  # name → [n, ...], n rows of a batch or chunk


class Chunks:
    """Columns of equal length in a folder, in chunks of `rows` rows; the last chunk may have fewer.

    The files 00000.npz ... hold the columns, about.json describes them, and complete.json, which is written last, holds
    the number of chunks. Until then begun_<chunk>.npz has the first rows of the next chunk.
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
        done, count, whole = self._begin()
        if whole:
            return
        writes, saved = jax.process_index() == 0, time.monotonic()
        waiting: list[Columns] = [self._begun(done)] if writes and count else []
        try:
            for columns in batches(done * self.rows + count):
                count += _length(columns)
                waiting += [columns] * writes
                while count >= self.rows:
                    waiting = self._write(done, waiting)
                    done, count, saved = done + 1, count - self.rows, time.monotonic()
                if time.monotonic() - saved > SAVE_SECONDS:
                    waiting, saved = self._save_begun(done, waiting), time.monotonic()
        except KeyboardInterrupt:
            self._save_begun(done, waiting)
            raise
        if count:
            self._write(done, waiting)
        if writes:
            (self.folder / "complete.json").write_text(json.dumps(len(self.files())) + "\n")
        peers.broadcast(None)  # a barrier: the others wait until everything is written

    def rows_there(self) -> int:
        """Returns the number of existing rows, counting the last chunk as full; 0 if there is no folder.

        Only for process 0, which writes them.
        """
        if not self.folder.is_dir():
            return 0
        done = len(self.files())
        return done * self.rows + _length(self._begun(done))

    def read(self, names: Collection[str] = ()) -> Iterator[dict[str, np.ndarray]]:
        """Yields the columns of each chunk, all or those in `names`; raises UserError for a damaged file."""
        for path in self.files():
            with opened(path, f"; remove {self.folder}") as stored:
                yield {name: stored[name] for name in names or stored.files}

    def _begin(self) -> tuple[int, int, bool]:
        """Returns the numbers of existing chunks and of rows of the next one, and whether all exist, on all processes.
        """
        done, count, whole, why = 0, 0, False, ""
        if jax.process_index() == 0:  # the folder may not be visible to other processes yet
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._claim()
                done, complete = len(self.files()), self.folder / "complete.json"
                whole = complete.is_file() and complete.read_text().strip() == str(done)
                count = _length(self._begun(done))
            except UserError as error:
                why = str(error)
        if why := peers.broadcast(why):
            raise UserError(why)
        done, count, whole = peers.broadcast([done, count, whole])
        return done, count, whole

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

    def _begun(self, number: int) -> Columns:
        """Returns the first rows of an unfinished chunk; {} if there are none, or they are damaged."""
        path = self._path_of_begun(number)
        try:
            with opened(path) as stored:
                return {name: stored[name] for name in stored.files}
        except (UserError, OSError):
            return {}

    def _path_of_begun(self, number: int) -> epath.Path:
        return self.folder / f"begun_{number:05d}.npz"

    def _save_begun(self, number: int, waiting: list[Columns]) -> list[Columns]:
        """Saves the first rows of an unfinished chunk; returns them joined."""
        if not waiting:  # on other processes than 0, too
            return []
        columns = _joined(waiting)
        self._save(self._path_of_begun(number), columns)
        return [columns]

    def _write(self, number: int, waiting: list[Columns]) -> list[Columns]:
        """Writes one chunk; returns the rows that exceed it."""
        if not waiting:  # on other processes than 0
            return []
        columns = _joined(waiting)
        self._save(self.folder / f"{number:05d}.npz", {name: column[:self.rows] for name, column in columns.items()})
        self._path_of_begun(number).unlink(missing_ok=True)
        rest = {name: column[self.rows:] for name, column in columns.items()}
        return [rest] if _length(rest) else []

    def _save(self, path: epath.Path, columns: Columns) -> None:
        self._verify()
        partial = self.folder / f"partial_{path.name}"
        with naming(path), partial.open("wb") as file:
            np.savez(file, **dict[str, Any](columns))
        partial.replace(path)


def difference(there: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Returns 'key (old value, now new value)' for the first key whose value differs; '' if none does."""
    return next((f"{key} ({_shortened(there.get(key))}, now {_shortened(now.get(key))})"
                 for key in {**now, **there} if there.get(key) != now.get(key)), "")


def _shortened(value: Any) -> str:
    """Returns a value as text of at most about MAX_SHOWN characters."""
    text = printable(str(value))
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def _length(columns: Columns) -> int:
    return len(next(iter(columns.values()), ()))


def _joined(parts: list[Columns]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
