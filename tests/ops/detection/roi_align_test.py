from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.ops import partitioning
from mae_jax.ops.detection import instance_masks, roi_align
from mae_jax.ops.detection.crops import CROP, PACKED, pack

GOLDEN = dict(np.load(Path(__file__).parents[2] / "golden/detection.npz"))
STRIDES = (4, 8)
CANONICAL = (12, 4)  # which shares the boxes of the golden values among the two maps
MAPS = [GOLDEN[f"align/map/{number}"] for number in range(2)]
BOXES = GOLDEN["align/boxes"]
targets = jax.jit(instance_masks.targets, static_argnums=3)


def wanted(side, samples):
    number = np.asarray(roi_align.level(BOXES, STRIDES, CANONICAL))
    assert 5 < number.sum() < len(BOXES) - 5
    both = np.stack([GOLDEN[f"align/{k}/{side}/{samples}"] for k in range(2)])
    return both[number, np.arange(len(BOXES))]


def align(form, maps, side, samples):
    each = jax.jit(lambda *arrays: form(arrays[:-1], arrays[-1], STRIDES, side, samples, CANONICAL))
    return each(*(m[0] for m in maps), BOXES)


@pytest.mark.parametrize(("form", "side", "samples"), [
    ("multiplied", 7, 0), ("multiplied", 7, 1), ("multiplied", 7, 2), ("multiplied", 14, 2),
    ("gathered", 7, 1), ("gathered", 7, 2), ("gathered", 14, 2)])
def test_features_are_those_of_torchvision(form, side, samples):
    found = align(getattr(roi_align, form), MAPS, side, samples)
    np.testing.assert_allclose(found, wanted(side, samples), atol=2e-5)


@pytest.mark.parametrize("form", ["multiplied", "gathered"])
def test_gradients_are_those_of_torchvision(form):
    def loss(values):
        found = getattr(roi_align, form)([values[0]], jnp.asarray(BOXES), (4,), 7, 2, CANONICAL)
        return (found**2).sum()

    np.testing.assert_allclose(jax.jit(jax.grad(loss))(MAPS[0]), GOLDEN["align/gradient"], atol=1e-4)


def test_boxes_that_do_not_fill_a_chunk_are_no_different(monkeypatch):
    whole = align(roi_align.multiplied, MAPS, 7, 2)
    monkeypatch.setattr(roi_align, "TOGETHER", 7)
    np.testing.assert_allclose(align(roi_align.multiplied, MAPS, 7, 2), whole, atol=2e-5)  # products of other sizes


def test_levels_are_those_of_the_pyramid_paper():
    sides = np.array([0, 10, 111, 112, 223, 224, 447, 448, 1024], np.float32)
    given = np.stack([0 * sides, 0 * sides, sides, sides], -1)
    assert roi_align.level(given, (4, 8, 16, 32)).tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize(("platform", "samples", "form"), [
    ("cpu", 2, "gathered"), ("cpu", 0, "multiplied"), ("tpu", 2, "multiplied"), ("gpu", 2, "multiplied")])
def test_the_platform_chooses_the_form_and_no_gradient_reaches_the_boxes(platform, samples, form, monkeypatch):
    called = []
    monkeypatch.setattr(partitioning, "platform", lambda: platform)
    for name in ("gathered", "multiplied"):
        kind = getattr(roi_align, name)
        monkeypatch.setattr(roi_align, name, lambda *args, kind=kind, name=name, **kwargs: (
            called.append(name), kind(*args, **kwargs))[1])
    gradient = jax.jit(jax.grad(lambda b: roi_align.roi_align(MAPS, STRIDES, b, 7, samples, CANONICAL).sum()))(
        BOXES[None])
    assert called == [form]
    assert not gradient.any()


def test_padding_gives_finite_features_and_gradients():
    nothing = np.zeros((1, 3, 4), np.float32)
    for platform_samples in (0, 2):
        found, gradient = jax.jit(jax.value_and_grad(
            lambda m, samples=platform_samples: roi_align.roi_align([m], (4,), nothing, 7, samples).sum()))(MAPS[0])
        assert np.isfinite(found)
        assert np.isfinite(gradient).all()


def crops():
    """The bitmaps of the golden values in the frames of their boxes, by the nearest cell."""
    bitmaps = np.unpackbits(GOLDEN["masks/bitmaps"], -1).astype(bool)
    found = []
    for bitmap, (x1, y1, x2, y2) in zip(bitmaps, GOLDEN["masks/boxes"], strict=True):
        share = (np.arange(CROP) + 0.5) / CROP
        found.append(bitmap[np.ix_((y1 + share * (y2 - y1)).astype(int), (x1 + share * (x2 - x1)).astype(int))])
    return np.stack(found)


def test_mask_targets_are_the_bitmaps_in_the_proposals():
    packed = pack(crops())
    assert packed.shape == (5, PACKED)
    unpacked = jax.jit(instance_masks.unpack)(packed)
    np.testing.assert_array_equal(unpacked, crops())
    found = targets(unpacked, GOLDEN["masks/boxes"], GOLDEN["masks/proposals"], 28)
    theirs = GOLDEN["masks/mean"]  # of the bitmaps; cells on an outline may differ, as crops and bitmaps do
    clear = np.abs(theirs - 0.5) > 0.35
    assert clear.mean() > 0.85
    np.testing.assert_array_equal(np.asarray(found)[clear], (theirs >= 0.5)[clear])
    assert (np.asarray(found) != (theirs >= 0.5)).mean() < 0.02


def test_a_target_is_empty_outside_its_object_and_of_an_empty_object():
    full = np.ones((2, CROP, CROP), bool)
    objects = np.array([[10, 10, 20, 20], [0, 0, 0, 0]], np.float32)
    found = targets(full, objects, np.array([[20, 0, 40, 30], [0, 0, 8, 8]], np.float32), 28)
    assert not found.any()
    half = targets(full[:1], objects[:1], np.array([[15, 10, 25, 20]], np.float32), 28)
    np.testing.assert_array_equal(half[0], np.tile(np.arange(28) < 14, (28, 1)))


def test_masks_are_pasted_as_detectron2_does():
    values = zip(GOLDEN["masks/probabilities"], GOLDEN["masks/proposals"], GOLDEN["masks/pasted"], strict=True)
    for mask, box, theirs in values:
        clear = np.abs(theirs - 0.5) > 1e-3  # which is kept in float16
        pasted = instance_masks.paste(mask, box, theirs.shape)
        assert pasted.any()
        np.testing.assert_array_equal(pasted[clear], (theirs >= 0.5)[clear])
