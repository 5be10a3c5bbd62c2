"""Data that lie elsewhere at a resume: accepted where they are the same, by names and samples; refused where not."""

import json
import shutil
import time

import numpy as np
import pytest
from etils import epath
from PIL import Image

from mae_jax.data.identity import SAMPLES, sampled
from mae_jax.data.sources import folder as sources_folder
from mae_jax.data.sources.base import Example, Source
from mae_jax.errors import UserError
from mae_jax.training import loop, workdir
from tests.helpers import records
from tests.helpers.tiny import open_inputs, tiny_config, tiny_segment


def pixels(seed):
    return np.random.default_rng(seed).integers(0, 256, (16, 16, 3), np.uint8)


def pictures(folder, count=6, classes=("ant", "bee")):
    """Writes images of classes, with a split for evaluation; returns the folder."""
    for split in ("train", "test"):
        for name in classes:
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                Image.fromarray(pixels(number + len(name))).save(folder / split / name / f"{number}.png")
    return folder


def of_folder(path, **fields):
    sources_folder.folder_listing.files.cache_clear()
    return tiny_config({"data.source": "folder", "data.path": str(path), **fields})


def recorded(folder, config):
    """Records a run of a config with its data; returns its workdir."""
    run = epath.Path(folder) / "run"
    workdir.record(run, config, open_inputs(config))
    return run


def resumed(run, config):
    """Returns what a resume with the config tells; raises as it does."""
    inputs = open_inputs(config)
    return workdir.changes(run, config, inputs) + workdir.data_changes(run, inputs, False)


def test_the_same_pictures_in_another_folder_are_taken_and_told(tmp_path):
    run = recorded(tmp_path, of_folder(pictures(tmp_path / "a")))
    shutil.move(tmp_path / "a", tmp_path / "b")
    told, = resumed(run, of_folder(tmp_path / "b"))
    assert told.startswith(f"data.path: '{tmp_path / 'a'}' -> '{tmp_path / 'b'}' (the same data, ")
    moved = of_folder(tmp_path / "b")
    workdir.record(run, moved, open_inputs(moved))
    assert resumed(run, moved) == []
    assert workdir.read_config(run).data.path == str(tmp_path / "b")


def test_another_layout_that_reads_the_same_pictures_is_taken_and_told(tmp_path):
    run = recorded(tmp_path, of_folder(pictures(tmp_path / "a")))
    told, = resumed(run, of_folder(tmp_path / "a", **{"data.layout": "splits"}))
    assert told.startswith("data.layout: 'auto' -> 'splits' (the same data, ")
    with pytest.raises(UserError, match=r"data\.layout: 'auto' -> 'flat'"):
        resumed(run, of_folder(tmp_path / "a", **{"data.layout": "flat"}))


def again(tmp_path):
    """Records a run on images; returns it and a copy of them."""
    run = recorded(tmp_path, of_folder(pictures(tmp_path / "a")))
    return run, shutil.copytree(tmp_path / "a", tmp_path / "b")


def rename(folder):
    (folder / "train" / "bee" / "3.png").rename(folder / "train" / "bee" / "33.png")


def repaint(folder):
    Image.fromarray(pixels(99)).save(folder / "train" / "bee" / "3.png")


def repaint_test(folder):
    Image.fromarray(pixels(99)).save(folder / "test" / "bee" / "3.png")


def remove(folder):
    (folder / "train" / "bee" / "3.png").unlink()


def rename_class(folder):
    for split in ("train", "test"):
        (folder / split / "bee").rename(folder / split / "cat")


@pytest.mark.parametrize(("change", "line"), [
    (rename, "for train"), (repaint, "for train"), (repaint_test, "for test"), (remove, "for train"),
    (rename_class, r"classes: 2 -> 2 \(-bee, \+cat\)")])
def test_other_pictures_in_another_folder_are_refused_by_what_differs(tmp_path, change, line):
    run, other = again(tmp_path)
    change(other)
    with pytest.raises(UserError, match=rf"data\.path: .*/a' -> '.*/b' \(.*{line}") as caught:
        resumed(run, of_folder(other))
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=line):
        workdir.record(run, of_folder(other), open_inputs(of_folder(other)))


def test_other_pictures_in_the_same_folder_are_told(tmp_path):
    config = of_folder(pictures(tmp_path / "a"))
    run = recorded(tmp_path, config)
    assert resumed(run, config) == []
    repaint(tmp_path / "a")
    assert [text.partition(":")[0] for text in resumed(run, config)] == ["images of train"]


def test_what_else_is_changed_is_refused_though_the_data_are_the_same(tmp_path):
    run, other = again(tmp_path)
    with pytest.raises(UserError, match=r"config; optim\.lr: 0\.05 -> 0\.1\. Use"):
        resumed(run, of_folder(other, **{"optim.lr": 0.1}))
    with pytest.raises(UserError, match=r"data\.source: 'folder' -> 'photo_crops'"):
        resumed(run, tiny_config())


@pytest.mark.parametrize("lacks", ["identity", "data"])
def test_a_run_that_did_not_record_its_data_needs_them_where_they_were(tmp_path, lacks):
    run, other = again(tmp_path)
    stored = json.loads((run / "config.json").read_text())
    del (stored if lacks == "data" else stored["data"])[lacks]
    (run / "config.json").write_text(json.dumps(stored))
    with pytest.raises(UserError, match=r"data\.path: .* not on record"):
        resumed(run, of_folder(other))
    assert resumed(run, of_folder(tmp_path / "a")) == []


def test_copies_of_a_run_are_of_one_run_where_their_records_agree(tmp_path):
    run, other = again(tmp_path)
    workdir.record(epath.Path(tmp_path) / "same", of_folder(other), open_inputs(of_folder(other)))
    repaint(shutil.copytree(other, tmp_path / "c"))
    workdir.record(epath.Path(tmp_path) / "other", of_folder(tmp_path / "c"), open_inputs(of_folder(tmp_path / "c")))
    told, = workdir.changes(run, of_folder(other), origin=epath.Path(tmp_path / "same"))
    assert "the same data" in told
    with pytest.raises(UserError, match=r"data\.path: .* for train"):
        workdir.changes(run, of_folder(tmp_path / "c"), origin=epath.Path(tmp_path / "other"))
    with pytest.raises(UserError, match=r"data\.path: .* not on record"):
        workdir.changes(run, of_folder(other))


def test_numbered_images_are_known_by_their_content(tmp_path):
    images = np.stack([pixels(seed) for seed in range(40)])

    def config(name, stored):
        np.savez(tmp_path / name, x_train=stored, x_test=stored[:8], y_train=np.arange(40) % 2, y_test=np.arange(8) % 2)
        return tiny_config({"data.source": "npz", "data.path": str(tmp_path / name)})

    run = recorded(tmp_path, config("a.npz", images))
    told, = resumed(run, config("b.npz", images))
    assert "the same data" in told
    with pytest.raises(UserError, match=r"b\.npz' \(.*for train"):
        resumed(run, config("b.npz", np.concatenate([images[:39], images[:1]])))
    with pytest.raises(UserError, match=r"b\.npz' \(.*for test, train"):
        resumed(run, config("b.npz", images[::-1]))


def test_masks_move_with_the_images_and_count_as_content(tmp_path):
    for name in ("train", "test"):
        for folder in ("images", "masks", "others"):
            (tmp_path / folder / name).mkdir(parents=True)
        for number in range(4):
            Image.fromarray(pixels(number)).save(tmp_path / "images" / name / f"{number}.png")
            for folder in ("masks", "others"):
                mask = pixels(number + 50 * (folder == "others"))[..., 0] % 3
                Image.fromarray(mask).save(tmp_path / folder / name / f"{number}.png")

    def config(images, masks):
        sources_folder.folder_listing.files.cache_clear()
        return tiny_segment({"data.source": "folder", "data.path": str(tmp_path / images),
                             "data.mask_key": str(tmp_path / masks)})

    run = recorded(tmp_path, config("images", "masks"))
    (tmp_path / "images").rename(tmp_path / "new")
    (tmp_path / "masks").rename(tmp_path / "new_masks")
    told = resumed(run, config("new", "new_masks"))
    assert [text.partition(":")[0] for text in told] == ["data.mask_key", "data.path"]
    with pytest.raises(UserError, match=r"others' \(.*for test, train"):
        resumed(run, config("new", "others"))


@pytest.mark.parametrize("change", [lambda i: i + 100, lambda i: 7 - i])  # records of the same size
def test_records_are_known_by_their_files_and_how_they_begin(tmp_path, change):
    def config(name, number):
        (tmp_path / name).mkdir()
        for split in ("train", "test"):
            records.write(tmp_path / name / f"{split}-0.tfrecord", [records.record(number(i)) for i in range(8)])
        return tiny_config({"data.source": "tfrecord", "data.path": str(tmp_path / name / "{split}-*.tfrecord"),
                            "data.readers": 4})

    run = recorded(tmp_path, config("a", lambda i: i))
    told, = resumed(run, config("b", lambda i: i))
    assert "the same data" in told
    with pytest.raises(UserError, match=r"for test, train"):
        resumed(run, config("c", change))


def test_no_more_than_64_examples_are_read_however_many_there_are():
    read = []

    def example(index):
        read.append(index)
        if index == 0:
            raise OSError("gone")
        return Example(b"x" * index, label=1)

    began = time.monotonic()
    found = Source(30_000, example, str).identity()
    assert time.monotonic() - began < 30
    assert sorted(read) == sampled(30_000).tolist()
    assert (len(read), min(read), max(read)) == (SAMPLES, 0, 29_999)
    assert found == Source(30_000, example, str).identity()
    assert found["names"] != Source(30_000, example, "n{}".format).identity()["names"]
    assert sampled(5).tolist() == [0, 1, 2, 3, 4]
    assert sampled(0).tolist() == []


@pytest.mark.slow
def test_a_run_goes_on_and_is_evaluated_where_its_data_lie_now(tmp_path, caplog):
    caplog.set_level("INFO", "mae_jax")
    fields = {"train.duration": "2 steps", "eval.every": "2 steps"}
    assert loop.train(of_folder(pictures(tmp_path / "a"), **fields), str(tmp_path / "run")) == 0
    shutil.move(tmp_path / "a", tmp_path / "b")
    moved = of_folder(tmp_path / "b", **fields)
    assert loop.evaluate(str(tmp_path / "run"), moved) == 0
    assert "changed since the run began: data.path: " in caplog.text
    longer = of_folder(tmp_path / "b", **fields | {"train.duration": "3 steps"})
    assert loop.train(longer, str(tmp_path / "run")) == 0
    assert loop.evaluate(str(tmp_path / "run")) == 0
    repaint_test(shutil.copytree(tmp_path / "b", tmp_path / "c"))
    for go_on in (loop.train, lambda config, run: loop.evaluate(run, config)):
        with pytest.raises(UserError, match=r"data\.path: .* for test"):
            go_on(of_folder(tmp_path / "c", **fields | {"train.duration": "3 steps"}), str(tmp_path / "run"))
