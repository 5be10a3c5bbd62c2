"""Several folders with weights."""

import logging
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from mae_jax.data.sources import mixture, registry
from mae_jax.errors import UserError
from mae_jax.methods import with_data
from tests.helpers.tiny import tiny_config


@pytest.fixture
def folders(tmp_path):
    for name, classes, count in (("a", ("cat", "dog"), 6), ("b:1", ("dog", "ant"), 4)):
        for split, images in (("train", count), ("val", 2)):
            for kind in classes:
                (tmp_path / name / split / kind).mkdir(parents=True)
                for i in range(images):
                    Image.new("RGB", (16, 16), (i, 0, 0)).save(tmp_path / name / split / kind / f"{i}.png")
    return tmp_path


def config(folders, weights=("3", "1"), **fields):
    mix = tuple(f"{weight}:{folders / name}" for weight, name in zip(weights, ("a", "b:1"), strict=True))
    return tiny_config({"data.source": "folder", "data.mix": mix, **fields})


@pytest.mark.parametrize(("weights", "whole"), [(("3", "1"), (3, 1)), (("0.75", "0.25"), (3, 1)), (("6", "2"), (3, 1)),
                                                (("1", "0.1"), (10, 1))])
def test_of_each_block_of_draws_every_part_has_its_share_and_goes_through_all_its_examples(weights, whole):
    mix = mixture.parsed([f"{weight}:{path}" for weight, path in zip(weights, "ab", strict=True)])
    assert mix.weights == whole
    sizes, total = (12, 8), sum(whole)
    shown = [mixture.drawn(whole, sizes, 5, number) for number in range(24 * total)]
    for block in range(24):
        assert sum(index < 12 for index in shown[block * total:(block + 1) * total]) == whole[0]
    for low, size in ((0, 12), (12, 8)):
        own = [index - low for index in shown if low <= index < low + size]
        for turn in range(len(own) // size):
            # Within a block the turns of a part mingle, so that a pass is whole up to the blocks at its ends.
            counts = Counter(own[:(turn + 1) * size])
            assert max(counts.values()) <= turn + 2
    assert shown == [mixture.drawn(whole, sizes, 5, number) for number in range(24 * total)]
    assert shown != [mixture.drawn(whole, sizes, 6, number) for number in range(24 * total)]


def test_where_a_draw_comes_from_is_no_pattern():
    first = [mixture.drawn((1, 1), (10, 10), 0, number) < 10 for number in range(0, 4000, 2)]
    assert abs(np.mean(first) - 0.5) < 0.05
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 0.08


def test_classes_are_one_by_their_names_and_ids_are_of_all_examples(folders):
    source = registry.load(config(folders).data, "train")
    assert source.classes == ("ant", "cat", "dog")
    assert source.size == 20
    for i in range(20):
        kind = source.name(i).split("/")[-2].split(": ")[-1]
        assert source.classes[source.label(i)] == source.classes[source.read(i).label] == kind
    held = registry.load(config(folders).data, "val")
    assert (held.size, held.classes) == (8, source.classes)


def test_a_run_draws_by_the_weights_goes_on_in_the_middle_and_says_so(folders, caplog):
    caplog.set_level(logging.INFO, "mae_jax")
    made = config(folders, **{"data.eval_split": "val"})
    method, opened = with_data(made)
    inputs = opened.batches(method.eval_spec(), method.patch_order())
    assert inputs.num_train == 20
    assert inputs.description.startswith("data.mix: 3 of 4 draws from ")
    assert "an epoch is 20 images in 3 classes" in inputs.description
    assert "train: 12 images in 2 classes (cat, dog)" in inputs.description
    batches = inputs.train(0)
    ids = [next(batches)["id"] for _ in range(6)]
    assert [(batch < 12).sum() for batch in ids] == [6] * 6
    np.testing.assert_array_equal(next(inputs.train(4))["id"], ids[4])
    assert sum(int(batch["valid"].sum()) for batch in inputs.evaluate()) == 8


def test_a_bad_image_gives_way_to_another_draw(folders):
    (folders / "a" / "train" / "cat" / "0.png").write_bytes(b"no image")
    made = config(folders)
    method, opened = with_data(made)
    batches = opened.batches(method.eval_spec(), method.patch_order()).train(0)
    found = [next(batches) for _ in range(4)]
    assert sum(int((batch["replaced"] > 0).sum()) for batch in found) > 0
    assert all((batch["valid"] == 1).all() for batch in found)


@pytest.mark.parametrize(("fields", "line"), [
    ({"data.mix": ("a",)}, "not a weight and a path"), ({"data.mix": ("0:/a",)}, "not a weight and a path"),
    ({"data.mix": ("1:/a", "2:/a")}, "twice"), ({"data.mix": ("1.00001:/a", "2:/b")}, "smaller"),
    ({"data.mix": ("1:/a", "1:/b"), "data.path": "/c"}, "both"),
    ({"data.mix": ("1:/a", "1:/b"), "data.classes": "cat"}, "one data set"),
    ({"data.mix": ("1:/nothing/here", "1:/b")}, "/nothing/here")])
def test_a_mix_that_is_none_is_refused(fields, line):
    with pytest.raises(UserError, match=line):
        registry.load(tiny_config({"data.source": "folder", **fields}).data, "train")
