"""The JSON parser of this package, which bounds size, depth and integers, for input that is not trusted.

Python's parser accepts any depth until its stack overflows, and integers of any length.
"""

import codecs
import json
import re
from collections.abc import Collection, Iterator
from typing import Any, BinaryIO

MAX_BYTES = 100_000_000  # most bytes of a text; the limit for headers in the specification of safetensors
MAX_DEPTH = 64  # deepest nesting of lists and objects; this package's have 6
MAX_INTEGER = 2**64  # exclusive bound of an integer's magnitude: steps, seeds, bytes and checksums
PIECE = 2**20  # least bytes that `listed` reads at a time
MAX_ELEMENT = 2**25  # most characters of a value in `listed`
_SPACE = re.compile(r"[ \t\r\n]*")


def parse(text: bytes | str) -> Any:
    """Parses a JSON text; raises ValueError, with the reason in one line, if it is invalid or beyond the bounds."""
    if len(text) > MAX_BYTES:
        raise ValueError(f"it has {len(text)} bytes; at most {MAX_BYTES} are read")
    try:
        value = json.loads(text, parse_int=_integer)
    except RecursionError:
        raise ValueError(_DEEP) from None
    except UnicodeDecodeError:
        raise ValueError("it is not text in UTF-8") from None
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [item for part in level if isinstance(part, dict | list)
                 for item in (part.values() if isinstance(part, dict) else part) if isinstance(item, dict | list)]
        if not level:
            return value
    raise ValueError(_DEEP)


def parse_object(text: bytes | str) -> dict[str, Any]:
    """Parses a JSON text that holds an object; raises ValueError for any other text."""
    value = parse(text)
    if not isinstance(value, dict):
        raise ValueError(f"it holds a {type(value).__name__}, where an object {{...}} is expected")
    return value


def as_read(value: Any) -> Any:
    """Returns a value as it is after a round trip through JSON: tuples become lists."""
    return json.loads(json.dumps(value))


_DEEP = f"lists or objects are nested more than {MAX_DEPTH} deep"


def _integer(digits: str) -> int:
    if len(digits) > 20 or abs(value := int(digits)) >= MAX_INTEGER:
        raise ValueError(f"an integer of {len(digits.lstrip('-'))} digits: {digits[:12]}...")
    return value


def listed(file: BinaryIO, names: Collection[str]) -> Iterator[tuple[str, Any]]:
    """Yields (name, element) for the elements of named lists in a JSON object, in the order of the text.

    The text may have any size; a few million bytes of it are in memory at a time. Other values are skipped.

    Args:
      file: a JSON text that holds an object.
      names: names of lists in the object; missing ones yield nothing.

    Raises:
      ValueError: the text is not an object, a named value is not a list, or the text is invalid.
    """
    text = _Text(file)
    text.expect("{", "it is not an object {...}")
    while not text.take("}"):
        name = text.value()
        text.expect(":", f"no value after {name!r:.40}")
        if name not in names:
            text.value()
        else:
            text.expect("[", f"{name!r} is not a list [...]")
            while not text.take("]"):
                yield name, text.value()
                if not text.take(","):
                    text.expect("]", f"no end of the list {name!r}")
                    break
        if not text.take(","):
            text.expect("}", f"no end after {name!r:.40}")
            break


class _Text:
    """A JSON text that is read in pieces."""

    def __init__(self, file: BinaryIO):
        self._file, self._decoder = file, codecs.getincrementaldecoder("utf-8-sig")()
        self._text, self._at, self._ended = "", 0, False
        self._json = json.JSONDecoder(parse_int=_integer)

    def _more(self) -> bool:
        """Reads at least as much as is buffered, so that parsing a value again is cheap; returns False at the end."""
        if self._ended:
            return False
        if len(self._text) - self._at > MAX_ELEMENT:
            raise ValueError(f"a value in it has more than {MAX_ELEMENT} characters, or is broken")
        try:
            part = self._file.read(max(PIECE, len(self._text) - self._at))
            text = self._decoder.decode(part, final=not part)
        except UnicodeDecodeError:
            raise ValueError("it is not text in UTF-8") from None
        self._text, self._at, self._ended = self._text[self._at:] + text, 0, not part
        return True

    def _skip(self) -> str:
        """Skips white space; returns the next character, or '' at the end."""
        while True:
            self._at = _SPACE.match(self._text, self._at).end()  # type: ignore[union-attr]  # it always matches
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def take(self, letter: str) -> bool:
        """Skips the next character if it is `letter`; returns whether it was."""
        if self._skip() != letter:
            return False
        self._at += 1
        return True

    def expect(self, letter: str, otherwise: str) -> None:
        """Skips the next character; raises ValueError with the message `otherwise` if it is not `letter`."""
        if not self.take(letter):
            raise ValueError(otherwise if self._text[self._at:] else f"{otherwise}: the text ends too early")

    def value(self) -> Any:
        """Parses the next value."""
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
