"""SplitMask and BEiT-style prediction: what a branch may know, what swapping halves leaves, where losses start."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.errors import UserError
from mae_jax.losses.contrastive import info_nce
from mae_jax.training.throughput import train_flops
from tests.helpers.tiny import tiny_batch, tiny_config, tiny_loss, tiny_method, tiny_params

ODD = {"data.image_size": (12, 20)}  # 15 patches: 7, 7 and one in neither half
SIZES = pytest.mark.parametrize("size", [
    pytest.param({}, id="even"), pytest.param(ODD, id="odd", marks=pytest.mark.slow)])


def made(fields=None, method="splitmask"):
    config = tiny_config(fields, method)
    batch = tiny_batch(config)
    some = tiny_method(config)
    extras = {"vocabulary": np.random.default_rng(3).normal(size=(config.method.vocabulary - 1, 48)).astype(np.float32)}
    return some, tiny_params(config), extras if some.targets.discrete else {}, batch


@pytest.mark.slow
@SIZES
def test_a_branch_knows_nothing_of_the_pixels_of_the_other_half(size):
    method, params, _, batch = made(size)
    patches = jnp.asarray(batch["patches"], jnp.float32)

    def outputs(patches):
        return method.predict(params, {**batch, "patches": patches})

    # Whatever is summed: a change of B's pixels moves no prediction and no descriptor of branch A, and the reverse.
    weights = [jnp.asarray(np.random.default_rng(0).normal(size=out.shape[1:]), jnp.float32)
               for out in jax.eval_shape(outputs, patches)]
    for branch, own in ((0, slice(0, method.half)), (1, slice(method.half, 2 * method.half))):
        grad = jax.jit(jax.grad(lambda x, b=branch: sum((out[b::2] * w).sum() for out, w in
                                                        zip(outputs(x), weights, strict=True))))(patches)
        known = np.zeros(method.patches, bool)
        known[own] = True
        assert np.all(np.asarray(grad)[:, ~known] == 0)
        assert np.abs(np.asarray(grad)[:, known]).min(0).max() > 0


@SIZES
def test_swapping_the_halves_changes_no_loss(size):
    method, params, extras, batch = made(size)
    h = method.half
    swap = np.r_[h : 2 * h, :h, 2 * h : method.patches]
    other = {**batch, "patches": batch["patches"][:, swap], "order": batch["order"][:, swap]}
    loss = tiny_loss(method)
    losses = [loss(params, extras, some, None, 0, False)[1][0] for some in (batch, other)]
    for name in losses[0]:
        np.testing.assert_allclose(losses[0][name][0], losses[1][name][0], rtol=1e-5, err_msg=name)


def reference(method, params, batch):
    """The same in raster order: gather the half, encode, scatter into mask tokens, decode, gather what is missing."""
    n, h = method.patches, method.half
    raster = np.zeros_like(batch["patches"])
    np.put_along_axis(raster, batch["order"][..., None].astype(int), batch["patches"], 1)
    predicted, described = [], []
    for image in range(len(raster)):
        a, b, rest = np.split(batch["order"][image], (h, 2 * h))
        for own, missing in ((a, np.r_[b, rest]), (b, np.r_[a, rest])):
            seen = np.sort(own)
            # What comes behind the seen ones is decoded in raster order; only its rows are permuted at the end.
            hidden = np.setdiff1d(np.arange(n), seen)
            order = np.r_[seen, hidden][None]
            pixels = method.encoder.apply({"params": params["encoder"]}, _normal(raster[image][seen])[None], seen[None])
            out, mean = method.decoder.apply({"params": params["decoder"]}, pixels, order.astype(np.int32), n - h)
            predicted.append(np.asarray(out[0])[np.searchsorted(hidden, missing)])
            described.append(np.asarray(mean[0]))
    return np.stack(predicted), np.stack(described)


def _normal(patches):
    from mae_jax.ops.patches import normalize

    return normalize(patches)


@pytest.mark.slow
@SIZES
def test_predictions_are_those_of_gathering_and_scattering_in_raster_order(size):
    method, params, _, batch = made(size)
    few = {name: value[:3] for name, value in batch.items()}
    for ours, wanted in zip(method.predict(params, few), reference(method, params, few), strict=True):
        np.testing.assert_allclose(ours, wanted, atol=2e-5)


def by_hand(predicted, patches, target, extras):
    """Returns the mean loss of predictions [M, outputs] of raw patches [M, P], in NumPy."""
    if target == "norm_pix":
        pixels = np.asarray(_normal(patches), np.float64)
        centered = pixels - pixels.mean(1, keepdims=True)
        wanted = centered / np.sqrt(pixels.var(1, keepdims=True, ddof=1) + 1e-6)
        return np.square(predicted - wanted).mean()
    distances = np.square(np.asarray(_normal(patches))[:, None] - extras["vocabulary"]).sum(2)
    flat = (patches.reshape(len(patches), -1, 3).max(1) == patches.reshape(len(patches), -1, 3).min(1)).all(1)
    tokens = np.where(flat, 0, 1 + distances.argmin(1))
    shifted = predicted - predicted.max(1, keepdims=True)
    return (np.log(np.exp(shifted).sum(1)) - shifted[np.arange(len(tokens)), tokens]).mean()


def raster_of(batch):
    """Returns the patches [B, N, P] where they belong."""
    raster = np.zeros_like(batch["patches"])
    np.put_along_axis(raster, batch["order"][..., None].astype(int), batch["patches"], 1)
    return raster


@pytest.mark.slow
@SIZES
@pytest.mark.parametrize("target", [pytest.param("kmeans", marks=pytest.mark.slow), "norm_pix"])
def test_each_half_is_asked_for_the_patches_that_it_has_not_seen(size, target):
    method, params, extras, batch = made({**size, "method.target": target})
    few, h = {name: value[:3] for name, value in batch.items()}, method.half
    few["patches"][:, 1] = 9  # constant ones
    predicted, raster, losses = reference(method, params, few)[0], raster_of(few), []
    for image in range(3):
        a, b, rest = np.split(few["order"][image], (h, 2 * h))
        for branch, missing in enumerate((np.r_[b, rest], np.r_[a, rest])):
            losses.append(by_hand(predicted[2 * image + branch], raster[image][missing], target, extras))
    total, weight = tiny_loss(method)(params, extras, few, None, 0, False)[1][0]["inpaint_loss"]
    assert float(total / weight) == pytest.approx(np.mean(losses), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["kmeans", "norm_pix"])
def test_beit_is_asked_for_the_masked_patches(target):
    method, params, extras, batch = made({"method.target": target}, "beit")
    predicted, raster = np.asarray(method.predict(params, batch)), raster_of(batch)
    losses = [by_hand(predicted[image], raster[image][batch["order"][image, -method.masked :]], target, extras)
              for image in range(len(raster))]
    total, weight = tiny_loss(method)(params, extras, batch, None, 0, False)[1][0]["loss"]
    assert float(total / weight) == pytest.approx(np.mean(losses), rel=1e-4)


@pytest.mark.slow
@SIZES
def test_a_descriptor_is_the_mean_of_all_patches_outputs(size):
    method, params, _, batch = made(size)
    tokens = jnp.asarray(np.random.default_rng(0).normal(size=(4, 1 + method.half, 32)), jnp.float32)
    (_, described), seen = method.decoder.apply(
        {"params": params["decoder"]}, tokens, batch["order"][:4], method.patches - method.half,
        capture_intermediates=lambda module, _: module.name == "norm", mutable=["intermediates"])
    outputs = seen["intermediates"]["norm"]["__call__"][0]
    assert outputs.shape[:2] == (4, method.patches)
    np.testing.assert_allclose(described, outputs.mean(1), atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["splitmask", "beit"])
@pytest.mark.parametrize("target", ["kmeans", "patches", "projection"])
def test_cross_entropy_starts_at_the_logarithm_of_the_vocabulary(method, target):
    fields = {"method.target": target, "model.width": 128, "model.heads": 4}
    some, _, extras, batch = made(fields, method)
    params, _ = jax.jit(some.init)(jax.random.key(0), batch)
    loss = tiny_loss(some)
    name = "inpaint_loss" if method == "splitmask" else "loss"

    def start(params):
        total, weight = loss(params, extras, batch, None, 0, False)[1][0][name]
        return float(total / weight)

    assert start(params) == pytest.approx(np.log(24), rel=0.03)
    head = params["decoder"]["head"] if method == "splitmask" else params["head"]
    head["kernel"] = jnp.zeros_like(head["kernel"])
    assert start(params) == pytest.approx(np.log(24), rel=1e-6)


def test_info_nce_is_that_of_the_definition():
    rng = np.random.default_rng(0)
    pairs, valid = rng.normal(size=(6, 2, 5)).astype(np.float32), np.array([1, 1, 0, 1, 1, 1], np.float32)
    ids = np.array([0, 1, 2, 3, 3, 5])  # rows 3 and 4 show the same image
    losses, found = info_nce(pairs, valid, ids, 0.3)
    unit = pairs / np.linalg.norm(pairs, axis=2, keepdims=True)
    for i in np.flatnonzero(valid):
        wanted, right = [], []
        for k in (0, 1):
            partner = np.exp(unit[i, k] @ unit[i, 1 - k] / 0.3)
            others = [np.exp(unit[i, k] @ unit[j, b] / 0.3) for j in range(6) for b in (0, 1)
                      if ids[j] != ids[i] and valid[j]]
            wanted.append(-np.log(partner / (partner + sum(others))))
            right.append(partner >= max(others))
        assert losses[i] == pytest.approx(np.mean(wanted), rel=1e-5)
        assert found[i] == all(right)


def test_plain_products_are_not_normalised():
    pairs = np.random.default_rng(0).normal(size=(4, 2, 5)).astype(np.float32)
    losses = [info_nce(scale * pairs, np.ones(4, np.float32), np.arange(4), 1.0, normalize)[0]
              for scale in (1, 2) for normalize in (True, False)]
    np.testing.assert_allclose(losses[0], losses[2], rtol=1e-5)
    assert np.abs(losses[1] - losses[3]).max() > 0.1


def test_the_predictions_of_beit_do_not_depend_on_the_pixels_of_masked_patches():
    method, params, _, batch = made(method="beit")
    grad = jax.jit(jax.grad(lambda x: jnp.square(method.predict(params, {**batch, "patches": x})).sum()))(
        jnp.asarray(batch["patches"], jnp.float32))
    assert np.all(np.asarray(grad)[:, -method.masked :] == 0)
    assert np.abs(np.asarray(grad)[:, : -method.masked]).max(2).min() > 0


@pytest.mark.slow
@pytest.mark.parametrize("method", ["splitmask", "beit"])
@pytest.mark.parametrize("target", ["norm_pix", "kmeans"])
def test_invalid_rows_change_neither_loss_nor_gradients(method, target):
    some, params, extras, batch = made({"method.target": target}, method)
    batch["valid"][-2:] = 0
    other = {**batch, "patches": batch["patches"].copy()}
    other["patches"][-2:] = 7
    value = jax.jit(jax.value_and_grad(lambda p, b: some.loss(p, extras, b, None, 0, False)[0]))
    for ours, theirs in zip(jax.tree.leaves(value(params, batch)), jax.tree.leaves(value(params, other)), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


@pytest.mark.slow
def test_stochastic_depth_drops_branches_in_training_alone():
    for name in ("splitmask", "beit"):
        method, params, extras, batch = made({"model.drop_path": 0.5}, name)
        loss = partial(tiny_loss(method), params, extras, batch, jax.random.key(1), 0)
        assert loss(True)[0] != loss(False)[0]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["splitmask", "beit"])
def test_flops_on_paper_are_those_of_xla(method):
    fields = {"model.width": 192, "model.heads": 3, "data.image_size": (32, 32), "method.vocabulary": 256}
    if method == "splitmask":
        fields |= {"method.decoder_width": 192, "method.decoder_heads": 3}
    some, params, extras, batch = made(fields, method)
    compiled = jax.jit(jax.grad(lambda p: some.loss(p, extras, batch, None, 0, True)[0])).lower(params).compile()
    assert train_flops(some) * len(batch["valid"]) == pytest.approx(compiled.cost_analysis()["flops"], rel=0.1)


@pytest.mark.parametrize(("method", "fields", "line"), [
    ("splitmask", {"method.decoder_width": 18}, "method.decoder_width=18"),
    ("splitmask", {"method.target": "kmean"}, "method.target='kmean'.* 'kmeans'"),
    ("splitmask", {"method.temperature": 0.0}, "method.temperature=0.0"),
    ("splitmask", {"data.image_size": (4, 4)}, "one patch"),
    ("beit", {"method.target": "pixel", "method.vocabulary_file": "v.npz"}, "method.target='pixel'"),
    ("beit", {"method.masked": 16}, "method.masked=16; .*1 to 15 "),
    ("beit", {"method.vocabulary": 2}, "method.vocabulary=2; .* 3")])
def test_what_cannot_be_is_refused(method, fields, line):
    with pytest.raises(UserError, match=line):
        tiny_config(fields, method)
