import pytest

from mae_jax.data import splits
from mae_jax.errors import UserError


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
