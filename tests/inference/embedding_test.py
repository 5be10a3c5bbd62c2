"""Files of features: of all images, in order, in bounded memory, going on where they were stopped."""

import json
import os
import subprocess
import sys
import time
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
import pytest
from etils import epath

from mae_jax.errors import GuardError, UserError
from mae_jax.inference import asked, embedding, embedding_files
from mae_jax.inference import parts as inference_parts
from mae_jax.inference.encoder import open_encoder
from mae_jax.storage import workdir_lock
from tests.helpers.stored import STEP, store_images, store_run
from tests.helpers.tiny import tiny_config

COLUMNS = ["file", "split", "id", "label", "label_name", "features"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with the images `data`, three of them broken, and the workdir `run`."""
    folder = tmp_path_factory.mktemp("embedding")
    store_images(folder / "data", count=7, broken=3)
    store_run(folder / "run", tiny_config({"data.source": "folder", "data.path": str(folder / "data")}))
    return folder


@pytest.fixture(scope="module")
def encoder(made):
    return open_encoder(str(made / "run"), batch_size=4)


def embed(encoder, to, images="", config=None, split="", **more):
    parts = asked.parts_of(encoder, str(images), config, split, all_splits=True)
    return embedding.embed(encoder, parts, epath.Path(to), images=str(images), **more)


def columns(path):
    if str(path).endswith(".npz"):
        with np.load(path) as stored:
            return {name: stored[name] for name in COLUMNS}
    table = pq.read_table(path)
    assert table.column_names == COLUMNS
    found = {name: np.array(table[name].to_pylist()) for name in COLUMNS}
    return {**found, "features": found["features"].astype(np.float32)}


@pytest.mark.parametrize("ending", ["parquet", "npz"])
def test_every_image_has_a_row_and_what_cannot_be_read_is_named(made, encoder, tmp_path, ending):
    found = embed(encoder, tmp_path / f"a.{ending}", made / "data")
    rows = columns(tmp_path / f"a.{ending}")
    files = [f"{name}/{k:02d}.png" for name in "abc" for k in range(7)]
    assert rows["file"].tolist() == files
    assert rows["id"].tolist() == list(range(21))
    assert rows["label"].tolist() == [k // 7 for k in range(21)]
    assert rows["label_name"].tolist() == [name[0] for name in files]
    assert set(rows["split"]) == {"images"}
    np.testing.assert_allclose(rows["features"], encoder([made / "data" / name for name in files]), atol=1e-6)
    assert (found.images, found.unreadable_count) == (21, 3)
    assert [name for name, _ in found.unreadable] == [f"c/broken: {k}.png" for k in range(3)]
    assert all("not a JPEG" in reason for _, reason in found.unreadable)
    assert "3 images could not be read" in embedding.told(found)
    assert [path.name for path in tmp_path.iterdir()] == [f"a.{ending}"]


def test_the_file_says_what_made_it_and_opens_its_images_again(made, encoder, tmp_path):
    embed(encoder, tmp_path / "a.parquet", features="patches", block=1)
    about = json.loads(pq.read_schema(tmp_path / "a.parquet").metadata[b"mae_jax"])
    assert about == embedding_files.about_of(epath.Path(tmp_path / "a.parquet"))
    assert about["step"] == STEP
    assert about["shape"] == [4, 4, 32]
    assert about["from"] == str(made / "run")
    assert (about["features"], about["block"], about["image_size"]) == ("patches", 1, [16, 16])
    assert about["source"]["path"] == str(made / "data")
    assert about["unreadable_count"] == 3
    parts = inference_parts.reopened(about)
    assert [[part.split, part.size] for part in parts] == about["splits"]
    rows = columns(tmp_path / "a.parquet")
    assert len(rows["id"]) == 21
    assert len(set(rows["id"].tolist())) == 21
    splits = dict(about["splits"])
    for k in (0, 20):
        part = next(part for part in parts if part.split == rows["split"][k])
        number = rows["id"][k] - (splits["train"] if part.split == "test" else 0)
        assert part.name(int(number)) == rows["file"][k]
        seen = encoder([part.source.read(int(number)).image], "patches", 1)[0]
        np.testing.assert_allclose(rows["features"][k].reshape(4, 4, 32), seen, atol=1e-5)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(embedding, "CHUNK_ROWS", 5)


@pytest.mark.parametrize("cut", [0, 1, 3, 5])
def test_a_call_that_was_stopped_goes_on_to_the_same_file(made, encoder, tmp_path, monkeypatch, small_chunks, cut):
    embed(encoder, tmp_path / "whole.parquet")
    batches = inference_parts.Part.batches

    def stopped(part, *args):
        for number, batch in enumerate(batches(part, *args)):
            if number == cut:
                raise KeyboardInterrupt
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(inference_parts.Part, "batches", stopped)
        with pytest.raises(KeyboardInterrupt):
            embed(encoder, tmp_path / "a.parquet")
    assert not (tmp_path / "a.parquet").exists()
    with pytest.raises(UserError, match=r"their (features|shape|block)"):
        embed(encoder, tmp_path / "a.parquet", features="cls", block=0)
    embed(encoder, tmp_path / "a.parquet")
    for name, column in columns(tmp_path / "whole.parquet").items():
        np.testing.assert_array_equal(columns(tmp_path / "a.parquet")[name], column)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.parquet", "whole.parquet"]


def test_a_file_that_is_there_is_kept_and_another_one_refused(made, encoder, tmp_path, monkeypatch):
    first = embed(encoder, tmp_path / "a.npz", split="test")
    when = (tmp_path / "a.npz").stat().st_mtime_ns
    assert embed(encoder, tmp_path / "a.npz", split="test") == first
    assert (tmp_path / "a.npz").stat().st_mtime_ns == when
    with pytest.raises(UserError, match=r"their (splits|examples|source)"):
        embed(encoder, tmp_path / "a.npz", split="train")
    (tmp_path / "b.parquet").write_bytes(b"mine")
    with pytest.raises(UserError, match="not a file of features"):
        embed(encoder, tmp_path / "b.parquet")
    assert (tmp_path / "b.parquet").read_bytes() == b"mine"
    for name, line in (("c.csv", "end in .parquet or .npz"), ("", "end in .parquet")):
        with pytest.raises(UserError, match=line):
            embed(encoder, tmp_path / name)


def test_a_second_call_for_the_same_file_is_refused_while_one_lives(made, encoder, tmp_path):
    with workdir_lock.hold(epath.Path(tmp_path / "a.npz.parts")), pytest.raises(UserError, match="in use by another"):
        embed(encoder, tmp_path / "a.npz")


def test_a_call_beside_a_run_of_the_same_process_leaves_the_run_its_workdir(encoder, tmp_path):
    with workdir_lock.hold(epath.Path(tmp_path / "run")):
        embed(encoder, tmp_path / "a.npz")
        assert workdir_lock.holds()
        with pytest.raises(UserError, match="this process trains already"), workdir_lock.hold(
                epath.Path(tmp_path / "another")):
            pass
        assert workdir_lock.holds()
    assert not workdir_lock.holds()


def test_features_that_are_not_finite_are_refused_by_the_name_of_their_image(made, tmp_path):
    damaged = open_encoder(str(made / "run"), batch_size=4)
    damaged.params = jax.tree.map(lambda leaf: leaf * jnp.nan, damaged.params)
    with pytest.raises(UserError, match=r"the features of a/00.png by .*run are not finite"):
        embed(damaged, tmp_path / "a.npz", made / "data")
    assert not (tmp_path / "a.npz").exists()


def test_a_relative_path_is_the_same_from_any_folder(made, encoder, tmp_path, monkeypatch):
    monkeypatch.chdir(made)
    first = embed(encoder, tmp_path / "a.npz", "data")
    monkeypatch.chdir(made / "data")
    assert embed(encoder, tmp_path / "a.npz", made / "data") == first
    with pytest.raises(UserError, match="no image"):
        embed(encoder, tmp_path / "a.npz", "data")


def test_memory_does_not_grow_with_the_number_of_images(encoder, tmp_path, small_chunks):
    """What Python and NumPy hold at the most, of 60 and of 600 images whose features take 5 MB."""
    peaks = []
    for count in (60, 600):
        store_images(tmp_path / str(count), ("a",), count)
        tracemalloc.start()
        embed(encoder, tmp_path / f"{count}.parquet", tmp_path / str(count), features="tokens")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 1_500_000, peaks


def test_too_many_broken_images_end_with_code_3(encoder):
    assert asked.exit_code(encoder, 90, 10) == 0
    with pytest.raises(GuardError, match=r"11 of 100 images could not be read.*max_bad_fraction=0.1"):
        asked.exit_code(encoder, 89, 11)


KILLED = """
import sys
from mae_jax.inference import embedding
embedding.CHUNK_ROWS = 8
from mae_jax.__main__ import main
main()
"""


@pytest.mark.slow
def test_killed_processes_leave_what_the_next_one_goes_on_with(made, tmp_path):
    """kill -9 at several moments; then the file is that of a run that was not killed, row by row."""
    store_images(tmp_path / "many", count=60)

    def start(to):
        flags = [f"--from={made / 'run'}", f"--images={tmp_path / 'many'}", f"--to={to}", "--batch_size=4"]
        return subprocess.Popen([sys.executable, "-c", KILLED, "embed", *flags], stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT, env=os.environ | {"PYTHONUNBUFFERED": "1"}, text=True)

    parts, kills = tmp_path / "a.parquet.parts" / "0", 0
    for wanted in (1, 5, 12):
        process = start(tmp_path / "a.parquet")
        while process.poll() is None and len(list(parts.glob("0*.npz"))) < wanted:
            time.sleep(0.002)
        kills += process.poll() is None
        process.kill()
        process.communicate()
    assert kills
    for name in ("a", "whole"):
        said, _ = (process := start(tmp_path / f"{name}.parquet")).communicate(timeout=300)
        assert process.returncode == 0, said
    one, other = (columns(tmp_path / f"{name}.parquet") for name in ("a", "whole"))
    for name in COLUMNS:
        np.testing.assert_array_equal(one[name], other[name])
    assert len(one["id"]) == 180
