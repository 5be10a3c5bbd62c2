"""Counts and figures of classification against scikit-learn."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn import metrics

from mae_jax.errors import UserError
from mae_jax.evals import accumulators, classification


def guesses(count: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Returns logits [count, classes] that are right more often than not, and labels [count]; one class is missing."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes - 1, size=count).astype(np.int32)
    return (rng.normal(size=(count, classes)) + 2 * np.eye(classes)[labels]).astype(np.float32), labels


def counted(logits, labels, valid=None, sizes=(None,)) -> dict[str, np.ndarray]:
    """Returns the sums of `counts` over batches of the given sizes; the last takes the rest."""
    total, start, valid = {}, 0, np.ones(len(labels), np.float32) if valid is None else valid
    for size in sizes:
        rows = slice(start, None if size is None else start + size)
        part = classification.counts(logits[rows], labels[rows], valid[rows], logits.shape[1])
        total, start = accumulators.add(total, part), rows.stop
    return total


@pytest.mark.parametrize("classes", [3, 6, 100])
def test_the_figures_are_scikit_learns(classes):
    logits, labels = guesses(500, classes)
    found, total = classification.summary(counted(logits, labels)), counted(logits, labels)
    predicted, every = logits.argmax(1), np.arange(classes)
    assert found["top1"] == pytest.approx(metrics.accuracy_score(labels, predicted))
    present = np.unique(labels)
    assert found["mean_per_class"] == pytest.approx(
        metrics.recall_score(labels, predicted, labels=present, average="macro"))
    if classes > 5:
        assert found["top5"] == pytest.approx(metrics.top_k_accuracy_score(labels, logits, k=5, labels=every))
    np.testing.assert_array_equal(total["confusion"], metrics.confusion_matrix(labels, predicted, labels=every))


def test_top5_is_reported_where_it_can_fail():
    assert "top5" not in classification.summary(counted(*guesses(20, 5)))
    assert "top5" in classification.summary(counted(*guesses(20, 6)))


def test_the_sums_do_not_depend_on_how_rows_are_batched_and_padded():
    logits, labels = guesses(101, 7)
    whole = counted(logits, labels)
    padded = np.concatenate([logits, np.full((3, 7), 9, np.float32)]), np.concatenate([labels, np.int32([0, 6, 2])])
    split = counted(*padded, valid=np.r_[np.ones(101), np.zeros(3)].astype(np.float32), sizes=(40, 40, 24))
    for name, value in whole.items():
        np.testing.assert_array_equal(split[name], value)
        assert value.dtype == np.int64


def test_pictures_without_a_label_do_not_count():
    logits, labels = guesses(60, 7)
    unlabeled = np.where(np.arange(60) % 3 == 0, -1, labels)
    keep = unlabeled >= 0
    for name, value in counted(logits[keep], labels[keep]).items():
        np.testing.assert_array_equal(counted(logits, unlabeled)[name], value)


def test_of_equal_logits_the_lower_class_comes_first():
    total = counted(np.zeros((8, 8), np.float32), np.arange(8, dtype=np.int32))
    assert (total["top1"], total["top5"]) == (1, 5)
    np.testing.assert_array_equal(total["class_hits"], np.eye(8)[0])
    np.testing.assert_array_equal(total["confusion"], np.eye(8)[0] * np.ones((8, 1)))
    assert counted(np.zeros((3, 8), np.float32), np.int32([1, 4, 7]))["top5"] == 2


def test_infinite_logits_have_their_place_and_a_nan_is_a_miss():
    logits = np.array([[-np.inf, 1, 0], [np.inf, 1, 0], [np.nan] * 3, [np.nan, 0, 1]], np.float32)
    total = counted(logits, np.array([0, 0, 0, 2], np.int32))
    assert (total["top1"], total["class_totals"].sum(), total["confusion"].sum()) == (1, 4, 2)


def test_figures_of_nothing_are_nan():
    logits, labels = guesses(4, 7)
    assert np.isnan(list(classification.summary(counted(logits, np.full_like(labels, -1))).values())).all()


def test_many_classes_have_no_table_of_confusions():
    total = counted(*guesses(50, 101))
    assert "confusion" not in total
    assert classification.summary(total)["top1"] > 0


def test_a_head_of_another_number_of_classes_is_refused():
    with pytest.raises(UserError, match=r"7 classes, .* 10"):
        classification.counts(*(jnp.asarray(x) for x in guesses(4, 7)), jnp.ones(4), 10)


def test_counts_are_whole_numbers_on_the_device():
    logits, labels = guesses(4, 7)
    counted = classification.counts(logits, labels, np.ones(4), 7)
    assert {x.dtype for x in jax.tree.leaves(counted)} == {jnp.dtype("int32")}


def test_accuracy_among_the_classes_that_occur_ignores_all_others():
    logits, labels = guesses(300, 20)
    present = np.array([11, 2, 5, 7])
    rows = np.isin(labels, present)
    logits, labels = logits[rows], labels[rows]
    hits = [max(present, key=lambda c: row[c]) == label for row, label in zip(logits, labels, strict=True)]
    assert classification.subset_top1(logits, labels, present) == pytest.approx(np.mean(hits))
    assert classification.subset_top1(logits, labels, present) > (logits.argmax(1) == labels).mean()
    assert classification.subset_top1(np.full_like(logits, np.nan), labels, present) == 0


@pytest.mark.parametrize("levels", [4, 50, 10**6])  # few levels: many equal scores
def test_average_precision_is_scikit_learns(levels):
    rng = np.random.default_rng(levels)
    positives = rng.random(200) < 0.2
    scores = np.floor((rng.normal(size=200) + positives) * levels) / levels
    found = classification.average_precision(scores, positives)
    assert found == pytest.approx(metrics.average_precision_score(positives, scores))


def eleven_points(scores: np.ndarray, positives: np.ndarray) -> float:
    """Returns VOC2007's figure from scikit-learn's curve."""
    precision, recall, _ = metrics.precision_recall_curve(positives, scores)
    curve = list(zip(precision[:-1], recall[:-1], strict=True))  # the last point is made up
    return np.mean([max(p for p, r in curve if r > tenth / 10 - 1e-9) for tenth in range(11)])


@pytest.mark.parametrize("positive", [1, 10, 37])  # 10: recalls fall on the eleven points
@pytest.mark.parametrize("levels", [4, 10**6])
def test_the_eleven_point_precision_is_read_off_scikit_learns_curve(levels, positive):
    rng = np.random.default_rng(positive)
    positives = rng.permutation(200) < positive
    scores = np.floor((rng.normal(size=200) + positives) * levels) / levels
    found = classification.average_precision(scores, positives, "voc11")
    assert found == pytest.approx(eleven_points(scores, positives))
    assert found != pytest.approx(classification.average_precision(scores, positives), abs=1e-4) or positive == 1


def test_average_precision_by_hand():
    scores, positives = np.array([0.9, 0.8, 0.7, 0.6]), np.array([1, 0, 1, 0])
    assert classification.average_precision(scores, positives) == pytest.approx((1 + 2 / 3) / 2)
    assert classification.average_precision(scores, positives, "voc11") == pytest.approx((6 * 1 + 5 * 2 / 3) / 11)
    assert np.isnan(classification.average_precision(scores, np.zeros(4)))


@pytest.mark.parametrize("how", ["all", "voc11"])
def test_the_mean_is_over_the_classes_that_occur(how):
    rng = np.random.default_rng(0)
    scores, labels = rng.normal(size=(60, 5)), (rng.random((60, 5)) < 0.3).astype(np.uint8)
    labels[:, 2] = 0
    each = [classification.average_precision(scores[:, c], labels[:, c], how) for c in (0, 1, 3, 4)]
    assert classification.mean_ap(scores, labels, how) == pytest.approx(np.mean(each))
    assert np.isnan(classification.mean_ap(scores, np.zeros_like(labels), how))
    if how == "all":
        with warnings.catch_warnings(action="ignore"):
            assert metrics.average_precision_score(labels, scores, average=None)[2] == 0  # what is left out
