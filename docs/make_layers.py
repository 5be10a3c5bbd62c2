"""Draws docs/images/layers.svg: the packages in their layers, as pyproject.toml has them and ARCHITECTURE.md says.

  python docs/make_layers.py            draws the figure
  python docs/make_layers.py --check    exits 1 where the figure is not what would be drawn
"""

import argparse
import re
import sys
import tomllib
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FIGURE = ROOT / "docs" / "images" / "layers.svg"
WIDTH, ROW, LEFT = 980, 34, 46  # pixels
NAME, GAP = 132, 8
# What a layer is about, by its first module: its color, and those of the layers below it until the next one.
COLORS = {"__main__": "#dbe7f6", "inference": "#dcefe0", "config": "#f6ecd2", "methods": "#f5dede",
          "storage": "#e7e1f3", "losses": "#f5dede", "rng": "#ececec"}


def layers() -> list[list[str]]:
    """Returns the modules of each layer, the uppermost first."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (found,) = (contract["layers"] for contract in contracts if contract["type"] == "layers")
    return [[name.strip() for name in layer.split("|")] for layer in found]


def meanings() -> dict[str, str]:
    """Returns module → what ARCHITECTURE.md's list of layers says of it."""
    section = (ROOT / "ARCHITECTURE.md").read_text().split("\n## Layers\n")[1].split("\n## ")[0]
    found = re.findall(r"^(\w+) {2,}(\S.*(?:\n {8,}\S.*)*)", section, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in found}


def drawn() -> str:
    """Returns the SVG."""
    rows, said, color = layers(), meanings(), ""
    height = len(rows) * ROW + 2 * GAP
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-size="14" '
             'font-family="system-ui, sans-serif">',
             "<title>The layers of mae_jax: a module imports what stands below it</title>",
             f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
             '<marker id="head" markerWidth="8" markerHeight="8" refX="4" refY="4" orient="auto">'
             '<path d="M0 0L8 4L0 8z" fill="#555"/></marker>',
             f'<path d="M30 {2 * GAP}V{height - 2 * GAP}" stroke="#555" stroke-width="2" marker-end="url(#head)"/>',
             f'<text transform="translate(20 {height // 2}) rotate(-90)" text-anchor="middle" fill="#555">imports'
             '</text>']
    for number, names in enumerate(rows):
        color = COLORS.get(names[0], color)
        top = GAP + number * ROW
        for place, name in enumerate(names):
            left = LEFT + place * (NAME + GAP)
            lines += [f'<rect x="{left}" y="{top + 2}" width="{NAME}" height="{ROW - 4}" rx="5" fill="{color}"/>',
                      f'<text x="{left + NAME // 2}" y="{top + 22}" text-anchor="middle" fill="#111" '
                      f'font-family="ui-monospace, monospace">{escape(name)}</text>']
        meaning = said.get("main" if names[0] == "__main__" else names[0], "")
        left = LEFT + len(names) * (NAME + GAP) + GAP
        lines.append(f'<text x="{left}" y="{top + 22}" fill="#333">{escape(meaning.replace("`", ""))}</text>')
    return "\n".join([*lines, "</svg>"]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the figure, and write nothing")
    check, text = parser.parse_args().check, drawn()
    if not check:
        FIGURE.write_text(text)
    elif not FIGURE.exists() or FIGURE.read_text() != text:
        print("docs/images/layers.svg is not up to date: python docs/make_layers.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
