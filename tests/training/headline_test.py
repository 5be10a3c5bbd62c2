"""The line that a run ends with: figures of the record, and no more than they say."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from mae_jax.data.sources.base import Example, Source
from mae_jax.training import headline
from tests.helpers.tiny import tiny_config

SOURCE = Source(1500, lambda i: Example(np.zeros((4, 4, 3), np.uint8), i % 3), str, ("a", "b", "c"),
                label=lambda i: i % 3)
SERIES = {"eval/linear/top1": [(0, 0.25), (3, 0.4), (6, 0.715)], "eval/linear/pixels_top1": [(0, 0.313)]}


def run_of(fields=None, test=SOURCE):
    config = tiny_config({"eval.max_examples": 1200} | (fields or {}))
    return SimpleNamespace(config=config, program=SimpleNamespace(method=SimpleNamespace(group=1)),
                           inputs=SimpleNamespace(parts={"train": SOURCE, "test": test, "train[50%:]": SOURCE}))


def test_the_line_has_the_three_figures_and_how_many_labels():
    assert headline.line(run_of(), "eval", SERIES) == (
        "learned: a linear probe, fitted on 1,200 labels, names the class of 71.5% of 1,200 new images; untrained "
        "encoder 25.0%, raw pixels 31.3%")


def test_images_without_a_label_do_not_count():
    test = dataclasses.replace(SOURCE, label=lambda i: -1 if i % 3 else 0)
    found = headline.line(run_of({"eval.max_examples": 1500}, test), "eval", SERIES)
    assert "fitted on 1,500 labels" in found
    assert "of 500 new images" in found


@pytest.mark.parametrize(("after", "word"), [(0.40, "learned"), (0.33, "not seen to learn"),
                                             (0.2, "not seen to learn")])
def test_what_chance_may_give_is_not_called_learned(after, word):
    series = SERIES | {"eval/linear/top1": [(0, 0.25), (6, after)]}
    assert headline.line(run_of(), "eval", series).startswith(f"{word}: ")


def test_a_run_that_started_from_weights_had_no_untrained_encoder():
    assert "encoder before this run 25.0%" in headline.line(run_of({"init_from": "runs/a"}), "eval", SERIES)


def test_a_run_that_is_judged_on_its_validation_part_is_told_by_it():
    run = run_of({"data.val_split": "train[50%:]", "data.train_split": "train"})
    series = {name.replace("eval/", "val/"): points for name, points in SERIES.items()}
    assert "71.5%" in headline.line(run, "val", series | {"eval/linear/top1": [(6, 0.9)]})


@pytest.mark.parametrize("lacking", [{"eval/linear/pixels_top1": []}, {"eval/linear/top1": [(6, 0.7)]},
                                     {"eval/linear/top1": [(3, 0.4), (6, 0.7)]},
                                     {"eval/linear/top1": [(0, 0.2), (6, float("nan"))]}])
def test_nothing_is_said_of_what_was_not_measured(lacking):
    assert headline.line(run_of(), "eval", SERIES | lacking) == ""


def test_nothing_is_said_of_cached_batches_and_of_labels_that_are_not_known():
    assert headline.line(run_of(test=None), "eval", SERIES) == ""
    assert headline.line(run_of(test=dataclasses.replace(SOURCE, label=None)), "eval", SERIES) == ""
