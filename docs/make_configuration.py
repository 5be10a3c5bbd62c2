"""Writes docs/configuration.md: every config field, its default, and the comment beside it in the source.

  python docs/make_configuration.py            writes the page
  python docs/make_configuration.py --check    exits 1 where the page is not what would be written
"""

import argparse
import ast
import io
import sys
import tokenize
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "configuration.md"
HEADER = """# Configuration

Every field of the config, its default and what it is. A recipe under `configs/` states only what differs from these;
each field can be overridden on the command line: `--config.optim.lr=1e-4`, `--config.data.image_size='(128, 128)'`.
Durations are one text: `'800 epochs'`, `'100 steps'`, `'5e6 examples'`. Generated from `mae_jax/config.py` and
`mae_jax/methods/fields.py` by `python docs/make_configuration.py`; do not edit it.
"""


def comments(source: str) -> dict[int, tuple[bool, str]]:
    """Returns line number → (whether the line holds nothing else, the text without '#') of all comments."""
    found = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            alone = not token.line[: token.start[1]].strip()
            found[token.start[0]] = alone, token.string.lstrip("# ")
    return found


def tables(source: str) -> Iterator[tuple[str, ast.Dict]]:
    """Yields (name, literal) of the dicts that a module assigns to its variables."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Dict) and isinstance(node.target, ast.Name):
            yield node.target.id, node.value


def leaves(table: ast.Dict, prefix: str = "") -> Iterator[tuple[str, int, int]]:
    """Yields (dotted name, first line, last line) of each field that the literal spells out."""
    for key, value in zip(table.keys, table.values, strict=True):
        if isinstance(key, ast.Constant) and isinstance(value, ast.Dict):
            yield from leaves(value, f"{prefix}{key.value}.")
        elif isinstance(key, ast.Constant):
            yield f"{prefix}{key.value}", key.lineno, value.end_lineno or key.lineno


def described(file: Path, variable: str) -> dict[str, str]:
    """Returns dotted name → the comment at the end of its line, or above it; '' without one.

    Where several fields share a line, its comment is the last one's, or that of the field which it begins with. A table
    that another spreads (`**MAE`) gives its comments first.
    """
    source = file.read_text()
    notes, table, texts = comments(source), dict(tables(source))[variable], {}
    for key, value in zip(table.keys, table.values, strict=True):
        if key is None and isinstance(value, ast.Name):
            texts |= described(file, value.id)
    fields = list(leaves(table))
    for name, first, last in fields:
        neighbours = [other for other, _, end in fields if end == last]
        _, text = notes.get(last, (False, ""))
        head, _, rest = text.partition(": ")
        owner = next((other for other in neighbours if other.split(".")[-1] == head), None)
        texts[name] = "" if (owner or neighbours[-1]) != name else rest if owner else text
        above, line = [], first - 1
        while not texts[name] and notes.get(line, (False, ""))[0]:
            above.insert(0, notes[line][1])
            line -= 1
        texts[name] = texts[name] or " ".join(above)
    return texts


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (dotted name, value) of nested tables."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def rows(values: Mapping[str, Any], texts: Mapping[str, str], choices: Mapping[str, Any], prefix: str) -> list[str]:
    """Returns the lines of a table of the fields under `prefix`."""
    lines = ["| field | default | |", "|---|---|---|"]
    for name, value in flat(values, prefix):
        text, allowed = texts.get(name, ""), choices.get(name, ())
        if any(choice not in text for choice in allowed):
            text = "; ".join(filter(None, (text, "one of " + ", ".join(allowed))))
        shown = text.replace("|", "\\|").replace("<", "&lt;")
        lines.append(f"| `{name}` | `{value!r}` | {shown} |")
    return lines


def page() -> str:
    """Returns the page's text."""
    from mae_jax import config
    from mae_jax.methods import fields

    choices = getattr(config, "CHOICES", {})
    texts = described(ROOT / "mae_jax" / "config.py", "DEFAULTS")
    single = {name: value for name, value in config.DEFAULTS.items() if not isinstance(value, Mapping)}
    parts = [HEADER, "## Top level\n", *rows(single, texts, choices, "")]
    for group, values in config.DEFAULTS.items():
        if isinstance(values, Mapping):
            parts += [f"\n## {group}\n", *rows(values, texts, choices, f"{group}.")]
    parts.append("\n## method\n\n`method.name` is the method of the recipe, and has these fields beside it:")
    for name, own in sorted(fields.TABLE.items()):
        found = described(ROOT / "mae_jax" / "methods" / "fields.py", name.upper())
        notes = {f"method.{field}": text for field, text in found.items()}
        parts += [f"\n### {name}\n", *rows(own, notes, choices, "method.")]
    return "\n".join(parts) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the page, and write nothing")
    check, text = parser.parse_args().check, page()
    if not check:
        PAGE.write_text(text)
    elif not PAGE.exists() or PAGE.read_text() != text:
        print("docs/configuration.md is not up to date: python docs/make_configuration.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
