import numpy as np
import pytest

from mae_jax.data.sources import registry
from mae_jax.data.sources.base import Example, Source
from mae_jax.data.sources.class_filter import LISTS, keep_classes, numbers, places
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


NUMBERED = tuple(sorted(map(str, range(12))))  # as folders are sorted: 0, 1, 10, 11, 2 ...


@pytest.mark.parametrize(("classes", "text", "names"), [
    (NUMBERED, "10-11", ["10", "11"]), (NUMBERED, "2", ["2"]), (NUMBERED, "8-10", ["10", "8", "9"]),
    (("001", "002", "010"), "1-10", ["001", "002", "010"]), (("001", "002", "010"), "10", ["010"]),
    (("0", "1", "2", "other"), "0-2", ["0", "1", "2"]), (("3", "5", "other"), "other", ["other"]),
    (("caf\u00e9", "tea"), "cafe\u0301", ["caf\u00e9"])])
def test_names_that_are_numbers_go_before_places(classes, text, names):
    assert sorted(classes[place] for place in numbers(text, classes)) == names


@pytest.mark.parametrize(("classes", "text", "message"), [
    (("3", "5", "other"), "0-2", "'0-2' can be read in two ways"),
    (NUMBERED, "10-12", "no class is called 12.*0 to 11"),
    (("3", "5"), "0", "no class is called 0.*3 to 5")])
def test_numbers_that_may_be_names_or_places_are_refused(classes, text, message):
    with pytest.raises(UserError, match=message):
        numbers(text, classes)


def test_numbers_are_places_for_a_stored_run():
    assert list(places("2-3", NUMBERED)) == [2, 3]
    assert list(numbers("2-3", NUMBERED)) != [2, 3]


def test_pictures_without_one_label_each_are_refused():
    with pytest.raises(UserError, match="one label"):
        keep_classes(source(fields=("labels",)), "bee")


def test_a_config_keeps_classes_of_any_split():
    data = tiny_config({"data.source": "photo_crops", "data.classes": "0-2"}).data
    train, test = (registry.load(data, split) for split in ("train", "test"))
    assert (train.size, test.size) == (600, 180)
    assert train.classes == test.classes
    assert {train.read(i).label for i in range(9)} == {0, 1, 2}
