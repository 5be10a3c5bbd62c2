"""Learning from labels: losses beside restatements, stochastic depth, what learns, and the classifier's parts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.data import DataInfo
from mae_jax.errors import UserError
from mae_jax.methods.supervised import Supervised
from mae_jax.models.layers import drop_path
from mae_jax.models.vit import drop_path_rates, make_encoder
from mae_jax.param_tree import flatten
from tests.helpers.tiny import raster_batch, tiny_loss, tiny_method, tiny_params, tiny_supervised

CLASSES = 3


def parts(fields=None):
    """Returns method, parameters, extras and a batch."""
    config = tiny_supervised(fields)
    method = tiny_method(config)
    _, extras = jax.eval_shape(method.init, jax.random.key(0), method.batch_spec())
    extras = {"batch_norm": {"mean": jnp.zeros(32), "var": jnp.ones(32)}} if extras else {}
    return method, tiny_params(config), extras, raster_batch(config)


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


@pytest.fixture(scope="module")
def logits():
    return np.random.default_rng(0).normal(size=(8, CLASSES)) * 3


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_that_of_the_smoothed_labels(logits, smoothing):
    method, _, _, batch = parts({"method.smoothing": smoothing})
    targets = np.full((8, CLASSES), smoothing / CLASSES)
    targets[np.arange(8), batch["label"]] += 1 - smoothing
    np.testing.assert_allclose(method.targets(batch, smoothing), targets, atol=1e-6)
    wanted = -(targets * log_softmax(logits)).sum(-1)
    np.testing.assert_allclose(method.losses(jnp.asarray(logits), jnp.asarray(targets)), wanted, rtol=1e-5)


def test_binary_cross_entropy_counts_both_labels_of_a_mixed_picture_whole_and_averages_over_classes(logits):
    method = parts({"method.loss": "bce"})[0]
    targets = np.zeros((8, CLASSES))
    targets[:, 0], targets[:, 2] = 0.9, 0.1
    probability = 1 / (1 + np.exp(-logits))
    wanted = -(np.log(probability[:, [0, 2]]).sum(-1) + np.log(1 - probability[:, 1])) / CLASSES
    np.testing.assert_allclose(method.losses(jnp.asarray(logits), jnp.asarray(targets)), wanted, rtol=1e-5)


def test_multi_label_targets_are_the_batchs_labels():
    config = tiny_supervised({"method.loss": "bce", "method.multi_label": True})
    method, labels = tiny_method(config), np.eye(8, CLASSES, dtype=np.uint8)
    labels[0] = 1
    assert method.batch_spec()["labels"].shape == (8, CLASSES)
    np.testing.assert_array_equal(method.targets({"labels": labels}, 0.0), labels)


def test_pictures_without_a_label_and_padding_do_not_count():
    method, params, extras, batch = parts()
    loss = jax.jit(lambda batch: method.loss(params, extras, batch, jax.random.key(0), 0, False))
    some = batch | {"label": batch["label"].copy(), "valid": batch["valid"].copy()}
    some["label"][2] = -1
    some["valid"][5] = 0
    total, weight = loss(some)[1][0]["loss"]
    assert weight == 6
    each = -log_softmax(np.asarray(jax.jit(lambda batch: method.logits(params, extras, batch))(batch)))
    kept = [row for row in range(8) if row not in (2, 5)]
    np.testing.assert_allclose(total, each[kept, batch["label"][kept]].sum(), rtol=1e-5)
    some["label"][:] = -1
    assert float(loss(some)[0]) == 0


@pytest.mark.slow
def test_a_picture_that_is_mixed_with_an_unlabeled_one_does_not_count():
    """Groups of 4 rows: row 0 is mixed with row 3, row 1 with row 2."""
    method, params, extras, batch = parts({"method.mixup": 1.0, "method.mix_group": 4})
    batch["label"][3] = -1
    _, (metrics, _) = tiny_loss(method)(params, extras, batch, jax.random.key(0), 0, True)
    assert metrics["loss"][1] == 6
    _, (metrics, _) = tiny_loss(method)(params, extras, batch, jax.random.key(0), 0, False)
    assert metrics["loss"][1] == 7
    weight = np.float32([1, 2, 3, 4, 5, 6, 7, 8])
    np.testing.assert_array_equal(method.partners_weight(weight), [4, 3, 2, 1, 8, 7, 6, 5])


def test_the_mean_is_normalised_after_pooling_and_without_the_encoders_norm():
    method, params, extras, batch = parts()
    assert "norm" not in params["encoder"]
    tokens = np.asarray(jax.jit(lambda batch: method.encode(params, extras, batch))(batch), np.float64)
    mean = tokens[:, 1:].mean(1)
    normed = (mean - mean.mean(-1, keepdims=True)) / np.sqrt(mean.var(-1, keepdims=True) + 1e-6)
    features = normed * params["fc_norm"]["scale"] + params["fc_norm"]["bias"]
    wanted = features @ params["head"]["kernel"] + params["head"]["bias"]
    found = jax.jit(lambda batch: method.logits(params, extras, batch))(batch)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize(("pool", "head"), [("cls", "linear"), ("cls", "probe"), ("mean", "probe")])
def test_elsewhere_the_encoders_norm_comes_before_pooling(pool, head):
    params = parts({"model.pool": pool, "method.head": head})[1]
    assert "norm" in params["encoder"]
    assert "fc_norm" not in params


def test_a_probes_evaluation_uses_the_running_moments_and_its_training_those_of_the_batch():
    method, params, extras, batch = parts({"method.head": "probe", "method.train_blocks": 0.0})
    assert method.loss_spans_batch
    features = np.asarray(jax.jit(lambda batch: method.encode(params, extras, batch))(batch), np.float64)[:, 1:].mean(1)
    train = jax.jit(lambda batch: method.training_logits(params, extras, batch, jax.random.key(0), jnp.ones(8)))
    logits, _, new = train(batch)
    normed = (features - features.mean(0)) / np.sqrt(features.var(0) + 1e-6)
    wanted = normed @ params["head"]["kernel"] + params["head"]["bias"]
    np.testing.assert_allclose(logits, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())
    np.testing.assert_allclose(new["batch_norm"]["mean"], 0.1 * features.mean(0), atol=1e-6)
    plain = (features / np.sqrt(1 + 1e-6)) @ params["head"]["kernel"] + params["head"]["bias"]
    found = jax.jit(lambda batch: method.logits(params, extras, batch))(batch)
    np.testing.assert_allclose(found, plain, rtol=0, atol=1e-5 * np.abs(plain).max())


BLOCK = {f"{part}/{leaf}" for part, leaf in (
    *((f"norm{i}", leaf) for i in (1, 2) for leaf in ("scale", "bias")),
    *((f"{part}/{layer}", leaf) for part, layer in (("attn", "qkv"), ("attn", "proj"), ("mlp", "fc1"), ("mlp", "fc2"))
      for leaf in ("kernel", "bias")), ("ls1", "gamma"), ("ls2", "gamma"))}
HEAD = {"head/kernel", "head/bias"}
NORM = {"encoder/norm/scale", "encoder/norm/bias"}
EMBEDDING = {"encoder/cls_token", "encoder/pos_embed", "encoder/patch_embed/kernel", "encoder/patch_embed/bias"}
LAST = {f"encoder/block_02/{leaf}" for leaf in BLOCK}
LEARNS = {
    0.0: HEAD,
    0.5: HEAD | NORM | {name for name in LAST if "/mlp/" in name or "/norm2/" in name or "/ls2/" in name},
    1.0: HEAD | NORM | LAST,
    2.0: HEAD | NORM | LAST | {f"encoder/block_01/{leaf}" for leaf in BLOCK},
    -1.0: HEAD | NORM | EMBEDDING | {f"encoder/block_0{number}/{leaf}" for number in range(3) for leaf in BLOCK},
}
DEEP = {"model.depth": 3, "model.pool": "cls", "model.layer_scale": 0.1, "model.positions": "learned"}


@pytest.mark.slow
@pytest.mark.parametrize("blocks", LEARNS)
def test_as_many_of_the_last_blocks_learn_as_asked_and_the_gradient_of_the_others_is_zero(blocks):
    method, params, extras, batch = parts(DEEP | {"method.train_blocks": blocks})
    assert {name for name in flatten(params) if method.is_trainable(name)} == LEARNS[blocks]
    grads = flatten(jax.jit(jax.grad(lambda params: method.loss(params, extras, batch, jax.random.key(0), 0, True)[0])
                            )(params))
    moved = {name for name, grad in grads.items() if np.asarray(grad).any()}
    assert moved == LEARNS[blocks]


def test_all_three_blocks_and_everything_differ_in_the_embedding():
    method = parts(DEEP | {"method.train_blocks": 3.0})[0]
    assert {name for name in LEARNS[-1.0] if not method.is_trainable(name)} == EMBEDDING


@pytest.mark.slow
def test_stochastic_depth_drops_images_branches_and_keeps_their_mean():
    rates = np.array([0.0, 0.3, 0.6])
    drop_path_mask = np.asarray(drop_path(jax.random.key(0), rates, 5_000))
    assert drop_path_mask.shape == (3, 2, 5_000)
    assert (drop_path_mask[0] == 1).all()
    for block, rate in enumerate(rates):
        np.testing.assert_allclose(np.unique(drop_path_mask[block]), [0, 1 / (1 - rate)] if rate else [1], rtol=1e-6)
    np.testing.assert_allclose((drop_path_mask == 0).mean(2), np.stack([rates, rates], 1), atol=0.025)
    np.testing.assert_allclose(drop_path_mask.mean(2), 1, atol=0.05)
    assert abs(np.corrcoef(drop_path_mask[2])[0, 1]) < 0.05  # the two branches are drawn apart


def test_rates_rise_linearly_from_zero_or_are_the_same_in_all_blocks():
    fields = {"model.depth": 5, "model.drop_path": 0.2}
    np.testing.assert_allclose(drop_path_rates(tiny_supervised(fields)), [0, 0.05, 0.1, 0.15, 0.2])
    constant = tiny_supervised(fields | {"model.drop_path_rates": "constant"})
    np.testing.assert_allclose(drop_path_rates(constant), [0.2] * 5)


def test_a_dropped_branch_adds_nothing_and_a_kept_one_is_scaled():
    config = tiny_supervised({"model.depth": 1})
    encoder, params, batch = make_encoder(config), tiny_params(config)["encoder"], raster_batch(config)
    pixels = np.random.default_rng(0).standard_normal(batch["patches"].shape).astype(np.float32)

    @jax.jit
    def run(drop_path_mask):
        return encoder.apply({"params": params}, pixels, batch["order"], block=0, drop_path_mask=drop_path_mask)

    ones = jnp.ones((1, 2, 8))
    full, plain = run(ones), run(None)
    np.testing.assert_allclose(full, plain, atol=1e-6)
    none, first = run(0 * ones), run(ones.at[:, 1].set(0))
    twice = run(ones.at[:, 1].set(0).at[:, 0].set(2))
    np.testing.assert_allclose(twice - none, 2 * (first - none), atol=1e-5)
    mixed = run(ones.at[:, :, 3:].set(0))
    np.testing.assert_allclose(mixed[:3], plain[:3], atol=1e-6)
    np.testing.assert_allclose(mixed[3:], none[3:], atol=1e-6)
    assert np.abs(none - plain).max() > 0.1


TRAINING = {"model.drop_path": 0.5, "model.layer_scale": 0.5, "model.positions": "learned",
            "method.mixup": 0.8, "method.cutmix": 1.0, "method.smoothing": 0.1, "method.erase": 0.5,
            "method.mix_group": 4, "model.pool": "cls"}


def value_and_grad(fields):
    method, params, extras, batch = parts(TRAINING | fields)
    return jax.jit(jax.value_and_grad(
        lambda params: method.loss(params, extras, batch, jax.random.key(3), 0, True)[0]))(params)


@pytest.fixture(scope="module")
def plain():
    return value_and_grad({})


@pytest.mark.slow
@pytest.mark.parametrize(("scan", "remat"), [(True, "none"), (False, "full")])
def test_scan_and_remat_drop_the_same_branches(plain, scan, remat):
    loss, grads = value_and_grad({"model.scan": scan, "model.remat": remat})
    np.testing.assert_allclose(loss, plain[0], rtol=1e-6)
    for name, wanted in flatten(plain[1]).items():
        tolerance = 2e-6 * float(abs(wanted).max()) + 1e-8
        np.testing.assert_allclose(flatten(grads)[name], wanted, atol=tolerance, err_msg=name)


def test_augmentation_and_stochastic_depth_are_off_in_evaluation():
    method, params, extras, batch = parts(TRAINING)
    loss = jax.jit(lambda key: method.loss(params, extras, batch, key, 0, False)[0])
    assert loss(jax.random.key(0)) == loss(jax.random.key(1))
    logits = np.asarray(jax.jit(lambda batch: method.logits(params, extras, batch))(batch))
    wanted = -log_softmax(logits)[np.arange(8), batch["label"]].mean()  # of labels that are not smoothed
    np.testing.assert_allclose(loss(jax.random.key(0)), wanted, rtol=1e-5)


@pytest.mark.slow
def test_frozen_blocks_drop_nothing():
    fields = TRAINING | {"method.train_blocks": 0.0, "method.mixup": 0.0, "method.cutmix": 0.0, "method.erase": 0.0}
    method, params, extras, batch = parts(fields)
    train = jax.jit(lambda key: method.training_logits(params, extras, batch, key, jnp.ones(8))[0])
    wanted = jax.jit(lambda batch: method.logits(params, extras, batch))(batch)
    np.testing.assert_allclose(train(jax.random.key(0)), wanted, atol=1e-6)


@pytest.mark.parametrize(("fields", "line"), [
    ({"method.head": "probes"}, "method.head='probes'.* 'probe'"),
    ({"method.loss": "mse"}, "method.loss='mse'"),
    ({"method.smoothing": 1.0}, "method.smoothing=1.0; .*0 to 0.999"),
    ({"method.mixup": -0.1}, "method.mixup=-0.1"),
    ({"method.train_blocks": 1.5}, "method.train_blocks=1.5"),
    ({"method.train_blocks": 3.0}, "method.train_blocks=3.0.* 2 blocks"),
    ({"method.loss": "bce", "method.smoothing": 0.1}, "use 0"),
    ({"method.multi_label": True}, "method.multi_label"),
    ({"method.mixup": 0.8, "method.mix_group": 3}, "method.mix_group=3.* 8 rows"),
    ({"method.mixup": 0.8, "train.accumulate": 2}, " 4 rows"),
])
def test_what_cannot_work_is_refused_in_one_line(fields, line):
    with pytest.raises(UserError, match=line) as caught:
        tiny_supervised(fields)
    assert "\n" not in str(caught.value)


def test_the_data_tells_the_number_of_classes():
    method = Supervised(tiny_supervised({"method.classes": 0}), DataInfo(8, ("a", "b")))
    method.check_data()
    assert method.classes == 2
    with pytest.raises(UserError, match=r"at least two classes; the data have 1\. A folder"):
        Supervised(tiny_supervised({"method.classes": 0}), DataInfo(8, ("a",))).check_data()
    with pytest.raises(UserError, match=r"method\.classes=3, but the data has 2"):
        Supervised(tiny_supervised(), DataInfo(8, ("a", "b"))).check_data()


def test_images_with_any_number_of_labels_need_a_method_that_learns_them():
    several = DataInfo(8, ("a", "b", "c"), multi_label=True)
    with pytest.raises(UserError, match=r"the data have 0\. .* method\.multi_label"):
        Supervised(tiny_supervised({"method.classes": 0}), several).check_data()
    config = tiny_supervised({"method.classes": 0, "method.multi_label": True, "method.loss": "bce"})
    method = Supervised(config, several)
    method.check_data()
    assert method.eval_spec()["labels"].shape == (8, 3)
