"""The one reader of JSON: whatever a text holds, it costs little, and nothing that follows breaks on what comes out.

Python's own reader takes any depth until its stack ends, and numbers of any length.
"""

import codecs
import json
import re
from collections.abc import Collection, Iterator
from typing import Any, BinaryIO

MAX_BYTES = 100_000_000  # of a text; the largest are headers of safetensors files, whose specification says so
MAX_DEPTH = 64  # of lists and objects in each other; ours have 6
MAX_INTEGER = 2**64  # integers are smaller in size; ours are steps, seeds, bytes and checksums
PIECE = 2**20  # bytes of a long text that are read at a time, at least
MAX_ELEMENT = 2**25  # letters of an element of its lists
_SPACE = re.compile(r"[ \t\r\n]*")


def parse(text: bytes | str) -> Any:
    """Returns what a text of JSON says; raises ValueError, with what is wrong in one line, for any other text."""
    if len(text) > MAX_BYTES:
        raise ValueError(f"it has {len(text)} bytes; at most {MAX_BYTES} are read")
    try:
        value = json.loads(text, parse_int=_integer)
    except RecursionError:
        raise ValueError(_DEEP) from None
    except UnicodeDecodeError:
        raise ValueError("it is no text in UTF-8") from None
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [item for part in level if isinstance(part, dict | list)
                 for item in (part.values() if isinstance(part, dict) else part) if isinstance(item, dict | list)]
        if not level:
            return value
    raise ValueError(_DEEP)


def parse_object(text: bytes | str) -> dict[str, Any]:
    """Returns the object that a text of JSON is; raises ValueError for any other text."""
    value = parse(text)
    if not isinstance(value, dict):
        raise ValueError(f"it holds a {type(value).__name__}, where an object {{...}} is expected")
    return value


def as_read(value: Any) -> Any:
    """Returns a value of ours as it comes back from JSON: tuples become lists."""
    return json.loads(json.dumps(value))


_DEEP = f"lists or objects lie more than {MAX_DEPTH} deep in each other"


def _integer(digits: str) -> int:
    if len(digits) > 20 or abs(value := int(digits)) >= MAX_INTEGER:
        raise ValueError(f"an integer of {len(digits.lstrip('-'))} digits: {digits[:12]}...")
    return value


def listed(file: BinaryIO, names: Collection[str]) -> Iterator[tuple[str, Any]]:
    """Yields (name, element) of each element of those lists of an object that have these names, in the text's order.

    The text may be of any size: of it a few million bytes are held at a time. What else the object holds is passed by.

    Args:
      file: gives the bytes of a text of JSON, which is an object.
      names: of lists in it; one that it lacks gives nothing.

    Raises:
      ValueError: it is no object, one of the names is no list, or something in it cannot be read.
    """
    text = _Text(file)
    text.expect("{", "it is no object {...}")
    while not text.take("}"):
        name = text.value()
        text.expect(":", f"no value after {name!r:.40}")
        if name not in names:
            text.value()
        else:
            text.expect("[", f"{name!r} is no list [...]")
            while not text.take("]"):
                yield name, text.value()
                if not text.take(","):
                    text.expect("]", f"no end of the list {name!r}")
                    break
        if not text.take(","):
            text.expect("}", f"no end after {name!r:.40}")
            break


class _Text:
    """A text of JSON that is read piece by piece."""

    def __init__(self, file: BinaryIO):
        self._file, self._decoder = file, codecs.getincrementaldecoder("utf-8-sig")()
        self._text, self._at, self._ended = "", 0, False
        self._json = json.JSONDecoder(parse_int=_integer)

    def _more(self) -> bool:
        """Reads as much again as there is, which makes trying a value anew cheap; False at the end."""
        if self._ended:
            return False
        if len(self._text) - self._at > MAX_ELEMENT:
            raise ValueError(f"a value in it has more than {MAX_ELEMENT} letters, or is broken")
        try:
            part = self._file.read(max(PIECE, len(self._text) - self._at))
            text = self._decoder.decode(part, final=not part)
        except UnicodeDecodeError:
            raise ValueError("it is no text in UTF-8") from None
        self._text, self._at, self._ended = self._text[self._at:] + text, 0, not part
        return True

    def _skip(self) -> str:
        """Passes white space by; returns the letter after it, '' at the end."""
        while True:
            self._at = _SPACE.match(self._text, self._at).end()  # type: ignore[union-attr]  # it matches nothing, too
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def take(self, letter: str) -> bool:
        """Whether this letter comes next, which is then passed by."""
        if self._skip() != letter:
            return False
        self._at += 1
        return True

    def expect(self, letter: str, otherwise: str) -> None:
        if not self.take(letter):
            raise ValueError(otherwise if self._text[self._at:] else f"{otherwise}: the text ends too early")

    def value(self) -> Any:
        """Returns the next value."""
        self._skip()
        while True:
            try:
                value, end = self._json.raw_decode(self._text, self._at)
                if end < len(self._text) or not self._more():  # a number may go on in the next piece
                    self._at = end
                    return value
            except RecursionError:
                raise ValueError(_DEEP) from None
            except json.JSONDecodeError as error:
                if not self._more():
                    raise ValueError(error.msg if self._text[self._at:] else "the text ends too early") from None
