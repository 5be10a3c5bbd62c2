"""Several views of an image, as DINO trains on them."""

import functools
import threading
from collections import Counter

import numpy as np
import pytest
from etils import epath

from mae_jax.data import OpenedData, decode
from mae_jax.data.decode import StoredImage
from mae_jax.data.masking import ColorAugmentation, PatchOrder, View
from mae_jax.data.readers.random_access import Source, train_example
from mae_jax.data.sources.base import Example
from mae_jax.data.transforms import color, crop
from mae_jax.data.transforms.example import ExampleBuilder
from mae_jax.data.writers import write_batches
from mae_jax.rng import rng
from tests.helpers.tiny import open_inputs, tiny_config, tiny_method


def build(rows=None, **fields):
    config = tiny_config({"data.source": "photo_crops", **fields}, "dino")
    method = tiny_method(config)
    return config, method, open_inputs(config, method, rows)


def test_training_has_the_views_in_place_of_the_single_one_and_evaluations_have_that():
    _, method, inputs = build()
    for batch, spec in ((next(inputs.train(0)), method.batch_spec()), (next(inputs.support()), method.eval_spec()),
                        (next(inputs.evaluate()), method.eval_spec())):
        assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {k: (s.shape, s.dtype) for k, s in spec.items()}
    batch = next(inputs.train(0))
    assert batch["global/patches"].shape == (8, 2, 16, 48)
    assert batch["local/patches"].shape == (8, 3, 4, 48)
    assert (batch["global/order"] == np.arange(16)).all()


def test_views_are_addressed_by_position_and_number_whatever_rows_a_process_feeds():
    _, _, inputs = build()
    stream = inputs.train(0)
    next(stream)
    second = next(stream)
    for name, value in next(inputs.train(1)).items():
        np.testing.assert_array_equal(value, second[name])
    _, _, part = build(np.array([1, 6]))
    for name, value in next(part.train(1)).items():
        np.testing.assert_array_equal(value, second[name][[1, 6]])
    views = second["global/patches"]
    assert np.abs(views[:, 0].astype(int) - views[:, 1]).max((1, 2)).min() > 0
    assert np.abs(second["local/patches"][:, 0].astype(int) - second["local/patches"][:, 1]).max() > 0


def test_each_change_of_color_comes_as_often_as_it_says_and_in_order(monkeypatch):
    made, here = [], threading.get_ident()  # threads of another test may still make examples

    def note(image, *_, name):
        made.extend([name] * (threading.get_ident() == here))
        return image

    for name in ("jitter", "gray", "blur", "solarize"):
        monkeypatch.setattr(color, name, functools.partial(note, name=name))
    chances, count = ColorAugmentation(0.8, 0.2, 0.5, 0.1), 3000
    for position in range(count):
        before = len(made)
        color.change(None, rng(0, "augment", position), chances)
        order = [("jitter", "gray", "blur", "solarize").index(name) for name in made[before:]]
        assert order == sorted(order)
    for name, share in Counter(made).items():
        expected = getattr(chances, name)
        assert abs(share / count - expected) < 4 * np.sqrt(expected * (1 - expected) / count)
    assert len(set(made)) == 4


def test_views_differ_as_published():
    """Released code: both jittered and gray alike often; the first always blurred, the second rarely, but solarized."""
    method = tiny_method(tiny_config(method="dino"))
    large, small = method.views()
    assert [tuple(colors[:4]) for colors in large.colors] == [(0.8, 0.2, 1, 0), (0.8, 0.2, 0.1, 0.2)]
    assert [tuple(colors[:4]) for colors in small.colors] == 3 * [(0.8, 0.2, 0.5, 0)]
    assert (large.scale, small.scale) == ((0.4, 1.0), (0.05, 0.4))


def test_a_view_shows_the_share_of_the_picture_that_it_says():
    """On an image whose red is the column and green the row, the span of both is the box."""
    config, side = tiny_config(method="dino"), 200
    rows, columns = np.mgrid[:side, :side]
    pixels = np.stack([columns, rows, 0 * rows], -1).astype(np.uint8)
    none = ColorAugmentation(0, 0, 0, 0)
    view = View("x", (32, 32), (0.05, 0.4), (none,), PatchOrder("identity", (8, 8), 0))
    areas = []
    for position in range(300):
        shown = crop.augment_view(StoredImage(pixels), rng(0, "augment", position), view, none, config.data).astype(int)
        assert shown.shape == (32, 32, 3)
        areas.append(np.ptp(shown[..., 0]) * np.ptp(shown[..., 1]) / side**2)
    assert 0.02 < min(areas) < 0.09
    assert 0.3 < max(areas) < 0.43
    assert np.mean(areas) == pytest.approx(0.225, abs=0.04)


def test_a_picture_that_cannot_be_read_leaves_gray_views_that_are_not_valid():
    config = tiny_config({"data.source": "photo_crops"}, "dino")
    method, bad = tiny_method(config), []
    views = ExampleBuilder(config, method.patch_order(), method.eval_spec(), method.views())
    source = Source(8, lambda i: Example(b"no image", 1), str, ("a", "b"))
    fields = train_example(source, views, config, bad, 3)
    assert (fields["valid"], fields["label"], len(bad)) == (0.0, -1, 4)
    assert fields["global/patches"].shape == (2, 16, 48)
    assert np.ptp(fields["local/patches"].reshape(3, -1, 3), axis=1).max() <= 1  # of one color each


def test_all_views_of_a_picture_come_from_one_decoding(monkeypatch):
    decoded, to_rgb = [], decode.to_rgb
    config = tiny_config({"data.source": "photo_crops"}, "dino")
    method = tiny_method(config)
    views = ExampleBuilder(config, method.patch_order(), method.eval_spec(), method.views())
    monkeypatch.setattr(decode, "to_rgb", lambda image: decoded.append(1) or to_rgb(image))
    views.train(Example(np.zeros((40, 40, 3), np.uint8), 0), 0)
    assert len(decoded) == 1


def test_cached_batches_hold_the_views_and_read_back_the_same(tmp_path):
    config, method, inputs = build(**{"eval.max_examples": 16})
    folder = epath.Path(tmp_path / "out")
    write_batches(OpenedData(config), inputs, method.eval_spec(), method.patch_order(), method.views(), folder, steps=2)
    _, _, stored = build(**{"data.source": "batches", "data.path": str(tmp_path / "out")})
    for ours, theirs in ((stored.train(1), inputs.train(1)), (stored.evaluate(), inputs.evaluate())):
        one, other = next(ours), next(theirs)
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name], err_msg=name)
