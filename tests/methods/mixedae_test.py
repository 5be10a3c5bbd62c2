"""MixedAE: mixing against an explicit scatter, what it shares with MAE, what tokens may know, its figures."""

import dataclasses
import itertools
from collections import deque

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.data import masking
from mae_jax.data.decode import BadImage
from mae_jax.data.masking import PatchOrder
from mae_jax.data.readers import random_access
from mae_jax.data.sources import registry
from mae_jax.data.transforms.example import ExampleBuilder
from mae_jax.errors import UserError
from mae_jax.evals import reconstruction
from mae_jax.ops.homologous_attention import TopKMask
from mae_jax.ops.patches import normalize
from mae_jax.training import run as training_run
from mae_jax.training.throughput import train_flops
from mae_jax.training.train_step import gradients
from tests.helpers.tiny import (
    tiny_batch,
    tiny_config,
    tiny_loss,
    tiny_method,
    tiny_params,
    tiny_program,
    tiny_state,
)

PLAIN = {"method.segments": False, "method.contrast_weight": 0.0, "method.attention": "oracle"}


def made(fields=None):
    config = tiny_config(fields, "mixedae")
    return tiny_method(config), tiny_params(config), tiny_batch(config)


def without_class_token(method):
    """Takes the class token out of a method's encoder and decoder, in place."""
    for name in ("encoder", "mixer", "decoder"):
        if hasattr(method, name):
            setattr(method, name, getattr(method, name).clone(class_token=False))
    return method


@pytest.mark.parametrize("group", [2, 4])
def test_orders_of_a_group_are_one_permutation_rolled(group):
    order = PatchOrder("random", (4, 4), 16 - 16 // group, group)
    members = [masking.draw(order, np.random.default_rng(5), member)["order"] for member in range(group)]
    for member, some in enumerate(members):
        np.testing.assert_array_equal(some, np.roll(members[0], -member * 16 // group))
    shown = np.concatenate([some[: 16 // group] for some in members])
    assert sorted(shown) == list(range(16))  # every place of the grid once in the mix


def test_batches_have_those_orders_in_training_and_evaluation(tmp_path):
    config = tiny_config({"data.source": "photo_crops", "eval.max_examples": 13}, "mixedae")
    inputs = training_run.prepare(config, tmp_path).inputs
    trained = inputs.train(0)
    training, evaluated = [next(trained)["order"] for _ in range(2)], [batch["order"] for batch in inputs.evaluate()]
    assert len(evaluated) == 2  # of eight rows each, three of them padding
    groups = np.concatenate(training + evaluated).reshape(-1, 4, 16)
    for members in groups:
        assert sorted(members[:, :4].ravel()) == list(range(16))
        np.testing.assert_array_equal(members, [np.roll(members[0], -4 * member) for member in range(4)])
    assert len({members[0].tobytes() for members in groups}) == len(groups)


def test_evaluations_mix_pictures_that_do_not_lie_beside_one_another(tmp_path):
    config = tiny_config({"data.source": "photo_crops", "eval.max_examples": 1020}, "mixedae")
    ids = np.concatenate([batch["id"] for batch in training_run.prepare(config, tmp_path).inputs.evaluate()])
    ids = ids[ids >= 0]
    assert sorted(ids) == list(range(1020))
    assert np.abs(np.diff(ids)).mean() == pytest.approx(1020 / 3, rel=0.1)  # of a random order


def test_fewer_pictures_than_a_mix_has_are_refused(tmp_path):
    config = tiny_config({"data.source": "photo_crops", "data.train_split": "train[:3]"}, "mixedae")
    with pytest.raises(UserError, match=r"'train\[:3\]' has 3 .* 4 "):
        training_run.prepare(config, tmp_path)


def test_a_bad_picture_gives_way_to_one_of_another_group():
    config = tiny_config({"data.source": "photo_crops"}, "mixedae")
    views = ExampleBuilder(config, tiny_method(config).patch_order(), tiny_method(config).batch_spec())
    source = registry.load(config.data, "train")
    drawn = [random_access.train_example(source, views, config, deque(), row)["id"] for row in range(8)]

    def read(index):
        if index == drawn[1]:
            raise BadImage("broken")
        return source.read(index)

    replaced = random_access.train_example(dataclasses.replace(source, read=read), views, config, deque(), 1)
    assert (replaced["id"], replaced["replaced"]) == (drawn[5], 1)


@pytest.mark.parametrize("fields", [{"data.repeats": 3, "batch_size": 16}, {}])
def test_no_picture_stands_in_for_one_that_it_is_mixed_with(fields):
    config = tiny_config({"data.source": "photo_crops"} | fields, "mixedae")
    size = 400 if fields else 9  # six images thrice in a batch: a group of the images 4, 5, 0, 1
    for first in range(0, 320, 4):
        shown = [next(random_access._candidates(size, 4, config, first + member)) for member in range(4)]
        for member in range(4):
            _, *others = itertools.islice(random_access._candidates(size, 4, config, first + member), 4)
            assert others
            assert not set(others) & set(shown)
            assert len(set(others)) == len(others)


def scattered(method, values, order, turn):
    """Mixes by scattering: the place n of a mix is what its image has there; returns [B / G, N, ...] in raster order.

    The k-th patch of the shared permutation is of the image k // (N / G), and in later turns of those after it.
    """
    group, count, visible = method.group, method.patches, method.num_visible
    mixes = np.zeros((len(values) // group, *values.shape[1:]), values.dtype)
    for mix in range(len(mixes)):
        for member in range(group):
            row = mix * group + member
            raster = np.zeros_like(values[row])
            raster[order[row]] = values[row]
            shared = np.roll(order[row], member * visible)
            start = (member + turn) * visible
            places = shared[np.arange(start, start + visible) % count]
            mixes[mix, places] = raster[places]
    return mixes


@pytest.mark.parametrize("mixing", ["compose", "full"])
@pytest.mark.parametrize("ratio", [0.5, 0.25])
def test_mixing_and_unmixing_are_those_of_an_explicit_scatter(mixing, ratio):
    method, _, batch = made({"method.mixing": mixing, "method.ratio": ratio})
    patches, order = batch["patches"].astype(np.float32), batch["order"]
    turned = {name: np.asarray(method.turned(jnp.asarray(value))) for name, value in
              (("patches", patches), ("order", order))}
    mixed, places = np.asarray(method.mixed(turned["patches"])), np.asarray(method.mixed(turned["order"]))
    groups = len(order) // method.group
    assert len(mixed) == groups * (method.group if mixing == "full" else 1)
    for turn in range(method.turns):
        wanted = scattered(method, patches, order, turn)
        for mix in range(groups):
            ours = mixed[mix * method.turns + turn]
            raster = np.zeros_like(ours)
            raster[places[mix * method.turns + turn]] = ours
            np.testing.assert_array_equal(raster, wanted[mix])
    tokens = np.concatenate([np.zeros_like(mixed[:, :1]), mixed], 1)
    np.testing.assert_array_equal(method.unmixed(tokens), turned["patches"][:, : method.num_visible])


@pytest.mark.slow
@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("mixing", ["compose", "full"])
def test_with_the_true_sources_it_is_mae_token_by_token(mixing, scan):
    mixed, params, batch = made(PLAIN | {"method.mixing": mixing, "model.scan": scan})
    mae = without_class_token(tiny_method(tiny_config({"model.scan": scan})))
    mixed = without_class_token(mixed)
    # Full mixing is MAE on each picture's G sets of visible patches.
    turned = {name: np.asarray(mixed.turned(jnp.asarray(value))) for name, value in batch.items() if name in
              ("patches", "order", "valid")}
    tokens = jax.jit(lambda p: mixed.unmixed(mixed.encode_mixed(p, turned)))(params)
    seen = normalize(turned["patches"][:, :4]), turned["order"][:, :4]
    alone = jax.jit(mae.encoder.apply)({"params": params["encoder"]}, *seen)
    np.testing.assert_allclose(tokens, alone, atol=2e-5)
    np.testing.assert_allclose(jax.jit(mixed.predict)(params, turned), jax.jit(mae.predict)(params, turned), atol=2e-5)

    def loss(method, batch):
        return jax.jit(jax.value_and_grad(lambda p: method.loss(p, {}, batch, None, 0, True)[0]))(params)

    (ours, grads), (theirs, wanted) = loss(mixed, batch), loss(mae, {**batch, **turned})
    assert float(ours) == pytest.approx(float(theirs), rel=1e-6)
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        other = dict(jax.tree_util.tree_leaves_with_path(wanted))[path]
        scale = np.abs(other).max() + 1e-6
        np.testing.assert_allclose(grad / scale, other / scale, atol=2e-5 if scale > 1e-4 else 1, err_msg=str(path))


@pytest.mark.slow
def test_naive_mixing_attends_across_pictures_and_the_oracle_does_not():
    for attention, leaks in (("all", True), ("topk", True), ("oracle", False)):
        method, params, batch = made(PLAIN | {"method.attention": attention})
        method = without_class_token(method)
        patches = jnp.asarray(batch["patches"], jnp.float32)

        def first(patches, method=method, params=params, batch=batch):
            return (method.predict(params, {**batch, "patches": patches})[0] ** 2).sum()

        grad = np.asarray(jax.jit(jax.grad(first))(patches))
        assert np.abs(grad[0, : method.num_visible]).max() > 0
        assert np.all(grad[:, method.num_visible :] == 0)  # hidden patches
        assert np.all(grad[4:] == 0)  # another group
        assert bool(np.any(grad[1:4])) == leaks


def test_the_decoder_of_a_picture_is_given_no_class_token():
    method, params, batch = made(PLAIN)
    grads = jax.jit(jax.grad(lambda p: method.loss(p, {}, batch, None, 0, True)[0]))(params)
    assert np.abs(grads["encoder"]["cls_token"]).max() > 0  # patches look at it
    tokens, decode = jax.jit(method.encode_mixed)(params, batch), jax.jit(method.decode)
    changed = tokens.at[:, 0].add(1)
    np.testing.assert_array_equal(decode(params, tokens, batch["order"]), decode(params, changed, batch["order"]))


@pytest.mark.slow
def test_chosen_blocks_alone_have_homologous_attention():
    method, _, _ = made({"method.blocks": "1"})
    assert method.mixer.kept == (None, TopKMask(4, 16))
    assert made({"method.blocks": "last_half"})[0].mixer.kept == method.mixer.kept
    assert made({"method.blocks": "0-1", "method.keep": 3})[0].mixer.kept == (TopKMask(3, 16),) * 2
    losses = {}
    for blocks in ("0", "1", "all"):
        for scan in (False, True):
            method, params, batch = made({"method.blocks": blocks, "model.scan": scan})
            losses[blocks, scan] = float(tiny_loss(method)(params, {}, batch, None, 0, True)[0])
        assert losses[blocks, False] == pytest.approx(losses[blocks, True], rel=1e-6)
    assert len(set(losses.values())) >= 3


def test_whole_pictures_are_encoded_with_ordinary_attention_and_without_segments():
    method, params, batch = made()
    mae = tiny_method(tiny_config())
    np.testing.assert_array_equal(jax.jit(method.encode)(params, {}, batch), jax.jit(mae.encode)(params, {}, batch))


@pytest.mark.slow
def test_losses_start_where_they_should_and_evaluations_add_figures():
    method, _, batch = made({"model.width": 64, "model.heads": 4, "method.decoder_width": 32})
    params, _ = jax.jit(method.init)(jax.random.key(0), batch)
    loss = tiny_loss(method)
    training = loss(params, {}, batch, None, 0, True)[1][0]
    assert set(training) == {"loss", "reconstruction_loss", "contrast_loss"}
    found = {name: float(total / weight) for name, (total, weight) in
             loss(params, {}, batch, None, 0, False)[1][0].items()}
    assert set(found) == {*training, "purity", "purity/block_00", "purity/block_01", "neighbour_homology"}
    assert found["loss"] == pytest.approx(found["reconstruction_loss"] + 0.1 * found["contrast_loss"], rel=1e-6)
    assert 0.9 < found["reconstruction_loss"] < 2  # a prediction of nothing has 1
    assert np.log(3) < found["contrast_loss"] < np.log(15) + 1
    assert found["purity"] == pytest.approx((found["purity/block_00"] + found["purity/block_01"]) / 2, rel=1e-6)
    assert found["purity"] == pytest.approx(0.25, abs=0.1)  # by chance


def test_the_picture_of_mixes_has_what_it_says_where_it_says(monkeypatch):
    method, params, batch = made()
    laid = {}
    monkeypatch.setattr(reconstruction, "tile", lambda rows, captions, title, *_, **__: laid.update(
        rows=rows, captions=captions, title=title) or np.zeros((1, 1, 3), np.uint8))
    reconstruction.mixtures(method, params, {}, batch)
    assert laid["captions"] == ["mixed", *(f"{what} {i}" for what in ("source", "reconstruction") for i in range(1, 5))]
    inputs, _, predicted = reconstruction.panels(method, params, {}, batch)
    assert len(laid["rows"]) == 2
    for mix, (mixed, *others) in enumerate(laid["rows"]):
        for member in range(4):
            row = 4 * mix + member
            np.testing.assert_array_equal(others[member], inputs[row])
            np.testing.assert_array_equal(others[4 + member], predicted[row])
            for place in batch["order"][row, :4]:  # what it gives to the mix, and keeps in its own reconstruction
                top, left = 4 * (place // 4), 4 * (place % 4)
                cell = slice(top, top + 4), slice(left, left + 4)
                np.testing.assert_array_equal(mixed[cell], inputs[row][cell])
                np.testing.assert_array_equal(predicted[row][cell], inputs[row][cell])


@pytest.mark.slow
def test_an_untrained_encoder_looks_at_all_pictures_of_a_mix_alike(tmp_path):
    config = tiny_config({"data.source": "photo_crops", "data.image_size": (40, 40), "model.width": 96,
                          "model.depth": 4, "model.heads": 3, "batch_size": 64}, "mixedae")
    run = training_run.prepare(config, tmp_path)
    batch, method = next(run.inputs.train(0)), run.program.method
    start, loss = jax.jit(method.init), tiny_loss(method)
    purities = []
    for seed in range(5):
        found = loss(start(jax.random.key(seed), batch)[0], {}, batch, None, 0, False)[1][0]["purity"]
        purities.append(float(found[0] / found[1]))
    assert np.mean(purities) == pytest.approx(0.25, abs=0.03), purities


def test_pictures_that_could_not_be_read_do_not_count():
    method, params, batch = made()
    batch["valid"][[1, 6]] = 0
    loss = tiny_loss(method)
    total, (metrics, _) = loss(params, {}, batch, None, 0, False)
    assert metrics["loss"][1] == 6
    assert metrics["purity"][1] == 0  # both mixes have one of them
    changed = {**batch, "patches": batch["patches"].copy()}
    changed["patches"][1, method.num_visible :] = 0  # what it was to reconstruct
    assert float(loss(params, {}, changed, None, 0, False)[0]) == float(total)


@pytest.mark.slow
@pytest.mark.parametrize("mixing", ["compose", "full"])
def test_micro_batches_keep_groups_together(mixing):
    method, _, batch = made({"method.mixing": mixing, "batch_size": 16})
    batch["valid"][3] = 0
    state = tiny_state(method.config)
    whole, split = (jax.jit(lambda state, parts=parts: gradients(method, state, batch, jax.random.key(0), parts))(state)
                    for parts in (1, 2))
    for name, (total, weight) in whole[1].items():
        np.testing.assert_allclose(total / weight, split[1][name][0] / split[1][name][1], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), whole[0], split[0])


@pytest.mark.slow
def test_flops_on_paper_agree_with_xla():
    for mixing in ("compose", "full"):
        method, params, batch = made({"method.mixing": mixing, "model.width": 128, "method.decoder_width": 64,
                                      "method.attention": "all", "method.projection": 32})
        step = jax.jit(lambda p, b, m=method: m.loss(p, {}, b, None, 0, True)[0])
        counted = step.lower(params, batch).compile().cost_analysis()["flops"]
        assert method.forward_flops() * len(batch["valid"]) == pytest.approx(counted, rel=0.1)
        assert train_flops(method) == 3 * method.forward_flops()


def test_beside_an_encoder_like_maes_it_has_segments_and_projector():
    _, params, _ = made()
    assert set(params) == {"encoder", "decoder", "segments", "projector"}
    assert set(params["encoder"]) == set(tiny_params(tiny_config())["encoder"])


@pytest.mark.parametrize(("fields", "text"), [
    ({"method.ratio": 0.3}, "method.ratio=0.3"),
    ({"method.ratio": 1.0}, "method.ratio=1.0"),
    ({"data.image_size": (12, 12)}, r"data.image_size: \(16, 16\)"),
    ({"method.blocks": "2"}, "method.blocks='2'.* 'last_two_odd', .* 0 to 1"),
    ({"method.blocks": "0-"}, "method.blocks='0-'"),
    ({"method.attention": "topp"}, "method.attention='topp'.* 'topk'"),
    ({"method.mixing": "ful"}, "method.mixing='ful'.* 'full'"),
    ({"method.keep": 17}, "method.keep=17; .*1 to 16"),
    ({"method.temperature": 0.0}, "method.temperature=0.0"),
    ({"method.ratio": 1e-320}, "method.ratio=1e-320"),
    ({"method.ratio": 0.001}, "method.ratio=0.001 .* 16 patches .* 1000 "),
    ({"method.attention": "all", "method.blocks": "0"}, "method.attention='all'"),
    ({"eval.max_examples": 3}, "eval.max_examples=3 .* 4 "),
    ({"model.drop_path": 0.1}, "mixedae .*depth"),
    ({"data.repeats": 3}, "mix .*itself"),
    ({"method.ratio": 0.0625}, "contrast")])
def test_what_cannot_be_mixed_is_refused(fields, text):
    with pytest.raises(UserError, match=text):
        tiny_config(fields, "mixedae")


def test_a_batch_that_cuts_a_group_is_refused():
    config = tiny_config({"batch_size": 10}, "mixedae")
    with pytest.raises(UserError, match=r"10 rows .* 4 .*mixedae .* 8 and 12"):
        tiny_program(config)
