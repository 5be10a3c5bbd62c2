"""Data in folders of any name: read as they are, and never as a pattern."""

import numpy as np
import pytest
from PIL import Image

from mae_jax.data.sources import registry
from tests.helpers.records import build, config, describe, plain_config, record, store, tfds_config, write, write_shards
from tests.helpers.tiny import tiny_config

NAMES = ["lr[1e-4]", "a*b", "a?b", "ä b"]


@pytest.fixture(params=NAMES)
def folder(request, tmp_path):
    """A folder of such a name; beside it one that the name fits as a pattern, with other data."""
    for name in ("lr1", "axb", "a_b"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "train-0.tfrecord", [record(i) for i in range(5)])
    folder = tmp_path / request.param
    folder.mkdir()
    return folder


def size(source: str, path, **fields) -> int:
    config = tiny_config()
    config.data.update(source=source, path=str(path), **fields)
    return registry.load(config.data, "train").size


def test_pictures_and_arrays(folder):
    for name in ("train", "test"):
        (folder / name).mkdir()
        Image.new("RGB", (8, 8)).save(folder / name / "x.png")
    np.savez(folder / "arrays.npz", x_train=np.zeros((7, 8, 8), np.uint8), y_train=np.zeros(7, np.int64))
    assert size("folder", folder) == 1
    assert size("npz", folder / "arrays.npz") == 7


def test_records_counted_and_described(folder):
    write_shards(folder)
    assert build(plain_config(folder)).num_train == 50 - 2
    describe(folder)
    assert build(config("tfrecord", folder)).num_train == 50 - 2


def test_prepared_sets(folder):
    assert build(tfds_config(store(folder, "array_record"))).num_train == 61


def test_a_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_shards(tmp_path)
    np.savez(tmp_path / "arrays.npz", x_train=np.zeros((7, 8, 8), np.uint8), y_train=np.zeros(7, np.int64))
    assert size("npz", "~/arrays.npz") == 7
    assert size("tfrecord", "~/{split}-*.tfrecord") == 50
