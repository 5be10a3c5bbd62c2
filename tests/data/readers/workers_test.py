"""Worker processes make the same batches as threads, of every source and kind of batch, and name what fails."""

import functools
import gc
import importlib.util
import itertools
import os
import pickle
import socket
import time
from collections import deque
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from mae_jax import config as configs
from mae_jax import data
from mae_jax.data.readers import process_pool, random_access, shared_slots
from mae_jax.data.readers.makers import ExampleMaker, StreamMaker
from mae_jax.data.readers.worker_process import Channel
from mae_jax.data.sources import registry
from mae_jax.data.sources.base import Example, Source
from mae_jax.errors import UserError
from mae_jax.methods import with_data
from tests.data import without_tensorflow_test as files
from tests.data.readers.fake_examples import dies, example, fails, odd
from tests.helpers import records
from tests.helpers.process_tree import children
from tests.helpers.tiny import tiny_method

SPEC = {"id": jax.ShapeDtypeStruct((8,), np.int32), "row": jax.ShapeDtypeStruct((8, 3), np.uint8)}


DEMO = pytest.mark.skipif(not importlib.util.find_spec("mlxtend"), reason="the extra demo is not installed")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MAE_JAX_CACHE", str(tmp_path / "cache"))


def config(source, path="", **fields):
    c = configs.default()
    c.batch_size = 8
    c.data.update({"source": source, "path": str(path), "image_size": (16, 16), "threads": 2, "train_split": "train",
                   "eval_split": "", **fields})
    c.model.patch = (8, 8)
    return configs.resolved(c)


def inputs(c, workers, rows=None):
    c = c.copy_and_resolve_references()
    c.data.workers = workers
    method = tiny_method(c)
    return data.OpenedData(c, method.data_needs(c)).batches(method.batch_spec(), method.patch_order(), rows=rows)


def assert_same(one, two, count):
    for batch, other in itertools.islice(zip(one, two, strict=True), count):
        assert batch.keys() == other.keys()
        for name in batch:
            assert batch[name].dtype == other[name].dtype
            np.testing.assert_array_equal(batch[name], other[name], err_msg=name)


@pytest.mark.parametrize("source", ["folder", "tar", "parquet", "table", "npz", "photo_crops", "photo_mosaic",
                                    pytest.param("mnist5k", marks=DEMO)])
def test_batches_of_every_source_are_those_of_threads(tmp_path, source):
    path = getattr(files, source)(tmp_path) if hasattr(files, source) else ""
    c = config(source, path)
    threads, workers = inputs(c, "0"), inputs(c, "2")
    assert_same(threads.train(5), workers.train(5), 12)
    c.eval.max_examples = 20
    assert_same(threads.support(), workers.support(), 99)
    rows = np.array([1, 2, 6])
    part = inputs(c, "2", rows).train(6)
    for whole, own in itertools.islice(zip(threads.train(6), part, strict=True), 3):
        np.testing.assert_array_equal(whole["patches"][rows], own["patches"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["array_record", "tfrecord", "plain"])
def test_batches_of_tfds_and_records_are_those_of_threads(tmp_path, name):
    if name == "plain":
        c = records.plain_config(records.write_shards(tmp_path), eval_split="")
    else:
        c = records.tfds_config(records.store(tmp_path, name), eval_split="")
    threads, workers = inputs(configs.resolved(c), "0"), inputs(configs.resolved(c), "3")
    for step in (0, 17):
        assert_same(threads.train(step), workers.train(step), 12)
    assert_same(threads.support(), workers.support(), 99)
    rows = np.array([2, 3, 6, 7])
    assert_same(inputs(configs.resolved(c), "0", rows).train(3), inputs(configs.resolved(c), "2", rows).train(3), 4)


@pytest.mark.parametrize("method", ["mae", "splitmask", "dino", "mixedae", "supervised"])
def test_batches_of_every_kind_are_those_of_threads(method):
    c = configs.default(method)
    configs.runlocal(c)
    c.batch_size = 8
    c.data.update({"source": "photo_crops", "threads": 2, "color": "three" if method == "supervised" else "none"})
    made = []
    for workers in ("0", "2"):
        c.data.workers = workers
        built, opened = with_data(configs.resolved(c))
        made.append(opened.batches(built.eval_spec(), built.patch_order(), built.views()).train(2))
    assert_same(*made, 3)


def test_lists_of_labels_come_out_the_same(tmp_path):
    several = np.random.default_rng(0).integers(0, 2, (40, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", image=np.zeros((40, 20, 20, 3), np.uint8), label=several)
    c = config("npz", tmp_path / "a.npz")
    spec = tiny_method(c).batch_spec() | {"labels": jax.ShapeDtypeStruct((8, 3), np.uint8)}
    made = []
    for workers in ("0", "2"):
        c.data.workers = workers
        made.append(data.OpenedData(c).batches(spec, tiny_method(c).patch_order()).train(0))
    assert_same(*made, 4)


def test_bad_images_are_replaced_and_named_alike(tmp_path):
    files.folder(tmp_path)
    for number in range(0, 64, 5):
        (tmp_path / str(number % 2) / f"{number}.jpg").write_bytes(b"no image")
    c = config("folder", tmp_path)
    threads, workers = inputs(c, "0"), inputs(c, "2")
    assert_same(threads.train(0), workers.train(0), 16)
    names = [{line.split(":")[0] for line in each.bad} for each in (threads, workers)]
    assert names[0] == names[1]
    assert len(names[0]) >= 8


def pool(example, workers=2, count=10**6, ahead=2, name=lambda number, row: ""):
    maker = ExampleMaker(example, np.arange(8), 8, 0)
    return process_pool.batches(maker, SPEC, count, workers, ahead, (), deque(), name)


def test_an_error_of_ours_comes_out_as_itself_and_another_with_its_traceback():
    batches = pool(fails)
    with pytest.raises(UserError, match=r"^the disk is gone$"):
        list(itertools.islice(batches, 5))
    with pytest.raises(ValueError, match="row of an example has the shape") as caught:
        next(pool(odd))
    assert "worker process" in caught.value.__notes__[0]


def test_a_worker_that_is_killed_is_named_and_its_rows_are_made_again(tmp_path, caplog):
    (tmp_path / "deaths").write_text("xx")
    batches = list(itertools.islice(pool(functools.partial(dies, tmp_path / "deaths")), 6))
    assert [batch["id"].tolist() for batch in batches] == [list(range(s, s + 8)) for s in range(0, 48, 8)]
    assert sum("was killed by SIGKILL" in record.message for record in caplog.records) == 2


def test_an_example_that_kills_every_worker_is_named_and_ends_the_run(tmp_path):
    (tmp_path / "deaths").write_text("x" * 50)
    batches = pool(functools.partial(dies, tmp_path / "deaths"), name=lambda number, row: f"image {number * 8 + row}")
    with pytest.raises(UserError, match=r"was killed by SIGKILL, at row 5 of batch 2, image 21"):
        list(itertools.islice(batches, 5))


def test_the_leading_process_may_be_killed_too(caplog):
    batches = pool(example)
    first = [next(batches)["id"].tolist() for _ in range(3)]
    server = process_pool._fork_server.process
    supervisors = children(server.pid)
    os.kill(supervisors[-1], 9)
    rest = [next(batches)["id"].tolist() for _ in range(20)]
    assert first + rest == [list(range(s, s + 8)) for s in range(0, 184, 8)]
    assert "restarted" in caplog.text
    server.kill()
    server.wait()
    assert next(pool(example))["id"].tolist() == list(range(8))


def test_batches_that_are_kept_stay_as_they_were():
    batches = list(pool(example, count=30, ahead=1))
    on_device = [jax.device_put(batch["id"]) for batch in pool(example, count=30, ahead=1)]
    gc.collect()
    for place, (batch, placed) in enumerate(zip(batches, on_device, strict=True)):
        assert batch["id"].tolist() == np.asarray(placed).tolist() == list(range(8 * place, 8 * place + 8))


def test_memory_and_file_descriptors_stay_flat_over_iterators_and_batches():
    def state():
        gc.collect()
        return len(os.listdir("/proc/self/fd")), Path("/proc/self/maps").read_text().count("mae_jax batches")

    list(pool(example, count=3))
    before, names = state(), set(os.listdir("/dev/shm"))
    for _ in range(5):
        list(pool(example, count=30))
    batches = pool(example)
    next(batches)
    assert set(os.listdir("/dev/shm")) <= names
    del batches
    assert state() == before
    deadline = time.monotonic() + 20
    while children(process_pool._fork_server.process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not children(process_pool._fork_server.process.pid)


def test_a_channel_that_the_garbage_collector_closed_does_not_close_the_next_one():
    ours, theirs = socket.socketpair()
    channel = Channel(ours.detach())
    number = channel.fileno()
    channel.__del__()
    copy = os.dup(theirs.fileno())
    assert copy == number  # the lowest number that is free
    channel.close()
    os.fstat(copy)
    os.close(copy)
    theirs.close()


def test_more_memory_than_there_is_is_refused_at_once_with_the_bytes_and_the_fields():
    wide = {"id": jax.ShapeDtypeStruct((8, 2**38), np.int32)}
    maker = ExampleMaker(example, np.arange(8), 8, 0)
    begin = time.monotonic()
    with pytest.raises(UserError, match=r"need \d{13,} bytes .*, and \d+ are free; lower data.prefetch or batch_size"):
        process_pool.batches(maker, wide, 10, 2, 2, (), deque())
    assert time.monotonic() - begin < 5


def test_what_cannot_be_handed_over_is_made_by_threads_or_refused(tmp_path, monkeypatch):
    def load(group, split):
        return Source(6000, lambda i: Example(np.zeros((16, 16, 3), np.uint8)), str)

    monkeypatch.setitem(registry.MODULES, "closure", "tests.data.readers.closure")
    monkeypatch.setattr(registry, "_found", lambda group: load)
    c = config("closure")
    assert next(inputs(c, "auto").train(0))["patches"].shape == (8, 4, 192)
    with pytest.raises(UserError, match=r"data.source='closure' cannot be handed to worker processes"):
        next(inputs(c, "2").train(0))


@pytest.mark.parametrize(("workers", "threads", "images", "expected"),
                         [("auto", 4, 10**6, 4), ("auto", 4, 4000, 0), ("auto", 1, 10**6, 0), ("auto", 99, 10**6, 32),
                          ("3", 0, 10, 3), ("0", 8, 10**6, 0)])
def test_auto_takes_processes_where_there_are_cores_and_images_enough(workers, threads, images, expected):
    c = config("photo_crops", workers=workers, threads=threads)
    assert random_access.workers(c.data, images) == expected


def test_a_stream_gives_each_worker_rows_of_its_own_readers():
    maker = StreamMaker(None, np.arange(24), 4, 0)
    assert maker.most_workers() == 6
    assert maker.tasks(4) == [(0, range(8)), (1, range(8, 16)), (2, range(16, 20)), (3, range(20, 24))]


def test_workers_import_neither_jax_nor_tensorflow_for_files(tmp_path):
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    if process_pool._fork_server:  # which may have imported what other tests need
        process_pool._fork_server.stop()
        process_pool._fork_server = None
    batches = inputs(config("folder", tmp_path), "1").train(0)
    next(batches)
    supervisor = children(process_pool._fork_server.process.pid)[-1]
    worker, = children(supervisor)
    mapped = Path(f"/proc/{worker}/maps").read_text()
    assert "numpy" in mapped
    for library in ("jaxlib", "tensorflow", "flax"):
        assert library not in mapped
    assert "mae_jax batches" in mapped


def test_a_batch_lies_where_jax_takes_it_as_it_is():
    layout = shared_slots.Layout.of(SPEC, 5, 3)
    assert [field.start % 64 for field in layout.fields] == [0, 0]
    assert pickle.loads(pickle.dumps(layout)) == layout
