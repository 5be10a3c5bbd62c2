"""A run whose checkpoint does not fit on its disk is told so at its start."""

import logging
from collections import namedtuple

import jax
import jax.numpy as jnp
import pytest
from etils import epath

from mae_jax.errors import UserError
from mae_jax.storage import disk

Usage = namedtuple("Usage", "total used free")
STATE = {"a": jax.ShapeDtypeStruct((1000, 250), jnp.float32), "b": jax.ShapeDtypeStruct((), jnp.int32)}  # 1,000,004


@pytest.fixture
def free(monkeypatch):
    """Sets how many bytes are free, and returns which folders were asked for."""
    asked = []

    def set_to(size, total=10**12):
        monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: asked.append(path) or Usage(total, 0, size))
        return asked

    return set_to


def test_one_checkpoint_must_fit(tmp_path, free):
    asked = free(1_000_003)
    with pytest.raises(UserError, match=r"disk has 1\.0 MB left, .*needs 1\.0 MB"):
        disk.check_room(epath.Path(tmp_path / "new" / "run"), STATE, 1)
    assert asked == [str(tmp_path)]  # the nearest folder that is there
    free(1_000_004)
    disk.check_room(epath.Path(tmp_path / "run"), STATE, 1)


def test_fewer_than_are_kept_at_once_is_told(tmp_path, free, caplog):
    caplog.set_level(logging.WARNING, "mae_jax")
    free(3_500_000)
    disk.check_room(epath.Path(tmp_path), STATE, 3)
    assert caplog.text == ""
    disk.check_room(epath.Path(tmp_path), STATE, 4)
    assert "up to 4 more" in caplog.text


def test_checkpoints_on_another_disk_are_asked_for_there(tmp_path, free):
    (tmp_path / "big").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "big")
    assert disk.free_bytes(tmp_path / "run" / "checkpoints") > 0
    assert free(10**9) == []
    disk.check_room(epath.Path(tmp_path / "run"), STATE, 1)


def test_buckets_and_disks_that_do_not_tell_have_room(tmp_path, free, monkeypatch):
    free(0, total=0)
    disk.check_room(epath.Path(tmp_path), STATE, 9)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: (_ for _ in ()).throw(OSError()))
    disk.check_room(epath.Path(tmp_path), STATE, 9)
    assert disk.free_bytes("gs://bucket/run") is None
