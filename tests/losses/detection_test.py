"""The losses of detection against torchvision's, and against their formulas written out in NumPy for each sample."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.losses import detection
from mae_jax.ops.detection.boxes import decode

proposal_losses = jax.jit(detection.proposal_losses, static_argnums=5)
region_losses = jax.jit(detection.region_losses)
GOLDEN = dict(np.load(Path(__file__).parents[1] / "golden/detection.npz"))
DRAWS = np.random.default_rng(0)
KIND = np.array([[1, 1, 0, 0, -1], [1, 0, 0, -1, -1]], np.int32)
TARGETS = np.where(KIND[..., None] == 1, DRAWS.normal(size=(2, 5, 4)), np.nan).astype(np.float32)


def quotients(terms):
    return [value / weight for value, weight in terms]


def test_losses_are_torchvisions():
    given = {name.removeprefix("loss/"): value for name, value in GOLDEN.items() if name.startswith("loss/")}
    kind, targets, positive = given["kind"], given["targets"], given["kind"] == 1
    samples = (kind >= 0).sum()  # which torchvision divides by, and we by all that could have been sampled
    found = proposal_losses(given["objectness"], given["proposal_deltas"], kind, targets, np.float32(2), 1 / 9)
    np.testing.assert_allclose(quotients(found), given["of_proposals"] * samples / kind.size, rtol=1e-5)
    own = np.take_along_axis(given["deltas"], given["label"][..., None, None], 2)[:, :, 0]
    assert np.abs(own - targets)[positive].min() > 1 / 9
    (classes, count), (boxes, _) = region_losses(given["logits"], given["deltas"], kind, given["label"], targets)
    smooth = boxes - 4 * positive.sum() / 18  # theirs, since all errors are above 1 / 9
    np.testing.assert_allclose(np.stack([classes, smooth]) / count, given["of_regions"], rtol=1e-5)
    found = jax.jit(detection.mask_loss)(given["mask_logits"], given["label"], given["mask_targets"], positive)
    np.testing.assert_allclose(quotients([found]), [given["of_masks"]], rtol=1e-5)


def test_generalized_iou_loss_is_torchvisions():
    found, targets = GOLDEN["loss/pairs"][:, :, None]  # [R, 1, 4] each
    kind = np.ones((1, 1), np.int32)

    @jax.jit
    @jax.vmap
    def loss(found, target):
        return detection.region_losses(np.zeros((1, 1, 2), np.float32), found[None, :, None], kind, 0 * kind,
                                       target[None], lambda boxes: boxes)[1][0]

    np.testing.assert_allclose(loss(found, targets), GOLDEN["loss/of_pairs"], rtol=1e-5)


def entropy(logit, truth):
    chance = 1 / (1 + np.exp(-np.float64(logit)))
    return -np.log(chance if truth else 1 - chance)


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_proposals_are_divided_by_the_samples_that_an_image_could_have(beta):
    logits, deltas = (DRAWS.normal(size=(2, 5, *more)).astype(np.float32) for more in ((), (4,)))
    objectness, boxes = proposal_losses(logits, deltas, KIND, TARGETS, np.float32(2), beta)
    wanted = sum(entropy(logits[i], KIND[i]) for i in np.ndindex(2, 5) if KIND[i] >= 0)
    np.testing.assert_allclose(objectness, (wanted, 10), rtol=1e-5)
    error = np.abs(deltas - TARGETS)[KIND == 1]
    smooth = np.where(error < beta, error**2 / max(2 * beta, 1e-9), error - beta / 2)
    assert ((error < 1).any(), (error > 1).any()) == (True, True)
    np.testing.assert_allclose(boxes, (smooth.sum(), 10), rtol=1e-5)


@pytest.mark.parametrize("specific", [True, False])
def test_regions_are_divided_by_all_that_were_sampled(specific):
    logits = DRAWS.normal(size=(2, 5, 4)).astype(np.float32)
    deltas = DRAWS.normal(size=(2, 5, 3 if specific else 1, 4)).astype(np.float32)
    classes = DRAWS.integers(3, size=(2, 5)).astype(np.int32)
    found, boxes = region_losses(logits, deltas, KIND, classes, TARGETS)
    truth = np.where(KIND == 1, classes, 3)  # the background's is the last
    chances = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    used = [i for i in np.ndindex(2, 5) if KIND[i] >= 0]
    np.testing.assert_allclose(found, (-sum(np.log(chances[(*i, truth[i])]) for i in used), 7), rtol=1e-5)
    wanted = sum(np.abs(deltas[(*i, classes[i] * specific)] - TARGETS[i]).sum() for i in used if KIND[i] == 1)
    np.testing.assert_allclose(boxes, (wanted, 7), rtol=1e-5)


def test_boxes_may_be_judged_by_how_they_overlap():
    proposals = np.tile(np.array([10, 10, 30, 30], np.float32), (2, 5, 1))
    deltas = np.zeros((2, 5, 1, 4), np.float32)
    targets = np.where(KIND[..., None] == 1, np.array([1, 0, 0, 0], np.float32), np.nan)  # one width to the right

    def loss(deltas):
        return detection.region_losses(np.zeros((2, 5, 4), np.float32), deltas, KIND, np.zeros((2, 5), np.int32),
                                       targets, lambda d: decode(d, proposals, (1, 1, 1, 1)))[1][0]

    value, gradient = jax.jit(jax.value_and_grad(loss))(deltas)
    np.testing.assert_allclose(value, 3 * 1.0, rtol=1e-6)  # side by side: overlap 0, and nothing between them
    assert np.isfinite(gradient).all()
    assert (gradient[KIND == 1][..., 0] < 0).all()
    assert not gradient[KIND != 1].any()


def test_masks_are_a_mean_over_the_positives_of_their_own_classes():
    logits = DRAWS.normal(size=(2, 5, 2, 2, 3)).astype(np.float32)
    truth = DRAWS.integers(2, size=(2, 5, 2, 2)).astype(np.float32)
    classes = DRAWS.integers(3, size=(2, 5)).astype(np.int32)
    found = jax.jit(detection.mask_loss)(logits, classes, truth, KIND == 1)
    wanted = sum(np.mean([entropy(logits[(*i, *cell, classes[i])], truth[(*i, *cell)]) for cell in np.ndindex(2, 2)])
                 for i in np.ndindex(2, 5) if KIND[i] == 1)
    np.testing.assert_allclose(found, (wanted, 3), rtol=1e-5)


def test_without_positives_the_losses_of_boxes_and_masks_and_all_gradients_are_0():
    nothing = jnp.full((2, 5), -1, jnp.int32)

    def losses(logits, deltas, masks):
        parts = [*detection.proposal_losses(logits[..., 0], deltas, nothing, TARGETS, jnp.float32(2)),
                 *detection.region_losses(logits, deltas[:, :, None], nothing, 0 * nothing, TARGETS),
                 detection.mask_loss(masks, 0 * nothing, jnp.zeros((2, 5, 2, 2)), nothing == 1)]
        return sum(value / jnp.maximum(weight, 1) for value, weight in parts)

    given = [DRAWS.normal(size=shape).astype(np.float32) for shape in ((2, 5, 4), (2, 5, 4), (2, 5, 2, 2, 3))]
    value, gradients = jax.jit(jax.value_and_grad(losses, argnums=(0, 1, 2)))(*given)
    assert value == 0
    assert not any(gradient.any() for gradient in gradients)
