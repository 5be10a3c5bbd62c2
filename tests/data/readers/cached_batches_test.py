import itertools
import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from mae_jax import data
from mae_jax.data.masking import PatchOrder
from mae_jax.errors import UserError

ORDER = PatchOrder("random", (2, 2), 3)
SPEC = {"patches": jax.ShapeDtypeStruct((4, 4, 12), np.uint8), "order": jax.ShapeDtypeStruct((4, 4), np.int32),
        "id": jax.ShapeDtypeStruct((4,), np.int32), "valid": jax.ShapeDtypeStruct((4,), np.float32)}


def write(folder, **sizes):
    draws = np.random.default_rng(0)
    for name, size in {"train": 10, "support": 3, "evaluate": 6, **sizes}.items():
        np.savez(folder / f"{name}.npz", patches=draws.integers(0, 255, (size, 4, 12), dtype=np.uint8),
                 order=np.tile(np.arange(4, dtype=np.int32), (size, 1)), id=np.arange(size, dtype=np.int32),
                 valid=np.ones(size, np.float32))
    meta = {"classes": ["a", "b"], "num_train": 100, "order": ORDER, "views": []}
    (folder / "meta.json").write_text(json.dumps(meta))


def build(folder, rows=None, spec=SPEC, order=ORDER):
    config = ConfigDict({"batch_size": 4, "data": {"source": "batches", "path": str(folder)},
                         "eval": {"crop_ratio": (0.875,)}, "method": {}})
    return data.OpenedData(config).batches(spec, order, rows=rows)


def test_training_reads_the_file_over_and_over_from_any_step(tmp_path):
    write(tmp_path)
    inputs = build(tmp_path)
    ids = [list(batch["id"]) for batch in itertools.islice(inputs.train(1), 3)]
    assert ids == [[4, 5, 6, 7], [8, 9, 0, 1], [2, 3, 4, 5]]
    assert inputs.num_train == 100
    assert inputs.classes == ("a", "b")


def test_a_copy_is_known_again_by_its_patches(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(tmp_path / name)
    found = build(tmp_path / "a").identity()
    assert found == build(tmp_path / "b").identity()
    with np.load(tmp_path / "b" / "train.npz") as stored:
        arrays = dict(stored)
    arrays["patches"][9, 3, 0] ^= 1
    np.savez(tmp_path / "b" / "train.npz", **arrays)
    other = build(tmp_path / "b").identity()
    assert [part for part in found if found[part] != other[part]] == ["train"]


def test_processes_read_their_rows(tmp_path):
    write(tmp_path)
    assert list(next(build(tmp_path, np.array([1, 3])).train(2))["id"]) == [9, 1]


def test_evaluations_end_and_are_padded(tmp_path):
    write(tmp_path)
    batches = list(build(tmp_path).evaluate())
    assert [list(batch["id"]) for batch in batches] == [[0, 1, 2, 3], [4, 5, -1, -1]]
    assert [batch["valid"].sum() for batch in batches] == [4, 2]
    assert sorted(batches[1]["order"][3]) == [0, 1, 2, 3]
    assert len(list(build(tmp_path).support())) == 1


def test_padding_has_the_order_of_its_place_in_a_group(tmp_path):
    order = PatchOrder("random", (2, 2), 2, 2)
    write(tmp_path, evaluate=5, train=6)
    for name in ("train", "support", "evaluate"):
        with np.load(tmp_path / f"{name}.npz") as stored:
            arrays = dict(stored)
        shared = np.array([2, 0, 3, 1], np.int32)
        arrays["order"] = np.stack([np.roll(shared, -2 * (row % 2)) for row in range(len(arrays["order"]))])
        np.savez(tmp_path / f"{name}.npz", **arrays)
    meta = {"classes": [], "num_train": 9, "order": order, "views": []}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    config = ConfigDict({"batch_size": 4, "data": {"source": "batches", "path": str(tmp_path)},
                         "eval": {"crop_ratio": (0.875,)}, "method": {}})
    last = list(data.OpenedData(config).batches(SPEC, order).evaluate())[-1]
    assert list(last["valid"]) == [1, 0, 0, 0]
    assert last["order"].tolist() == [[2, 0, 3, 1], [3, 1, 2, 0]] * 2
    write(tmp_path, train=9)
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match=r"9 training examples, .* 2 "):
        data.OpenedData(config).batches(SPEC, order)


@pytest.mark.parametrize(("fields", "text"), [({"kept": "0-3"}, "data.classes"), ({"clusters": "1f"}, "clusters")])
def test_batches_of_other_classes_or_clusters_are_refused(tmp_path, fields, text):
    write(tmp_path)
    meta = json.loads((tmp_path / "meta.json").read_text())
    (tmp_path / "meta.json").write_text(json.dumps(meta | {"kept": "", "clusters": ""} | fields))
    with pytest.raises(UserError, match=f"another .*{text}"):
        build(tmp_path)


def test_nothing_to_evaluate_is_no_batch(tmp_path):
    write(tmp_path, evaluate=0)
    assert list(build(tmp_path).evaluate()) == []


@pytest.mark.parametrize(("change", "text"), [
    (lambda folder: (folder / "meta.json").unlink(), "--write=batches"),
    (lambda folder: (folder / "support.npz").unlink(), "support.npz"),
])
def test_a_folder_that_lacks_files_is_refused(tmp_path, change, text):
    write(tmp_path)
    change(tmp_path)
    with pytest.raises(UserError, match=text):
        build(tmp_path)


@pytest.mark.parametrize(("field", "shape", "text"), [
    ("patches", (4, 9, 12), "image_size .*patch"), ("label", (4,), "'label'")])
def test_batches_of_another_config_are_refused(tmp_path, field, shape, text):
    write(tmp_path)
    with pytest.raises(UserError, match=text):
        build(tmp_path, spec={**SPEC, field: jax.ShapeDtypeStruct(shape, np.uint8)})


def test_cached_batches_need_no_tensorflow(tmp_path):
    write(tmp_path)
    code = (f"import importlib.util, sys\n"
            "sys.modules['tensorflow'] = None  # an import would fail\n"
            f"spec = importlib.util.spec_from_file_location('this_test', {__file__!r})\n"
            "module = importlib.util.module_from_spec(spec)\n"
            "spec.loader.exec_module(module)\n"
            f"assert next(module.build({str(tmp_path)!r}).train(0))['id'].tolist() == [0, 1, 2, 3]\n")
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_field_is_found_under_the_name_that_0_1_0_stored(tmp_path):
    write(tmp_path)
    pixels = np.arange(4 * 4 * 10, dtype=np.uint8).reshape(10, 4, 4)
    for name in ("train", "support", "evaluate"):
        with np.load(tmp_path / f"{name}.npz") as stored:
            np.savez(tmp_path / f"{name}.npz", **stored, mask=pixels[:len(stored["id"])])
    inputs = build(tmp_path, spec={**SPEC, "pixel_label": jax.ShapeDtypeStruct((4, 4, 4), np.uint8)})
    assert (next(inputs.train(0))["pixel_label"] == pixels[:4]).all()
    assert (list(inputs.evaluate())[1]["pixel_label"] == [*pixels[4:6], *np.full((2, 4, 4), 255)]).all()


def test_block_masks_of_0_1_0_are_for_runs_that_have_them(tmp_path):
    write(tmp_path)
    block = PatchOrder("block", (2, 2), 3)
    meta = json.loads((tmp_path / "meta.json").read_text()) | {"order": block}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    assert build(tmp_path, order=block).num_train == 100
    with pytest.raises(UserError, match="make them again with this config, or train on them with recipe_version=1"):
        build(tmp_path, order=block._replace(kind="published_block"))


def test_batches_of_another_order_of_patches_are_refused(tmp_path):
    write(tmp_path)
    meta = json.loads((tmp_path / "meta.json").read_text()) | {"order": ["block", [2, 2], 3, 1]}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match="patch order") as error:
        build(tmp_path)
    assert "recipe_version" not in str(error.value)


def test_a_validation_part_may_be_missing(tmp_path):
    write(tmp_path)
    inputs = build(tmp_path)
    assert (list(inputs.validate()), inputs.num_val) == ([], 0)
    write(tmp_path, validate=5)
    inputs = build(tmp_path)
    assert [list(batch["id"]) for batch in inputs.validate()] == [[0, 1, 2, 3], [4, -1, -1, -1]]
    assert inputs.num_val == 5


def test_crops_and_sets_that_were_not_cached_are_refused(tmp_path):
    write(tmp_path)
    inputs = build(tmp_path)
    assert len(list(inputs.evaluate(0.875))) == 2
    with pytest.raises(UserError, match=r"eval\.crop_ratio=1\.0"):
        inputs.evaluate(1.0)
    with pytest.raises(UserError, match=r"eval\.sets='imagenet_a'"):
        inputs.extra("imagenet_a")
