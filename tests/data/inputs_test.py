"""The input as a whole, on photo_crops and on small made sources."""

import itertools
import struct
import subprocess
import sys
from collections import deque

import jax
import numpy as np
import pytest
from PIL import Image

from mae_jax import config as configs
from mae_jax import data
from mae_jax.data.masking import PatchOrder
from mae_jax.data.readers import random_access
from mae_jax.data.sources.base import Example, Source
from mae_jax.data.transforms.example import ExampleBuilder
from mae_jax.errors import UserError
from mae_jax.ops.patches import PatchGrid


def config(**fields):
    c = configs.default()
    c.batch_size = 8
    c.data.update(image_size=(32, 48), threads=2)
    c.model.patch = (8, 8)
    c.update(fields)
    return c


ORDER = PatchOrder("random", (4, 6), 18)


def spec(c):
    shapes = {"patches": ((24, 192), np.uint8), "order": ((24,), np.int32), "label": ((), np.int32),
              "id": ((), np.int32), "valid": ((), np.float32), "replaced": ((), np.int32)}
    return {name: jax.ShapeDtypeStruct((c.batch_size, *shape), kind) for name, (shape, kind) in shapes.items()}


def inputs_of(c, rows=None):
    return data.OpenedData(c).batches(spec(c), ORDER, rows=rows)


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def assert_equal(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        for name in batch:
            np.testing.assert_array_equal(batch[name], other[name], err_msg=name)


def test_batches_are_exactly_what_the_spec_says():
    c = config()
    inputs = inputs_of(c)
    for batch in [next(inputs.train(0)), next(inputs.support()), next(inputs.evaluate())]:
        assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {k: (s.shape, s.dtype) for k, s in spec(c).items()}
    assert inputs.num_train == 3400
    assert inputs.parts["test"].size == 1020
    assert len(inputs.classes) == 17
    assert "3400" in inputs.description
    assert "17 classes" in inputs.description


def test_the_batch_of_a_step_depends_on_no_step_before_it():
    c = config()
    unbroken = take(inputs_of(c).train(0), 6)
    assert_equal(take(inputs_of(c).train(3), 3), unbroken[3:])


def test_threads_and_prefetching_change_nothing():
    c, d = config(), config()
    d.data.update(threads=5, prefetch=1)
    assert_equal(take(inputs_of(c).train(0), 4), take(inputs_of(d).train(0), 4))


def test_processes_feed_the_rows_that_one_process_would():
    c = config()
    whole = take(inputs_of(c).train(2), 3)
    for rows in ([0, 1, 4, 5], [2, 3, 6, 7]):
        part = take(inputs_of(c, np.array(rows)).train(2), 3)
        assert_equal(part, [{name: value[rows] for name, value in batch.items()} for batch in whole])


def test_the_seed_changes_ids_pixels_and_orders():
    c, d = config(), config(seed=1)
    one, two = next(inputs_of(c).train(0)), next(inputs_of(d).train(0))
    for name in ("id", "patches", "order"):
        assert not np.array_equal(one[name], two[name])


def test_evaluation_batches_are_the_same_for_every_seed_and_padded_at_the_end():
    c, d = config(batch_size=32), config(batch_size=32, seed=1)
    c.eval.max_examples = d.eval.max_examples = 40
    for name in ("support", "evaluate"):
        batches = list(getattr(inputs_of(c), name)())
        assert [batch["valid"].sum() for batch in batches] == [32, 8]
        assert (batches[1]["id"][8:] == -1).all()
        assert (batches[1]["label"][8:] == -1).all()
        assert_equal(batches, list(getattr(inputs_of(d), name)()))


def test_without_an_evaluation_split_there_is_nothing_to_evaluate():
    c = config()
    c.data.eval_split = ""
    inputs = inputs_of(c)
    assert list(inputs.evaluate()) == []
    assert list(inputs.parts) == ["train"]


def test_a_field_that_no_pipeline_gives_names_its_provider():
    c = config()
    wanted = {**spec(c), "cluster": jax.ShapeDtypeStruct((8,), np.int32)}
    with pytest.raises(UserError, match=r"'cluster', but its data_needs .*mae_jax cluster"):
        data.OpenedData(c).batches(wanted, ORDER)


def test_an_unknown_source_is_refused_with_the_nearest_name():
    c = config()
    c.data.source = "photo_crop"
    with pytest.raises(UserError, match="'photo_crops'"):
        inputs_of(c)


def test_patches_are_cut_channel_fastest_and_permuted_by_their_order():
    c = config()
    pixels = np.random.default_rng(0).integers(0, 255, (32, 48, 3), dtype=np.uint8)
    c.data.augment = "none"
    c.eval.crop_ratio = (1.0,)
    fields = ExampleBuilder(c, ORDER, spec(c)).train(Example(pixels), position=5)
    picture = PatchGrid(4, 6, 8, 8).unpatchify(fields["patches"][None], fields["order"][None])[0]
    assert (picture == pixels).all()
    # Patch 7 = row 1, column 1; its second pixel.
    assert (PatchGrid(4, 6, 8, 8).patchify(pixels)[7, 3:6] == pixels[8, 9]).all()


def made(size=10, bad=()):
    """A source of one-color images; those named in `bad` are text."""
    def read(i):
        return Example(b"text" if i in bad else np.full((32, 48, 3), i, np.uint8), i % 3)
    return Source(size, read, name=lambda i: f"image {i}", classes=("a", "b", "c"))


def examples(source, count, c=None):
    c, bad = c or config(), deque(maxlen=100)
    views = ExampleBuilder(c, ORDER, spec(c))
    return [random_access.train_example(source, views, c, bad, position) for position in range(count)], bad


def test_every_epoch_holds_each_example_once():
    found, _ = examples(made(), 30)
    for epoch in range(3):
        assert sorted(fields["id"] for fields in found[10 * epoch:10 * epoch + 10]) == list(range(10))


def test_labels_and_pixels_belong_to_the_id():
    for fields in examples(made(), 10)[0]:
        assert fields["label"] == fields["id"] % 3
        assert (fields["patches"] == fields["id"]).all()


def test_repeats_of_one_example_have_different_views():
    found, _ = examples(made(1), 2)
    assert not np.array_equal(found[0]["order"], found[1]["order"])


def test_a_bad_picture_gives_way_to_the_next_of_the_epoch_and_is_named():
    whole, _ = examples(made(), 10)
    found, bad = examples(made(bad={4}), 10)
    place = [fields["id"] for fields in whole].index(4)
    assert found[place]["id"] == whole[(place + 1) % 10]["id"]
    assert found[place]["replaced"] == 1
    assert found[place]["valid"] == 1
    assert sum(fields["replaced"] for fields in found) == 1
    assert list(bad) == ["image 4: not a JPEG, PNG, WebP, BMP, GIF, TIFF, AVIF or HEIC image"]


def write_odd_folder(root):
    """Twelve images of all kinds, each of its number's gray, and six broken files; returns id → gray of the good."""
    def save(name, gray, kind, mode="RGB", **options):
        Image.new("RGB", (40, 30), (gray, gray, gray)).convert(mode).save(root / name, kind, **options)

    more = {"save_all": True, "append_images": [Image.new("RGB", (40, 30), "red")], "lossless": True}
    kinds = [("JPEG", {}), ("PNG", {}), ("WEBP", {"lossless": True}), ("BMP", {}), ("JPEG", {"progressive": True}),
             ("GIF", more), ("PNG", more), ("WEBP", more)]
    for i, (kind, options) in enumerate(kinds):
        save(f"{i:02d}.jpg", 20 * i, kind, **options)  # most of them by a wrong extension
    save("08.jpg", 160, "JPEG", "L")
    save("09.jpg", 180, "JPEG", "CMYK")
    Image.fromarray(np.full((30, 40), 200 << 8 | 77, np.uint16)).save(root / "10.png")
    Image.new("RGB", (1, 1), (220, 220, 220)).save(root / "11.png")
    whole = (root / "00.jpg").read_bytes()
    broken = {"text": b"no image", "empty": b"", "half": whole[:len(whole) // 2], "head": whole[:100],
              "end": whole[:-2], "bomb": whole.replace(struct.pack(">HH", 30, 40), struct.pack(">HH", 60_000, 60_000))}
    for name, content in broken.items():
        (root / f"bad_{name}.jpg").write_bytes(content)
    return {i: 20 * i for i in range(12)}


def test_files_of_every_kind_are_read_or_replaced_by_name_alike_on_resume_and_in_two_processes(tmp_path):
    grays, c = write_odd_folder(tmp_path), config()
    c.data.update(source="folder", path=str(tmp_path), eval_split="")
    inputs = inputs_of(c)
    assert inputs.num_train == 18
    batches = take(inputs.train(0), 9)  # four epochs
    for batch in batches:
        assert (batch["valid"] == 1).all()
        for id, patches in zip(batch["id"].tolist(), batch["patches"], strict=True):
            assert abs(patches.astype(int) - grays[id]).max() <= 3
    ids, replaced = (np.concatenate([batch[name] for batch in batches]) for name in ("id", "replaced"))
    assert set(ids.tolist()) == set(grays)
    assert ((replaced > 0).reshape(4, 18).sum(1) == 6).all()  # each broken file once in each epoch
    named = {name.split(":")[0] for name in inputs.bad}
    assert named == {f"bad_{name}.jpg" for name in ("text", "empty", "half", "head", "end", "bomb")}
    assert_equal(take(inputs_of(c).train(4), 5), batches[4:])
    for rows in ([0, 1, 2, 3], [4, 5, 6, 7], [0, 3, 6]):
        part = take(inputs_of(c, np.array(rows)).train(2), 7)
        assert_equal(part, [{name: value[rows] for name, value in batch.items()} for batch in batches[2:]])
    whole = list(inputs.support())
    assert sum(batch["valid"].sum() for batch in whole) == 12  # in evaluations, a broken one has no weight
    part = list(inputs_of(c, np.arange(4)).support())
    assert_equal(part, [{name: value[:4] for name, value in batch.items()} for batch in whole])


def test_where_all_tries_fail_a_gray_picture_without_weight_stands_in():
    fields = examples(made(bad=range(10)), 1)[0][0]
    assert (fields["patches"] == 127).all()
    assert fields["valid"] == 0
    assert fields["label"] == -1
    assert fields["replaced"] == 4
    assert sorted(fields["order"]) == list(range(24))


def test_a_bad_picture_of_an_evaluation_has_no_weight_and_moves_no_other():
    c, bad = config(), deque(maxlen=100)
    views = ExampleBuilder(c, ORDER, spec(c))
    found = [random_access.evaluate_example(made(bad={1}), views, np.arange(3), 1.0, bad, i) for i in range(4)]
    assert [fields["valid"] for fields in found] == [1, 0, 1, 0]
    assert [fields["id"] for fields in found] == [0, 1, 2, -1]
    assert bad[0].startswith("image 1:")


def test_an_error_of_ours_comes_out_as_itself():
    def example(bad, position):
        raise UserError("the disk is gone")
    c = config()
    with pytest.raises(UserError, match=r"^the disk is gone$"):
        next(random_access.batches(example, spec(c), np.arange(8), range(5), c, deque(), 0))


@pytest.mark.slow
def test_a_process_ends_while_batches_are_being_made():
    """TensorFlow's threads hung the interpreter's exit when they came back to Python too late."""
    code = """
import sys, time
import jax, numpy as np
from ml_collections import ConfigDict
from mae_jax.data.readers import random_access
def example(bad, position):
    time.sleep(0.002)
    return {"id": position}
spec = {"id": jax.ShapeDtypeStruct((8,), np.int32)}
config = ConfigDict({"data": {"workers": "auto", "threads": 8, "prefetch": 2}})
batches = random_access.batches(example, spec, np.arange(8), range(10**6), config, None, 0)
next(batches)
sys.exit(75)
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 75


@pytest.mark.parametrize("source", ["photo_crops", "photo_mosaic", "mnist5k"])
def test_a_path_that_nothing_reads_is_refused(source):
    c = config()
    c.data.update(source=source, path="/pictures")
    with pytest.raises(UserError, match=f"data.source='{source}' .*data.path='/pictures'"):
        inputs_of(c)
