"""Sphinx builds the site from the repository's root: README, results and these pages link to each other as files.

  python -m sphinx -W -n --keep-going -c docs . build/site
"""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

project = author = "mae_jax"
project_copyright = "The mae_jax authors, Apache-2.0"
release = re.search(r'__version__ = "(.+)"', (ROOT / "mae_jax/__init__.py").read_text())[1]

root_doc = "docs/index"
include_patterns = ["*.md", "docs/**.md", "examples/*/README.md", "studies/*/*.md", "benchmarks/results/*.md",
                    "tests/*/results/*.md"]
exclude_patterns = [".*", "build", "dist", "runs", "mae_jax", "*.egg-info"]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "sphinx_copybutton"]
myst_heading_anchors = 4  # the anchors that GitHub gives to headings
myst_enable_extensions = ["colon_fence"]
copybutton_prompt_text = "$ "

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_use_ivar = True
# Types of others have no page here, and neither have ours that plug-ins only hand on.
nitpick_ignore_regex = [("py:.*", r"(?!mae_jax\.).*"),
                        ("py:class", r"mae_jax\.(data\.objects\.(Objects|Annotations)|data\.cluster_ids\.Clusters|"
                                     r"evals\.(context\.Counter|detected\.Detected))")]

html_theme = "sphinx_book_theme"
html_title = "mae_jax"
html_theme_options = {"show_navbar_depth": 1, "use_download_button": False, "use_fullscreen_button": False,
                      "home_page_in_toc": False, "navbar_persistent": [], "show_toc_level": 2}
html_show_sourcelink = False
html_copy_source = False


def as_rst(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Makes a docstring's `code` what reStructuredText takes for code, and keeps it from reading more into the rest."""
    for number, line in enumerate(lines):
        parts = re.split(r"`+([^`]+)`+", line)
        text = [re.sub(r"([*|_\\])", r"\\\1", part) for part in parts[::2]]
        code = [f"``{part}``" for part in parts[1::2]] + [""]
        lines[number] = "".join(before + inside for before, inside in zip(text, code, strict=True))


def give_a_title(app: Any, docname: str, source: list[str]) -> None:
    """Begins a page that has no heading, as results that a script writes, with its name."""
    if not re.search(r"^# ", source[0], re.MULTILINE):
        source[0] = f"# {docname}\n\n{source[0]}"


def write_front_door(app: Any, error: Exception | None) -> None:
    """Writes the index.html at the top, which leads to the site's first page."""
    if error is None and app.builder.name == "html":
        (Path(app.outdir) / "index.html").write_text(
            f'<!doctype html><meta http-equiv="refresh" content="0; url={root_doc}.html"><a href="{root_doc}.html">'
            f"{project}</a>\n")


def setup(app: Any) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", as_rst, priority=400)  # before napoleon reads the sections
    app.connect("source-read", give_a_title)
    app.connect("build-finished", write_front_door)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
