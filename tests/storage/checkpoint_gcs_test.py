"""Checkpoints in a bucket, over HTTP: whole or not at all, whatever the store answers; and told where it is slow."""

import time

import numpy as np
import pytest

from mae_jax.errors import UserError
from mae_jax.storage import checkpoint
from mae_jax.storage import gcs as storage_gcs
from mae_jax.storage.checkpoint import Checkpoints, load_params
from tests.storage.checkpoint_test import abstract, make_state, same


@pytest.fixture
def run(gcs, tmp_path) -> str:
    """A workdir of its own in a bucket whose account has roles/storage.objectAdmin: buckets themselves stay closed."""
    storage_gcs.check("gs://bucket")
    gcs.add({"path": "/b/[^/]+(/storageLayout)?$|/b/[^/?]+[?]|/b[?]", "status": 403, "times": -1})
    return f"gs://bucket/{tmp_path.name}"


def objects(gcs, run: str, folder: str) -> list[str]:
    prefix = f"{run.removeprefix('gs://bucket/')}/{folder}/"
    return [item["name"].removeprefix(prefix) for item in gcs.store.list("bucket", {"prefix": prefix})["items"]]


def save(run: str, *steps: int, keep_last: int = 2) -> Checkpoints:
    checkpoints = Checkpoints(run, keep_last)
    for step in steps:
        checkpoints.save(step, make_state(step))
    checkpoints.wait()
    return checkpoints


def restored(run: str):
    return Checkpoints(run, 2).restore(abstract(make_state(0)))


def test_the_last_ones_are_kept_and_the_newest_comes_back_bit_for_bit(run, gcs):
    checkpoints = save(run, 1, 2, 3)
    checkpoints.close()
    assert checkpoints.failed is None
    assert same(restored(run), make_state(3))
    assert {name.split("/")[0] for name in objects(gcs, run, "checkpoints")} == {"2", "3"}
    np.testing.assert_array_equal(load_params(run)["count"], make_state(3).params["count"])


def test_bursts_and_resets_during_a_save_are_waited_for_and_the_checkpoint_is_whole(run, gcs, caplog):
    for fault in ({"path": "upload.*/d/", "status": 503}, {"path": "upload.*manifest", "status": 429},
                  {"path": "upload.*/d/", "kind": "reset"}, {"path": "upload.*_METADATA", "status": 500},
                  {"path": "upload.*commit_success", "kind": "lost"}, {"path": "commit_success", "status": 408}):
        gcs.add(fault)
    checkpoints = save(run, 1)
    assert checkpoints.failed is None
    assert all(fault.done for fault in gcs.faults[1:])
    assert same(restored(run), make_state(1))


def test_a_save_lists_a_bucket_of_many_kept_steps_once_and_behind_the_training(run, gcs):
    folder = f"{run.removeprefix('gs://bucket/')}/checkpoints"
    for step in range(1, 2001):
        gcs.store.put("bucket", f"{folder}/{step}/commit_success.txt", b"", {}, {})
    gcs.store.put("bucket", f"{folder}/2001/state/d/x", b"", {}, {})  # without the mark: an interrupted save
    gcs.store.put("bucket", f"{folder}/1999/state/commit_success.txt", b"", {}, {})
    checkpoints = Checkpoints(run, 2, keep_every=1)
    assert checkpoints.latest() == 2000
    checkpoints.save(2001, make_state(1))
    checkpoints.wait()
    assert checkpoints.failed is None
    gcs.clear()
    checkpoints._prepare(2002)
    assert gcs.requests == []
    checkpoints.save(2002, make_state(2002))
    checkpoints.wait()
    checkpoints.close()
    assert checkpoints.failed is None
    whole = [request for request in gcs.requests if "matchGlob" in request]
    assert len(whole) == 3  # a listing of 2,001 names has so many pages
    assert not [request for request in gcs.requests if "2002" not in request and request not in whole]
    assert checkpoints.latest() == 2002


@pytest.mark.parametrize("file", ["upload.*/d/", "upload.*manifest", "upload.*commit_success", "o[?].*checkpoints"])
def test_a_save_that_is_refused_is_a_warning_and_the_next_one_works(run, gcs, caplog, file):
    checkpoints = save(run, 1)
    gcs.add({"path": file, "status": 403, "times": -1})
    checkpoints.save(2, make_state(2))
    checkpoints.wait()
    assert "checkpoint of step 2 not saved" in checkpoints.failed
    assert checkpoints.latest() == 1
    gcs.faults.pop()
    assert same(restored(run), make_state(1))
    checkpoints.save(3, make_state(3))
    checkpoints.close()
    assert checkpoints.failed is None
    assert same(restored(run), make_state(3))


def test_old_steps_that_cannot_be_deleted_are_a_warning_and_tried_again(run, gcs, caplog):
    gcs.add({"path": "checkpoints/1/", "method": "DELETE", "status": 403, "times": -1})
    checkpoints = save(run, 1, 2, 3)
    assert checkpoints.failed is None
    assert "could not delete the old checkpoint of step 1" in caplog.text
    gcs.faults.pop()
    checkpoints.save(4, make_state(4))
    checkpoints.close()
    assert objects(gcs, run, "checkpoints/1") == []
    assert same(restored(run), make_state(4))


def test_a_body_damaged_on_its_way_is_read_again_and_one_that_stays_so_refuses_the_step_by_name(run, gcs, caplog):
    save(run, 1, 2).close()
    flip = {"path": "2/state/.*/d/|2/state/d/", "method": "GET", "kind": "flip", "after": 1}
    gcs.add(flip)
    assert same(restored(run), make_state(2))
    assert gcs.faults[-1].done == 1
    assert caplog.text.count("checkpoint of step 2 read damaged") == 1
    assert "refused" not in caplog.text
    gcs.add({**flip, "times": -1})
    assert same(restored(run), make_state(1))
    assert "checkpoint of step 2 refused: " in caplog.text
    np.testing.assert_array_equal(load_params(run)["count"], make_state(1).params["count"])


def test_a_folder_that_cannot_be_listed_is_an_error_and_never_a_fresh_start(run, gcs):
    save(run, 1).close()
    gcs.add({"path": "checkpoints", "method": "GET", "kind": "flip"})
    assert same(restored(run), make_state(1))
    gcs.add({"path": "checkpoints", "method": "GET", "status": 403, "times": -1})
    with pytest.raises(UserError, match=f"{run}/checkpoints"):
        restored(run)


def test_a_refused_step_is_moved_aside_in_a_bucket_too(run, gcs):
    save(run, 1, 2).close()
    [name] = objects(gcs, run, "checkpoints/2/state/d")
    path = f"{run}/checkpoints/2/state/d/{name}"
    content = bytearray(storage_gcs.read(path).content)
    content[len(content) // 2] ^= 1
    storage_gcs.write(path, bytes(content))
    checkpoints = Checkpoints(run, 2)
    assert same(checkpoints.restore(abstract(make_state(0))), make_state(1))
    checkpoints.save(2, make_state(2))
    checkpoints.close()
    assert "commit_success.txt" in objects(gcs, run, "refused/2")
    assert same(restored(run), make_state(2))


def test_a_slow_store_is_told_and_a_save_past_its_time_has_failed(run, gcs, monkeypatch, caplog):
    monkeypatch.setattr(checkpoint, "PATIENCE", 0.1)
    gcs.add({"path": "upload.*/d/", "kind": "slow", "seconds": 1})
    checkpoints = save(run, 1)
    assert checkpoints.failed is None
    assert "training waits for the checkpoint of step 1: its disk or bucket is slow" in caplog.text
    monkeypatch.setattr(checkpoint, "SAVE_SECONDS", 1)
    gcs.add({"path": "checkpoints/2/.*/d/", "method": "POST", "kind": "slow", "seconds": 5})
    began = time.monotonic()
    checkpoints = save(run, 2)
    assert time.monotonic() - began < 5
    assert "checkpoint of step 2 not saved: TimeoutError" in checkpoints.failed
    assert same(restored(run), make_state(1))
