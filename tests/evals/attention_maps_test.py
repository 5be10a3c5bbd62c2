"""Attention maps: where patches lie, which pixels they cover, and what is chosen on which pictures."""

import jax
import numpy as np
import pytest

from mae_jax.errors import UserError
from mae_jax.evals import attention_maps, attention_overlap
from mae_jax.evals.image_grid import CAPTION, GAP
from mae_jax.losses.segmentation import IGNORED
from mae_jax.ops.resampling import upsample
from tests.helpers import margins
from tests.helpers.tiny import (
    tiny_batch,
    tiny_config,
    tiny_method,
    tiny_params,
    tiny_segment,
    tiny_segment_batch,
    tiny_state,
)
from tests.models.intermediates_test import numpy_attention


@pytest.mark.parametrize("block", [0, 1, -1])
@pytest.mark.parametrize("query", ["cls", "mean"])
def test_maps_are_rows_of_the_attention_in_raster_order(block, query):
    config = tiny_config({"data.image_size": (16, 24)})
    method, params, batch = tiny_method(config), tiny_params(config), tiny_batch(config)
    found = np.asarray(attention_maps.maps(method, params, {}, batch, block, query))
    assert found.shape == (8, 2, 4, 6)
    entering = attention_maps._entering(method, params, {}, batch, block % 2)
    weights = numpy_attention(entering, params["encoder"][f"block_{block % 2:02d}"], 2)
    rows = weights[:, :, 0] if query == "cls" else weights[:, :, 1:].mean(2)
    for image, order in enumerate(batch["order"]):
        for place, cell in enumerate(order):
            np.testing.assert_allclose(found[image, :, cell // 6, cell % 6], rows[image, :, 1 + place], rtol=1e-4)
    np.testing.assert_allclose(found.sum((2, 3)) + rows[:, :, 0], 1, atol=1e-5)


def test_an_unknown_query_or_block_is_refused():
    config = tiny_config()
    method, params, batch = tiny_method(config), tiny_params(config), tiny_batch(config)
    with pytest.raises(UserError, match="query 'class'"):
        attention_maps.maps(method, params, {}, batch, query="class")
    with pytest.raises(UserError, match="block 2"):
        attention_maps.maps(method, params, {}, batch, block=2)


def test_the_fewest_pixels_that_hold_a_share_are_kept():
    weights = np.array([[0.1, 0.4], [0.3, 0.2]]) * 7
    kept = np.asarray(attention_overlap.covers(weights, (0.3, 0.41, 0.65, 0.95)))
    np.testing.assert_array_equal(kept[0], [[0, 1], [0, 0]])
    np.testing.assert_array_equal(kept[1], [[0, 1], [1, 0]])
    np.testing.assert_array_equal(kept[2], [[0, 1], [1, 0]])
    np.testing.assert_array_equal(kept[3], [[1, 1], [1, 1]])


def numpy_overlaps(method, state, batch) -> tuple[np.ndarray, np.ndarray]:
    """Returns (IoU [masses, 1 + H] and share of foreground), means over images with foreground, pixel by pixel."""
    maps = np.asarray(attention_maps.maps(method, state.params, {}, batch))
    maps = np.concatenate([maps.mean(1, keepdims=True), maps], 1)
    large = np.asarray(upsample(maps.transpose(0, 2, 3, 1), method.grid.patch)).transpose(0, 3, 1, 2)
    classes = np.asarray(method.pixel_classes(batch))
    scores, shares = [], []
    for image, truth in enumerate(classes):
        known, wanted = truth != IGNORED, (truth != 1) & (truth != IGNORED)
        if not wanted.any():
            continue
        shares.append(wanted.sum() / known.sum())
        scores.append(np.zeros((len(attention_overlap.MASSES), maps.shape[1])))
        for (m, mass), h in ((item, h) for item in enumerate(attention_overlap.MASSES) for h in range(maps.shape[1])):
            flat = large[image, h].ravel()
            order = np.argsort(-flat)
            count = int((np.cumsum(flat[order]) / flat.sum() < mass).sum()) + 1
            kept = np.zeros(flat.size, bool)
            kept[order[:count]] = True
            kept = kept.reshape(truth.shape) & known
            scores[-1][m, h] = (kept & wanted).sum() / (kept | wanted).sum()
    return np.mean(scores, 0), np.mean(shares)


@pytest.mark.slow
def test_the_iou_reads_the_test_part_with_what_was_best_on_the_other():
    config = tiny_segment({"batch_size": 4, "method.background": 1})
    method, state = tiny_method(config), tiny_state(config)
    parts = [tiny_segment_batch(config, seed) for seed in range(3)]
    parts[0]["pixel_label"][1] = 1  # an image without foreground
    parts[1]["valid"][0] = 0
    found = attention_overlap.iou(method, state.params, {}, parts[:1], parts[1:])
    chosen, _ = numpy_overlaps(method, state, parts[0])
    assert margins.least(chosen.reshape(1, -1)) > 4e-3  # or rounding might choose another one
    mass, which = np.unravel_index(chosen.argmax(), chosen.shape)
    assert found["attention_mass"] == attention_overlap.MASSES[mass]
    assert found["attention_head"] == which - 1
    both = {name: np.concatenate([part[name] for part in parts[1:]]) for name in parts[1]}
    scores, share = numpy_overlaps(method, state, both)
    assert found["attention_iou"] == pytest.approx(scores[mass, which], abs=2e-3)
    assert found["foreground_share"] == pytest.approx(share, abs=1e-6)


def test_there_is_no_iou_without_foreground():
    config = tiny_segment()
    method, state, batch = tiny_method(config), tiny_state(config), tiny_segment_batch(config)
    empty = batch | {"pixel_label": np.zeros_like(batch["pixel_label"])}
    assert attention_overlap.iou(method, state.params, {}, [batch], [empty]) == {}
    assert attention_overlap.iou(method, state.params, {}, [], [batch]) == {}
    method = tiny_method(tiny_segment({"method.background": -1}))
    assert attention_overlap.iou(method, state.params, {}, [batch], [batch]) == {}


def test_pictures_have_a_row_for_each_image_and_a_column_for_each_head():
    config = tiny_config()
    method, params, batch = tiny_method(config), tiny_params(config), tiny_batch(config)
    few = {name: jax.numpy.asarray(value[:3]) for name, value in batch.items()}
    picture = attention_maps.picture(method, params, {}, few, query="mean", names=("a/1.png  a", "b/1.png  b", "c"))
    assert picture.shape == (2 * CAPTION + 3 * (128 + GAP + CAPTION) + GAP, 4 * (128 + GAP) + GAP, 3)
    assert picture.dtype == np.uint8


def test_colors_spread_each_map_over_the_ramp_with_rising_lightness():
    heat = np.linspace(3, 9, 12).reshape(1, 3, 4)
    found = attention_maps.colors(heat)
    np.testing.assert_array_equal(found[0, 0, 0], attention_maps.RAMP[0])
    np.testing.assert_array_equal(found[0, -1, -1], attention_maps.RAMP[-1])
    lightness = found[0].reshape(-1, 3) @ (0.299, 0.587, 0.114)
    assert (np.diff(lightness) > 0).all()
    assert (attention_maps.colors(np.full((2, 2), 5.0)) == attention_maps.RAMP[0]).all()
