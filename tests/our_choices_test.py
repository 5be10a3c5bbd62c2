"""The page of our choices names every file that says of a value that it is ours, or that the true one is not known."""

import re
from pathlib import Path

PAGE = Path("docs/our_choices.md")
SAID = re.compile(r"\bour choices?\b|the choices are ours|Ours(?: are)?:|(?:BEiT|these), ours\b|What is ours|"
                  r"article's [\w ]+ is not known|which is ours|rule is ours|form here is ours|8 is ours|"
                  r"those are is not known|remembered of the|our reading|[Ff]rom memory\b|not known to us")


def spoken(path: Path) -> str:
    """Returns a file's text on one line, without the marks of comments."""
    return re.sub(r"\s*\n\s*#?\s*", " ", path.read_text())


def saying() -> set[str]:
    return {str(path) for root in ("mae_jax", "configs", "examples") for path in Path(root).rglob("*.py")
            if SAID.search(spoken(path))}


def test_every_file_that_calls_a_value_our_choice_is_on_the_page():
    assert len(saying()) > 30
    named = set(re.findall(r"`((?:mae_jax|configs|examples)/[\w/]+\.py)`", PAGE.read_text()))
    assert saying() - named == set()
    assert {name for name in named if not Path(name).exists()} == set()


def test_every_config_field_on_the_page_is_one():
    fields = Path("docs/configuration.md").read_text()
    named = re.findall(r"`((?:method|model|data|optim)\.\w+)", PAGE.read_text())
    assert len(named) > 15
    assert [name for name in named if f"`{name}`" not in fields] == []


def test_pages_of_methods_and_the_readme_lead_to_it():
    pages = [Path("README.md"), *Path("docs/methods").glob("*.md")]
    assert [str(page) for page in pages if "our_choices.md" not in page.read_text()] == []
