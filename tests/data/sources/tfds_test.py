"""Data sets as TFDS stores them: what is there, what is missing or damaged, and what metadata may not do."""

import json
import shutil

import pytest

from mae_jax.data import audit
from mae_jax.data.decode import BadImage
from mae_jax.data.sources import base, registry, tfds
from mae_jax.errors import UserError
from tests.helpers.records import TRAIN, assert_pixels_belong_to_ids, build, store, take, tfds_config


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    return store(tmp_path_factory.mktemp("tfds"), "tfrecord")


@pytest.mark.parametrize(("fields", "text"), [
    ({"name": ""}, "data.name"), ({"name": "no_such_set"}, "'no_such_set'"),
    ({"name": "mnist"}, "not prepared"), ({"name": "kaggle:toy"}, "another catalog"),
    ({"name": "kaggle:toy:1.0.0"}, "another catalog"), ({"name": "toy:2.*.*"}, "'toy:2")])
def test_data_sets_that_are_not_there_are_refused(stored, fields, text):
    c = tfds_config(stored)
    c.data.update(fields)
    with pytest.raises(UserError, match=text):
        build(c)


@pytest.mark.parametrize("name", ["toy:1.0.0", "toy:1.*.*"])  # as recipes name ImageNet
def test_a_data_set_is_named_with_its_version(stored, name):
    c = tfds_config(stored)
    c.data.name = name
    assert registry.load(c.data, "train").size == TRAIN


def test_array_record_has_random_access(tmp_path):
    c = tfds_config(store(tmp_path, "array_record"))
    source = registry.load(c.data, "train[10:20]")
    assert isinstance(source, base.Source)
    assert source.size == 10
    assert [source.label(i) for i in range(10)] == [source.read(i).label for i in range(10)]
    inputs = build(c)
    batch = next(inputs.train(0))
    assert_pixels_belong_to_ids(batch)
    assert inputs.num_train == TRAIN
    assert inputs.classes == ("a", "b", "c")


def metadata(folder, name):
    return next(folder.rglob(name))


@pytest.mark.parametrize("file_format", ["tfrecord", "array_record"])
def test_missing_files_of_tfds_are_refused_at_once(tmp_path, file_format):
    store(tmp_path, file_format)
    metadata(tmp_path, "toy-train.*").unlink()
    with pytest.raises(UserError, match=r"1 of the 1 files of 'train' .*toy-train"):
        build(tfds_config(tmp_path))


@pytest.mark.parametrize("change", [
    lambda raw: b"", lambda raw: raw[:len(raw) // 2], lambda raw: raw[:-20], lambda raw: raw[:70_000],
    lambda raw: raw[:1000] + bytes([raw[1000] ^ 1]) + raw[1001:]])
def test_damaged_files_with_random_access_give_bad_pictures_by_name(tmp_path, monkeypatch, change):
    monkeypatch.setattr(tfds, "FETCHED", 8)  # labels at a time
    c = tfds_config(store(tmp_path, "array_record"))
    path = metadata(tmp_path, "toy-train.*")
    path.write_bytes(change(path.read_bytes()))
    inputs = build(c)
    batches = take(inputs.train(0), 8)
    assert sum((batch["replaced"] > 0).sum() for batch in batches) > 0
    assert all(name.startswith("toy train[") for name in inputs.bad)
    seen = audit.audit(registry.load(c.data, "train"), 2, "train")
    assert seen.broken
    assert len(seen.broken) + len(seen.good()) == TRAIN
    source = registry.load(c.data, "train")
    labels = [source.label(i) for i in range(TRAIN)]
    assert labels == [label_of(source, i) for i in range(TRAIN)]
    assert base.UNLABELED in labels


def label_of(source, number):
    try:
        return source.read(number).label
    except BadImage:
        return base.UNLABELED


def test_metadata_of_a_data_set_are_never_executed(tmp_path, monkeypatch):
    """TFDS imports the module of any class that features.json names, from the current folder as well."""
    store(tmp_path, "tfrecord")
    (tmp_path / "toy" / "intruder.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w').close()")
    monkeypatch.syspath_prepend(str(tmp_path))
    file = metadata(tmp_path, "features.json")
    content = json.loads(file.read_text())
    content["featuresDict"]["features"]["image"]["pythonClassName"] = "toy.intruder.Image"
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"'toy\.intruder\.Image'"):
        build(tfds_config(tmp_path))
    assert not (tmp_path / "mark").exists()


def test_metadata_of_a_data_set_do_not_lead_out_of_its_folder(tmp_path):
    (tmp_path / "inside").mkdir()
    (tmp_path / "outside").mkdir()
    store(tmp_path / "outside", "tfrecord")
    store(tmp_path / "inside", "tfrecord")
    file = metadata(tmp_path / "inside", "dataset_info.json")
    file.write_text(file.read_text().replace("{DATASET}-", "../../../outside/toy/1.0.0/{DATASET}-"))
    with pytest.raises(UserError, match="point outside of its folder"):
        build(tfds_config(tmp_path / "inside"))


def test_masks_of_tfds_scene_parsing_are_refused_because_they_are_not_of_its_150_classes(tmp_path):
    store(tmp_path, "tfrecord")
    (tmp_path / "toy").rename(tmp_path / "scene_parse150")
    file = metadata(tmp_path, "dataset_info.json")
    file.write_text(file.read_text().replace('"toy"', '"scene_parse150"'))
    c = tfds_config(tmp_path, mask_key="image")
    c.data.name = "scene_parse150"
    with pytest.raises(UserError, match=r"^data\.name='scene_parse150': [^\n]* read ADEChallengeData2016$"):
        registry.load(c.data, "train")


@pytest.mark.parametrize("name", ["features.json", "dataset_info.json"])
@pytest.mark.parametrize(("content", "line"), [
    ('{"a":' * 100_000 + "1" + "}" * 100_000, "deep"), ('{"a": ', "damaged"), ("", "empty"), ("[]", "list"),
    ("version https://git-lfs.github.com/spec/v1\n", "git lfs pull"), ("{}", "it has no "), ("<html>", "HTML")],
    ids=lambda text: text[:9])
def test_metadata_that_do_not_read_are_named_and_not_taken_for_a_data_set_that_is_not_there(
        stored, tmp_path, name, content, line):
    shutil.copytree(stored, tmp_path / "all")
    next((tmp_path / "all").rglob(name)).write_text(content)
    with pytest.raises(UserError, match=rf"{name} is .*{line}.*; prepare the data set again"):
        build(tfds_config(tmp_path / "all"))
