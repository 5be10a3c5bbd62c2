"""Millions of names in the memory that their letters take."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

CODING = ("utf-8", "surrogatepass")  # whose bytes sort as the texts do, and which has what a disk's bytes that are no
# UTF-8 become


class Names(Sequence[str]):
    """Texts, in order: one array of bytes, and where each ends."""

    def __init__(self, letters: np.ndarray, ends: np.ndarray):
        """Takes uint8 [bytes] and int64 [n]."""
        self.letters, self.ends = letters, ends

    @classmethod
    def of(cls, texts: Iterable[str]) -> "Names":
        """Returns these texts."""
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
        for first in range(0, len(self.ends), 10_000):  # the whole would have a number object for each
            ends = self.ends[first:first + 10_000].tolist()
            part, start = self.letters[begin:ends[-1]].tobytes(), begin
            for end in ends:
                yield part[begin - start:end - start].decode(*CODING)
                begin = end

    def only(self, kept: np.ndarray | Sequence[int]) -> "Names":
        """Returns those at these places, in this order."""
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
    """Names on their way into memory."""

    def __init__(self) -> None:
        self._letters, self._sizes = bytearray(), [np.zeros(0, np.int64)]
        self._last: list[int] = []

    @classmethod
    def of(cls, names: Names) -> "Collector":
        """Returns one that has these already."""
        collected = cls()
        collected._letters += names.letters.tobytes()
        collected._sizes.append(np.diff(names.ends, prepend=0))
        return collected

    def add(self, name: bytes) -> None:
        """Appends a name, as CODING has it."""
        self._letters += name
        self._last.append(len(name))
        if len(self._last) == 100_000:
            self._pack()

    def names(self) -> Names:
        """Returns all that were added."""
        self._pack()
        return Names(np.frombuffer(self._letters, np.uint8), np.cumsum(np.concatenate(self._sizes)))

    def _pack(self) -> None:
        self._sizes.append(np.array(self._last, np.int64))
        self._last = []
