"""data.resize=graph: ids, boxes, flips and orders are those of exact, of every source; pixels lie close to PIL's."""

import functools
import hashlib
import io
import itertools
from collections import deque

import numpy as np
import pytest
from PIL import Image

from mae_jax import config as configs
from mae_jax import data
from mae_jax.data.masking import PatchOrder
from mae_jax.data.readers import random_access
from mae_jax.data.sources import photo_crops
from mae_jax.data.sources.base import Example, Source
from mae_jax.data.transforms import sampling
from mae_jax.data.transforms.graph_builder import builder
from mae_jax.errors import UserError
from mae_jax.methods import with_data
from mae_jax.rng import rng
from tests.data import without_tensorflow_test as files
from tests.helpers import records
from tests.helpers.tiny import tiny_method


def config(**fields):
    c = configs.default()
    c.batch_size = 8
    c.data.update({"image_size": (32, 48), "threads": 2, "workers": "0", "eval_split": "", **fields})
    c.model.patch = (16, 16)
    return configs.resolved(c)


def photograph(name, **size):
    path = next(path for path in photo_crops.paths() if path.stem == name)
    image = Image.open(path).convert("RGB")
    return image.resize(size["size"], Image.Resampling.BICUBIC) if size else image


def jpeg(image, **options):
    file = io.BytesIO()
    image.save(file, "JPEG", **{"quality": 95, **options})
    return file.getvalue()


def inputs(c, resize, rows=None):
    c = c.copy_and_resolve_references()
    c.data.resize = resize
    method = tiny_method(c)
    return data.OpenedData(c, method.data_needs(c)).batches(method.batch_spec(), method.patch_order(), rows=rows)


ORDER = PatchOrder("random", (2, 3), 4)


@functools.cache
def photographs():
    """Of all kinds that the graph decodes; the last one is smaller than the views."""
    return [jpeg(photograph("chelsea")), jpeg(photograph("coffee"), subsampling=0), jpeg(photograph("china")),
            jpeg(photograph("chelsea").convert("L")), jpeg(photograph("china"), progressive=True),
            jpeg(photograph("coffee"), subsampling=1), jpeg(photograph("astronaut", size=(30, 20)))]


@pytest.mark.parametrize(("augment", "size", "mean", "highest"), [
    ("random", (224, 224), 0.25, 16), ("simple", (224, 224), 0.25, 8), ("single", (32, 48), 0.7, 16),
    ("fixed", (32, 48), 0.7, 16), ("none", (32, 48), 0.7, 16)])
def test_views_of_photographs_are_those_of_exact_but_for_rounding(augment, size, mean, highest):
    c = config(image_size=size, augment=augment)
    order = ORDER._replace(grid=(size[0] // 16, size[1] // 16))
    graph, exact = (config(image_size=size, augment=augment, resize=each) for each in ("graph", "exact"))
    spec = tiny_method(c).batch_spec()
    items = [(Example(image), 10 * place) for place, image in enumerate(photographs())]
    ours = builder(graph, order, spec, ()).train_many(items)
    theirs = [builder(exact, order, spec, ()).train(*item) for item in items]
    errors = [np.abs(one["patches"].astype(int) - two["patches"]) for one, two in zip(ours, theirs, strict=True)]
    for one, two in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one["order"], two["order"])
    assert np.mean([error.mean() for error in errors]) < mean  # of 32 x 48 the decoder shrinks most photographs
    assert max(error.max() for error in errors) <= highest  # a few: where a crop ends, or the decoder shrinks


def test_what_is_made_together_is_what_is_made_alone():
    c = config(resize="graph")
    graph = builder(c, ORDER, tiny_method(c).batch_spec(), ())
    items = [(Example(image), place) for place, image in enumerate(photographs())]
    for fields, item in zip(graph.train_many(items), items, strict=True):
        np.testing.assert_array_equal(fields["patches"], graph.train_many([item])[0]["patches"])


def test_the_draws_are_golden():
    """Rows and columns, and ids of positions; pixels hang on the processor's last bits, and are bounded above."""
    digest = hashlib.sha256()
    for augment in ("random", "single", "simple", "fixed", "none"):
        c = config(augment=augment)
        for position in range(50):
            axes = sampling.draw(rng(c.seed, "augment", position), (375, 500), c)
            digest.update(np.round(np.concatenate([axis.centers for axis in axes]) * 1024).astype(np.int64).tobytes())
    c = config()
    ids = [next(random_access._candidates(17, 1, c, position)) for position in range(50)]
    digest.update(np.array(ids, np.int64).tobytes())
    assert digest.hexdigest()[:16] == "ef7418b9750bab1e"


def folder(place):
    """Photographs, an image that is no JPEG, and one whose header is good and whose pixels do not decode."""
    for number, image in enumerate(photographs()):
        (place / f"{number}.jpg").write_bytes(image)
    photograph("coffee", size=(60, 40)).save(place / "7.png")
    photograph("coffee", size=(60, 40)).convert("CMYK").save(place / "8.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    photograph("coffee", size=(60, 40)).save(place / "9.jpg", exif=exif)
    whole = jpeg(photograph("coffee", size=(60, 40)))
    table = whole.index(b"\xff\xdb")
    (place / "bad.jpg").write_bytes(whole[:table] + b"\xff\xfe" + whole[table + 2:])  # a table of it is a comment
    return place


def assert_alike(ours, theirs):
    """Everything is equal, but pixels by little."""
    for name in theirs:
        if name != "patches":
            np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    assert np.abs(ours["patches"].astype(int) - theirs["patches"]).mean() < 1


def test_batches_of_a_folder_are_those_of_exact_and_so_are_stand_ins_and_names(tmp_path):
    c = config(source="folder", path=str(folder(tmp_path)), layout="flat")
    ours, theirs = inputs(c, "graph"), inputs(c, "exact")
    batches = list(itertools.islice(ours.train(0), 8))
    for one, two in zip(batches, theirs.train(0), strict=False):
        assert_alike(one, two)
    assert sum(batch["replaced"].sum() for batch in batches) >= 4
    assert set(ours.bad) == set(theirs.bad)
    assert all(name.startswith("bad.jpg: ") for name in ours.bad)
    for batch, again in zip(batches[5:], inputs(c, "graph").train(5), strict=False):
        for name in batch:
            np.testing.assert_array_equal(batch[name], again[name], err_msg=name)
    rows = np.array([1, 2, 6])
    for batch, own in zip(batches[3:5], inputs(c, "graph", rows).train(3), strict=False):
        for name in batch:
            np.testing.assert_array_equal(batch[name][rows], own[name], err_msg=name)


def test_where_all_tries_fail_a_gray_image_stands_in(tmp_path):
    bad = (folder(tmp_path) / "bad.jpg").read_bytes()
    c = config(resize="graph")
    graph, names = builder(c, ORDER, tiny_method(c).batch_spec(), ()), deque()
    source = Source(9, lambda index: Example(bad), str)
    ours = random_access.train_examples(source, graph, c, names, [3, 4])
    theirs = [random_access.train_example(source, graph, c, deque(), position) for position in (3, 4)]
    for one, two in zip(ours, theirs, strict=True):
        assert one["replaced"] == 4
        for name in two:
            np.testing.assert_array_equal(one[name], two[name], err_msg=name)
    assert len(names) == 8


@pytest.mark.slow
@pytest.mark.parametrize("source", ["tar", "array_record", "tfrecord", "plain"])
def test_workers_and_threads_make_the_same_batches_of_tars_tfds_and_records(tmp_path, monkeypatch, source):
    monkeypatch.setenv("MAE_JAX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    if source == "tar":
        c = config(source="tar", path=str(files.tar(tmp_path / "data")))
    elif source == "plain":
        c = records.plain_config(records.write_shards(tmp_path / "data"), eval_split="", augment="random")
    else:
        c = records.tfds_config(records.store(tmp_path / "data", source), eval_split="", augment="random")
    made = []
    for resize, workers in (("exact", "0"), ("graph", "0"), ("graph", "2")):
        c.data.workers = workers
        made.append(itertools.islice(inputs(configs.resolved(c), resize).train(3), 4))
    for exact, threads, processes in zip(*made, strict=True):
        assert_alike(threads, exact)
        for name in threads:
            np.testing.assert_array_equal(threads[name], processes[name], err_msg=name)


def test_bad_records_are_replaced_and_named_as_exact_does(tmp_path):
    shards = records.write_shards(tmp_path)
    bad = (folder(tmp_path) / "bad.jpg").read_bytes()
    tf = records.tf

    def broken(image):
        feature = {"image": tf.train.Feature(bytes_list=tf.train.BytesList(value=[image]))}
        return tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString()

    records.write(shards / "train-3.tfrecord", [broken(bad) if i == 17 else broken(b"text") if i == 30 else
                                                records.record(i) for i in range(14, 34)])
    c = configs.resolved(records.plain_config(shards, readers=2, workers="0", eval_split=""))
    ours, theirs = inputs(c, "graph"), inputs(c, "exact")
    batches = list(itertools.islice(ours.train(0), 6))
    for one, two in zip(batches, theirs.train(0), strict=False):
        assert_alike(one, two)
    assert sum(batch["replaced"].sum() for batch in batches) == 2
    assert set(ours.bad) == set(theirs.bad)
    assert len(set(ours.bad)) == 2
    for batch, again in zip(batches[2:], inputs(c, "graph").train(2), strict=False):
        np.testing.assert_array_equal(batch["patches"], again["patches"])


@pytest.mark.parametrize(("method", "fields", "text"), [
    ("mae", {"data.color": "jitter"}, r"data\.color='jitter'; .*data\.resize=exact"),
    ("dino", {}, r"data\.resize='graph'"),
    ("mae", {"data.source": "photo_crops"}, r"data\.source='photo_crops' has pixels; take data\.resize=exact"),
])
def test_other_recipes_are_refused_by_name(method, fields, text):
    c = configs.default(method)
    configs.runlocal(c)
    c.data.update(resize="graph", source="photo_crops", workers="0")
    c.update_from_flattened_dict(fields)

    def train():
        built, opened = with_data(configs.resolved(c))
        next(opened.batches(built.eval_spec(), built.patch_order(), built.views()).train(0))

    with pytest.raises(UserError, match=text):
        train()


def test_a_folder_of_other_formats_is_told(tmp_path, caplog):
    for number in range(8):
        photograph("coffee", size=(60, 40)).save(tmp_path / f"{number}.png")
    c = config(source="folder", path=str(tmp_path), layout="flat")
    next(inputs(c, "graph").train(0))
    assert "0.png is none" in caplog.text
