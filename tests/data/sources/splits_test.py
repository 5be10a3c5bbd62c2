import numpy as np
import pytest

from mae_jax import data
from mae_jax.data.sources import registry, splits
from mae_jax.errors import UserError
from tests.helpers.tiny import tiny_config


@pytest.mark.parametrize(("expression", "bounds"), [
    ("train", (0, 200)), ("train[:10%]", (0, 20)), ("train[10%:]", (20, 200)), ("train[25%:75%]", (50, 150)),
    ("train[:50]", (0, 50)), ("train[150:500]", (150, 200)), ("train[:]", (0, 200))])
def test_a_slice_means_what_tfds_means(expression, bounds):
    assert splits.parse(expression).bounds(200) == bounds


def test_complementary_percents_share_nothing_and_lose_nothing():
    for size in (7, 50, 333):
        assert splits.parse("a[:33%]").bounds(size)[1] == splits.parse("a[33%:]").bounds(size)[0]


@pytest.mark.parametrize("expression", ["train[", "train[:x]", "", "train[:110%]", "train+test"])
def test_other_expressions_are_refused_with_an_example(expression):
    with pytest.raises(UserError, match=r"train|100%"):
        splits.parse(expression)


def test_a_sum_of_splits_has_the_examples_of_the_one_and_then_of_the_other():
    config = tiny_config().data
    whole = registry.load(config, "train[:10]+test[5:8]+train[20:21]")
    parts = [registry.load(config, text) for text in ("train[:10]", "test[5:8]", "train[20:21]")]
    assert whole.size == 14
    examples = [part.read(i) for part in parts for i in range(part.size)]
    for i, example in enumerate(examples):
        np.testing.assert_array_equal(whole.read(i).image, example.image)
        assert whole.read(i).label == example.label
    assert whole.name(13) == parts[2].name(0)
    assert whole.classes == parts[0].classes


def test_what_is_trained_on_in_a_sum_may_not_choose():
    config = tiny_config({"data.train_split": "test+train[:50%]", "data.val_split": "train[40%:60%]"})
    with pytest.raises(UserError, match="shares images"):
        data.OpenedData(config)
