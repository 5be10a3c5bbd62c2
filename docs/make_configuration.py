"""Writes docs/configuration.md: every config field, its default, and the comment beside it in the source.

  python docs/make_configuration.py            writes the page
  python docs/make_configuration.py --check    exits 1 where the page is not what would be written
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mae_jax import config
from mae_jax.commands.recipes import comments, leaves, own_comments, with_choices
from mae_jax.config import field_values
from mae_jax.data.transforms.color import COLOR_POLICIES
from mae_jax.methods import fields

# Without those of plug-ins.
CHOICES = {**field_values.CHOICES, "optim.name": config.OPTIMIZERS, "data.color": COLOR_POLICIES}
ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "configuration.md"
HEADER = """# Configuration

Every field of the config: its default, what it is, and where the default is from. A recipe under `configs/` states only
what differs from these; each field can be overridden on the command line: `--config.optim.lr=1e-4`,
`--config.data.image_size='(128, 128)'`. Durations are one text: `'800 epochs'`, `'100 steps'`, `'5e6 examples'`,
`'5e6 examples, at most 800 epochs'`, `'100 epochs, at least 400 steps'`. `python docs/make_configuration.py` writes
this page from `mae_jax/config/__init__.py` and `mae_jax/methods/fields.py`; do not edit it.
"""


def rows(values: Mapping[str, Any], texts: Mapping[str, str], prefix: str) -> list[str]:
    """Returns the lines of a table of the fields under `prefix`."""
    lines = ["| field | default | |", "|---|---|---|"]
    for name, value in leaves(values, prefix):
        shown = with_choices(texts.get(name, ""), CHOICES.get(name, ())).replace("|", "\\|").replace("<", "&lt;")
        lines.append(f"| `{name}` | `{value!r}` | {shown} |")
    return lines


def page() -> str:
    """Returns the page's text."""
    texts = comments("config/__init__.py", "DEFAULTS")
    single = {name: value for name, value in config.DEFAULTS.items() if not isinstance(value, Mapping)}
    parts = [HEADER, "## Top level\n", *rows(single, texts, "")]
    for group, values in config.DEFAULTS.items():
        if isinstance(values, Mapping):
            parts += [f"\n## {group}\n", *rows(values, texts, f"{group}.")]
    parts.append("\n## method\n\n`method.name` is the method of the recipe, and has these fields beside it:")
    for name, own in sorted(fields.TABLE.items()):
        parts += [f"\n### {name}\n", *rows(own, own_comments(name), "method.")]
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
