"""Compact storage of millions of names."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

CODING = ("utf-8", "surrogatepass")  # bytes sort like the texts, and file names that are not UTF-8
# can be encoded


class Names(Sequence[str]):
    """A sequence of texts, stored as one array of bytes and the end of each."""

    def __init__(self, letters: np.ndarray, ends: np.ndarray):
        """Takes the bytes, uint8 [bytes], and the end of each text, int64 [n]."""
        self.letters, self.ends = letters, ends

    @classmethod
    def of(cls, texts: Iterable[str]) -> "Names":
        """Returns the sequence of these texts."""
        collected = Collector()
        for text in texts:
            collected.add(text.encode(*CODING))
        return collected.names()

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, place: int) -> str:  # type: ignore[override]
        place = range(len(self.ends))[place]
        begin = self.ends[place - 1] if place else 0
        return self.letters[begin:self.ends[place]].tobytes().decode(*CODING)

    def __iter__(self) -> Iterator[str]:
        begin = 0
        for first in range(0, len(self.ends), 10_000):  # in parts: a list of all ends would take much memory
            ends = self.ends[first:first + 10_000].tolist()
            part, start = self.letters[begin:ends[-1]].tobytes(), begin
            for end in ends:
                yield part[begin - start:end - start].decode(*CODING)
                begin = end

    def only(self, kept: np.ndarray | Sequence[int]) -> "Names":
        """Returns the texts at these indices, in this order."""
        kept = np.asarray(kept, np.int64)
        if len(kept) == len(self) and (np.diff(kept) == 1).all():
            return self
        begins = np.append(0, self.ends[:-1])[kept]
        sizes = self.ends[kept] - begins
        ends = np.cumsum(sizes)
        letters = np.empty(int(ends[-1]) if len(ends) else 0, np.uint8)
        for first in range(0, len(kept), 1_000_000):
            part = slice(first, first + 1_000_000)
            size, begin = sizes[part], begins[part]
            inside = np.arange(size.sum()) - np.repeat(np.cumsum(size) - size, size)
            start = ends[first] - sizes[first]
            letters[start:start + len(inside)] = self.letters[np.repeat(begin, size) + inside]
        return Names(letters, ends)


class Collector:
    """Collects names into compact storage."""

    def __init__(self) -> None:
        self._letters, self._sizes = bytearray(), [np.zeros(0, np.int64)]
        self._last: list[int] = []

    @classmethod
    def of(cls, names: Names) -> "Collector":
        """Returns a collector that starts with these names."""
        collected = cls()
        collected._letters += names.letters.tobytes()
        collected._sizes.append(np.diff(names.ends, prepend=0))
        return collected

    def add(self, name: bytes) -> None:
        """Appends a name, encoded by CODING."""
        self._letters += name
        self._last.append(len(name))
        if len(self._last) == 100_000:
            self._pack()

    def names(self) -> Names:
        """Returns all added names."""
        self._pack()
        return Names(np.frombuffer(self._letters, np.uint8), np.cumsum(np.concatenate(self._sizes)))

    def _pack(self) -> None:
        self._sizes.append(np.array(self._last, np.int64))
        self._last = []
