"""MoCE: what an upcycled one is at its first step, what its gates learn, whose experts an image goes through."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.data import DataInfo
from mae_jax.data.cluster_ids import Clusters
from mae_jax.errors import UserError
from mae_jax.methods.moce import MoCE
from mae_jax.models.intermediates import block_name
from mae_jax.models.upcycling import extract_path, upcycle
from mae_jax.ops.patches import normalize
from mae_jax.param_tree import flatten
from mae_jax.training.throughput import train_flops
from mae_jax.training.train_step import gradients
from tests.helpers.tiny import tiny_batch, tiny_config, tiny_loss, tiny_method, tiny_params, tiny_program, tiny_state

COUNT = 5  # clusters
FIELDS = {"method.num_clusters": COUNT, "method.centroid_width": 12, "method.clusters": "somewhere"}


def made(fields=None):
    """Returns the method, parameters, extras and a batch of images of all clusters."""
    config = tiny_config(FIELDS | (fields or {}), "moce")
    method, batch = tiny_method(config), tiny_batch(config)
    batch["cluster"] = (np.arange(config.batch_size) % COUNT).astype(np.int32)
    params = tiny_params(config)
    share = np.array([3, 1, 2, 1, 1], np.float32) / 8
    extras = {"centroids": np.random.default_rng(1).normal(size=(COUNT, 12)).astype(np.float32), "share": share}
    for gate in params.get("gates", {}).values():  # apart enough that clusters choose differently
        gate["kernel"] = np.random.default_rng(7).normal(size=gate["kernel"].shape).astype(np.float32)
    return method, params, extras, batch


def grown(fields=None):
    """Returns the same with the experts of a random MAE, and that MAE's method and parameters."""
    method, params, extras, batch = made(fields)
    dense = tiny_config({key: value for key, value in (fields or {}).items() if key.startswith("model.")})
    start = tiny_params(dense, seed=3)
    copied = flatten(upcycle(start, params))
    params = jax.tree_util.tree_map_with_path(
        lambda keys, leaf: np.asarray(copied.get(jax.tree_util.keystr(keys, simple=True, separator="/"), leaf)), params)
    return method, params, extras, batch, tiny_method(dense), start


@pytest.mark.slow
@pytest.mark.parametrize("fields", [
    pytest.param({}, id="cluster"), pytest.param({"method.gate": "token"}, id="token", marks=pytest.mark.slow),
    pytest.param({"model.scan": True}, id="scan", marks=pytest.mark.slow)])
def test_the_first_step_of_an_upcycled_one_is_that_of_the_mae_with_noise_or_without(fields):
    method, params, extras, batch, mae, start = grown(fields)
    wanted = tiny_loss(mae)(start, {}, batch, None, 0, True)[1][0]["loss"][0]
    for train in (True, False):
        metrics = tiny_loss(method)(params, extras, batch, None, 0, train)[1][0]
        assert float(metrics["reconstruction_loss"][0]) == pytest.approx(float(wanted), rel=1e-5)
    ours = jax.jit(method.predict)(params, batch, extras)
    np.testing.assert_allclose(ours, jax.jit(mae.predict)(start, batch), atol=1e-5)


@pytest.mark.slow
def test_the_gate_of_an_upcycled_one_learns_from_its_first_step():
    method, params, extras, batch, *_ = grown({"method.balance_weight": 0.0, "method.confidence_weight": 0.0})
    grads = jax.jit(jax.grad(lambda p: method.loss(p, extras, batch, None, 0, True)[0]))(params)
    for gate in jax.tree.leaves(grads["gates"]):
        assert np.abs(gate).max() > 1e-6


@pytest.mark.slow
def test_gates_start_small_and_send_clusters_to_different_experts():
    method, _, extras, batch = made({"model.width": 64, "model.heads": 4, "method.centroid_width": 64,
                                     "method.num_clusters": 40})
    params, first = jax.jit(method.init)(jax.random.key(0), batch)
    assert first["centroids"].shape == (40, 64)
    centroids = np.random.default_rng(0).normal(size=(40, 64)).astype(np.float32)
    table = method.probabilities(params, {**extras, "centroids": centroids})
    for each in table.values():
        assert 1 / 4 < each.max(1).mean() < 0.4  # near even
        assert len(np.unique(each.argmax(1))) == 4
    experts = params["encoder"]["block_01"]["experts"]["fc1"]["kernel"]
    assert np.abs(experts[0] - experts[1]).max() > 0


@pytest.mark.slow
def test_noise_is_drawn_per_cluster_layer_and_step_and_in_training_alone():
    method, params, extras, batch = made({"method.blocks": "all", "method.noise": 8.0})
    key = jax.random.key(0)
    quiet, loud, other = (method.probabilities(params, extras, k) for k in (None, key, jax.random.key(1)))
    assert np.ptp([np.asarray(loud[block] - quiet[block]) for block in (0, 1)], axis=0).min() > 0
    assert np.abs(loud[0] - other[0]).min() > 0
    loss = tiny_loss(method)
    trained = [float(loss(params, extras, batch, None, step, True)[0]) for step in (3, 3, 4)]
    assert trained[0] == trained[1] != trained[2]
    still = [float(loss(params, extras, batch, None, step, False)[0]) for step in (3, 4)]
    assert still[0] == still[1]


@pytest.mark.slow
@pytest.mark.parametrize("weight", ["straight", "value"])
def test_a_path_cut_out_is_the_mixture_on_pictures_of_every_cluster_routed_along_it(weight):
    method, params, extras, batch = made({"method.gate_weight": weight, "method.blocks": "all"})
    mae = tiny_method(tiny_config())
    table = {block: np.asarray(each) for block, each in method.probabilities(params, extras).items()}
    whole, encode = np.asarray(jax.jit(method.encode)(params, extras, batch)), jax.jit(mae.encode)
    paths = [tuple(each[cluster].argmax() for each in table.values()) for cluster in range(COUNT)]
    assert len(set(paths)) > 1
    for cluster, path in enumerate(paths):
        scale = {block: float(each[cluster].max()) for block, each in table.items()} if weight == "value" else None
        dense = extract_path(params["encoder"], dict(zip(table, path, strict=True)), scale)
        rows = batch["cluster"] == cluster
        some = {name: value[rows] for name, value in batch.items()}
        np.testing.assert_allclose(encode({"encoder": dense}, {}, some), whole[rows], atol=1e-5)
        assert set(flatten(dense)) == set(flatten(tiny_params(tiny_config())["encoder"]))


def test_regularizers_are_those_of_the_whole_table_weighted_by_the_data():
    method, params, extras, batch = made()
    metrics = {name: float(total / weight) for name, (total, weight) in
               tiny_loss(method)(params, extras, batch, None, 0, False)[1][0].items()}
    (table,) = (np.asarray(each) for each in method.probabilities(params, extras).values())
    importance = extras["share"] @ table
    assert metrics["balance_loss"] == pytest.approx(importance.var() / importance.mean() ** 2, rel=1e-4)
    assert metrics["confidence_loss"] == pytest.approx(-(extras["share"] @ (table * np.log(table)).sum(1)), rel=1e-4)
    assert metrics["gate_confidence"] == pytest.approx(extras["share"] @ table.max(1), rel=1e-5)
    assert metrics["loss"] == pytest.approx(metrics["reconstruction_loss"] + 0.01 * metrics["balance_loss"]
                                            + 0.01 * metrics["confidence_loss"], rel=1e-5)


@pytest.mark.slow
def test_the_distance_to_the_first_encoder_starts_at_zero_and_is_hubers():
    method, params, extras, batch, _, start = grown({"method.distill_weight": 0.5})
    extras = {**extras, "start": start["encoder"]}
    loss = tiny_loss(method)
    total, (metrics, _) = loss(params, extras, batch, None, 0, False)
    assert float(metrics["distill_loss"][0]) == pytest.approx(0, abs=1e-6)
    last = params["encoder"]["block_01"]["experts"]["fc2"]
    last["kernel"] = 3 * last["kernel"]
    moved, (metrics, _) = loss(params, extras, batch, None, 0, False)
    tokens, _ = method.encode_visible(params, extras, batch)
    seen = normalize(batch["patches"][:, : method.num_visible]), batch["order"][:, : method.num_visible]
    ours, theirs = (np.asarray(x)[:, 1:] for x in (tokens, method.dense.apply({"params": start["encoder"]}, *seen)))
    standard = [(x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True) for x in (ours, theirs)]
    apart = np.abs(standard[0] - standard[1])
    assert apart.min() < 1 < apart.max()
    wanted = np.where(apart < 1, apart**2 / 2, apart - 0.5).mean((1, 2))
    assert float(metrics["distill_loss"][0]) == pytest.approx(wanted.sum(), rel=1e-3)
    assert float(moved) > float(total)
    assert method.frozen_flops() > 0


@pytest.mark.slow
def test_tokens_choose_for_themselves_where_the_gate_reads_tokens():
    method, params, extras, batch = made({"method.gate": "token", "method.gate_weight": "value"})
    assert "gates" not in params
    _, of_tokens = jax.jit(method.encode_visible)(params, extras, batch)
    (gate,) = of_tokens.values()
    assert gate.shape == (8, 1 + method.num_visible, 4)
    assert len(np.unique(gate.argmax(-1))) > 1
    other = {**batch, "cluster": batch["cluster"][::-1]}
    loss = tiny_loss(method)
    assert float(loss(params, extras, batch, None, 0, True)[0]) == float(loss(params, extras, other, None, 0, True)[0])
    grads = jax.jit(jax.grad(lambda p: method.loss(p, extras, batch, None, 0, True)[0]))(params)
    assert np.abs(grads["encoder"]["block_01"]["experts"]["gate"]["kernel"]).max() > 0


@pytest.mark.slow
def test_tokens_explore_by_noise_in_training_and_regularizers_see_none():
    method, params, extras, batch = made({"method.gate": "token", "method.noise": 8.0})
    loss = tiny_loss(method)
    still, (quiet, _) = loss(params, extras, batch, None, 3, False)
    noisy = [loss(params, extras, batch, jax.random.key(draw), 3, True) for draw in (3, 3, 4)]
    losses = [float(total) for total, _ in noisy]
    assert losses[0] == losses[1] != losses[2]
    assert losses[0] != float(still)
    for name in ("balance_loss", "confidence_loss"):
        np.testing.assert_allclose(noisy[0][1][0][name][0], quiet[name][0], rtol=1e-5)
    scanned = made({"method.gate": "token", "method.noise": 8.0, "model.scan": True, "model.remat": "full"})[0]
    again = tiny_loss(scanned)(params, extras, batch, jax.random.key(3), 3, True)[0]
    assert float(again) == pytest.approx(losses[0])
    draws = method.choices(params, extras, batch, jax.random.key(0))[1]
    assert draws.shape == (8, 1 + method.num_visible, 4)
    assert np.std(draws) == pytest.approx(8 / 4, rel=0.2)


@pytest.mark.slow
def test_micro_batches_share_their_noise():
    method, _, extras, batch = made({"batch_size": 16})
    state = tiny_state(method.config, jax.tree.map(jnp.asarray, extras))
    batch["cluster"] = (np.arange(16) % COUNT).astype(np.int32)
    both = jax.jit(lambda state, batch: [gradients(method, state, batch, jax.random.key(0), parts) for parts in (1, 2)])
    whole, split = both(state, batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), whole[0], split[0])


def test_work_does_not_grow_with_experts():
    few, many = (made({"method.experts": count})[0] for count in (2, 16))
    assert train_flops(few) == train_flops(many) == train_flops(tiny_method(tiny_config()))


def test_upcycling_and_cutting_out_are_inverse():
    method, params, *_, start = grown()
    for expert in range(4):
        dense = extract_path(params["encoder"], dict.fromkeys(method.blocks, expert))
        jax.tree.map(np.testing.assert_array_equal, dense, start["encoder"])
    assert not any("/mlp/" in name and block_name(method.blocks[0]) in name for name in flatten(params["encoder"]))
    assert upcycle(start, start) == start


@pytest.mark.parametrize(("fields", "text"), [
    ({"method.gate": "clusters"}, "method.gate='clusters'.* 'cluster'"),
    ({"method.gate_weight": "strait"}, "method.gate_weight='strait'.* 'straight'"),
    ({"method.experts": 1}, "method.experts=1.* 2"),
    ({"method.blocks": "7"}, "method.blocks='7'.* 0 to 1"),
    ({"model.depth": 1}, "method.blocks='last_two_odd' .* 1 block"),
    ({"method.temperature": 0.0}, "method.temperature=0.0"),
    ({"method.noise": -1.0}, "method.noise and"),
    ({"method.encoder_mask_tokens": True}, "without experts")])
def test_what_cannot_be_mixed_is_refused(fields, text):
    with pytest.raises(UserError, match=text):
        tiny_config(FIELDS | fields, "moce")


def test_micro_batches_are_refused_where_the_tokens_of_the_whole_batch_balance_experts():
    config = tiny_config(FIELDS | {"method.gate": "token", "train.accumulate": 2}, "moce")
    with pytest.raises(UserError, match=r"train.accumulate=2: .*moce"):
        tiny_program(config)


def test_clusters_of_another_number_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"method.clusters='' .*clusters.npz"):
        Clusters.read("")
    Clusters(np.eye(3, 12, dtype=np.float32), np.zeros(3, np.float32), np.zeros(12, np.float32),
             np.array([5, 2, 3]), meta={"data": {"source": "npz", "name": "", "classes": ""}}).write(tmp_path)
    config = tiny_config(FIELDS | {"method.clusters": str(tmp_path)}, "moce")
    with pytest.raises(UserError, match=r"method.num_clusters=5, .* 3"):
        MoCE(config, DataInfo(clusters=Clusters.read(str(tmp_path)))).check_data()
    free = tiny_config({"method.clusters": str(tmp_path)}, "moce")
    assert MoCE.data_needs(free).clusters == str(tmp_path)
    method = MoCE(free, DataInfo(clusters=Clusters.read(str(tmp_path))))
    method.check_data()
    assert (method.num_clusters, method.width) == (3, 12)
    params, extras = tiny_params(free), {"centroids": None, "share": None}
    extras = method.fit_extras(params, extras, None)
    np.testing.assert_allclose(extras["share"], [0.5, 0.2, 0.3])
    np.testing.assert_allclose(extras["centroids"].std(1), 1, rtol=1e-4)
