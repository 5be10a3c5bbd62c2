from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.ops.detection import anchors, assignment, boxes, nms

GOLDEN = dict(np.load(Path(__file__).parents[2] / "golden/detection.npz"))
WEIGHTS = (10.0, 10.0, 5.0, 5.0)
# Op by op, each operation would be compiled on its own.
iou, clip, generalized_iou = (jax.jit(f) for f in (boxes.iou, boxes.clip, boxes.generalized_iou))
encode, decode = (jax.jit(f, static_argnums=2) for f in (boxes.encode, boxes.decode))
match = jax.jit(assignment.match, static_argnums=(2, 3, 4, 5))
sample = jax.jit(assignment.sample, static_argnums=(2, 3))
kept = jax.jit(nms.kept, static_argnums=2)
EMPTY = np.array([[3, 3, 3, 3], [5, 2, 4, 8]], np.float32)  # without a side, and with one below 0


def test_overlaps_are_those_of_torchvision():
    overlap = iou(GOLDEN["match/objects"], GOLDEN["match/proposals"])
    np.testing.assert_allclose(overlap, GOLDEN["match/iou"], atol=1e-6)


def test_generalized_overlaps_are_those_of_torchvision():
    objects, proposals = GOLDEN["match/objects"], GOLDEN["match/proposals"]
    found = generalized_iou(np.repeat(objects[:, None], len(proposals), 1), np.broadcast_to(
        proposals, (len(objects), *proposals.shape)))
    np.testing.assert_allclose(found, GOLDEN["match/giou"], atol=1e-6)


def test_generalized_overlaps_of_empty_boxes_have_finite_gradients():
    assert np.isfinite(jax.jit(jax.grad(lambda a: boxes.generalized_iou(a, EMPTY).sum()))(EMPTY)).all()


def test_empty_boxes_overlap_nothing_and_their_gradients_are_finite():
    some = np.concatenate([EMPTY, [[0, 0, 6, 6]]]).astype(np.float32)
    overlap, gradient = jax.jit(jax.value_and_grad(lambda a: boxes.iou(a, some).sum()))(some)
    assert overlap == 1  # the third with itself
    assert np.isfinite(gradient).all()


def test_boxes_are_coded_as_torchvision_does():
    encoded = encode(GOLDEN["coder/targets"], GOLDEN["coder/proposals"], WEIGHTS)
    np.testing.assert_allclose(encoded, GOLDEN["coder/encoded"], rtol=1e-5, atol=1e-4)
    decoded = decode(GOLDEN["coder/deltas"], GOLDEN["coder/proposals"], WEIGHTS)
    assert (GOLDEN["coder/deltas"] / WEIGHTS)[:, 2:].max() > boxes.MAX_SCALE  # some are cut
    np.testing.assert_allclose(decoded, GOLDEN["coder/decoded"], rtol=1e-5, atol=1e-3)


def test_decoding_is_the_inverse_of_encoding():
    given, proposals = GOLDEN["coder/targets"], GOLDEN["coder/proposals"]
    again = decode(encode(given, proposals, WEIGHTS), proposals, WEIGHTS)
    np.testing.assert_allclose(again, given, atol=1e-4)


def test_empty_boxes_are_coded_as_finite_numbers_with_finite_gradients():
    for function in (boxes.encode, boxes.decode):
        value, gradient = jax.jit(jax.value_and_grad(lambda a, f=function: f(a, EMPTY, WEIGHTS).sum()))(EMPTY)
        assert np.isfinite(value)
        assert np.isfinite(gradient).all()


def test_boxes_are_cut_to_each_image_without_its_padding():
    given = np.tile(np.array([[-5, -5, 90, 90]], np.float32), (2, 1, 1))
    cut = clip(given, np.array([[40, 60], [96, 30]], np.int32))
    np.testing.assert_array_equal(cut, [[[0, 0, 60, 40]], [[0, 0, 30, 90]]])


def test_anchors_are_torchvision_s_before_it_rounds_them():
    found = anchors.anchors((48, 64), (4, 8), (32, 64))
    assert [len(level) for level in found] == [12 * 16 * 3, 6 * 8 * 3]
    np.testing.assert_allclose(np.concatenate(found), GOLDEN["anchors"], atol=1e-5)


def test_a_side_that_a_stride_does_not_divide_has_a_last_cell():
    found = anchors.anchors((10, 8), (4,), (8,), (1.0,))
    np.testing.assert_array_equal(found[0].reshape(3, 2, 4)[2, 1], [0, 4, 8, 12])


@pytest.mark.parametrize(("name", "rules"), [("rpn", (0.7, 0.3, True)), ("roi", (0.5, 0.5, False))])
def test_boxes_match_as_in_torchvision(name, rules):
    found = match(GOLDEN["match/iou"], np.ones(6, bool), *rules)
    wanted = GOLDEN[f"match/{name}"]  # -1: negative, -2: neither
    assert set(np.unique(np.minimum(wanted, 0))) == ({0, -1, -2} if name == "rpn" else {0, -1})
    np.testing.assert_array_equal(found.kind == assignment.POSITIVE, wanted >= 0)
    np.testing.assert_array_equal(found.kind == assignment.NEGATIVE, wanted == -1)
    np.testing.assert_array_equal(found.object[wanted >= 0], wanted[wanted >= 0])


def test_padding_and_the_order_of_objects_change_no_match():
    iou, rules = GOLDEN["match/iou"], (0.7, 0.3, True)
    alone = match(iou, np.ones(6, bool), *rules)
    # Padding may lie anywhere: what overlaps it does not match, and that it overlaps nothing makes nothing positive.
    padded = np.concatenate([iou, np.zeros((2, 300), np.float32), np.ones((1, 300), np.float32)])
    order = np.array([8, 5, 4, 7, 3, 2, 6, 1, 0])
    found = match(padded[order], np.arange(9)[order] < 6, *rules)
    np.testing.assert_array_equal(found.kind, alone.kind)
    positive = alone.kind == assignment.POSITIVE
    np.testing.assert_array_equal(order[found.object][positive], alone.object[positive])


def test_low_quality_matches_may_have_to_reach_some_overlap():
    overlap = np.array([[0.35, 0.1, 0.0], [0.05, 0.2, 0.1]], np.float32)
    kinds = [match(overlap, np.ones(2, bool), 0.7, 0.3, True, least).kind.tolist() for least in (0.0, 0.3)]
    assert kinds == [[1, 1, 0], [1, 0, 0]]


def test_without_objects_all_boxes_are_negative():
    found = match(np.zeros((3, 50), np.float32), np.zeros(3, bool), 0.7, 0.3, True)
    assert (found.kind == assignment.NEGATIVE).all()


@pytest.mark.parametrize(("positive", "negative", "expected"), [
    (50, 200, (8, 24)), (3, 200, (3, 29)), (50, 5, (8, 5)), (0, 40, (0, 32)), (2, 3, (2, 3))])
def test_a_sample_has_positives_first_and_fills_up_with_negatives(positive, negative, expected):
    kind = np.random.default_rng(0).permutation([1] * positive + [0] * negative + [-1] * 30).astype(np.int32)
    index, found = sample(jax.random.key(0), kind, 32, 8)
    used = np.asarray(found) >= 0
    assert (found[:expected[0]] == 1).all()
    assert ((found == 1).sum(), (found == 0).sum()) == expected
    assert len(set(np.asarray(index)[used].tolist())) == used.sum()
    np.testing.assert_array_equal(kind[index[used]], found[used])


def test_every_candidate_is_drawn_equally_often():
    kind = jnp.array([1] * 5 + [0] * 7, jnp.int32)
    index, found = jax.jit(jax.vmap(lambda key: assignment.sample(key, kind, 4, 2)))(
        jax.random.split(jax.random.key(1), 4000))
    assert (found == np.array([1, 1, 0, 0])).all()
    shares = np.bincount(np.ravel(index), minlength=12) / 4000
    np.testing.assert_allclose(shares, [2 / 5] * 5 + [2 / 7] * 7, atol=0.04)  # 5 standard deviations


def greedy(given, valid, threshold, group):
    keep: list[int] = []
    overlap = np.asarray(iou(given, given))
    for j in range(len(given)):
        if valid[j] and not any(overlap[i, j] > threshold and group[i] == group[j] for i in keep):
            keep.append(j)
    return np.isin(np.arange(len(given)), keep)


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7])
@pytest.mark.parametrize("crowded", [3, 60])
def test_suppression_keeps_what_a_greedy_loop_keeps(threshold, crowded):
    draws = np.random.default_rng(crowded)
    centers = draws.uniform(20, 80, (crowded, 2))[draws.integers(crowded, size=200)] + draws.normal(0, 4, (200, 2))
    half = draws.uniform(6, 12, (200, 2))
    given = np.concatenate([centers - half, centers + half], -1).astype(np.float32)
    given[50] = given[40]  # an equal one, which goes
    valid, group = draws.random(200) < 0.9, draws.integers(2, size=200).astype(np.int32)
    wanted = greedy(given, valid, threshold, group)
    assert 0 < wanted.sum() < valid.sum()
    np.testing.assert_array_equal(kept(given, valid, threshold, group), wanted)
    np.testing.assert_array_equal(kept(given, valid, threshold), greedy(given, valid, threshold, np.zeros(200)))


def test_a_chain_of_suppressions_is_followed_to_its_end():
    start = jnp.arange(64.0) * 4
    chain = jnp.stack([start, jnp.zeros(64), start + 10, jnp.full(64, 10.0)], -1)  # each overlaps the next alone
    np.testing.assert_array_equal(kept(chain, jnp.ones(64, bool), 0.4), np.arange(64) % 2 == 0)
