"""The plug-in of examples/ijepa: where its targets are, what its teacher does, and training through the real loop."""

import importlib.util
import json
import math
import shutil
import tomllib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax import plugins
from mae_jax.commands.export.weights import export
from mae_jax.config import validate
from mae_jax.data.masking import draw
from mae_jax.errors import UserError
from mae_jax.ops.patches import normalize
from mae_jax.param_tree import flatten
from mae_jax.rng import rng
from mae_jax.storage.checkpoint import load_params
from mae_jax.training import loop
from mae_jax.training.warm_start import load
from tests.helpers.tiny import open_inputs, tiny_method, tiny_params

FOLDER = Path("examples/ijepa")
SIZES = [((14, 14), 30, {(5, 6), (6, 5)}), ((8, 8), 12, {(3, 4), (4, 3)}), ((16, 16), 42, {(6, 7), (7, 6)})]


def plug_in(patch, site):
    """Puts the example on the path as an installer does, with the entry points of its pyproject.toml."""
    project = tomllib.loads((FOLDER / "pyproject.toml").read_text())["project"]
    info = site / f"{project['name']}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    lines = [line for group, points in project["entry-points"].items()
             for line in (f"[{group}]", *(f"{name} = {target}" for name, target in points.items()))]
    (info / "entry_points.txt").write_text("\n".join(lines))
    for folder in (site, FOLDER.resolve()):
        patch.syspath_prepend(str(folder))
    plugins._entry_points.cache_clear()


@pytest.fixture(autouse=True)
def _plugged_in(monkeypatch, tmp_path_factory):
    plug_in(monkeypatch, tmp_path_factory.mktemp("site"))
    yield
    plugins._entry_points.cache_clear()


def config_of(**fields):
    """Returns the recipe's runlocal config with fields of other values, '__' for the dots."""
    spec = importlib.util.spec_from_file_location("ijepa_recipe", FOLDER / "recipe.py")
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    config = recipe.get_config("runlocal")
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in fields.items()})
    config.log.tensorboard = False
    validate(config)
    return config




def batches_of(config):
    """Returns the data that the method asks for, opened as a run opens them."""
    return open_inputs(config)


def made(**fields):
    """Returns method, random parameters, extras with another teacher, and a batch of random pixels."""
    config = config_of(**fields)
    method, teacher = tiny_method(config), {"encoder": tiny_params(config, seed=1)["encoder"]}
    drawn = [draw(method.patch_order(), rng(0, "order", row)) for row in range(config.batch_size)]
    batch = {name: np.stack([fields[name] for fields in drawn]) for name in drawn[0]}
    batch["patches"] = np.random.default_rng(0).integers(0, 256, method.eval_spec()["patches"].shape, np.uint8)
    batch["valid"] = np.ones(config.batch_size, np.float32)
    return method, tiny_params(config), {"teacher": teacher}, batch


def rectangle(raster, grid):
    """Returns the (rows, columns) of a set of patches; fails where they are no rectangle."""
    rows, columns = np.divmod(np.unique(raster), grid[1])
    shape = np.ptp(rows) + 1, np.ptp(columns) + 1
    assert len(rows) == math.prod(shape)
    return shape


@pytest.mark.parametrize(("grid", "patches", "shapes"), SIZES)
def test_targets_are_blocks_of_the_papers_scale_and_aspect_and_no_context_is_in_any(grid, patches, shapes):
    config = config_of(data__image_size=(grid[0] * 4, grid[1] * 4))
    order, count, found, overlaps, places = tiny_method(config).patch_order(), math.prod(grid), set(), 0, np.zeros(grid)
    visible = count // 4
    assert order.num_masked == count - visible
    for position in range(200):
        drawn = draw(order, rng(0, "order", position))
        assert sorted(drawn["order"]) == list(range(count))
        assert drawn["blocks"].shape == (4, patches)
        assert drawn["blocks"].dtype == drawn["order"].dtype == np.int32
        assert drawn["blocks"].min() >= visible  # no target has a patch that the context has
        raster = drawn["order"][drawn["blocks"]]
        found |= {rectangle(block, grid) for block in raster}
        overlaps += len(np.unique(raster)) < raster.size
        places.flat[np.unique(raster)] += 1
    assert found == shapes
    assert all(0.15 <= height * width / count <= 0.2 and 0.75 <= height / width <= 1.5 for height, width in found)
    assert overlaps > 100  # most draws have targets that overlap each other
    assert places.min() > 0  # a target may be anywhere
    assert places[grid[0] // 2, grid[1] // 2] > 2 * places[0, 0]


def test_the_context_is_spread_over_a_block_of_most_of_the_image():
    """It is drawn from a block of at least 0.85 of it, so that now and then a border has none of its patches."""
    order, seen = tiny_method(config_of()).patch_order(), np.zeros((8, 8))
    for position in range(400):
        seen.flat[draw(order, rng(0, "order", position))["order"][:16]] += 1
    assert seen.sum() == 400 * 16
    assert seen.min() > 20


def test_the_batch_says_where_the_targets_are_in_training_and_evaluation_and_repeats():
    config = config_of(eval__max_examples=24)
    first, again = (next(batches_of(config).train(3)) for _ in range(2))
    held_out = list(batches_of(config).evaluate())
    assert first["blocks"].shape == (16, 4, 12)
    for name in first:
        np.testing.assert_array_equal(first[name], again[name])
    assert len({tuple(row) for row in first["blocks"].reshape(16, -1)}) > 8
    assert [batch["blocks"].shape for batch in held_out] == [(16, 4, 12)] * 2
    assert (held_out[1]["id"] == -1).sum() == 8


def test_cached_batches_hold_the_targets_and_are_refused_for_others(tmp_path):
    from mae_jax.data import OpenedData
    from mae_jax.data.writers import write_batches

    config = config_of(eval__max_examples=16)
    method, inputs = tiny_method(config), batches_of(config)
    write_batches(OpenedData(config), inputs, method.eval_spec(), method.patch_order(), (), tmp_path, 2)
    config.data.update(source="batches", path=str(tmp_path))
    for cached, drawn in ((next(batches_of(config).train(1)), next(inputs.train(1))),
                          (next(batches_of(config).evaluate()), next(inputs.evaluate()))):
        for name in drawn:
            np.testing.assert_array_equal(cached[name], drawn[name])
    config.method.target_aspect = (1.0, 1.5)
    with pytest.raises(UserError, match="patch order"):
        batches_of(config)


def test_the_loss_is_that_of_each_target_of_the_paper_written_out_for_one_image():
    """Targets one by one: the teacher's tokens of the whole image there, normalized, and the predictor's of them."""
    method, params, extras, batch = made()
    found = jax.jit(method.loss, static_argnums=5)(params, extras, batch, jax.random.key(0), 0, True)[0]
    encode, predict = jax.jit(method.encoder.apply), jax.jit(method.predictor.apply, static_argnums=3)
    pixels, order = normalize(batch["patches"]), batch["order"]
    raster = np.argsort(order, 1)
    taught = np.take_along_axis(np.asarray(encode({"params": extras["teacher"]["encoder"]}, pixels, order)[:, 1:]),
                                raster[..., None], 1)  # in raster order
    tokens = encode({"params": params["encoder"]}, pixels[:, :16], order[:, :16])
    losses = []
    for target in range(4):
        places = np.take_along_axis(order, batch["blocks"][:, target], 1)
        wanted = np.take_along_axis(taught, places[..., None], 1)
        wanted = (wanted - wanted.mean(-1, keepdims=True)) / np.sqrt(wanted.var(-1, keepdims=True) + 1e-5)
        told = predict({"params": params["predictor"]}, tokens, np.concatenate([order[:, :16], places], 1), 12)
        losses.append(np.square(told - wanted).mean())
    assert found == pytest.approx(np.mean(losses), rel=1e-4)


@pytest.mark.slow
def test_smooth_l1_is_quadratic_near_zero_and_linear_beyond():
    method, params, extras, batch = made(method__distance="smooth_l1")
    error = np.abs(jax.jit(method.predict)(params, batch) - jax.jit(method.wanted)(extras, batch))
    assert (error < 1).any()
    assert (error > 1).any()
    found = jax.jit(method.loss, static_argnums=5)(params, extras, batch, jax.random.key(0), 0, False)[0]
    assert found == pytest.approx(np.where(error < 1, error**2 / 2, error - 0.5).mean(), rel=1e-4)


@pytest.mark.slow
def test_the_student_sees_the_context_alone_and_invalid_images_do_not_count():
    method, params, extras, batch = made()
    predict = jax.jit(method.predict)
    other = {**batch, "patches": np.concatenate([batch["patches"][:, :16], 255 - batch["patches"][:, 16:]], 1)}
    np.testing.assert_array_equal(predict(params, batch), predict(params, other))
    loss = jax.jit(method.loss, static_argnums=5)
    batch["valid"][8:] = 0
    other = {**batch, "patches": np.concatenate([batch["patches"][:8], 255 - batch["patches"][8:]])}
    first, second = (loss(params, extras, some, None, 0, False)[0] for some in (batch, other))
    assert first == second > 0


@pytest.mark.slow
def test_no_gradient_reaches_the_teacher_and_all_parameters_have_one():
    method, params, extras, batch = made()
    grad = jax.jit(jax.grad(lambda p, e: method.loss(p, e, batch, None, 0, False)[0], (0, 1)))
    of_params, of_teacher = grad(params, extras)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(of_teacher))
    silent = {name for name, leaf in flatten(of_params).items() if not np.any(leaf)}
    assert silent == set()


def test_the_teachers_momentum_rises_linearly_from_its_first_value_to_one():
    method = tiny_method(config_of(train__duration="100 steps"))
    params, extras = {"encoder": jnp.ones(3), "predictor": jnp.ones(2)}, {"teacher": {"encoder": jnp.zeros(3)}}
    for step, momentum in ((0, 0.996), (50, 0.998), (100, 1.0), (120, 1.0)):
        moved = method.after_update(params, extras, jnp.int32(step))
        assert moved.keys() == {"teacher"}
        np.testing.assert_allclose(moved["teacher"]["encoder"], 1 - momentum, atol=1e-7)


@pytest.mark.parametrize(("fields", "line"), [
    ({"method__target_scale": (0.16, 0.17)}, "no block of 8 x 8 patches"),
    ({"method__context_ratio": 0.7}, "44 of 64 patches; expected 1 to 37"),
    ({"method__context_scale": (0.9, 1.2)}, "at most 1"),
    ({"method__momentum": 1.0}, "momentum"),
    ({"method__distance": "l1"}, "l2, smooth_l1"),
])
def test_what_cannot_be_drawn_is_refused(fields, line):
    with pytest.raises(UserError, match=line):
        config_of(**fields)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of 24 steps, and its copy that lost what came after step 12 and went on."""
    with pytest.MonkeyPatch.context() as patch:
        plug_in(patch, tmp_path_factory.mktemp("site"))
        whole, again = (tmp_path_factory.mktemp("ijepa") / name for name in ("whole", "again"))
        config = config_of(train__duration="24 steps", checkpoint__every="12 steps", eval__every="24 steps",
                           optim__lr=0.08, method__momentum=0.9)
        assert loop.train(config, str(whole)) == 0
        shutil.copytree(whole, again)
        shutil.rmtree(again / "checkpoints" / "24")
        (again / "DONE").unlink()
        assert loop.train(config, str(again)) == 0
    return config, whole, again


@pytest.mark.slow
def test_the_loss_falls_and_probes_are_of_the_encoder(trained):
    rows = [json.loads(line) for line in (trained[1] / "metrics.jsonl").read_text().splitlines()]
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert len(losses) == 24
    assert np.mean(losses[-4:]) < 0.9 * np.mean(losses[:4])
    assert {"eval/loss", "eval/knn/top1", "eval/linear/top1"} <= rows[-1].keys()


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_bit_for_bit(trained):
    _, *folders = trained
    whole, again = (flatten(load_params(folder / "checkpoints" / "24", extras=True)) for folder in folders)
    assert whole.keys() == again.keys()
    for name, value in whole.items():
        np.testing.assert_array_equal(value, again[name], name)


@pytest.mark.slow
def test_evaluations_exports_and_warm_starts_have_the_teachers_weights(trained, tmp_path):
    config, folder, _ = trained
    stored = load_params(folder, extras=True)
    teacher = stored["extras"]["teacher"]["encoder"]
    assert np.abs(teacher["cls_token"] - stored["encoder"]["cls_token"]).max() > 0
    method, batch = tiny_method(config), next(batches_of(config).train(0))
    found = method.encode(stored, stored["extras"], batch)
    wanted = method.encoder.apply({"params": teacher}, normalize(batch["patches"]), batch["order"])
    np.testing.assert_array_equal(found, wanted)
    assert export(str(folder), str(tmp_path / "encoder.safetensors"), "mae_jax") == 0
    for source in (folder, tmp_path / "encoder.safetensors"):
        config.init_from = str(source)
        loaded = load(config, tiny_params(config))
        jax.tree.map(np.testing.assert_array_equal, loaded["encoder"], teacher)
        jax.tree.map(np.testing.assert_array_equal, loaded["predictor"], stored["predictor"])
