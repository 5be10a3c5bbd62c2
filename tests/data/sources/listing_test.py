"""Listings of large folders: arrays of bytes in the order of the names, kept until a folder changes."""

import os
import unicodedata

import numpy as np
import pytest
from etils import epath

from mae_jax.data.sources import folder_listing, listing_index
from mae_jax.data.sources.names import Names
from mae_jax.storage import cache


def texts(count=300):
    draws = np.random.default_rng(0)
    letters = list("ab-./_ 0Zé\u0308\udcff\U0001f600")
    return ["".join(draws.choice(letters, draws.integers(0, 9))) for _ in range(count)]


def test_names_are_the_texts_at_every_place():
    names = Names.of(texts())
    assert list(names) == texts()
    assert [names[i] for i in (-1, 0, 5)] == [texts()[i] for i in (-1, 0, 5)]
    kept = np.random.default_rng(1).permutation(300)[:70]
    assert list(names.only(kept)) == [texts()[i] for i in kept]
    assert names.only(range(300)) is names
    assert list(names.only([])) == list(Names.of([])) == []
    with pytest.raises(IndexError):
        names[300]


def test_names_take_the_memory_of_their_letters():
    names = Names.of(f"{i:09d}.jpg" for i in range(10_000))
    assert names.letters.nbytes + names.ends.nbytes == 10_000 * (13 + 8)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MAE_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(listing_index, "FROM", 1)
    root = tmp_path / "data"
    for name in ("b/1.jpg", "b-1/2.jpg", "b.jpg", "b/c/3.PNG", "a.txt", "B/4.jpg", "b/.hidden", "b/\u00e9.jpg",
                 "be\u0301/5.jpg", "z/notes.md"):
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    return root




@pytest.fixture(autouse=True)
def _settled(monkeypatch):
    monkeypatch.setattr(listing_index, "SETTLED", 0)
    folder_listing.files.cache_clear()
    yield
    folder_listing.files.cache_clear()


def listed(root, **how):
    folder_listing.files.cache_clear()
    return folder_listing.files(epath.Path(root), **how)


def walked(root):
    """The listing as a plain walk and a sort give it."""
    paths = [os.path.relpath(os.path.join(place, name), root) for place, _, names in os.walk(root) for name in names
             if not name.startswith(".")]
    return sorted((unicodedata.normalize("NFC", path), path) for path in paths)


def test_a_listing_is_sorted_as_the_whole_names_are(folder):
    found = listed(folder)
    pictures = [pair for pair in walked(folder) if pair[0].lower().endswith((".jpg", ".png"))]
    assert list(zip(found.pictures, found.paths, strict=True)) == pictures
    assert list(found.others) == ["a.txt", "z/notes.md"]
    assert found.ignored == ((".hidden", 1),)
    assert list(listed(folder, plain=True).pictures) == sorted(path for _, path in pictures)


def test_two_spellings_of_a_folder_mingle_in_the_order_of_names(tmp_path):
    for name in ("e\u0301/1.jpg", "\u00e9/0.jpg", "\u00e9/2.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = listed(tmp_path)
    assert list(zip(found.pictures, found.paths, strict=True)) == walked(tmp_path)
    assert [name[-5:] for name in found.pictures] == ["0.jpg", "1.jpg", "2.jpg"]


def kept_from(monkeypatch):
    """Forbids to list a folder."""
    def scandir(path):
        raise AssertionError(path)

    monkeypatch.setattr(os, "scandir", scandir)


def test_a_second_start_lists_nothing_and_finds_the_same(folder, monkeypatch):
    first = listed(folder)
    with monkeypatch.context() as patched:
        kept_from(patched)
        second = listed(folder)
    for field in ("pictures", "paths", "others", "ignored"):
        assert list(getattr(first, field)) == list(getattr(second, field))


def added(root):
    (root / "b" / "c" / "9.jpg").touch()


def removed(root):
    (root / "b" / "c" / "3.PNG").unlink()


def renamed(root):
    (root / "b" / "c" / "3.PNG").rename(root / "b" / "c" / "2.PNG")


def new_folder(root):
    (root / "b" / "d").mkdir()
    (root / "b" / "d" / "6.jpg").touch()


def back_dated(root):
    before = os.stat(root / "b" / "c")
    (root / "b" / "c" / "9.jpg").touch()
    os.utime(root / "b" / "c", ns=(before.st_atime_ns, before.st_mtime_ns))


def linked(root):
    (root / "b" / "link.jpg").symlink_to(root / "b.jpg")


@pytest.mark.parametrize("change", [added, removed, renamed, new_folder, back_dated, linked])
def test_every_change_is_noticed(change, folder):
    before = list(listed(folder).pictures)
    change(folder)
    found = listed(folder)
    assert list(found.pictures) != before
    assert [(name, path) for name, path in walked(folder) if name.lower().endswith((".jpg", ".png"))] == list(
        zip(found.pictures, found.paths, strict=True))


def test_what_leads_elsewhere_or_has_just_changed_is_not_kept(folder, tmp_path, monkeypatch):
    (tmp_path / "other").mkdir()
    (folder / "link").symlink_to(tmp_path / "other")
    listed(folder)
    (tmp_path / "other" / "new.jpg").touch()
    assert "link/new.jpg" in list(listed(folder).pictures)
    (folder / "link").unlink()
    monkeypatch.setattr(listing_index, "SETTLED", 10**12)
    listed(folder)
    kept_from(monkeypatch)
    with pytest.raises(AssertionError):
        listed(folder)


def test_a_damaged_index_is_made_anew(folder):
    before = list(listed(folder).pictures)
    for file in cache.folder().iterdir():
        file.write_bytes(file.read_bytes()[:50])
    assert list(listed(folder).pictures) == before
