"""Committed tables are those of the committed cells, and give no verdict on fewer seeds than one takes."""

import importlib
from pathlib import Path

import pytest

from studies import cells as shared

STUDIES = {"finetune.study": "results", "finetune.instrument": "instrument", "quickstart.study": "results",
           "dense.study": "results_cpu", "dense.patches": "patches", "mixing.study": "results",
           "small_data.study": "results", "negative_transfer.study": "results",
           "negative_transfer.instrument": "instrument"}


@pytest.mark.parametrize("name", STUDIES)
def test_a_committed_table_is_that_of_the_committed_cells(name):
    study = importlib.import_module(f"studies.{name}")
    results = Path("studies", name.split(".")[0], f"{STUDIES[name]}.jsonl")
    assert results.with_suffix(".md").read_text() == study.table(shared.read(results))


def test_no_study_calls_ranges_that_are_apart_a_difference():
    texts = {path: path.read_text() for path in Path("studies").rglob("*") if path.suffix in (".py", ".md")}
    assert [path for path, text in texts.items() if "are apart" in text or "decidable" in text] == []
