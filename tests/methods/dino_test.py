"""DINO: who sees which views, what is compared with what, and how teacher, center, temperature and decay move."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.errors import UserError
from mae_jax.losses.dino import cross_entropy, update_center
from mae_jax.models.vit import make_encoder
from mae_jax.ops.patches import normalize
from mae_jax.storage.checkpoint import load_params
from mae_jax.training import loop, optim
from mae_jax.training import run as training_run
from mae_jax.training.throughput import train_flops
from mae_jax.training.warm_start import load
from tests.helpers.tiny import tiny_batch, tiny_config, tiny_loss, tiny_method, tiny_params


def made(fields=None):
    config = tiny_config(fields, "dino")
    method = tiny_method(config)
    params, center = tiny_params(config), np.random.default_rng(4).normal(size=config.method.out_dim) * 0.1
    extras = {"teacher": tiny_params(config, seed=1), "center": center.astype(np.float32)}
    return method, params, extras, tiny_batch(config)


def projected(method, *args):
    return np.asarray(jax.jit(method.project, static_argnums=3)(*args))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_every_pair_of_different_views_is_compared_as_in_the_released_code():
    rng = np.random.default_rng(0)
    teacher_logits, student_logits = rng.normal(size=(3, 2, 7)), rng.normal(size=(3, 5, 7))
    wanted = softmax(teacher_logits)
    for picture in range(3):
        terms = [-(wanted[picture, t] * np.log(softmax(student_logits[picture, s]))).sum()
                 for t in range(2) for s in range(5) if t != s]
        assert len(terms) == 8
        assert cross_entropy(jnp.float32(wanted),
                             jnp.float32(student_logits))[picture] == pytest.approx(np.mean(terms), rel=1e-5)
    same = [-(wanted[0, t] * np.log(softmax(student_logits[0, t]))).sum() for t in range(2)]
    found = cross_entropy(jnp.float32(wanted), jnp.float32(student_logits[:, :2]), same=True)
    assert found[0] == pytest.approx(np.mean(same), rel=1e-5)


def test_the_loss_is_that_of_the_formula_with_the_center_before_this_batch():
    method, params, extras, batch = made()
    teacher_logits = projected(method, extras["teacher"], batch["global/patches"], batch["global/order"])
    student_logits = np.concatenate([
        projected(method, params, batch["global/patches"], batch["global/order"]),
        projected(method, params, batch["local/patches"], batch["local/order"], (2, 2))], 1)
    wanted = softmax((teacher_logits - extras["center"]) / 0.04)
    expected = np.asarray(cross_entropy(jnp.asarray(wanted), jnp.asarray(student_logits / 0.1))).mean()
    loss, (metrics, new) = tiny_loss(method)(params, extras, batch, jax.random.key(0), 0, True)
    assert loss == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(new["center"], 0.9 * extras["center"] + 0.1 * teacher_logits.mean((0, 1)), atol=1e-6)
    total, weight = metrics["teacher_entropy"]
    assert total / weight == pytest.approx(-(wanted * np.log(np.maximum(wanted, 1e-30))).sum(-1).mean(), rel=1e-4)


def test_the_center_is_of_valid_pictures_and_stays_where_there_are_none():
    outputs = np.random.default_rng(0).normal(size=(4, 2, 3)).astype(np.float32)
    center = np.ones(3, np.float32)
    found = update_center(center, outputs, np.float32([1, 0, 1, 0]), 0.5)
    np.testing.assert_allclose(found, 0.5 + 0.5 * outputs[::2].mean((0, 1)), rtol=1e-6)
    np.testing.assert_array_equal(update_center(center, outputs, np.zeros(4, np.float32), 0.5), center)


@pytest.mark.slow
def test_the_teacher_sees_the_large_views_alone():
    method, params, extras, batch = made()
    loss = tiny_loss(method)

    def center(batch):
        return loss(params, extras, batch, jax.random.key(0), 0, True)[1][1]["center"]

    other = {**batch, "local/patches": batch["local/patches"][::-1]}
    np.testing.assert_array_equal(center(batch), center(other))
    first, second = (loss(params, extras, some, None, 0, False)[0] for some in (batch, other))
    assert first != second


@pytest.mark.slow
def test_small_views_have_the_positions_of_their_own_grid():
    method, params, _, batch = made()
    small = make_encoder(tiny_config({"data.image_size": (8, 8)}, "dino"))
    patches, order = batch["local/patches"][:, 0], batch["local/order"][:, 0]
    tokens = jax.jit(small.apply)({"params": params["encoder"]}, normalize(patches), order)
    wanted = jax.jit(method.head.apply)({"params": params["head"]}, tokens[:, 0])
    found = projected(method, params, batch["local/patches"], batch["local/order"], (2, 2))
    np.testing.assert_allclose(found[:, 0], wanted, atol=1e-6)


def test_the_teacher_follows_by_a_momentum_that_rises_to_one():
    method, params, extras, _ = made({"method.momentum": 0.9, "train.duration": "10 steps"})
    old, new = extras["teacher"]["encoder"]["cls_token"], params["encoder"]["cls_token"]
    for step, momentum in ((0, 0.9), (5, 0.95), (10, 1.0)):
        moved = method.after_update(params, extras, step)["teacher"]["encoder"]["cls_token"]
        np.testing.assert_allclose(moved, momentum * old + (1 - momentum) * new, atol=1e-6)


@pytest.mark.slow
def test_the_last_layer_is_held_for_its_first_steps_and_weight_decay_turns_no_direction():
    method, params, extras, batch = made({"method.freeze_last": "2 steps"})
    grad = jax.jit(jax.grad(lambda p, step: method.loss(p, extras, batch, None, step, False)[0]))
    for step, held in ((0, True), (1, True), (2, False)):
        grads = grad(params, step)["head"]
        assert (np.abs(grads["last"]["kernel"]).max() == 0) == held
        assert np.abs(grads["fc3"]["kernel"]).max() > 0
    longer = jax.tree.map(lambda x: x, params)
    longer["head"]["last"]["kernel"] = 0.5 * params["head"]["last"]["kernel"]
    views = batch["global/patches"], batch["global/order"]
    np.testing.assert_allclose(projected(method, longer, *views), projected(method, params, *views), atol=1e-6)


@pytest.mark.slow
def test_the_teachers_temperature_and_the_weight_decay_follow_their_schedules():
    method, *_ = made({"method.teacher_temperature": 0.08, "method.temperature_warmup": "4 steps"})
    found = [float(method._teacher_temperature(step)) for step in (0, 2, 4, 9)]
    assert found == pytest.approx([0.04, 0.06, 0.08, 0.08])
    method = tiny_method(
        tiny_config({"optim.weight_decay": 0.04, "optim.final_weight_decay": 0.4, "train.duration": "10 steps"}))
    decay = optim.weight_decay(method)
    assert [float(decay(step)) for step in (0, 5, 10)] == pytest.approx([0.04, 0.22, 0.4])
    tree = {"kernel": np.ones(2, np.float32), "bias": np.ones(2, np.float32)}
    optimizer = optim.make_optimizer(method)
    zeros = jax.tree.map(np.zeros_like, tree)
    updates, _ = optimizer.update(zeros, optimizer.init(tree), tree, step=10)
    np.testing.assert_allclose(updates["kernel"], 0.4, rtol=1e-6)
    assert not updates["bias"].any()


@pytest.mark.slow
def test_an_evaluation_compares_teacher_and_student_on_the_one_view_it_has():
    method, params, extras, batch = made()
    batch |= {"patches": batch["global/patches"][:, 0], "order": batch["global/order"][:, 0]}
    views = batch["global/patches"][:, :1], batch["global/order"][:, :1]
    wanted = softmax((projected(method, extras["teacher"], *views) - extras["center"]) / 0.04)
    student_logits = np.log(softmax(projected(method, params, *views) / 0.1))
    one = {name: value for name, value in batch.items() if "/" not in name}

    @jax.jit
    def loss(params, extras):
        value, (_, after) = method.loss(params, extras, one, None, 0, False)
        assert after is extras
        return value

    assert loss(params, extras) == pytest.approx(-(wanted * student_logits).sum(-1).mean(), rel=1e-5)
    encode = jax.jit(method.encode)
    tokens = encode(params, extras, one)
    np.testing.assert_allclose(tokens, encode(extras["teacher"], extras, one))
    student = jax.jit(method.encoder.apply)({"params": params["encoder"]}, normalize(one["patches"]), one["order"])
    assert np.abs(tokens - student).max() > 0.1


@pytest.mark.slow
def test_invalid_rows_change_neither_loss_nor_center_nor_gradients():
    method, params, extras, batch = made()
    batch["valid"][-2:] = 0
    other = {name: value.copy() for name, value in batch.items()}
    other["global/patches"][-2:] = other["local/patches"][-2:] = 7
    value = jax.jit(jax.value_and_grad(lambda p, b: method.loss(p, extras, b, jax.random.key(0), 5, True),
                                       has_aux=True))
    for ours, theirs in zip(jax.tree.leaves(value(params, batch)), jax.tree.leaves(value(params, other)), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


@pytest.mark.slow
def test_stochastic_depth_is_the_students_alone():
    method, params, extras, batch = made({"model.drop_path": 0.5})
    loss = tiny_loss(method)
    first, second = (loss(params, extras, batch, jax.random.key(k), 0, True) for k in (0, 1))
    assert first[0] != second[0]
    np.testing.assert_array_equal(first[1][1]["center"], second[1][1]["center"])


@pytest.mark.slow
def test_flops_on_paper_are_those_of_xla():
    fields = {"model.width": 192, "model.heads": 3, "data.image_size": (32, 32), "method.local_size": (16, 16),
              "method.head_width": 256, "method.bottleneck": 64, "method.out_dim": 512}
    method, params, extras, batch = made(fields)
    loss = jax.jit(jax.grad(lambda p: method.loss(p, extras, batch, jax.random.key(0), 0, True)[0]))
    compiled = loss.lower(params).compile()
    assert train_flops(method) * len(batch["valid"]) == pytest.approx(compiled.cost_analysis()["flops"], rel=0.1)


@pytest.mark.parametrize(("fields", "line"), [
    ({"method.local_size": (6, 8)}, "model.patch=.4, 4."),
    ({"method.out_dim": 1}, "method.out_dim=1; .* 2"),
    ({"method.teacher_temperature": 0.0}, "method.teacher_temperature=0.0"),
    ({"method.momentum": 1.5}, "method.momentum=1.5"),
    ({"method.local_scale": (0.4, 0.1)}, "method.local_scale=.0.4, 0.1."),
    ({"method.local_views": -1}, "method.local_views=-1; .*0 to 64"),
    ({"method.freeze_last": "one epoch"}, "duration 'one epoch'"),
    ({"model.positions": "learned"}, "DINO.* 'fixed'"),
    ({"data.color": "three"}, "DINO.* crops ")])
def test_what_cannot_be_is_refused(fields, line):
    with pytest.raises(UserError, match=line):
        tiny_config(fields, "dino")


@pytest.mark.slow
def test_a_warm_start_begins_with_the_teacher_and_a_run_starts_its_own_from_what_was_loaded(tmp_path):
    fields = {"train.duration": "2 steps", "eval.every": "", "checkpoint.every": "2 steps"}
    assert loop.train(tiny_config(fields, "dino"), str(tmp_path / "first")) == 0
    stored = load_params(tmp_path / "first", extras=True)
    teacher, student = stored["extras"]["teacher"], stored["encoder"]
    config = tiny_config({**fields, "init_from": str(tmp_path / "first")}, "dino")
    found = load(config, tiny_params(config))
    jax.tree.map(np.testing.assert_array_equal, found["encoder"], teacher["encoder"])
    assert np.abs(student["cls_token"] - teacher["encoder"]["cls_token"]).max() > 0
    run = training_run.prepare(config, tmp_path / "second")
    with jax.set_mesh(run.program.mesh):
        state = training_run.initial_state(run)
        jax.tree.map(np.testing.assert_array_equal, state.extras["teacher"], state.params)
        jax.tree.map(np.testing.assert_array_equal, state.params["encoder"], teacher["encoder"])
        run.program.step(state, next(training_run.device_batches(run, 0)))  # no buffer is donated twice
