"""The map: places, neighbors, and thumbnails that are those of their images."""

import base64
import io
import shutil

import numpy as np
import pytest
from etils import epath
from PIL import Image

from mae_jax.commands.report import map_data, projection, thumbnails
from mae_jax.data.sources import folder_listing
from mae_jax.errors import UserError
from mae_jax.inference import embedding_files
from tests.helpers.stored import store_features, store_images


@pytest.fixture
def made(tmp_path):
    store_images(tmp_path / "images", count=6)
    return tmp_path, store_features(tmp_path / "f.parquet", tmp_path / "images")


def numbers(text, dtype):
    return np.frombuffer(base64.b64decode(text), dtype)


def tiles(data):
    """Returns the thumbnails that a page would draw, [n, side, side, 3]."""
    side, columns, found = data["side"], data["columns"], []
    for uri in data["sheets"]:
        sheet = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).convert("RGB"))
        rows = len(sheet) // side
        found += list(sheet.reshape(rows, side, columns, side, 3).swapaxes(1, 2).reshape(-1, side, side, 3))
    return np.stack(found[:len(data["files"])])


def test_each_image_has_its_own_thumbnail_label_and_place(made):
    folder, features = made
    drawn = map_data.made(epath.Path(features), 100, 18)
    data = drawn.data
    assert data["labels"] == ["a", "b", "c"]
    assert numbers(data["label"], "<u4").tolist() == [k // 6 for k in range(18)]
    for name, tile in zip(data["files"], tiles(data), strict=True):
        with Image.open(folder / "images" / name) as opened:
            side = min(opened.size)
            left, top = ((length - side) // 2 for length in opened.size)
            wanted = opened.crop((left, top, left + side, top + side)).resize((1, 1), Image.Resampling.BOX)
        assert np.abs(tile.mean((0, 1)) - np.asarray(wanted)[0, 0]).max() < 8, name
    for each in data["projections"]:
        places = numbers(each["places"], "<f4").reshape(-1, 2)
        assert len(places) == 18
        assert np.isfinite(places).all()
    assert not [note for note in drawn.notes if "gray" in note]


def test_of_more_images_the_rows_are_those_of_their_thumbnails(made):
    data = map_data.made(epath.Path(made[1]), 7, 0).data
    assert data["files"] == [f"{'abc'[k // 6]}/{k % 6:02d}.png" for k in (0, 2, 5, 7, 10, 12, 15)]
    strongest = tiles(data).mean((1, 2)).argmax(1)
    assert strongest.tolist() == [k // 6 for k in (0, 2, 5, 7, 10, 12, 15)]  # as store_images colors them


def test_an_image_that_is_gone_is_gray_and_the_others_are_found_by_name(made):
    folder, features = made
    (folder / "images" / "b" / "03.png").unlink()
    (folder / "images" / "c" / "00.png").write_bytes(b"no image")
    Image.new("RGB", (9, 9)).save(folder / "images" / "a" / "000.png")  # a newer one, before all others
    folder_listing.files.cache_clear()  # which a process lists once
    drawn = map_data.made(epath.Path(features), 100, 0)
    shown = tiles(drawn.data)
    gray = [name for name, tile in zip(drawn.data["files"], shown, strict=True)
            if np.ptp(tile[8:-8, 8:-8]) < 8]
    assert gray == ["b/03.png", "c/00.png"]
    assert shown.mean((1, 2)).argmax(1)[[0, 8, 17]].tolist() == [0, 1, 2]
    assert "2 of these images could not be read again, and are gray." in drawn.notes
    assert any("those of the same name" in note for note in drawn.notes)


def test_where_all_images_are_gone_the_map_says_so(made):
    folder, features = made
    shutil.rmtree(folder / "images")
    drawn = map_data.made(epath.Path(features), 100, 0)
    assert (tiles(drawn.data) == tiles(drawn.data)[0, 0, 0, 0]).all()
    assert any("The images are not here: no image matches" in note for note in drawn.notes)


@pytest.mark.parametrize("count", [2, 5, 700])
def test_neighbors_are_those_of_the_highest_cosines(count):
    features = np.random.default_rng(0).normal(size=(count, 6))
    units = features / np.linalg.norm(features, axis=1, keepdims=True)
    near = units @ units.T
    np.fill_diagonal(near, -2)
    found, cosines = projection.neighbors(features)
    k = min(projection.NEIGHBORS, count - 1)
    assert found.shape == cosines.shape == (count, k)
    np.testing.assert_allclose(cosines, -np.sort(-near, 1)[:, :k], atol=1e-5)
    np.testing.assert_allclose(np.take_along_axis(near, found.astype(int), 1), cosines, atol=1e-5)


@pytest.mark.parametrize("features", [np.ones((1, 4)), np.ones((15, 4)), np.zeros((15, 4)), np.ones((15, 1))])
def test_images_that_are_all_alike_have_places(features):
    assert np.isfinite(projection.pca(features)[0]).all()
    assert np.isfinite(projection.neighbors(features)[1]).all()
    if len(features) >= projection.LEAST:
        assert np.isfinite(projection.tsne(features)).all()


def test_features_that_are_not_finite_are_refused():
    with pytest.raises(UserError, match="of 1 image are not finite"):
        projection.check(np.array([[1.0, 2], [3, np.nan]]))


@pytest.mark.parametrize("ending", ["parquet", "npz"])
def test_of_maps_of_patches_the_mean_is_taken(tmp_path, ending):
    store_images(tmp_path / "images", count=3)
    plain = embedding_files.chosen(epath.Path(store_features(tmp_path / "a.npz", tmp_path / "images")), 4)
    patches = store_features(tmp_path / f"b.{ending}", tmp_path / "images", shape=(2, 2))
    _, count, rows = embedding_files.chosen(epath.Path(patches), 4)
    assert count == 9
    np.testing.assert_allclose(rows.features, plain[2].features, atol=1e-6)
    assert rows.id.tolist() == [0, 2, 4, 6]
    assert rows.file.tolist() == plain[2].file.tolist()


def test_a_thumbnail_of_noise_has_four_kilobytes():
    """No image has more; docs/report.md says so."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 64, 3)).astype(np.uint8)
    assert sum(map(len, thumbnails.sheets(noise))) / 64 < 4200
