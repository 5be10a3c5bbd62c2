"""Rows in chunks: however a computation is cut off, the rows are those of one that was not."""

import contextlib
import json

import numpy as np
import pytest
from etils import epath

from mae_jax.errors import UserError
from mae_jax.inference import chunks as chunks_module
from mae_jax.inference.chunks import Chunks

ABOUT = {"encoder": "abc", "block": -1}


class Cut(Exception):
    pass


def rows(size, total, cut=10**6, error=Cut):
    """Returns batches of `size` rows up to `total`, which stop after `cut` batches; and how far each call began."""
    begun = []

    def batches(first):
        begun.append(first)
        for number, start in enumerate(range(first, total, size)):
            if number == cut:
                raise error
            yield {"number": np.arange(start, min(start + size, total)), "name": np.array(["x" * (start % 7)] * min(
                size, total - start))}

    return batches, begun


def read(chunks):
    return np.concatenate([each["number"] for each in chunks.read()])


@pytest.mark.parametrize(("size", "per_chunk", "total"), [(4, 8, 30), (5, 8, 30), (40, 8, 30), (3, 100, 7), (4, 8, 0)])
def test_what_is_cut_off_goes_on_without_loss_or_repeats(tmp_path, size, per_chunk, total):
    made = 0
    for cut in (0, 1, 2, 3, 10**6):
        chunks = Chunks(epath.Path(tmp_path / "a"), ABOUT, per_chunk)
        batches, begun = rows(size, total, cut)
        try:
            chunks.fill(batches)
        except Cut:
            (tmp_path / "a" / "partial_00009.npz").write_bytes(b"half a chunk")
        assert begun == [] or begun == [made * per_chunk]
        made = len(chunks.files())
    np.testing.assert_array_equal(read(chunks) if total else np.zeros(0), np.arange(total))
    batches, begun = rows(size, total)
    chunks.fill(batches)
    assert begun == []


@pytest.mark.parametrize(("size", "per_chunk", "total"), [(4, 8, 30), (5, 8, 30), (40, 8, 50), (3, 100, 17)])
@pytest.mark.parametrize(("error", "seconds"), [(Cut, 0.0), (KeyboardInterrupt, 10**6)], ids=["killed", "ctrl-c"])
def test_rows_of_an_unfinished_chunk_are_kept(tmp_path, monkeypatch, size, per_chunk, total, error, seconds):
    """Rows are saved now and then, and on Ctrl-C: each call begins at the first row that none before computed."""
    monkeypatch.setattr(chunks_module, "SAVE_SECONDS", seconds - 1)
    known = 0
    for cut in (1, 0, 2, 10**6):
        chunks = Chunks(epath.Path(tmp_path / "a"), ABOUT, per_chunk)
        batches, begun = rows(size, total, cut, error)
        with contextlib.suppress(error):
            chunks.fill(batches)
        assert begun in ([known], [])
        known = min(total, known + cut * size)
    np.testing.assert_array_equal(read(chunks), np.arange(total))
    assert {path.name[:5] for path in (tmp_path / "a").iterdir()} == {"about", "compl", *(
        f"{number:05d}" for number in range(-(-total // per_chunk)))}


def test_a_damaged_unfinished_chunk_is_computed_again(tmp_path):
    with contextlib.suppress(KeyboardInterrupt):
        Chunks(epath.Path(tmp_path), ABOUT, 8).fill(rows(2, 6, 2, KeyboardInterrupt)[0])
    file = tmp_path / "begun_00000.npz"
    file.write_bytes(file.read_bytes()[:60])
    batches, begun = rows(2, 6)
    (chunks := Chunks(epath.Path(tmp_path), ABOUT, 8)).fill(batches)
    assert begun == [0]
    np.testing.assert_array_equal(read(chunks), np.arange(6))


def test_rows_of_something_else_are_refused(tmp_path):
    Chunks(epath.Path(tmp_path), ABOUT, 4).fill(rows(2, 6)[0])
    with pytest.raises(UserError, match=r"other features, by their encoder \(abc, now abd\)"):
        Chunks(epath.Path(tmp_path), {**ABOUT, "encoder": "abd"}, 4).fill(rows(2, 6)[0])
    with pytest.raises(UserError, match="by their block"):
        Chunks(epath.Path(tmp_path), {"encoder": "abc"}, 4).fill(rows(2, 6)[0])
    (tmp_path / "about.json").write_text("{")
    with pytest.raises(UserError, match="remove"):
        Chunks(epath.Path(tmp_path), ABOUT, 4).fill(rows(2, 6)[0])


def test_a_damaged_chunk_is_named(tmp_path):
    chunks = Chunks(epath.Path(tmp_path), ABOUT, 4)
    chunks.fill(rows(2, 6)[0])
    assert json.loads((tmp_path / "complete.json").read_text()) == 2
    content = (tmp_path / "00001.npz").read_bytes()
    (tmp_path / "00001.npz").write_bytes(content[:60])
    with pytest.raises(UserError, match=r"00001.npz.*remove"):
        read(chunks)


def test_a_full_disk_is_told_by_the_name_of_the_chunk(tmp_path):
    (tmp_path / "partial_00000.npz").symlink_to("/dev/full")
    with pytest.raises(OSError, match=rf"No space left on device: '{tmp_path}/00000.npz'"):
        Chunks(epath.Path(tmp_path), ABOUT, 4).fill(rows(2, 6)[0])
