"""Starting from other parameters: positions on other grids, heads of other classes, files of others, and refusals."""

import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from safetensors.numpy import save_file

from mae_jax.errors import UserError
from mae_jax.interop.hf import to_hf
from mae_jax.interop.mae import to_mae
from mae_jax.interop.timm import to_timm
from mae_jax.models.layers import sincos_positions
from mae_jax.ops.patches import PatchGrid
from mae_jax.ops.pos_embed import resize
from mae_jax.param_tree import flatten, merge
from mae_jax.storage import safetensors_file
from mae_jax.storage.checkpoint import Checkpoints
from mae_jax.training import workdir
from mae_jax.training.warm_start import load
from tests.helpers.tiny import tiny_config, tiny_params, tiny_segment, tiny_state, tiny_supervised

LEARNED = {"model.positions": "learned"}
LARGER = {"data.image_size": (24, 32)}  # 6 x 8 patches


def written(folder, config, seed=0, classes=()):
    """Writes an exported file with random parameters of a config; returns its path and them."""
    params = tiny_params(config, seed)
    file = folder / "from.safetensors"
    safetensors_file.save(file, params, workdir.metadata(config, classes=classes))
    return str(file), params


def from_elsewhere(folder, state):
    """Writes a file without a config of ours."""
    save_file(state, folder / "from.safetensors")
    return str(folder / "from.safetensors")


def started(source, config, classes=()):
    """Starts a model of `config` with other random parameters from `source`; returns flat parameters and the report."""
    config = config.copy_and_resolve_references()
    config.init_from = source
    fresh = jax.tree.map(jnp.asarray, tiny_params(config, seed=1))
    tree, report = merge(fresh, load(config, fresh, classes))
    return {name: np.asarray(leaf) for name, leaf in flatten(tree).items()}, report


def test_fine_tuning_takes_the_encoder_of_pretraining_and_reports_the_rest(tmp_path):
    source, theirs = written(tmp_path, tiny_config())
    ours, report = started(source, tiny_supervised())
    for name, leaf in flatten(theirs).items():
        if name.startswith("encoder/") and "norm/" not in name:
            np.testing.assert_array_equal(ours[name], leaf, err_msg=name)
    assert "new: 4 (fc_norm/bias, fc_norm/scale, head/bias, head/kernel)" in report
    assert "left over: " in report
    assert "encoder/norm" in report.partition("left over")[2]
    assert "decoder/" in report.partition("left over")[2]


def test_a_workdirs_averaged_parameters_are_taken(tmp_path):
    config = tiny_config({"optim.ema": 0.9})
    state = tiny_state(config)
    state.ema["encoder"]["cls_token"] += 1
    workdir.record(epath.Path(tmp_path), config)
    checkpoints = Checkpoints(tmp_path, 2)
    checkpoints.save(int(state.step), state)
    checkpoints.wait()
    checkpoints.close()
    wanted = np.asarray(state.ema["encoder"]["cls_token"])
    np.testing.assert_array_equal(started(str(tmp_path), tiny_supervised())[0]["encoder/cls_token"], wanted)


@pytest.mark.parametrize("size", [{}, LARGER])
def test_learned_positions_start_from_fixed_ones_stretched_to_the_new_grid(tmp_path, size):
    config = tiny_supervised(LEARNED | size)
    ours, report = started(written(tmp_path, tiny_config())[0], config)
    there = sincos_positions((4, 4), 32)
    wanted = resize(there, (4, 4), PatchGrid.of(config).shape) if size else there
    np.testing.assert_array_equal(ours["encoder/pos_embed"], wanted)
    assert "pos_embed" not in report.partition("new")[2].partition("left over")[0]


def test_learned_positions_are_resized_from_the_grid_that_their_config_names(tmp_path):
    source, theirs = written(tmp_path, tiny_supervised(LEARNED | {"data.image_size": (8, 32)}))  # 2 x 8 patches
    ours, _ = started(source, tiny_supervised(LEARNED))
    wanted = resize(theirs["encoder"]["pos_embed"], (2, 8), (4, 4))
    np.testing.assert_array_equal(ours["encoder/pos_embed"], wanted)


def test_a_head_of_other_classes_is_new_and_the_old_one_left_over(tmp_path):
    source, _ = written(tmp_path, tiny_supervised({"method.classes": 5}))
    ours, report = started(source, tiny_supervised())
    assert ours["head/kernel"].shape == (32, 3)
    assert "new: 2 (head/bias, head/kernel)" in report
    assert "left over: 2 (another head/bias, another head/kernel)" in report


def test_a_head_of_the_same_classes_goes_on(tmp_path):
    source, theirs = written(tmp_path, tiny_supervised())
    ours, report = started(source, tiny_supervised())
    np.testing.assert_array_equal(ours["head/kernel"], theirs["head"]["kernel"])
    assert report.endswith("new: none; left over: none")


ANIMALS, THINGS = ("ant", "bee", "cat"), ("cup", "hat", "key")
NEW = r"new: 2 \(head/bias, head/kernel\); left over: 2 "
NONE = r"new: none; left over: none"
TAKEN, MADE, UNKNOWN = "It is used", "A new head is made", "names are unknown"


@pytest.mark.parametrize(("theirs", "ours", "init_head", "report", "told"), [
    (ANIMALS, ANIMALS, "match", NONE, ""),
    (ANIMALS, THINGS, "match", NEW, MADE),
    (ANIMALS, ANIMALS[::-1], "match", NEW, MADE),
    (("caf\u00e9", "b", "c"), ("cafe\u0301", "b", "c"), "match", NONE, ""),
    (ANIMALS, THINGS, "keep", NONE, TAKEN),
    (ANIMALS, ANIMALS, "new", NEW, ""),
    ((), THINGS, "match", NONE, UNKNOWN),
    (ANIMALS, (), "match", NONE, UNKNOWN),
    (("0", "1", "2"), ("0", "1", "2"), "match", NONE, UNKNOWN),
    (("0", "1", "2"), ("3", "4", "5"), "match", NEW, MADE),
    (("0", "1", "2"), ANIMALS, "match", NEW, MADE),
])
def test_a_head_goes_on_where_its_classes_are_ours_and_it_is_told(tmp_path, caplog, theirs, ours, init_head, report,
                                                                  told):
    caplog.set_level("INFO", "mae_jax")
    source, _ = written(tmp_path, tiny_supervised(), classes=theirs)
    assert re.search(report, started(source, tiny_supervised({"init_head": init_head}), ours)[1])
    lines = [record.getMessage() for record in caplog.records if "its head" in record.getMessage()]
    assert len(lines) == bool(told)
    assert told in "".join(lines)
    assert "\n" not in "".join(lines)


def test_a_workdir_says_the_classes_of_its_head(tmp_path, caplog):
    config = tiny_supervised()
    state = tiny_state(config)
    workdir.record(epath.Path(tmp_path), config, SimpleNamespace(num_train=9, classes=ANIMALS, identity=dict))
    checkpoints = Checkpoints(tmp_path, 2)
    checkpoints.save(int(state.step), state)
    checkpoints.wait()
    checkpoints.close()
    for source in (str(tmp_path), str(tmp_path / "checkpoints" / "0")):
        assert re.search(NONE, started(source, config, ANIMALS)[1])
        assert re.search(NEW, started(source, config, THINGS)[1])
    assert "classes: 3 -> 3 (-ant, -bee, -cat, +cup, +hat, +key)" in caplog.text


@pytest.mark.parametrize(("theirs", "ours", "line"), [
    (tiny_supervised, {"method.classes": 5}, r"none of method\.name=supervised and 5 classes"),
    (tiny_config, {}, r"none of method\.name=supervised and 3 classes"),
    (tiny_supervised, {"method.head": "probe"}, r"method\.head=probe"),
])
def test_a_head_that_is_to_be_kept_and_does_not_fit_is_refused(tmp_path, theirs, ours, line):
    source, _ = written(tmp_path, theirs())
    with pytest.raises(UserError, match=rf"init_head=keep .*{line}"):
        started(source, tiny_supervised(ours | {"init_head": "keep"}))


@pytest.mark.parametrize("tiny", [tiny_supervised, tiny_segment])
def test_the_head_of_a_probe_starts_anew_as_its_batch_norm_does(tmp_path, tiny):
    source, theirs = written(tmp_path, tiny({"method.head": "probe"}))
    ours, report = started(source, tiny({"method.head": "probe"}))
    assert not np.array_equal(ours["head/kernel"], theirs["head"]["kernel"])
    assert "new: 2 (head/bias, head/kernel)" in report


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, b"\x02\x00\x00\x00\x00\x00\x00\x00[]"])
def test_a_file_that_is_no_safetensors_file_is_the_users_mistake(tmp_path, content):
    (tmp_path / "from.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="safetensors"):
        started(str(tmp_path / "from.safetensors"), tiny_supervised())


@pytest.mark.parametrize(("theirs", "ours", "line"), [
    ({"model.heads": 4}, {}, r"model\.heads=4, .* 2$"),
    ({"model.patch": (2, 8)}, {}, r"model\.patch=\(2, 8\), .*\(4, 4\)"),
    ({"model.gelu": "tanh"}, {}, r"model\.gelu=tanh, .* erf"),
    ({"model.depth": 3}, {}, r"model\.depth=3, where this config has 2\."),
    ({}, {"model.depth": 3}, r"model\.depth=2, where this config has 3\."),
    ({}, {"model.layer_scale": 0.1}, r"--config\.model\.layer_scale=0$"),
    ({"model.layer_scale": 0.1}, {}, r"--config\.model\.layer_scale=0\.1$"),
    ({"model.width": 64}, {}, r"model\.width=64, where this config has 32\."),
    ({"model.width": 64, "model.mlp_ratio": 2}, {}, r"model\.width=64, model\.mlp_ratio=2, .* 32, 4\."),
    (LEARNED, {}, r"model\.positions=learned"),
])
def test_another_encoder_is_refused_in_one_line(tmp_path, theirs, ours, line):
    source, _ = written(tmp_path, tiny_supervised(theirs))
    with pytest.raises(UserError, match=line) as caught:
        started(source, tiny_supervised(ours))
    assert "\n" not in str(caught.value)


def test_files_with_the_names_of_others_are_read(tmp_path):
    config = tiny_config()
    params = tiny_params(config)
    where = (PatchGrid.of(config).shape, config.model.patch)
    wanted, report = started(written(tmp_path, config)[0], tiny_supervised())
    for state in (to_mae(params, *where), to_hf(params, *where), to_timm(params, *where)):
        ours, found = started(from_elsewhere(tmp_path, state), tiny_supervised())
        assert found.partition("left over")[0] == report.partition("left over")[0]
        for name, leaf in wanted.items():
            np.testing.assert_array_equal(ours[name], leaf, err_msg=name)


@pytest.mark.parametrize("deit3", [False, True])
def test_a_classifier_of_timms_goes_on_at_another_size(tmp_path, deit3):
    fields = LEARNED | ({"model.layer_scale": 0.1, "model.pool": "cls"} if deit3 else {})
    params = tiny_params(tiny_supervised(fields))
    state = to_timm(params, (4, 4), (4, 4))
    assert state["pos_embed"].shape[1] == (16 if deit3 else 17)
    ours, report = started(from_elsewhere(tmp_path, state), tiny_supervised(fields | LARGER))
    assert report.endswith("new: none; left over: none")
    np.testing.assert_array_equal(ours["encoder/pos_embed"], resize(params["encoder"]["pos_embed"], (4, 4), (6, 8)))
    np.testing.assert_array_equal(ours["head/kernel"], params["head"]["kernel"])


def test_positions_that_are_no_square_need_a_config(tmp_path):
    wide = tiny_supervised(LEARNED | {"data.image_size": (16, 20)})
    source = from_elsewhere(tmp_path, to_timm(tiny_params(wide), (4, 5), (4, 4)))
    with pytest.raises(UserError, match="20 positions"):
        started(source, tiny_supervised(LEARNED))
    written(tmp_path, wide)
    assert started(source, tiny_supervised(LEARNED))[0]["encoder/pos_embed"].shape == (16, 32)


UPERNET = {"method.head": "upernet", "method.train_blocks": -1, "method.head_width": 8, "method.aux_width": 4,
           "model.positions": "learned"}
BIASED = {**UPERNET, "method.relative_position_bias": True, "model.layer_scale": 1.0}


@pytest.mark.parametrize("described", [True, False])
def test_patches_of_another_size_are_resized_for_dense_tasks_as_torch_does_it(tmp_path, caplog, described):
    before = tiny_config({"model.positions": "learned"})  # 4 x 4 patches of 4 pixels
    source, theirs = written(tmp_path, before)
    if not described:
        source = from_elsewhere(tmp_path, to_mae(theirs, (4, 4), (4, 4)))
    with caplog.at_level("INFO"):
        ours, _ = started(source, tiny_segment({"model.patch": (6, 6), "data.image_size": (48, 48), **LEARNED}))
    kernel = theirs["encoder"]["patch_embed"]["kernel"].reshape(16, 3 * 32)
    found = ours["encoder/patch_embed/kernel"].reshape(36, 3 * 32)
    np.testing.assert_allclose(found, resize(kernel, (4, 4), (6, 6)), atol=1e-6)
    table = resize(theirs["encoder"]["pos_embed"], (4, 4), (8, 8))
    np.testing.assert_allclose(ours["encoder/pos_embed"], table, atol=1e-6)
    assert "from 4 x 4 to 6 x 6 pixels" in caplog.text
    with pytest.raises(UserError, match=r"patch|shape"):  # a classifier takes them as they are
        started(source, tiny_supervised({"model.patch": (6, 6), "data.image_size": (48, 48)}))


def test_what_upernet_adds_to_an_encoder_is_new_and_told_and_changes_nothing_at_first(tmp_path):
    source, theirs = written(tmp_path, tiny_config())
    ours, report = started(source, tiny_segment(BIASED))
    np.testing.assert_array_equal(ours["encoder/block_01/attn/qkv/kernel"],
                                  theirs["encoder"]["block_01"]["attn"]["qkv"]["kernel"])
    new = report.partition("new: ")[2].partition("left over")[0]
    for name in ("encoder/block_*", "encoder/pos_embed", "upernet/fuse", "upernet/aux_classes"):
        assert (name in new) == (name != "encoder/pos_embed")  # which starts from fixed ones
    assert "encoder/block_*" not in report.partition("new: ")[0].replace("encoder/block_*", "", 1)


@pytest.mark.parametrize(("theirs", "ours", "line"), [
    ({}, {**BIASED, "model.layer_scale": 0.1}, "was trained without LayerScale; add --config.model.layer_scale=0"),
    (BIASED, UPERNET, "was trained with LayerScale"),
    ({**BIASED, "model.layer_scale": 0.0}, UPERNET, "has another encoder: encoder/block_00/attn/relative_position"),
    (UPERNET, {**UPERNET, "method.classes": 4, "init_head": "keep"}, "has shape (3,), but this model needs (4,)")])
def test_another_function_than_that_of_the_encoder_is_refused(tmp_path, theirs, ours, line):
    source, _ = written(tmp_path, tiny_segment({"model.positions": "learned", **theirs}))
    with pytest.raises(UserError, match=r"^[^\n]+$") as error:
        started(source, tiny_segment(ours))
    assert line in str(error.value)


def test_an_upernet_of_other_classes_starts_with_new_classifiers_and_says_so(tmp_path):
    source, theirs = written(tmp_path, tiny_segment(UPERNET))
    ours, report = started(source, tiny_segment({**UPERNET, "method.classes": 5}))
    np.testing.assert_array_equal(ours["upernet/fuse/kernel"], theirs["upernet"]["fuse"]["kernel"])
    assert ours["upernet/main_classes/classifier/kernel"].shape == (8, 5)
    assert "new: 4 (upernet/aux_classes, upernet/main_classes)" in report
    assert "left over: 4 (other classes/upernet)" in report
    same, _ = started(source, tiny_segment(UPERNET))
    np.testing.assert_array_equal(same["upernet/main_classes/classifier/kernel"],
                                  theirs["upernet"]["main_classes"]["classifier"]["kernel"])


def test_tables_are_added_to_an_encoder_that_has_a_layer_scale_of_its_own(tmp_path):
    source, theirs = written(tmp_path, tiny_config({"model.layer_scale": 0.1}))
    ours, _ = started(source, tiny_segment({**BIASED, "model.layer_scale": 0.1}))
    np.testing.assert_array_equal(ours["encoder/block_00/ls1/gamma"], theirs["encoder"]["block_00"]["ls1"]["gamma"])
