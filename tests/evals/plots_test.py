"""Figures by matplotlib: what they show, for any names, and that no state of matplotlib's is left."""

import sys

import numpy as np
import pytest

from mae_jax.evals import plots


def darkest(picture: np.ndarray) -> np.ndarray:
    """Returns where a figure has the color of a cell that holds all of its row."""
    return (np.abs(picture.astype(int) - (8, 48, 107)) < 3).all(2)


@pytest.mark.parametrize("classes", [2, 10, 40])
def test_a_table_of_confusions_is_dark_where_images_are(classes):
    right = np.eye(classes, dtype=np.int64) * 7
    right[-1] = 0  # a class that does not occur
    drawn = plots.confusion(right, [f"class {i}" for i in range(classes)], "val")
    assert (drawn.dtype, drawn.shape[2]) == (np.uint8, 3)
    rows, columns = np.nonzero(darkest(drawn))
    assert len(rows) > 50 * (classes - 1)
    if classes > 2:
        assert np.corrcoef(rows, columns)[0, 1] > 0.9  # from the upper left to the lower right
        wrong = plots.confusion(right[:, ::-1], [f"class {i}" for i in range(classes)], "val")
        assert np.corrcoef(*np.nonzero(darkest(wrong)))[0, 1] < -0.9


def test_names_may_be_anything_and_long_ones_do_not_make_it_larger():
    table = np.diag([3, 4, 5])
    shapes = {plots.confusion(table, ["$x$ {a}", "猫", "n" * length], "eval").shape for length in (24, 400)}
    assert len(shapes) == 1


def test_nothing_was_counted_and_still_there_is_a_figure():
    assert plots.confusion(np.zeros((3, 3), np.int64), "abc", "eval").max() == 255


def test_pyplot_is_not_touched():
    before = sys.modules.get("matplotlib.pyplot")
    plots.confusion(np.eye(3, dtype=np.int64), "abc", "eval")
    assert sys.modules.get("matplotlib.pyplot") is before
    if before is not None:
        assert not before.get_fignums()
