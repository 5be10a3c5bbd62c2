"""Exports are complete folders, which are read back and compared before they are there."""

import json
import logging
import sys
from types import SimpleNamespace

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from safetensors.numpy import load_file

from mae_jax.commands.export import publishing, weights
from mae_jax.errors import UserError
from mae_jax.interop import hf, layouts, onnx
from mae_jax.param_tree import flatten, nest
from mae_jax.storage import safetensors_file
from mae_jax.storage.checkpoint import Checkpoints, load_params
from mae_jax.training import workdir
from tests.helpers.tiers import all_slow_but
from tests.helpers.tiny import raster_batch, tiny_config, tiny_method, tiny_params, tiny_state, tiny_supervised

CLASSES = ("ant", "bee", "cat")
RUNS = {
    "mae": lambda: tiny_config(),
    "dino": lambda: tiny_config(method="dino"),
    "cls": lambda: tiny_supervised({"model.pool": "cls"}),
    "mean": lambda: tiny_supervised({"model.positions": "learned"}),
}


def made(folder, config, classes=(), seed=5):
    """Makes a workdir whose only checkpoint has random values everywhere; returns it and its parameters."""
    method = tiny_method(config)
    params = tiny_params(config, seed)
    extras = {"teacher": params} if config.method.name == "dino" else {}
    extras = jax.eval_shape(method.init, jax.random.key(0), method.batch_spec())[1] and extras
    state = tiny_state(config, extras, method)._replace(params=jax.tree.map(jnp.asarray, params), step=np.int32(6))
    workdir.record(epath.Path(folder), config, SimpleNamespace(num_train=9, classes=classes, identity=dict))
    lines = [{"step": 3, "eval/loss": 0.5}, {"step": 6, "eval/loss": 0.25, "eval/top1": 0.75},
             {"step": 9, "eval/loss": 0.1}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    checkpoints = Checkpoints(folder, 2)
    checkpoints.save(6, state)
    checkpoints.wait()
    checkpoints.close()
    return folder, params


@pytest.fixture(scope="module", params=all_slow_but(("mae",), RUNS))
def run(request, tmp_path_factory):
    """(its name, workdir, parameters, config)."""
    config = RUNS[request.param]()
    labeled = config.method.name == "supervised"
    return request.param, *made(tmp_path_factory.mktemp("runs") / request.param, config, CLASSES * labeled), config


@pytest.mark.parametrize("layout", ["hf", "timm", "mae"])
def test_what_our_reader_makes_of_a_folder_is_what_was_exported_bit_for_bit(run, layout, tmp_path):
    name, folder, params, config = run
    if (name, layout) == ("mean", "hf"):
        with pytest.raises(UserError, match=r"mean of the patches.*--layout=timm"):
            weights.export(str(folder), str(tmp_path / "out"), layout)
        assert not list(tmp_path.iterdir())
        return
    assert weights.export(str(folder), str(tmp_path / "out"), layout) == 0
    read, wanted = flatten(layouts.read(load_params(tmp_path / "out"), config)), flatten(params)
    parts = {"cls": ("encoder", "head"), "mean": ("encoder", "head", "fc_norm"), "dino": ("encoder",),
             "mae": ("encoder",) if layout == "timm" else ("encoder", "decoder")}[name]
    assert read.keys() == {key for key in wanted if key.startswith(parts)}
    for key, leaf in read.items():
        np.testing.assert_array_equal(leaf, wanted[key], err_msg=key)
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_hugging_faces_folder_says_which_of_its_models_it_is_and_how_images_are_prepared(run, tmp_path):
    name, folder, _params, _config = run
    if name == "mean":
        return
    weights.export(str(folder), str(tmp_path / "out"), "hf")
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    kind = {"mae": "ViTMAEForPreTraining", "cls": "ViTForImageClassification", "dino": "ViTModel"}[name]
    assert (said["architectures"], said["layer_norm_eps"], said["num_attention_heads"]) == ([kind], 1e-6, 2)
    assert said.get("id2label", {}) == (dict(zip("012", CLASSES, strict=True)) if name == "cls" else {})
    assert workdir.classes_of(str(tmp_path / "out")) == (CLASSES if name == "cls" else ())
    images = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert (images["size"], images["crop_size"]) == ({"shortest_edge": 18}, {"height": 16, "width": 16})
    arrays = load_file(tmp_path / "out" / "model.safetensors")
    if kind == "ViTModel":  # whose pooler hands the class token on
        np.testing.assert_array_equal(arrays["pooler.dense.weight"], np.eye(32))
        assert said["pooler_act"] == "linear"
        assert "encoder.layer.0.attention.attention.query.weight" in arrays


def test_classes_of_one_name_stay_apart():
    assert hf.distinct(("crane", "ant", "crane")) == ["crane (0)", "ant", "crane (2)"]


def test_timms_folder_has_all_that_its_hub_reads(run, tmp_path):
    name, folder, _, _ = run
    weights.export(str(folder), str(tmp_path / "out"), "timm")
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    labeled = name in ("cls", "mean")
    assert said["num_classes"] == said["pretrained_cfg"]["num_classes"] == 3 * labeled
    assert said["model_args"]["embed_dim"] == said["num_features"] == 32
    assert said["pretrained_cfg"]["input_size"] == [3, 16, 16]
    assert said["pretrained_cfg"]["crop_pct"] == 224 / 256
    assert said["pretrained_cfg"].get("label_names", []) == list(CLASSES) * labeled
    assert said["global_pool"] == ("avg" if name == "mean" else "token")
    assert said["model_args"]["fc_norm"] is (name == "mean")


@pytest.mark.slow
def test_a_stablehlo_program_computes_features_and_logits_of_any_number_of_images(run, tmp_path):
    name, folder, params, config = run
    weights.export(str(folder), str(tmp_path / "out"), "stablehlo")
    method, batch = tiny_method(config), raster_batch(config)
    images = method.grid.unpatchify(batch["patches"], batch["order"])
    program = jax.export.deserialize(bytearray((tmp_path / "out" / "encoder.stablehlo").read_bytes()))
    assert program.platforms == ("cpu", "cuda", "tpu")
    arrays = load_file(tmp_path / "out" / "model.safetensors")
    from mae_jax.methods.base import pool

    tokens = jax.jit(method.encode)(params, {}, batch)
    wanted = np.asarray(pool(tokens, config.model.pool))
    for count in (1, 3, 8):
        found = program.call(arrays, images[:count])
        np.testing.assert_allclose(found["features"], wanted[:count], rtol=0, atol=1e-5 * np.abs(wanted).max())
    assert ("logits" in found) == (name in ("cls", "mean"))
    if "logits" in found:
        logits = np.asarray(jax.jit(method.logits)(params, {}, batch))
        np.testing.assert_allclose(found["logits"], logits, rtol=0, atol=1e-5 * np.abs(logits).max())


@pytest.mark.slow
def test_an_onnx_model_computes_features_and_logits_of_any_number_of_images(run, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("jax2onnx")
    name, folder, params, config = run
    weights.export(str(folder), str(tmp_path / "out"), "onnx")
    method, batch = tiny_method(config), raster_batch(config)
    images = method.grid.unpatchify(batch["patches"], batch["order"])
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
    wanted = publishing.forward(config)(nest(flatten(params)), images)
    for count in (1, 3, 8):
        found = session.run(None, {"images": images[:count]})
        assert len(found) == 1 + (name in ("cls", "mean"))
        for array, each in zip(found, wanted.values(), strict=False):
            np.testing.assert_allclose(array, each[:count], rtol=0, atol=1e-4 * np.abs(each).max())


def test_what_makes_an_onnx_model_warns_of_nothing_that_a_user_could_mend(monkeypatch, caplog):
    converter, made = logging.getLogger("jax2onnx.plugins.plugin_system"), SimpleNamespace(SerializeToString=bytes)

    def to_onnx(*args, **kwargs):
        converter.warning("Skipping import of a plug-in")
        converter.error("no rule for a primitive")
        return made

    monkeypatch.setitem(sys.modules, "jax2onnx", SimpleNamespace(to_onnx=to_onnx))
    config = tiny_config()
    onnx.make(layouts.Exported(tiny_params(config, 1), config))
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert converter.isEnabledFor(logging.WARNING)


def test_the_layout_of_onnx_names_its_extra_where_it_is_missing(run, tmp_path, monkeypatch):
    monkeypatch.setattr("mae_jax.interop.onnx.find_spec", lambda name: None if name == "jax2onnx" else name)
    with pytest.raises(UserError, match=r"needs jax2onnx; run: pip install 'mae_jax\[onnx\]'"):
        weights.export(str(run[1]), str(tmp_path / "out"), "onnx")


def test_a_file_of_torch_save_has_the_published_names_under_model(run, tmp_path):
    _name, folder, params, config = run
    weights.export(str(folder), str(tmp_path / "out.pth"), "mae")
    read = flatten(layouts.read(load_params(tmp_path / "out.pth"), config))
    for key, leaf in read.items():
        np.testing.assert_array_equal(leaf, flatten(params)[key], err_msg=key)
    assert "encoder/block_01/attn/qkv/bias" in read
    assert [path.name for path in tmp_path.iterdir()] == ["out.pth"]


def test_the_card_says_data_method_step_metrics_and_how_it_is_loaded(run, tmp_path):
    _name, folder, _, config = run
    weights.export(str(folder), str(tmp_path / "out"), "timm")
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: timm\n")
    for text in (f"method.name={config.method.name}", "data.source=photo_crops", "9 images", "step 6",
                 "| eval/loss | 0.25 | 6 |", "| eval/top1 | 0.75 | 6 |", "(0.485, 0.456, 0.406)", "16 x 16 pixels",
                 'timm.create_model("local-dir:FOLDER", pretrained=True)', "train.duration = \"6 steps\""):
        assert text in card
    assert "0.1 | 9" not in card  # it was measured later


def test_a_copied_checkpoint_has_a_card_too(run, tmp_path):
    weights.export(str(run[1]), str(tmp_path / "copy"), "mae_jax")
    card = (tmp_path / "copy" / "README.md").read_text()
    assert "step 6" in card
    assert 'load_params("FOLDER")' in card


@pytest.mark.parametrize(("source", "line"), [
    ("/data/mae_pretrain_vit_base.pth", "CC BY-NC 4.0"), ("hf://facebook/vit-mae-base", "license: cc-by-nc-4.0"),
    ("hf://timm/vit_base_patch16_224.mae", "CC BY-NC 4.0"), ("/data/other.pth", "Those that it started from may have"),
    ("", "puts no licence on weights")])
def test_the_card_notes_the_licence_of_published_weights_that_a_run_started_from(source, line):
    from mae_jax.commands.export import card

    config = tiny_config({"init_from": source})
    exported = layouts.Exported(tiny_params(config), config)
    text = card.text(exported, "timm", epath.Path("/nowhere"), -1)
    assert line in text
    assert ("NC" in text) == ("mae" in source)
    assert "/data" not in text


def test_what_is_not_read_back_as_it_was_is_not_published(run, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors").write_text("before")
    save = safetensors_file.save

    def damaged(path, params, metadata):
        flat = dict(flatten(params))
        name = sorted(flat)[0]
        save(path, flat | {name: flat[name] + 1e-7}, metadata)

    monkeypatch.setattr(safetensors_file, "save", damaged)
    with pytest.raises(UserError, match=r"is not what was exported.*nothing was written"):
        weights.export(str(run[1]), str(tmp_path / "out"), "timm")
    assert (tmp_path / "out" / "model.safetensors").read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_layout_whose_reader_reads_something_else_is_not_published(run, tmp_path, monkeypatch):
    timm = layouts.get("timm")
    swapped = timm._replace(to=lambda params, config: {
        name: array[::-1].copy() if name.endswith("attn.qkv.bias") else array
        for name, array in timm.to(params, config).items()})
    monkeypatch.setattr(layouts, "get", lambda name: swapped)
    with pytest.raises(UserError, match="nothing was written"):
        weights.export(str(run[1]), str(tmp_path / "out"), "timm")
    assert not list(tmp_path.iterdir())


def test_a_program_that_computes_something_else_is_not_published(run, tmp_path, monkeypatch):
    monkeypatch.setattr(publishing, "forward", lambda config: lambda params, images: {"features": np.ones((2, 32))})
    wrong = layouts.Program("p", lambda exported: b"p", lambda *_: {"features": np.ones((2, 32)) + 1e-3}, 1e-4)
    monkeypatch.setattr(layouts, "get", lambda name: layouts.Layout(files=(), program=wrong))
    with pytest.raises(UserError, match=r"off by 1\.0e-03 of the largest"):
        weights.export(str(run[1]), str(tmp_path / "out"), "any")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_there_keeps_its_other_files_and_what_is_replaced_is_told(run, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    weights.export(str(run[1]), str(tmp_path / "out"), "mae")
    assert "replaces" not in capsys.readouterr().out
    weights.export(str(run[1]), str(tmp_path / "out"), "mae")
    assert "replaces README.md, model.safetensors" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"mine.txt", "README.md", "model.safetensors"}
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


@pytest.mark.bucket
def test_a_folder_in_a_bucket_is_whole_and_its_weights_come_last(run, gcs, tmp_path):
    to = f"gs://bucket/{tmp_path.name}"
    gcs.add({"path": "upload.*model.safetensors", "status": 403, "times": -1})
    with pytest.raises(OSError, match="access denied"):
        weights.export(str(run[1]), to, "timm")
    with pytest.raises(UserError, match="no checkpoint in"):
        load_params(to)
    gcs.clear()
    weights.export(str(run[1]), to, "timm")
    read = flatten(layouts.read(load_params(to), run[3]))
    assert all(np.array_equal(leaf, flatten(run[2])[key]) for key, leaf in read.items())
    assert json.loads((epath.Path(to) / "config.json").read_text())["num_features"] == 32
