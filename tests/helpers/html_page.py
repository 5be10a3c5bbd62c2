"""What an HTML parser, as a browser would, finds in a page."""

import json
from html.parser import HTMLParser
from typing import Any


class Page(HTMLParser):
    """A page's elements and texts.

    Attributes:
      tags: (name, attributes) of each element.
      scripts: (attributes, content).
      text: what is shown, joined.
    """

    def __init__(self, content: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self._texts: list[str] = []
        self._inside = ""
        self.feed(content)
        self.close()
        self.text = " ".join(" ".join(self._texts).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            attributes, content = self.scripts.pop()
            self.scripts.append((attributes, content + data))
        elif self._inside != "style":
            self._texts.append(data)

    def data(self) -> dict[str, Any]:
        """Returns what the map is drawn from."""
        return json.loads(next(content for attributes, content in self.scripts if attributes.get("id") == "map-data"))

    def attributes(self, name: str) -> list[str]:
        """Returns the values of an attribute in all elements."""
        return [each[name] or "" for _, each in self.tags if name in each]
