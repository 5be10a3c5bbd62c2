"""Text, data and code of a page, so that nothing in a name ends what it stands in."""

import base64
import hashlib
import html
import importlib.resources
import json
from collections.abc import Iterable
from typing import Any

from mae_jax.errors import printable

# In JSON these are escapes for the same; in a script they could end it, or open a comment.
UNSAFE = {ord(char): f"\\u{ord(char):04x}" for char in "<>&\u2028\u2029"}


def text(value: Any) -> str:
    """Returns a text as HTML shows it, in elements and in quoted attributes; what no screen shows as its escape."""
    return html.escape(printable(str(value)))


def json_script(name: str, data: Any) -> str:
    """Returns data as a script element that is not executed, for `JSON.parse`."""
    content = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":")).translate(UNSAFE)
    return f'<script type="application/json" id="{text(name)}">{content}</script>'


def table(head: Iterable[str], rows: Iterable[Iterable[str]], kind: str = "") -> str:
    """Returns a table of cells that are HTML already, the first one of each row being its heading."""
    lines = ["".join(f'<th scope="col">{cell}</th>' for cell in head)]
    for first, *rest in rows:
        lines.append(f'<th scope="row">{first}</th>' + "".join(f"<td>{cell}</td>" for cell in rest))
    body = "".join(f"<tr>{line}</tr>" for line in lines[1:])
    return (f'<div class="wide"><table class="{kind}"><thead><tr>{lines[0]}</tr></thead><tbody>{body}</tbody></table>'
            "</div>")


def page(title: str, body: str) -> str:
    """Returns a whole page: what it shows, our style and our script, and a policy by which no other script runs and
    nothing is fetched from anywhere."""
    here = importlib.resources.files("mae_jax.commands.report")
    style, script = (here.joinpath(name).read_text("utf-8") for name in ("page.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{text(title)}</title>
<style>{style}</style>
</head>
<body>
{body}
<script>{script}</script>
</body>
</html>
"""
