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


def test_of_several_names_at_least_one_is_held_out():
    few = ["0.png", "1.png", "2.png"]
    shares = {name: splits.share(name) for name in few}
    assert max(shares.values()) < 0.9  # by their hashes none would be
    held = splits.within(few, 0.9, 1.0)
    assert [few[i] for i in held] == [max(few, key=shares.get)]
    assert sorted([*splits.within(few, 0.0, 0.9), *held]) == [0, 1, 2]
    assert not splits.within(few[:1], 0.9, 1.0).size  # of one image nothing would be left


def test_of_many_names_a_hash_alone_decides():
    many = [f"{i}.png" for i in range(500)]
    assert [*splits.within(many, 0.9, 1.0)] == [i for i, name in enumerate(many) if splits.share(name) >= 0.9]
    assert 30 < len(splits.within(many, 0.9, 1.0)) < 70


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
