"""The site of docs/: it builds without a warning, and what its pages link to is there."""

import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest


class Page(HTMLParser):
    """The anchors of a page, and what it links to."""

    def __init__(self, path: Path):
        super().__init__()
        self.anchors: set[str] = set()
        self.links: set[str] = set()
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if value and name in ("id", "name"):
                self.anchors.add(value)
            elif value and name in ("href", "src"):
                self.links.add(value)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """Returns the folder of the site, built as CONTRIBUTING.md says."""
    to = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "-n", "--keep-going", "-q", "-c", "docs", "-d", to / "doctrees",
               ".", to / "html"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280,
                          env=os.environ | {"PYTHONPATH": os.getcwd(), "JAX_PLATFORMS": "cpu"})
    assert done.returncode == 0, done.stderr
    return to / "html"


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_every_link_within_it_leads_somewhere(site):
    pages = {path: Page(path) for path in site.rglob("*.html") if "_static" not in path.parts}
    broken = set()
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = Path(os.path.normpath(path.parent / unquote(parts.path))) if parts.path else path
            anchors = pages[target].anchors if target in pages else set()
            if not target.is_file() or (parts.fragment and target in pages and unquote(parts.fragment) not in anchors):
                broken.add((str(path.relative_to(site)), link))
    assert broken == set()
    assert {site / name for name in ("index.html", "README.html", "docs/index.html", "docs/api.html")} <= pages.keys()
    assert "mae_jax.load" in pages[site / "docs/api.html"].anchors


def test_the_drawing_of_the_layers_is_what_is_enforced():
    command = [sys.executable, "docs/make_layers.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
