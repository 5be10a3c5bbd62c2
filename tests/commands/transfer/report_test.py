"""What a suite reports: rows of several calls, the table and the plot."""

from io import BytesIO

import numpy as np
import pytest
from etils import epath
from PIL import Image

from mae_jax.commands.transfer.report import Cell, Row, joined, plot, series, stored, table, write


def rows() -> list[Row]:
    return [Row(Cell("dtd", "finetune", blocks), "top1", 0.3 + 0.1 * i, 100, None)
            for i, blocks in enumerate(("0", "0.5", "4", "all"))] + [
        Row(Cell("dtd", "quick"), "knn/top1", 0.25, 0, None), Row(Cell("pets", "quick"), "knn/top1", 0.75, 0, None),
        Row(Cell("cars", "quick"), "", None, None, None, "not prepared")]


def test_rows_of_earlier_calls_stay_and_no_failure_takes_the_place_of_a_figure(tmp_path):
    one, two, three = (Row(Cell(name), "top1", value, 5, 0.1) for name, value in (("a", 0.5), ("b", 0.6), ("c", 0.7)))
    tmp_path = epath.Path(tmp_path)
    write([one, two], tmp_path, "encoder/5", 2)
    assert stored(tmp_path, "encoder/5") == [one, two]
    assert stored(tmp_path, "encoder/9") == []  # of another encoder
    failed = Row(Cell("b"), "", None, None, None, "no memory")
    assert joined([one, two], [failed]) == [one, two]
    assert joined([one, failed], [two]) == [one, two]
    assert joined([one, two], [three, one._replace(value=0.4)]) == [two, three, one._replace(value=0.4)]


def test_the_table_has_means_over_what_is_alike_and_says_what_failed():
    text = table(rows())
    assert "| mean of 2 | quick knn/top1 |" in " ".join(text.split())
    assert "50.00%" in text
    assert text.endswith("\n\ncars_quick: not prepared")
    assert len(series(rows())["quick knn/top1"]) == 2
    lines = text.split("\n\n")[0].splitlines()
    assert len({len(line) for line in lines}) == 1


def test_the_plot_has_curves_over_blocks_and_bars():
    pytest.importorskip("matplotlib")
    both, one = (np.asarray(Image.open(BytesIO(plot(some, depth=12)))) for some in (rows(), rows()[:4]))
    assert both.shape[1] == 2 * one.shape[1]
    assert one.std() > 5
