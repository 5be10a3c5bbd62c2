"""Mask R-CNN on a plain ViT: its loss, what it learns, what padding must not change, and what it finds."""

import jax
import numpy as np
import pytest

from mae_jax.errors import UserError
from mae_jax.losses import detection as losses
from mae_jax.models.map_norms import MOMENTS
from mae_jax.ops.detection import boxes, selection
from mae_jax.ops.detection.instance_masks import paste
from mae_jax.param_tree import flatten
from tests.helpers.scenes import scene_batch, shape
from tests.helpers.tiers import slow
from tests.helpers.tiny import tiny_config, tiny_loss, tiny_method, tiny_params, tiny_state, tiny_step

CASCADE = {"method.stage_overlaps": (0.5, 0.6, 0.7), "method.stage_weights": (1.0, 0.5, 0.25)}


def detector(fields=None):
    return tiny_config(fields, "detection")


COMPILED = {}  # by config: most tests look at the same program


def loss_and_grads(config, params, batch):
    """Returns loss, metrics (name → mean) and gradients by path."""
    method = tiny_method(config)
    compute = COMPILED.setdefault(str(config), jax.jit(jax.value_and_grad(
        lambda p, b: method.loss(p, {}, b, jax.random.key(0), 0, True), has_aux=True)))
    (loss, (metrics, _)), grads = compute(params, batch)
    means = {name: float(total / max(weight, 1)) for name, (total, weight) in metrics.items()}
    return float(loss), means, flatten(grads)


@pytest.fixture(scope="module")
def found():
    """A loss with its metrics and gradients, from random parameters."""
    config = detector()
    params, batch = tiny_params(config), scene_batch(config)
    return config, params, batch, loss_and_grads(config, params, batch)


def test_a_detector_starts_at_the_losses_of_knowing_nothing():
    config = detector()
    batch = scene_batch(config)
    params, extras = jax.jit(tiny_method(config).init)(jax.random.key(0), batch)
    assert extras == {}
    loss, means, _ = loss_and_grads(config, params, batch)
    assert means["loss_objectness"] == pytest.approx(np.log(2), rel=0.05)
    assert means["loss_classes"] == pytest.approx(np.log(4), rel=0.1)
    assert means["loss_masks"] == pytest.approx(np.log(2), rel=0.05)
    assert 0 < means["loss_proposals"] < 0.5
    assert 0 < means["loss_boxes"] < 1
    assert loss == pytest.approx(sum(value for name, value in means.items() if name.startswith("loss_")), rel=1e-5)


def test_the_order_of_objects_changes_nothing(found):
    config, params, batch, (loss, means, grads) = found
    order = np.array([3, 1, 0, 2])
    moved = batch | {name: batch[name][:, order] for name in ("box", "box_class", "box_valid", "box_mask")}
    other, others, their_grads = loss_and_grads(config, params, moved)
    assert means["positive_regions"] > 0
    assert other == pytest.approx(loss, rel=1e-5)
    assert others == pytest.approx(means, rel=1e-4)
    for name, grad in grads.items():
        np.testing.assert_allclose(their_grads[name], grad, atol=1e-4 * abs(grad).max() + 1e-7, err_msg=name)


def test_twice_as_much_padding_changes_nothing(found):
    _, params, batch, (loss, means, _) = found
    wide = {name: np.pad(batch[name], ((0, 0), (0, 4), *((0, 0),) * (batch[name].ndim - 2)))
            for name in ("box", "box_class", "box_valid", "box_mask")}
    method = tiny_method(detector({"data.max_objects": 8}))
    other, (metrics, _) = tiny_loss(method)(params, {}, batch | wide, jax.random.key(0), 0, True)
    others = {name: float(total / weight) for name, (total, weight) in metrics.items()}
    assert other == pytest.approx(loss, rel=1e-6)
    assert others == pytest.approx(means, rel=1e-6)


def test_what_lies_past_an_images_size_is_not_seen(found):
    config, params, batch, _ = found
    small = batch | {"size": np.tile(np.array([10, 13], np.int32), (8, 1))}
    patches = small["patches"].reshape(8, 4, 4, 4, 4, 3).swapaxes(2, 3).reshape(8, 16, 16, 3).copy()
    patches[:, 10:], patches[:, :, 13:] = 7, 250
    other = small | {"patches": patches.reshape(8, 4, 4, 4, 4, 3).swapaxes(2, 3).reshape(8, 16, 48)}
    first, second = (loss_and_grads(config, params, b)[0] for b in (small, other))
    assert first == second
    patches[:, 9, 12] = 255
    inside = small | {"patches": patches.reshape(8, 4, 4, 4, 4, 3).swapaxes(2, 3).reshape(8, 16, 48)}
    assert loss_and_grads(config, params, inside)[0] != first


def test_an_image_without_objects_trains_what_says_so_and_padding_nothing(found):
    config, params, *_ = found
    empty = scene_batch(config, objects=0)
    _, means, grads = loss_and_grads(config, params, empty)
    assert means["loss_boxes"] == means["loss_masks"] == means["loss_proposals"] == 0
    assert means["loss_classes"] > 0
    assert all(np.isfinite(grad).all() for grad in grads.values())
    assert not any(grad.any() for name, grad in grads.items() if name.startswith("masks/"))
    assert grads["boxes/logits/kernel"].any()
    loss, _, grads = loss_and_grads(config, params, scene_batch(config) | {"valid": np.zeros(8, np.float32)})
    assert loss == 0
    assert not any(grad.any() for grad in grads.values())


def test_padding_images_leave_the_losses_of_others_alone(found):
    config, params, batch, _ = found
    half = batch | {"valid": (np.arange(8) < 4).astype(np.float32)}
    other = scene_batch(config, seed=5)
    mixed = half | {name: np.concatenate([value[:4], other[name][4:]]) for name, value in batch.items()
                    if name != "valid"}
    assert loss_and_grads(config, params, mixed)[1] == pytest.approx(
        loss_and_grads(config, params, half)[1], rel=1e-6)


@pytest.mark.parametrize(("fields", "terms"), [
    ({}, {"objectness", "proposals", "classes", "boxes", "masks"}),
    slow(CASCADE | {"method.class_boxes": False}, {"objectness", "proposals", "masks", *(
        f"{name}{stage}" for name in ("classes", "boxes") for stage in ("", "2", "3"))}),
    slow(CASCADE | {
        "method.box_loss": "giou", "method.box_weight": 10.0, "method.pyramid": "blocks", "method.beta": 1 / 9,
        "method.norm": "none", "method.class_token": True, "method.window": 0, "method.global_blocks": (),
        "method.relative_positions": False}, {"objectness", "proposals", "masks", *(
        f"{name}{stage}" for name in ("classes", "boxes") for stage in ("", "2", "3"))})],
    ids=["one stage", "cascade", "cascade of iBOT"])
def test_every_parameter_has_a_gradient_and_the_loss_its_terms(fields, terms):
    config = detector(fields)
    loss, means, grads = loss_and_grads(config, tiny_params(config), scene_batch(config))
    assert {name.removeprefix("loss_") for name in means if name.startswith("loss_")} == terms
    weights = tiny_method(config).weights()
    wanted = sum(means[f"loss_{name}"] * weights.get(name, 1) for name in terms)
    assert loss == pytest.approx(wanted, rel=1e-5)
    assert all(np.isfinite(grad).all() for grad in grads.values())
    assert [name for name, grad in grads.items() if not grad.any()] == []


@pytest.mark.slow
def test_no_gradient_goes_through_proposals(found, monkeypatch):
    """The regions' losses move the head of proposals by nothing."""
    config, params, batch, _ = found
    monkeypatch.setitem(COMPILED, str(config), None)
    COMPILED.pop(str(config))
    monkeypatch.setattr(losses, "proposal_losses", lambda *_: ((jax.numpy.zeros(()), jax.numpy.ones(())),) * 2)
    _, _, grads = loss_and_grads(config, params, batch)
    assert not any(grad.any() for name, grad in grads.items() if name.startswith("proposals/"))
    assert grads["pyramid/output0/kernel"].any()


def test_detections_are_sorted_inside_the_image_and_padded(found):
    _, params, batch, _ = found
    config = detector({"method.score": 0.2, "method.max_detections": 40})
    method = tiny_method(config)
    batch = batch | {"size": np.tile(np.array([10, 13], np.int32), (8, 1))}
    found = jax.device_get(jax.jit(method.detections)(params, {}, batch))
    assert {name: value.shape for name, value in found.items()} == {
        "box": (8, 40, 4), "score": (8, 40), "box_class": (8, 40), "detected": (8, 40), "mask": (8, 40, 28, 28),
        "crowded": (8,)}
    real = found["detected"] > 0
    assert real.any()
    assert not real.all()
    assert (np.diff(found["score"], axis=1) <= 0).all()
    assert (found["score"][real] > 0.2).all()
    assert not found["box"][~real].any()
    x1, y1, x2, y2 = found["box"][real].T
    assert ((x1 >= 0) & (x1 < x2) & (x2 <= 13)).all()
    assert ((y1 >= 0) & (y1 < y2) & (y2 <= 10)).all()
    assert ((found["mask"] >= 0) & (found["mask"] <= 1)).all()
    for row in range(8):
        overlap = np.asarray(boxes.iou(found["box"][row], found["box"][row]))
        same = (found["box_class"][row][:, None] == found["box_class"][row]) & real[row] & real[row][:, None]
        assert overlap[same & ~np.eye(40, dtype=bool)].max(initial=0) <= 0.5 + 1e-6


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_four_scenes_are_learned_by_heart_boxes_classes_and_masks():
    config = detector({
        "batch_size": 4, "data.image_size": (64, 64), "model.patch": (8, 8), "model.width": 64, "model.heads": 4,
        "method.anchor_sizes": (12.0, 20.0, 32.0), "method.scales": (2.0, 1.0, 0.5), "method.channels": 32,
        "method.anchor_samples": 64, "method.candidates": (96, 96), "method.proposals": (48, 48), "method.regions": 32,
        "method.box_width": 64, "method.mask_convs": 2, "method.max_detections": 10,
        "optim.lr": 3e-3 * 64, "optim.warmup": "20 steps", "optim.clip": 5.0, "train.duration": "400 steps"})
    method, batch = tiny_method(config), scene_batch(config)
    state = tiny_state(config)._replace(params=jax.jit(method.init)(jax.random.key(0), batch)[0])
    step = tiny_step(config)
    for _ in range(400):
        state, _ = step(state, batch)
    found = jax.device_get(jax.jit(method.detections)(state.params, {}, batch))
    for row in range(4):
        sure = found["score"][row] > 0.5
        real = batch["box_valid"][row] > 0
        assert sure.sum() == real.sum()
        overlap = np.asarray(boxes.iou(batch["box"][row][real], found["box"][row][sure]))
        nearest = overlap.argmax(1)
        assert (overlap.max(1) > 0.8).all()
        np.testing.assert_array_equal(found["box_class"][row][sure][nearest], batch["box_class"][row][real])
        for place, k in enumerate(nearest):
            x1, y1, x2, y2 = batch["box"][row][place].astype(int)
            wanted = np.zeros((64, 64), bool)
            wanted[y1:y2, x1:x2] = shape(batch["box_class"][row][place], y2 - y1, x2 - x1)
            mask = paste(found["mask"][row][sure][k], found["box"][row][sure][k], (64, 64))
            assert (mask & wanted).sum() / (mask | wanted).sum() > 0.75


def test_proposals_are_the_likeliest_boxes_that_do_not_overlap_much():
    anchors = [np.array([[0, 0, 8, 8], [0, 0, 9, 8], [8, 8, 14, 16], [2, 2, 2, 9]], np.float32),
               np.array([[0, 0, 8, 8]], np.float32)]
    logits = [np.array([2.0, 3.0, -1.0, 9.0], np.float32), np.array([0.5], np.float32)]
    deltas = [np.zeros((*level.shape, 4), np.float32) for level in logits]
    box, there = jax.jit(lambda *a: selection.proposals(*a, anchors, 3, 5, 0.7))(
        logits, deltas, np.array([16, 12], np.int32))
    # The third is cut to the image; the last one of the first map is empty; the first one overlaps the second. Of
    # the first map three are considered: without the empty one, two.
    np.testing.assert_array_equal(box[:2], [[0, 0, 9, 8], [0, 0, 8, 8]])
    assert there.tolist() == [True, True, False, False, False]


def test_regions_are_of_proposals_and_objects_and_padding_is_none():
    objects = selection.Objects(np.array([[0, 0, 10, 10], [0, 0, 0, 0]], np.float32), np.array([2, 0], np.int32),
                                np.array([True, False]))
    proposals = np.array([[0, 0, 10, 8], [20, 20, 30, 30], [0, 0, 10, 10]], np.float32)
    region, training = jax.jit(lambda key: selection.sampled_regions(
        key, proposals, np.array([True, True, False]), objects, 0.5, 6, 3))(jax.random.key(0))
    kinds = {(int(i), int(kind)) for i, kind in zip(training.index, training.kind, strict=True) if kind >= 0}
    assert kinds == {(0, 1), (3, 1), (1, 0)}  # not the third proposal, nor the second object
    assert training.kind.tolist() == [1, 1, 0, -1, -1, -1]
    assert region.shape == (6, 4)


def test_detections_are_of_pairs_of_region_and_class():
    scores = np.array([[0.9, 0.6, 0.01], [0.8, 0.02, 0.3], [0.7, 0.7, 0.7]], np.float32)
    deltas = np.zeros((3, 3, 4), np.float32)
    deltas[0, 1] = 1, 0, 0, 0  # in tenths of its width, to the right
    regions = np.array([[0, 0, 10, 10], [0, 0, 10, 9], [5, 5, 9, 9]], np.float32)
    found = jax.jit(lambda *a: selection.detections(*a, (10, 10, 5, 5), 0.05, 0.5, 100, 5))(
        scores, deltas, regions, np.array([True, True, False]), np.array([20, 20], np.int32))
    np.testing.assert_allclose(found["score"], [0.9, 0.6, 0.3, 0, 0])
    assert found["box_class"].tolist() == [0, 1, 2, 0, 0]
    np.testing.assert_allclose(found["box"][:3], [[0, 0, 10, 10], [1, 0, 11, 10], [0, 0, 10, 9]], atol=1e-5)
    assert found["crowded"] == 0
    few = jax.jit(lambda *a: selection.detections(*a, (10, 10, 5, 5), 0.05, 0.5, 3, 5))(
        scores, deltas, regions, np.array([True, True, False]), np.array([20, 20], np.int32))
    assert few["crowded"] == 1


@pytest.mark.parametrize(("blocks", "frozen"), [(-1, ()), (1, ("patch_embed", "pos_embed", "block_00")),
                                                (0, ("patch_embed", "pos_embed", "block_00", "block_01"))])
def test_so_many_of_the_last_blocks_learn_and_pyramid_and_heads_always(blocks, frozen):
    config = detector({"method.train_blocks": blocks, "model.positions": "learned"})
    names, learns = flatten(tiny_params(config)), tiny_method(config).is_trainable
    held = tuple(f"encoder/{part}" for part in frozen)
    assert {name for name in names if not learns(name)} == {name for name in names if held and name.startswith(held)}


@pytest.mark.slow
def test_no_gradient_reaches_an_encoder_that_is_held():
    config = detector({"method.train_blocks": 0})
    grads = loss_and_grads(config, tiny_params(config), scene_batch(config))[2]
    assert not any(np.any(grad) for name, grad in grads.items() if name.startswith("encoder/"))
    assert all(np.any(grads[f"{part}/kernel"]) for part in ("boxes/logits", "masks/logits", "proposals/conv0"))


def test_weight_decay_is_as_detectron2_has_it():
    names = flatten(tiny_params(detector({"model.positions": "learned"})))
    kept = {which: {name for name in names if not tiny_method(detector({
        "method.decayed": which, "model.positions": "learned"})).decays(name)}
        for which in ("detectron2", "all", "kernels", "matrices")}
    assert kept["all"] == set()
    assert kept["detectron2"] == {"encoder/pos_embed", *(
        f"encoder/block_0{block}/norm{k}/{part}" for block in (0, 1) for k in (1, 2) for part in ("scale", "bias"))}
    assert kept["kernels"] == {name for name in names if not name.endswith("/kernel")}
    assert kept["matrices"] == {name for name in names if not name.endswith(("/kernel", "/pos_embed"))}


@pytest.mark.slow
@pytest.mark.parametrize(("fields", "parts"), [
    ({"method.norm": "batch", "method.box_convs": 1}, {"pyramid", "boxes", "masks"}),
    ({"method.norm": "none", "method.box_norm": "batch", "method.box_convs": 1, **CASCADE},
     {"boxes", "boxes1", "boxes2"}),
    ({"method.norm": "none", "method.pyramid": "blocks", "method.scales": (4.0, 2.0),
      "method.upsampling_norm": "batch"}, {"pyramid"})], ids=["all", "boxes alone", "upsampled map alone"])
def test_batch_norms_see_what_counts_and_what_they_saw_is_kept_for_detections(fields, parts):
    config = detector(fields)
    method, batch = tiny_method(config), scene_batch(config)
    params, extras = jax.jit(method.init)(jax.random.key(0), batch)
    assert set(extras[MOMENTS]) == parts
    compute, key = tiny_loss(method), jax.random.key(0)
    half = batch | {"valid": (np.arange(8) < 4).astype(np.float32)}
    other = scene_batch(config, seed=5)
    mixed = half | {name: np.concatenate([value[:4], other[name][4:]]) for name, value in batch.items()
                    if name != "valid"}
    (loss, (_, after)), (same, (_, also)) = (compute(params, extras, each, key, 0, True) for each in (half, mixed))
    assert float(same) == pytest.approx(float(loss), rel=1e-6)
    for name, value in flatten(after).items():
        np.testing.assert_allclose(flatten(also)[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
        assert (value != flatten(extras)[name]).any(), name
    _, (_, untouched) = compute(params, after, batch | {"valid": np.zeros(8, np.float32)}, key, 0, True)
    _, (_, judged) = compute(params, after, batch, key, 0, False)
    for name, value in flatten(after).items():
        np.testing.assert_array_equal(flatten(untouched)[name], value, err_msg=name)
        np.testing.assert_array_equal(flatten(judged)[name], value, err_msg=name)
    before, found = (jax.jit(method.detections)(params, each, batch) for each in (extras, after))
    assert all(np.isfinite(value).all() for value in found.values())
    assert (np.asarray(before["score"]) != np.asarray(found["score"])).any()


@pytest.mark.slow
def test_flops_agree_with_the_compilers_count_of_the_forward_pass():
    config = detector({"data.image_size": (64, 64), "method.window": 4, "method.scales": (4.0, 2.0, 1.0, 0.5),
                       "method.anchor_sizes": (4.0, 8.0, 16.0, 32.0, 64.0), "method.channels": 32, "batch_size": 1,
                       "model.width": 64, "model.heads": 4, "method.box_convs": 2, "method.mask_convs": 2,
                       "method.relative_positions": False})
    method = tiny_method(config)
    params, _ = jax.eval_shape(method.init, jax.random.key(0), method.batch_spec())

    def forward(params, batch, regions, wide):
        """All matrix products but those of RoIAlign, which CPUs have not."""
        maps, _ = method.maps(params, {}, batch)
        return (method.ask_anchors(params, maps), method.box_heads["boxes"].apply({"params": params["boxes"]}, regions),
                method.mask_head.apply({"params": params["masks"]}, wide))

    given = [jax.ShapeDtypeStruct((1, count, side, side, 32), np.float32) for count, side in ((16, 7), (4, 14))]
    lowered = jax.jit(forward).lower(params, method.batch_spec(), *given)
    assert method.forward_flops() == pytest.approx(lowered.cost_analysis()["flops"], rel=0.05)


@pytest.mark.parametrize(("fields", "line"), [
    ({"method.global_blocks": (1, 0)}, "method.global_blocks=(1, 0); expected some of the blocks 0 to 1, ascending"),
    ({"method.global_blocks": (2,)}, "expected some of the blocks 0 to 1"),
    ({"method.scales": (1.0, 2.0)}, "method.scales=(1.0, 2.0); expected some of (4.0, 2.0, 1.0, 0.5)"),
    ({"method.scales": (4.0, 1.0)}, "each half of the one before"),
    ({"method.region_positives": 0.0}, "method.region_positives=0.0; expected a share that is at least "
     "one of the method.regions=16"),
    ({"method.anchor_positives": 0.01}, "expected a share that is at least one of the method.anchor_samples=32"),
    ({"method.pyramid": "blocks", "method.map_blocks": (0,), "method.scales": (1.0,), "method.anchor_sizes": (8.0,)},
     "the last block, 1, among them"),
    ({"optim.milestones": (0.5,), "optim.schedule": "poly"}, "optim.milestones are a schedule of their own"),
    ({"method.anchor_sizes": (8.0,)}, "expected 2 sizes, one for each of method.scales, or one more"),
    ({"method.pyramid": "block"}, "did you mean 'blocks'?"),
    ({"method.pyramid": "blocks", "method.map_blocks": (1,)}, "method.map_blocks=(1,); expected 2 blocks"),
    ({"method.stage_overlaps": (0.5, 0.6)}, "expected one stage, or the three of a cascade"),
    ({"method.class_token": True}, "method.class_token=True; expected False: it has no place in windows"),
    ({"method.candidates": (10,)}, "method.candidates=(10,); expected two numbers"),
    ({"method.train_blocks": 3}, "method.train_blocks=3; expected 0 to 2, or -1 for the whole encoder"),
    ({"method.allowed_border": -2}, "method.allowed_border=-2; expected 0 or more pixels, or -1 for any number"),
    ({"method.score": 1.5}, "method.score=1.5; expected 0 to 1"),
    ({"method.regions": 0}, "method.regions=0; expected more than 0"),
    ({"model.patch": (4, 2)}, "need square patches"),
    ({"method.scales": (1.0, 0.5), "data.image_size": (12, 16)}, "a map at half of that needs even numbers"),
])
def test_fields_that_cannot_work_are_refused_in_one_line(fields, line):
    with pytest.raises(UserError, match=r"^[^\n]+$") as error:
        detector(fields)
    assert line in str(error.value)
