"""Images that EXIF turns: new runs see them as people do, stored ones as their pixels are stored."""

import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from mae_jax import config as configs
from mae_jax import recipe_version
from mae_jax.data.decode import ORIENTATION, Box, StoredImage
from mae_jax.data.image_bounds import BadImage
from mae_jax.data.reading import Reading
from mae_jax.data.sources.base import Example
from mae_jax.data.transforms.crop import mask_image
from mae_jax.data.writers import shrink
from mae_jax.methods import with_data
from tests.helpers.tiny import tiny_config

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)
NEW, OLD = {}, {"recipe_version": 3}


def file(orientation: int | None, kind: str = "PNG", pixels: np.ndarray = PIXELS) -> bytes:
    buffer, more = io.BytesIO(), {}
    if orientation is not None:
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        more = {"exif": exif}
    Image.fromarray(pixels).save(buffer, kind, **({"quality": 95} if kind == "JPEG" else {}), **more)
    return buffer.getvalue()


@pytest.mark.parametrize("orientation", [None, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 700])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_an_image_is_turned_as_pillow_turns_it_and_left_alone_where_nobody_asks(kind, orientation):
    data = file(orientation, kind)
    opened = Image.open(io.BytesIO(data))
    wanted = np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))
    upright, stored = StoredImage(data, reading=Reading(upright=True)), StoredImage(data)
    assert (upright.height, upright.width) == wanted.shape[:2]
    np.testing.assert_array_equal(np.asarray(upright.whole()), wanted)
    assert (stored.height, stored.width) == PIXELS.shape[:2]
    np.testing.assert_array_equal(np.asarray(stored.whole()), np.asarray(opened.convert("RGB")))
    turned = orientation in range(2, 9)
    assert ("turned by EXIF" in upright.converted()) == turned
    assert ("turned by EXIF (ignored)" in stored.converted()) == turned


@pytest.mark.parametrize("fast", [False, True])
def test_a_part_is_one_of_the_upright_image(fast):
    data = file(6, "JPEG")
    whole = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    part = StoredImage(data, fast=fast, reading=Reading(upright=True)).view(Box(3, 2, 8, 6), (8, 6))
    np.testing.assert_array_equal(np.asarray(part), whole[3:11, 2:8])


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data:UserWarning")  # as `decode` has it, which pytest undoes
@pytest.mark.parametrize("exif", [b"", b"Exif\x00\x00", b"Exif\x00\x00MM\x00*" + b"\xff" * 40])
def test_exif_that_cannot_be_read_turns_nothing(exif):
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, "JPEG", exif=exif)
    assert (StoredImage(buffer.getvalue(), reading=Reading(upright=True)).whole().size) == (20, 12)


MASK = (np.arange(240) % 7).astype(np.uint8).reshape(12, 20)


def test_a_mask_of_the_stored_shape_is_turned_with_the_image_and_an_upright_one_is_not():
    stored = StoredImage(file(6), reading=Reading(upright=True))
    turned = np.asarray(Image.fromarray(MASK).transpose(Image.Transpose.ROTATE_270))
    np.testing.assert_array_equal(np.asarray(mask_image(stored, MASK)), turned)
    np.testing.assert_array_equal(np.asarray(mask_image(stored, turned)), turned)
    np.testing.assert_array_equal(np.asarray(mask_image(StoredImage(file(6)), MASK)), MASK)
    with pytest.raises(BadImage, match="shape"):
        mask_image(stored, MASK[:5])


@pytest.mark.parametrize(("orientation", "pixels"), [(3, PIXELS), (6, PIXELS[:, :12])])
def test_a_mask_that_may_be_turned_or_not_makes_a_bad_image(orientation, pixels):
    stored = StoredImage(file(orientation, pixels=np.ascontiguousarray(pixels)), reading=Reading(upright=True))
    with pytest.raises(BadImage, match=r"data\.exif=ignore"):
        mask_image(stored, MASK[:, :pixels.shape[1]])


@pytest.mark.parametrize(("orientation", "upright", "size"), [(6, True, (12, 20)), (6, False, (20, 12))])
def test_what_is_written_anew_is_upright_and_has_no_exif(orientation, upright, size):
    written = Image.open(io.BytesIO(shrink(Example(file(orientation)), 100, Reading(upright)).image))
    assert written.size == size
    assert not written.getexif()


@pytest.mark.parametrize(("fields", "turned"), [
    (NEW, True), (OLD, False), ({**OLD, "data.exif": "apply"}, True), ({**NEW, "data.exif": "ignore"}, False)])
def test_a_new_run_sees_images_as_people_do_and_a_stored_one_goes_on_as_it_began(tmp_path, fields, turned):
    for number in range(8):
        (tmp_path / f"{number}.png").write_bytes(file(3))
    given = {"data.source": "folder", "data.path": str(tmp_path), "data.eval_split": "", "data.augment": "none",
             "data.image_size": (12, 20), "model.patch": (4, 4), "eval.crop_ratio": (1.0,), **fields}
    config = tiny_config(given)
    assert recipe_version.has(config, "exif_orientation") == (fields.get("recipe_version") is None)
    method, data = with_data(configs.for_platform(config, "cpu"))
    batch = next(data.batches(method.eval_spec(), method.patch_order(), method.views()).train(0))
    wanted = PIXELS[::-1, ::-1] if turned else PIXELS
    patches = wanted.reshape(3, 4, 5, 4, 3).swapaxes(1, 2).reshape(15, 48)
    np.testing.assert_array_equal(batch["patches"][0], patches[batch["order"][0]])
