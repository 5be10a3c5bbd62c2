"""The notebook of examples, executed cell by cell with a run that takes seconds."""

import json
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import pytest

NOTEBOOK = Path("examples/neighbors.ipynb")


def cells():
    return [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]


def test_the_notebook_is_stored_without_outputs():
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells())
    assert sum(cell["metadata"].get("tags") == ["parameters"] for cell in cells()) == 1


@pytest.mark.slow
def test_the_notebook_runs_from_its_first_cell_to_its_last(tmp_path, monkeypatch, capsys):
    mpl.use("Agg")
    names = {"__name__": "__main__"}
    for cell in cells():
        exec(compile("".join(cell["source"]), str(NOTEBOOK), "exec"), names)
        if cell["metadata"].get("tags") == ["parameters"]:
            names |= {"RUN": str(tmp_path / "run"), "RECIPE": "quickstart:runlocal", "FEATURES": str(
                tmp_path / "features.parquet"), "FIELDS": {"eval.every": "9 steps"}}
    plt.close("all")
    said = capsys.readouterr().out
    assert "step 2, images of (32, 32), features of 48 values" in said
    assert "the nearest neighbor is of the same class for" in said
    assert (tmp_path / "features.png").stat().st_size > 10_000
    assert len(names["features"]) == 1020
