"""Curves as a figure of the workdir."""

import math

import numpy as np

from mae_jax.training import curves


def test_a_figure_has_a_panel_for_each_metric_that_changes():
    rising = [(step, float(step)) for step in range(5)]
    series = {"train/loss": rising, "eval/loss": rising[::2], "train/lr": rising, "train/spikes": [(0, 0.0), (1, 0.0)]}
    assert [panel.name for panel in curves.panels([series])] == ["loss", "lr"]
    drawn = curves.figure(series, "runs/a, to step 4")
    assert drawn.dtype == np.uint8
    assert (drawn != 255).any()
    more = curves.figure({**series, **{f"eval/{k}": rising for k in range(4)}}, "runs/a")
    assert more.shape[0] > drawn.shape[0]
    assert more.shape[1] == drawn.shape[1]


def test_a_run_without_curves_has_no_figure():
    assert curves.figure({"train/loss": [(1, 0.5)], "train/lr": [(1, math.nan), (2, math.nan)]}, "") is None
