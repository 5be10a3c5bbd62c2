"""Decay, freezing and the optimizers: against formulas written out in NumPy, PyTorch, timm and optax."""

import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType

from mae_jax.config import DEFAULTS, OPTIMIZERS
from mae_jax.methods.mae import MAE
from mae_jax.param_tree import flatten
from mae_jax.runtime import sharding
from mae_jax.storage.checkpoint import Checkpoints
from mae_jax.training import optim
from tests.helpers.tiny import TINY_DATA, tiny_batch, tiny_config, tiny_method, tiny_params, tiny_state, tiny_step

NAMES = tuple(OPTIMIZERS)
DECAYED = ("kernel", "cls_token", "mask_token")


def decays(name):
    return name.rsplit("/", 1)[-1] in DECAYED


def test_only_kernels_and_the_class_and_mask_tokens_decay():
    config = tiny_config({"method.encoder_mask_tokens": True})
    tree, method = tiny_params(config), tiny_method(config)
    decayed = {name for name, decays in flatten(optim.decay_mask(tree, method.decays)).items() if decays}
    assert decayed == {name for name in flatten(tree) if name.endswith(DECAYED)}
    kept = {name.rsplit("/", 1)[-1] for name in flatten(tree).keys() - decayed}
    assert kept == {"bias", "scale"}


def test_the_decay_mask_goes_by_name_also_on_stacked_leaves():
    stacked = {"norm": {"scale": np.zeros((12, 8)), "bias": np.zeros((12, 8))}, "fc": {"kernel": np.zeros((12, 8, 8))}}
    mask = optim.decay_mask(stacked, decays)
    assert mask == {"norm": {"scale": False, "bias": False}, "fc": {"kernel": True}}


class HeadOnly(MAE):
    """A MAE that learns its last layers, and whose class token would not decay."""

    decayed = ("kernel",)

    def is_trainable(self, path):
        return path.startswith(("decoder/", "encoder/block_01/mlp/"))


def test_the_words_of_the_table_follow_the_method():
    config = tiny_config()
    tree = {"encoder": {"cls_token": 0, "block_01": {"mlp": {"fc1": {"kernel": 0, "bias": 0}}}}}
    words = [flatten(optim.decay_words(tree, kind(config, TINY_DATA))) for kind in (MAE, HeadOnly)]
    assert words == [
        {"encoder/block_01/mlp/fc1/bias": "no", "encoder/block_01/mlp/fc1/kernel": "yes", "encoder/cls_token": "yes"},
        {"encoder/block_01/mlp/fc1/bias": "no", "encoder/block_01/mlp/fc1/kernel": "yes",
         "encoder/cls_token": "frozen"}]


def nest(flat):
    """Returns the tree of path → leaf."""
    tree = {}
    for name, value in flat.items():
        *folders, last = name.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = value
    return tree


def follow(optimizer, start, grads, rates):
    """Returns path → parameter after a step on each of the gradients, as the train step applies updates."""
    tree, update = nest(start), jax.jit(optimizer.update)
    state = optimizer.init(tree)
    for grad, rate in zip(grads, rates, strict=True):
        updates, state = update(nest(grad), state, tree, step=0)
        tree = jax.tree.map(lambda p, u, rate=rate: p - jnp.float32(rate) * u, tree, updates)
    return flatten(tree)


def make(fields):
    config = tiny_config({"optim.weight_decay": 0.1, "optim.betas": (0.8, 0.9), "optim.eps": 1e-6, **fields})
    return optim.make_optimizer(tiny_method(config))


@pytest.fixture(scope="module")
def golden():
    """What golden/make_optim.py wrote: name → array."""
    with np.load(Path(__file__).parents[1] / "golden" / "optim.npz") as file:
        return dict(file)


def part(golden, prefix):
    """Returns path → array."""
    return {name.removeprefix(f"{prefix}/"): value for name, value in golden.items() if name.startswith(f"{prefix}/")}


def assert_close(found, wanted, rtol=1e-5):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol=rtol, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("layered", [False, True])
@pytest.mark.parametrize(("name", "clip"), [("adamw", 0.0), ("lamb", 1.0), ("sgd", 0.0)])
def test_four_steps_are_those_of_pytorch_and_timm_also_with_a_learning_rate_per_layer(golden, name, clip, layered):
    optimizer = make({"optim.name": name, "optim.clip": clip, "optim.layer_decay": 0.65 if layered else 1.0})
    start, grads = part(golden, "start"), [part(golden, f"grad{i}") for i in range(4)]
    wanted = part(golden, f"{name}_layered" if layered else name)
    assert any(abs(wanted[key] - start[key]).max() > 0.05 for key in start)
    assert_close(follow(optimizer, start, grads, golden["rates"]), wanted)


def ratio(parameter, update):
    """Returns |parameter| / |update|, 1 where either is 0."""
    above, below = np.linalg.norm(parameter), np.linalg.norm(update)
    return above / below if above > 0 and below > 0 else 1.0


def numpy_lamb(start, grads, rates, clip):
    tree = {name: value.astype(np.float64) for name, value in start.items()}
    first, second = ({name: np.zeros(value.shape) for name, value in start.items()} for _ in range(2))
    for t, (grad, rate) in enumerate(zip(grads, rates, strict=True), 1):
        norm = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in grad.values()))
        for name, g in grad.items():
            g = g.astype(np.float64) / max(norm / clip, 1)
            first[name] = 0.8 * first[name] + 0.2 * g
            second[name] = 0.9 * second[name] + 0.1 * g**2
            update = first[name] / (1 - 0.8**t) / (np.sqrt(second[name] / (1 - 0.9**t)) + 1e-6)
            if name.endswith(DECAYED):
                update = update + 0.1 * tree[name]
                update = update * ratio(tree[name], update)
            tree[name] = tree[name] - rate * update
    return tree


def numpy_lars(start, grads, rates, factors):
    tree = {name: value.astype(np.float64) for name, value in start.items()}
    momentum = {name: np.zeros(value.shape) for name, value in start.items()}
    for grad, rate in zip(grads, rates, strict=True):
        for name, g in grad.items():
            g = g.astype(np.float64)
            if name.endswith(DECAYED):
                g = g + 0.1 * tree[name]
                g = g * 1e-3 * ratio(tree[name], g) if np.linalg.norm(tree[name]) * np.linalg.norm(g) > 0 else g
            momentum[name] = 0.9 * momentum[name] + g
            tree[name] = tree[name] - rate * factors[name] * momentum[name]
    return tree


def numpy_lion(start, grads, rates):
    """Algorithm 2 of arXiv 2302.06675, with betas 0.8 and 0.9 and the weight decay 0.1."""
    tree = {name: value.astype(np.float64) for name, value in start.items()}
    momentum = {name: np.zeros(value.shape) for name, value in start.items()}
    for grad, rate in zip(grads, rates, strict=True):
        for name, g in grad.items():
            update = np.sign(0.8 * momentum[name] + 0.2 * g.astype(np.float64))
            tree[name] = tree[name] - rate * (update + 0.1 * name.endswith(DECAYED) * tree[name])
            momentum[name] = 0.9 * momentum[name] + 0.1 * g.astype(np.float64)
    return tree


def test_lion_is_its_formulas_written_out_in_numpy(golden):
    start, grads = part(golden, "start"), [part(golden, f"grad{i}") for i in range(4)]
    wanted = numpy_lion(start, grads, golden["rates"])
    assert any(abs(wanted[key] - start[key]).max() > 0.05 for key in start)
    assert_close(follow(make({"optim.name": "lion"}), start, grads, golden["rates"]), wanted)


def test_lamb_is_its_formulas_written_out_in_numpy(golden):
    start, grads = part(golden, "start"), [part(golden, f"grad{i}") for i in range(4)]
    optimizer = make({"optim.name": "lamb", "optim.clip": 0.5})
    found = follow(optimizer, start, grads, golden["rates"])
    assert_close(found, numpy_lamb(start, grads, golden["rates"], 0.5))


@pytest.mark.parametrize("decay", [1.0, 0.5])
def test_lars_is_its_formulas_written_out_in_numpy_also_with_a_learning_rate_per_layer(golden, decay):
    start, grads = part(golden, "start"), [part(golden, f"grad{i}") for i in range(4)]
    rates = 10 * golden["rates"]
    layers = {"cls_token": 3, "pos_embed": 3, "patch_embed": 3, "block_00": 2, "block_01": 1}
    factors = {name: decay ** layers.get(name.split("/")[1], 0) for name in start}
    optimizer = make({"optim.name": "lars", "optim.layer_decay": decay})
    assert_close(follow(optimizer, start, grads, rates), numpy_lars(start, grads, rates, factors))


def test_a_matrix_of_zeros_takes_a_plain_gradient_step_under_lars():
    start, grad = {"head/kernel": np.zeros((3, 2), np.float32)}, {"head/kernel": np.ones((3, 2), np.float32)}
    found = follow(make({"optim.name": "lars"}), start, [grad], [0.5])
    np.testing.assert_array_equal(found["head/kernel"], -0.5)


def test_lars_and_lamb_are_optaxs_where_these_can_do_the_same(golden):
    start, grads, rates = part(golden, "start"), [part(golden, f"grad{i}") for i in range(4)], [0.05] * 4
    mask = partial(optim.decay_mask, decays=decays)
    lars = optax.lars(0.05, 0.1, mask, trust_coefficient=1e-3, trust_ratio_mask=mask, momentum=0.9)
    wanted = follow(lars, start, grads, [-1] * 4)
    assert_close(follow(make({"optim.name": "lars"}), start, grads, rates), wanted)
    start, grads = ({key: tree[key] for key in tree if key.endswith("kernel")} for tree in (start, grads[0]))
    lamb = optax.lamb(0.05, 0.8, 0.9, 1e-6, weight_decay=0.1)  # where all decays: it has one ratio for every leaf
    wanted = follow(lamb, start, [grads] * 4, [-1] * 4)
    assert_close(follow(make({"optim.name": "lamb"}), start, [grads] * 4, rates), wanted)


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_adamw_is_bit_for_bit_what_it_was_before_there_were_others_and_so_is_its_state(golden, clip):
    mask = partial(optim.decay_mask, decays=decays)
    plain = optax.chain(*([optax.clip_by_global_norm(clip)] if clip else []), optax.scale_by_adam(0.8, 0.9, eps=1e-6),
                        optax.add_decayed_weights(0.1, mask))
    start, grads = part(golden, "start"), [part(golden, f"grad{i}") for i in range(4)]
    found, wanted = (follow(o, start, grads, golden["rates"]) for o in (make({"optim.clip": clip}), plain))
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value)
    tree = nest(start)
    assert jax.tree.structure(make({"optim.clip": clip}).init(tree)) == jax.tree.structure(plain.init(tree))


def test_clipping_bounds_the_global_norm_before_adam():
    optimizer = make({"optim.clip": 1.0, "optim.weight_decay": 0.0, "optim.betas": (0.9, 0.95)})
    tree = {"a": np.zeros(2, np.float32), "b": np.zeros(2, np.float32)}
    grads = {"a": np.array([30, 0], np.float32), "b": np.array([0, 40], np.float32)}
    _, state = optimizer.update(grads, optimizer.init(tree), tree, step=0)
    moments = next(part.mu for part in state if isinstance(part, optax.ScaleByAdamState))
    np.testing.assert_allclose(np.concatenate([moments["a"], moments["b"]]), [0.06, 0, 0, 0.08], rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_rule_reads_the_fields_that_it_declares_and_no_others(name):
    fields, read = tiny_config().optim, set()

    class Watched:
        def __getattr__(self, field):
            read.add(field)
            return fields[field]

    rule = optim.get(name)
    assert rule.build(Watched(), lambda step: 0.1, partial(optim.decay_mask, decays=decays))
    assert read == set(rule.fields)


def test_every_field_of_optim_is_read_by_some_rule_or_whatever_the_rule():
    assert DEFAULTS["optim"].keys() == optim.SHARED.union(*(optim.get(name).fields for name in NAMES))


@pytest.mark.parametrize(("fields", "unread"), [
    ({"optim.clip": 1.0, "optim.betas": (0.9, 0.99)}, []), ({"optim.momentum": 0.5}, ["optim.momentum"]),
    ({"optim.name": "lars", "optim.momentum": 0.5, "optim.betas": (0.9, 0.99), "optim.eps": 1e-6},
     ["optim.betas", "optim.eps"])])
def test_fields_that_were_changed_and_that_the_rule_does_not_read_are_named(fields, unread):
    assert optim.unread(tiny_config(fields)) == unread


@pytest.mark.parametrize("name", [
    name if name == "adamw" else pytest.param(name, marks=pytest.mark.slow) for name in NAMES])
def test_no_moments_parameters_or_averages_are_copied_in_a_step(name):
    config = tiny_config({"optim.name": name, "optim.momentum": 0.9, "optim.ema": 0.9})
    program = tiny_step(config).lower(tiny_state(config), tiny_batch(config)).compile().as_text()
    assert "state_ema__encoder____cls_token" in program
    assert re.findall(r" copy\([^)]*?(state_(?:opt|params|ema)_\w*__[a-z]\w*)", program) == []


@pytest.mark.parametrize(("decay", "depth", "embedding"), [(0.65, 12, 3.70e-3), (0.75, 24, 7.5e-4), (0.75, 32, 7.5e-5)])
def test_the_embedding_learns_least_the_last_block_by_one_factor_and_the_head_fully(decay, depth, embedding):
    rate = partial(optim.layer_rate, decay=decay, depth=depth)
    for name in ("patch_embed/kernel", "patch_embed/bias", "cls_token", "mask_token", "pos_embed"):
        assert rate(f"encoder/{name}") == decay ** (depth + 1) == pytest.approx(embedding, rel=1e-2)
    blocks = [rate(f"encoder/block_{i:02d}/mlp/fc1/kernel") for i in range(depth)]
    np.testing.assert_allclose(blocks, decay ** np.arange(depth, 0, -1))
    for name in ("encoder/norm/scale", "fc_norm/bias", "head/kernel", "decoder/block_00/mlp/fc1/kernel",
                 "decoder/mask_token"):
        assert rate(name) == 1


def test_layer_decay_multiplies_warm_up_and_minimum_too():
    config = tiny_config({"optim.layer_decay": 0.5, "optim.min_lr": 0.01, "optim.warmup_lr": 0.02,
                          "optim.weight_decay": 0.0, "optim.name": "sgd", "optim.momentum": 0.0})
    tree = {"encoder": {"block_00": {"bias": np.zeros(2, np.float32)}}, "head": {"bias": np.zeros(2, np.float32)}}
    method = tiny_method(config)
    optimizer, schedule = optim.make_optimizer(method), optim.make_schedule(method)
    updates, _ = optimizer.update(jax.tree.map(np.ones_like, tree), optimizer.init(tree), tree, step=0)
    steps = np.array([schedule(step) for step in (0, 6)])[:, None]
    np.testing.assert_allclose(steps * updates["encoder"]["block_00"]["bias"], [[0.005] * 2, [0.0025] * 2], rtol=1e-6)
    np.testing.assert_allclose(steps * updates["head"]["bias"], [[0.02] * 2, [0.01] * 2], rtol=1e-6)


@pytest.mark.parametrize("name", ["lamb", "lars"])
def test_every_matrix_of_every_block_has_a_trust_ratio_of_its_own(name):
    config = tiny_config({"optim.name": name, "model.scan": True})
    optimizer, rng = optim.make_optimizer(tiny_method(config)), np.random.default_rng(0)
    tree = tiny_params(config)
    grads = jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), tree)
    updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(tree), tree, step=0)
    for key, update in flatten(updates).items():
        if key.endswith(DECAYED):
            wanted = np.linalg.norm(flatten(tree)[key]) * (1e-3 if name == "lars" else 1)
            np.testing.assert_allclose(np.linalg.norm(update), wanted, rtol=1e-5, err_msg=key)


@pytest.mark.slow
def test_three_steps_of_lars_with_scanned_layers_are_those_without():
    fields = {"optim.name": "lars", "optim.lr": 50.0, "optim.warmup": "0 steps"}
    ends = []
    for scan in (False, True):
        config = tiny_config({**fields, "model.scan": scan})
        state, step = tiny_state(config), tiny_step(config)
        for seed in range(3):
            state, _ = step(state, tiny_batch(config, seed))
        ends.append(flatten(jax.device_get(state.params)))
    start = flatten(tiny_params(config))
    assert min(np.abs(ends[0][name] - start[name]).max() for name in start) > 1e-4
    assert_close(*ends)


@pytest.mark.parametrize("name", NAMES)
def test_frozen_parameters_keep_their_bits_and_have_no_optimizer_state_whatever_their_gradient(name):
    config = tiny_config({"optim.name": name, "optim.layer_decay": 0.9, "optim.clip": 1.0})
    method = HeadOnly(config, TINY_DATA)
    optimizer, rng, start = optim.make_optimizer(method), np.random.default_rng(0), flatten(tiny_params(config))
    grads = [{key: rng.normal(size=value.shape).astype(np.float32) for key, value in start.items()} for _ in range(2)]
    for key, value in follow(optimizer, start, grads, [0.1, 0.1]).items():
        assert (value.tobytes() != start[key].tobytes()) == method.is_trainable(key), key
    held = {key for key in start if any(name.endswith(f"/{key}") for name in flatten(optimizer.init(nest(start))))}
    assert held == set(filter(method.is_trainable, start))


@pytest.mark.slow
def test_frozen_parameters_and_their_averages_keep_their_bits_in_training():
    config = tiny_config({"optim.name": "lamb", "optim.ema": 0.99, "optim.warmup": "0 steps"})
    method = HeadOnly(config, TINY_DATA)  # it stops no gradients: the optimizer alone must hold what does not learn
    state, step = tiny_state(config, method=method), tiny_step(config, method)
    before = flatten(jax.device_get(state.params))
    for seed in range(2):
        state, _ = step(state, tiny_batch(config, seed))
    for tree in jax.device_get((state.params, state.ema)):
        for key, value in flatten(tree).items():
            assert (value.tobytes() != before[key].tobytes()) == method.is_trainable(key), key


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_state_with_frozen_parameters_comes_back_from_its_checkpoint_bit_for_bit(name, tmp_path):
    config = tiny_config({"optim.name": name, "optim.ema": 0.9})
    draw = np.random.default_rng(0)
    state = tiny_state(config, method=HeadOnly(config, TINY_DATA))
    state = jax.tree.map(lambda x: jnp.asarray(draw.normal(size=x.shape), x.dtype), state)
    checkpoints = Checkpoints(tmp_path, 3)
    checkpoints.save(int(state.step), state)
    checkpoints.wait()
    assert checkpoints.failed is None
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    restored = checkpoints.restore(shapes)
    checkpoints.close()
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)


@pytest.mark.parametrize("name", NAMES)
def test_on_8_devices_moments_live_where_their_parameters_do_and_frozen_ones_nowhere(name):
    config = tiny_config({"optim.name": name, "model.width": 128})
    mesh = AbstractMesh((1, 4, 1, 2), sharding.AXES, axis_types=(AxisType.Auto,) * 4)
    state = tiny_state(config, method=HeadOnly(config, TINY_DATA))
    placed = flatten(sharding.param_shardings(mesh, state))
    pairs = [(placed[key], placed[f"params/{name}"]) for key in placed for name in flatten(state.params)
             if key.startswith("opt/") and key.endswith(f"/{name}")]
    learning = sum(map(HeadOnly(config, TINY_DATA).is_trainable, flatten(state.params)))
    assert len(pairs) == learning * (2 if name in ("adamw", "lamb") else 1)
    assert all(moment.spec == parameter.spec for moment, parameter in pairs)
    assert any(parameter.spec == jax.P(("zero",), ("tensor",)) for _, parameter in pairs)
