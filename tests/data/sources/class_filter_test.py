import numpy as np
import pytest

from mae_jax.data.sources import registry
from mae_jax.data.sources.base import Example, Source
from mae_jax.data.sources.class_filter import LISTS, keep_classes, numbers
from mae_jax.errors import UserError
from tests.helpers.tiny import tiny_config

CLASSES = ("ant", "bee", "cat", "dog")


def source(**options):
    return Source(12, lambda i: Example(np.full((2, 2, 3), i, np.uint8), i % 4), str, CLASSES, **options)


@pytest.mark.parametrize("label", [None, lambda i: i % 4], ids=["read", "known"])
@pytest.mark.parametrize("text", ["bee,dog", "3,1", "1,3-3"])
def test_pictures_of_chosen_classes_stay_and_are_numbered_anew(text, label):
    part = keep_classes(source(label=label), text)
    assert part.classes == ("bee", "dog")
    assert part.size == 6
    examples = [part.read(i) for i in range(6)]
    assert [example.image[0, 0, 0] for example in examples] == [1, 3, 5, 7, 9, 11]
    assert [example.label for example in examples] == [0, 1] * 3 == [part.label(i) for i in range(6)]
    assert [part.name(i) for i in range(2)] == ["1", "3"]


def test_the_shipped_lists_share_imagenet_without_overlap():
    thousand = tuple(map(str, range(1000)))
    parts = [{n for text in LISTS[name].split(",") for n in numbers(text, thousand)} for name in LISTS]
    assert parts[0] | parts[1] == set(range(1000))
    assert not parts[0] & parts[1]
    assert [len(part) for part in parts] == [413, 587]


@pytest.mark.parametrize(("text", "message"), [
    ("bea", "class 'bea' .*4; .*'bee'"), ("2-4", "0 to 3"),
    ("", "class ''")])
def test_classes_that_are_not_there_are_refused(text, message):
    with pytest.raises(UserError, match=message):
        keep_classes(source(), text)


def test_pictures_without_one_label_each_are_refused():
    with pytest.raises(UserError, match="one label"):
        keep_classes(source(fields=("labels",)), "bee")


def test_a_config_keeps_classes_of_any_split():
    data = tiny_config({"data.source": "photo_crops", "data.classes": "0-2"}).data
    train, test = (registry.load(data, split) for split in ("train", "test"))
    assert (train.size, test.size) == (600, 180)
    assert train.classes == test.classes
    assert {train.read(i).label for i in range(9)} == {0, 1, 2}
