"""The one reader of JSON: whatever a text holds, it costs little, and nothing that follows breaks on what comes out.

Python's own reader takes any depth until its stack ends, and numbers of any length.
"""

import json
from typing import Any

MAX_BYTES = 100_000_000  # of a text; the largest are headers of safetensors files, whose specification says so
MAX_DEPTH = 64  # of lists and objects in each other; ours have 6
MAX_INTEGER = 2**64  # integers are smaller in size; ours are steps, seeds, bytes and checksums


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
