"""The command as a user runs it, and what it writes read back through data.source."""

import io
import json
import os
import shlex
import subprocess
import sys

import numpy as np
import pytest
from etils import epath
from PIL import Image, ImageFont

from mae_jax import config as configs
from mae_jax import data
from mae_jax.commands.inspect import report, speed
from mae_jax.data import writers
from mae_jax.data.decode import decode
from mae_jax.data.sources import base, registry
from mae_jax.errors import UserError
from mae_jax.evals import image_grid, input_grid
from tests.helpers.records import describe, harm, write_shards
from tests.helpers.tiny import tiny_method


def make_folder(root, broken=True):
    """Twenty images of two classes, 40 x 30; image i is of gray i. One is cut short, one is text."""
    for i in range(20):
        path = root / "ab"[i % 2] / f"{i:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), (10 * i, 10 * i, 10 * i)).save(path, quality=95)
    if broken:
        cut = root / "a" / "00.jpg"
        cut.write_bytes(cut.read_bytes()[:-20])
        (root / "b" / "01.jpg").write_text("no image")
    return root


def config(**fields):
    c = configs.default()
    c.batch_size = 4
    c.data.update({"image_size": (16, 16), "threads": 2, "readers": 2, "eval_split": "", **fields})
    c.model.patch = (8, 8)
    return c


def build(c):
    method = tiny_method(c)
    return data.OpenedData(c).batches(method.batch_spec(), method.patch_order())


def contents(c, split="train"):
    """Returns gray value // 10 → class name of everything in a split."""
    source = registry.load(c.data, split)
    found = [item for _, item in writers.each(source, lambda example: example, threads=2)]
    return {round(float(decode(example.image).mean()) / 10): source.classes[example.label] for example in found}


EXPECTED = {i: "ab"[i % 2] for i in range(2, 20)}


def test_a_folder_written_as_tfrecord_reads_back_whole(tmp_path):
    c = config(source="folder", path=str(make_folder(tmp_path / "in")))
    found = {"train": registry.load(c.data, "train")}
    broken = writers.write_tfrecord(found, epath.Path(tmp_path / "out"), size=24, threads=2)
    assert [name.split(":")[0] for name in sorted(broken["train"])] == ["a/00.jpg", "b/01.jpg"]
    back = config(source="tfrecord", path=str(tmp_path / "out"))
    assert contents(back) == EXPECTED
    assert build(back).classes == ("a", "b")
    assert {decode(item.image).shape for _, item in writers.each(
        registry.load(back.data, "train"), lambda example: example, 2)} == {(24, 32, 3)}


def test_a_folder_written_as_array_record_reads_back_with_random_access(tmp_path):
    c = config(source="folder", path=str(make_folder(tmp_path / "in")))
    found = {"train": registry.load(c.data, "train")}
    broken = writers.write_array_record(found, epath.Path(tmp_path / "out"), size=64, threads=2)
    assert len(broken["train"]) == 2
    back = config(source="tfds", name="pictures", path=str(tmp_path / "out"))
    assert isinstance(registry.load(back.data, "train"), base.Source)
    assert contents(back) == EXPECTED


def test_small_jpegs_are_kept_byte_for_byte_and_others_become_jpegs():
    file = io.BytesIO()
    Image.new("RGB", (40, 30)).save(file, "JPEG", quality=50)
    example = base.Example(file.getvalue(), 3)
    assert writers.shrink(example, 30) is example
    assert decode(writers.shrink(example, 15).image).shape == (15, 20, 3)
    pixels = base.Example(np.zeros((5, 6, 3), np.uint8), 3)
    assert writers.shrink(pixels, 30).image.startswith(b"\xff\xd8\xff")  # a JPEG


def test_cached_batches_are_those_of_the_run(tmp_path):
    c = config(source="folder", path=str(make_folder(tmp_path / "in", broken=False)), train_split="train[:80%]",
               val_split="train[80%:]", eval_split="test")
    inputs, method = build(c), tiny_method(c)
    to = epath.Path(tmp_path / "out")
    writers.write_batches(data.OpenedData(c), inputs, method.eval_spec(), method.patch_order(), (), to, steps=3)
    back = build(config(source="batches", path=str(tmp_path / "out"), eval_split="test"))
    assert (back.num_train, back.classes) == (inputs.num_train, inputs.classes)
    assert back.num_val == inputs.num_val > 0
    for name in ("train", "support", "evaluate", "validate"):
        args = (0,) if name == "train" else ()
        count = 3 if name == "train" else len(list(getattr(inputs, name)()))
        pairs = list(zip(getattr(inputs, name)(*args), getattr(back, name)(*args), range(count), strict=False))
        assert len(pairs) == count
        for one, other, _ in pairs:
            real = one["id"] >= 0
            for field in one:
                np.testing.assert_array_equal(one[field][real], other[field][real])


@pytest.mark.parametrize("kind", ["write_tfrecord", "write_array_record"])
def test_what_is_there_is_not_overwritten(tmp_path, kind):
    c = config(source="folder", path=str(make_folder(tmp_path / "in")))
    found = {"train": registry.load(c.data, "train")}
    for attempt in range(2):
        if attempt:
            with pytest.raises(UserError, match="already"):
                getattr(writers, kind)(found, epath.Path(tmp_path / "out"), 24, 2)
        else:
            getattr(writers, kind)(found, epath.Path(tmp_path / "out"), 24, 2)


def run(*flags):
    command = [sys.executable, "-m", "mae_jax", "inspect", "--config=configs/quickstart.py:runlocal", *flags]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


def test_an_image_of_the_grid_is_called_as_its_file_and_by_its_class(tmp_path):
    make_folder(tmp_path)
    opened = data.OpenedData(config(source="folder", path=str(tmp_path), train_split="train"))
    method = tiny_method(opened.config)
    batch = next(opened.batches(method.batch_spec(), method.patch_order()).train(0))
    for row, number in enumerate(batch["id"]):
        name = opened.train.name(int(number))
        about = name[0] if batch["valid"][row] else "cannot be read"
        assert input_grid.caption(batch, row, opened.info.classes, opened.train) == (name, about)
    several = {"id": np.array([3]), "valid": np.ones(1), "labels": np.array([[1, 1]], np.uint8)}
    assert input_grid.caption(several, 0, opened.info.classes)[1] == "a, b"
    unlabeled = {"id": np.array([3]), "valid": np.ones(1), "label": np.array([-1])}
    assert input_grid.caption(unlabeled, 0, opened.info.classes)[1] == ""


def test_a_caption_that_is_too_long_keeps_its_end():
    font = ImageFont.load_default(input_grid.TEXT)
    text = image_grid.fitting("a_long_folder/" * 9 + "17.jpg", 100, font)
    assert text.startswith("...")
    assert text.endswith("/17.jpg")
    assert 80 < font.getlength(text) <= 100
    assert image_grid.fitting("17.jpg", 100, font) == "17.jpg"


@pytest.mark.parametrize(("each", "says"), [
    (400.0, "need 15 cores with a worker process each (data.workers=15), of 400"), (6500.0, "need 1 core with")])
def test_the_cores_that_devices_need_are_told(each, says):
    line, = speed._need(6000.0, each, 8, "")
    assert says in line
    assert ("this machine has 8" in line) == (each == 400.0)
    assert speed._need(0.0, each, 8, "") == []


@pytest.mark.slow
def test_the_command_tells_what_is_there_names_broken_pictures_and_draws_the_grid(tmp_path):
    folder = make_folder(tmp_path / "in")
    (folder / "b" / "@eaDir").mkdir()
    for i in range(60):
        (folder / "b" / f"{20 + i}.jpg").touch()
    (folder / "notes.txt").touch()
    done = run("--config.data.source=folder", f"--config.data.path={folder}", "--config.data.eval_split=",
               "--config.data.workers=2", "--images_per_second=1e9", f"--to={tmp_path / 'grid.png'}")
    assert done.returncode == 0, done.stderr
    for line in ("train: 80 images in 2 classes (a, b) from the class folders", "viewers: @eaDir 1", "classes: a, b",
                 "train: 80 images, 62 broken", "  a/00.jpg: cut off",
                 "  b/01.jpg: not a JPEG", "  and 12 more", "  sizes      all 40 x 30", "  formats    18 JPEG",
                 "1 file not read, because the extension is not that of an image (.txt 1), such as notes.txt",
                 f"all broken images by name: {tmp_path / 'grid.broken.txt'}", "images/s of 2 worker processes on",
                 "; one alone makes ", "devices that take 1000000000 images/s need "):
        assert line in done.stdout
    names = (tmp_path / "grid.broken.txt").read_text().splitlines()
    assert len(names) == 62
    assert "62 of 80 images of train are broken, more than guard.max_bad_fraction=" in done.stdout
    assert names[-1] == "train b/79.jpg: empty file"
    with Image.open(tmp_path / "grid.png") as drawn:
        # Below a line on what the rows are, 16 images four times as large, each above what the encoder sees and two
        # lines of text.
        assert drawn.size == (8 * (4 * 32 + 2), 12 + 2 + 2 * (2 * (4 * 32 + 2) + 2 * 12 + 2))


@pytest.mark.slow
def test_the_command_tells_of_lost_records_and_that_training_would_stop(tmp_path):
    describe(write_shards(tmp_path))
    for shard in (1, 3, 4):
        harm("cut in the payload", tmp_path / f"train-{shard}.tfrecord")
    done = run("--config.data.source=tfrecord", f"--config.data.path={tmp_path}", f"--to={tmp_path / 'grid.png'}")
    assert done.returncode == 0, done.stderr
    assert "train: 18 images, none broken" in done.stdout
    assert "  records    50 in 5 files of 0 to 20, as records.json promises; 32 not read:" in done.stdout
    assert done.stdout.count("is damaged after record 5 of ") == 4
    assert "no speed and no images, and training would stop: " in done.stdout


@pytest.mark.parametrize("kind", ["tfrecord", "array_record", "batches"])
def test_the_flags_that_read_what_was_stored_are_those_of_a_config(kind, tmp_path):
    flags = shlex.split(report.written(kind, epath.Path(tmp_path / "a b")))
    given = dict(flag.removeprefix("--config.data.").split("=") for flag in flags if flag.startswith("--config.data."))
    assert given.pop("path") == f"{tmp_path}/a b"
    assert given.pop("source") in {*registry.MODULES, "batches"}
    assert given in ({}, {"name": "pictures"})


@pytest.mark.slow
def test_the_command_writes_both_splits(tmp_path):
    done = run("--write=tfrecord", "--size=16", f"--to={tmp_path}")
    assert done.returncode == 0, done.stderr
    described = json.loads((tmp_path / "records.json").read_text())
    assert sum(described["records"].values()) == 3400 + 1020
    assert len(described["classes"]) == 17
    assert done.stdout.splitlines()[-1] == (f"{tmp_path} is read by --config.data.source=tfrecord "
                                            f"--config.data.path={tmp_path}")


@pytest.mark.slow
def test_a_missing_folder_is_one_line_and_exit_code_2(tmp_path):
    done = run("--config.data.source=folder", f"--config.data.path={tmp_path / 'none'}")
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "is not a folder" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("flags", "line"), [
    (["--to=s3://bucket/grid.png"], "a folder is local or gs://BUCKET/FOLDER"), (["--to={}"], "is a folder; expected"),
    (["--to=gs://"], "not a valid bucket"), (["--size=0"], "--size=0"), (["--steps=-3"], "--steps=-3")])
def test_what_cannot_be_written_is_said_before_any_picture_is_read(tmp_path, flags, line):
    done = run("--config.data.source=folder", f"--config.data.path={make_folder(tmp_path / 'in')}",
               *(flag.format(tmp_path) for flag in flags))
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.strip().splitlines()) == 1
    assert line in done.stderr
