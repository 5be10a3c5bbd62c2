"""Escapes text and data for a page, and assembles the page with its style and script."""

import base64
import hashlib
import html
import importlib.resources
import json
from collections.abc import Iterable
from typing import Any

from mae_jax.errors import printable

# Characters that could end a script element or open a comment in it, as JSON escapes.
UNSAFE = {ord(char): f"\\u{ord(char):04x}" for char in "<>&\u2028\u2029"}


def text(value: Any) -> str:
    """Escapes a value for HTML elements and quoted attributes; unprintable characters become their escapes."""
    return html.escape(printable(str(value)))


def json_script(name: str, data: Any) -> str:
    """Returns data as a script element of JSON, which is not executed; page.js reads it by `JSON.parse`."""
    content = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":")).translate(UNSAFE)
    return f'<script type="application/json" id="{text(name)}">{content}</script>'


def table(head: Iterable[str], rows: Iterable[Iterable[str]], kind: str = "") -> str:
    """Returns an HTML table; cells are HTML, and the first cell of each row is its heading."""
    lines = ["".join(f'<th scope="col">{cell}</th>' for cell in head)]
    for first, *rest in rows:
        lines.append(f'<th scope="row">{first}</th>' + "".join(f"<td>{cell}</td>" for cell in rest))
    body = "".join(f"<tr>{line}</tr>" for line in lines[1:])
    return (f'<div class="wide"><table class="{kind}"><thead><tr>{lines[0]}</tr></thead><tbody>{body}</tbody></table>'
            "</div>")


def page(title: str, body: str) -> str:
    """Returns a complete HTML page with style and script, and a content security policy that forbids other scripts and
    all network access."""
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
