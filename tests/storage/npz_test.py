import io
import os
import zipfile

import numpy as np
import pytest
from etils import epath

from mae_jax.errors import UserError
from mae_jax.storage.npz import opened


class Executed:
    """What a file of Python objects could do to whoever loads it."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (self.mark,)


def read(path):
    with opened(epath.Path(path), "; remove it") as stored:
        return {name: stored[name] for name in stored.files}


def test_arrays_come_back(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.arange(3), kind=np.array("text"))
    assert read(tmp_path / "a.npz")["x"].tolist() == [0, 1, 2]
    assert str(read(tmp_path / "a.npz")["kind"]) == "text"


def test_objects_are_never_made(tmp_path):
    objects = np.empty(1, object)
    objects[0] = Executed(str(tmp_path / "mark"))
    np.savez(tmp_path / "a.npz", x=objects)
    with pytest.raises(UserError, match=r"a\.npz .*Python objects"):
        read(tmp_path / "a.npz")
    assert not (tmp_path / "mark").exists()
    np.load(tmp_path / "a.npz", allow_pickle=True)["x"]
    assert (tmp_path / "mark").exists()  # the file is what it is meant to be


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04 broken", b"\x80\x04N."])
def test_what_is_no_npz_is_named(tmp_path, content):
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.npz .*damaged.*: \w") as error:
        read(tmp_path / "a.npz")
    assert "allow_pickle" not in str(error.value)  # NumPy's advice to load it unsafely


def test_a_single_array_is_refused(tmp_path):
    with (tmp_path / "a.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(UserError, match="one array"):
        read(tmp_path / "a.npz")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_flipped_cut_and_lost_bytes_give_one_line_or_the_same_values(tmp_path, save):
    arrays, draws = {"x": np.arange(50, dtype=np.uint8), "kind": np.array("text")}, np.random.default_rng(0)
    file = io.BytesIO()
    save(file, **arrays)
    whole, path, refused = file.getvalue(), tmp_path / "a.npz", 0
    for trial in range(300):
        raw, place = bytearray(whole), int(draws.integers(len(whole)))
        if trial % 3 == 0:
            raw[place] ^= 1 << int(draws.integers(8))
        else:
            del raw[place:place + 8 if trial % 3 == 1 else None]
        path.write_bytes(raw)
        try:
            found = read(path)
        except UserError as error:
            refused += len(str(error).splitlines()) == 1
            continue
        for name in found.keys() & arrays.keys():
            np.testing.assert_array_equal(found[name], arrays[name])
    assert refused > 200


@pytest.mark.parametrize(("content", "line"), [
    (b"", "empty"), (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"), (b"<html>", "HTML"),
    (b"\x1f\x8b" + bytes(20), "gzip"), (b"\x89HDF\r\n\x1a\n", "HDF5"), (b"\x80\x02}q\0.", "PyTorch")])
def test_what_is_something_else_is_told_by_what_it_is(tmp_path, content, line):
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(UserError, match=rf"a\.npz .*{line}.*; remove it$"):
        read(tmp_path / "a.npz")


def test_a_folder_a_lacking_array_and_one_that_is_too_large_are_told_as_such(tmp_path):
    (tmp_path / "a.npz").mkdir()
    with pytest.raises(UserError, match=r"cannot read .*a\.npz: Is a directory"):
        read(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", x=np.zeros(2))
    with pytest.raises(UserError, match=r"b\.npz lacks an array: y"), opened(epath.Path(tmp_path) / "b.npz") as stored:
        stored["y"]
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1099511627776, 1024), }"
    array = b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little") + header
    with zipfile.ZipFile(tmp_path / "c.npz", "w") as packed:
        packed.writestr("x.npy", array)
    with pytest.raises(UserError, match=r"c\.npz has an array that does not fit into memory"):
        read(tmp_path / "c.npz")
