"""Where images, boxes and masks come to lie: they move together, as the published augmentations say."""

import io
import itertools

import jax
import numpy as np
import pytest
from PIL import Image

from mae_jax import config as configs
from mae_jax.data.decode import ORIENTATION, BadImage
from mae_jax.data.objects import Objects, Region
from mae_jax.data.sources.base import Example
from mae_jax.data.transforms import detection
from mae_jax.data.transforms.detection import (
    AROUND,
    Placement,
    fields,
    largest_of_scales,
    lsj,
    multi_scale,
    resampled,
    visible,
    whole,
)
from mae_jax.data.transforms.example import ExampleBuilder
from mae_jax.errors import UserError
from mae_jax.ops.patches import PatchGrid
from mae_jax.rng import rng
from tests.helpers.tiny import tiny_method

MOST = 4
RED, BLUE = (230, 10, 10), (10, 10, 230)


def config(canvas=(64, 64), **changed):
    c = configs.default()
    c.batch_size = 8
    c.data.update(image_size=canvas, augment="lsj", max_objects=MOST)
    c.model.patch = (8, 8)
    c.eval.crop_ratio = (1.0,)
    c.update_from_flattened_dict(changed)
    return c


def builder(c):
    method = tiny_method(c)
    shapes = {"box": ((MOST, 4), np.float32), "box_class": ((MOST,), np.int32), "box_valid": ((MOST,), np.float32),
              "box_mask": ((MOST, 1568), np.uint8), "size": ((2,), np.int32), "original_size": ((2,), np.int32)}
    spec = method.batch_spec() | {name: jax.ShapeDtypeStruct((c.batch_size, *shape), dtype)
                                  for name, (shape, dtype) in shapes.items()}
    return ExampleBuilder(c, method.patch_order(), spec)


def objects(size, *masks, label=None, crowd=None):
    """Returns the objects of these masks, with boxes around them."""
    regions, boxes = [], []
    for mask in masks:
        left, top, right, bottom = detection.tight(mask)
        regions.append(Region(left, top, mask[top:bottom, left:right]))
        boxes.append((left, top, right, bottom))
    count = len(masks)
    return Objects(size, np.array(boxes, np.float32).reshape(-1, 4), np.arange(count, dtype=np.int32)
                   if label is None else np.array(label, np.int32), np.zeros(count, bool) if crowd is None else
                   np.array(crowd), np.array([mask.sum() for mask in masks], np.float32), tuple(regions))


def triangle(size, left, top, side):
    """Returns the mask of a triangle without its upper tip, which would be thinner than a pixel of a small view."""
    mask = np.zeros(size, bool)
    mask[top:top + side, left:left + side] = np.tri(side, k=side // 4, dtype=bool)
    return mask


def painted(size=(50, 80)):
    """An image of gray with a red and a blue triangle, and its objects."""
    masks = triangle(size, 6, 8, 30), triangle(size, 44, 20, 26)
    pixels = np.full((*size, 3), 128, np.uint8)
    for mask, color in zip(masks, (RED, BLUE), strict=True):
        pixels[mask] = color
    return Example(pixels, objects=objects(size, *masks))


def image_of(made, c):
    return PatchGrid.of(c).unpatchify(made["patches"][None], made["order"][None])[0].astype(int)


def cells(packed):
    return np.unpackbits(packed).reshape(112, 112).astype(bool)


def is_color(pixels, color):
    return np.abs(pixels - color).sum(-1) < 169  # half of the way from gray


@pytest.mark.parametrize("augment", ["lsj", "multi_scale", "none"])
def test_boxes_and_masks_lie_on_their_colors_in_every_view(augment):
    c = config(canvas=(96, 80), **{"data.augment": augment, "data.lsj_scale": (0.6, 2.0)})
    make, seen, flips = builder(c), 0, 0
    for position in range(60):
        made = make.train(painted(), position)
        pixels = image_of(made, c)
        for k in np.flatnonzero(made["box_valid"]):
            there = is_color(pixels, (RED, BLUE)[made["box_class"][k]])
            x1, y1, x2, y2 = made["box"][k]
            if min(x2 - x1, y2 - y1) < 12:  # mostly edges
                continue
            np.testing.assert_allclose(detection.tight(there), made["box"][k], atol=1.6)
            rows, columns = (np.indices(there.shape) + 0.5)
            inside = (rows > y1) & (rows < y2) & (columns > x1) & (columns < x2)
            place = ((rows - y1) / (y2 - y1) * 112).astype(int), ((columns - x1) / (x2 - x1) * 112).astype(int)
            mask = np.zeros_like(there)
            mask[inside] = cells(made["box_mask"][k])[place[0][inside], place[1][inside]]
            assert (mask & there).sum() > 0.8 * (mask | there).sum()
            seen += 1
            flips += bool(there[:, int(x1):int(x2)][:, -4:].any(0).sum() and made["box_class"][k] == 0
                          and there[int(y1) + 2].nonzero()[0].mean() > (x1 + x2) / 2)
    assert seen > 50
    assert (flips > 5) == (augment != "none")


def test_what_is_around_the_image_is_the_mean_color():
    c = config(**{"data.lsj_scale": (0.5, 0.5), "data.flip": False})
    made = builder(c).train(painted(), 0)
    assert made["size"].tolist() == [20, 32]  # 50 x 80 at half of 64
    assert made["original_size"].tolist() == [50, 80]
    pixels = image_of(made, c)
    assert (pixels[20:] == AROUND).all()
    assert (pixels[:, 32:] == AROUND).all()
    assert (pixels[:20, :32] != AROUND).any(-1).mean() > 0.9


def test_an_evaluation_sees_the_whole_image_as_large_as_may_be():
    assert whole((480, 640), (1024, 1024)).size == (768, 1024)
    assert whole((640, 427), (1024, 1024)).size == (1024, 683)  # 683.2
    assert whole((30, 1000), (64, 64)).size == (2, 64)  # 1.92
    made = builder(config()).evaluate(painted(), 0, 0, 1.0)
    assert made["size"].tolist() == [40, 64]
    np.testing.assert_allclose(made["box"][:2], np.array([[6, 8, 36, 38], [44, 20, 70, 46]]) * 0.8, atol=1e-5)


@pytest.mark.parametrize(("size", "canvas", "shown"), [
    ((480, 640), 1344, (800, 1067)), ((640, 427), 1344, (1199, 800)), ((300, 1000), 1344, (400, 1333)),
    ((480, 640), 336, (200, 267))])
def test_an_evaluation_of_multi_scale_has_the_size_of_its_protocols(size, canvas, shown):
    """MMDetection's test pipeline: img_scale=(1333, 800), keep_ratio=True; in proportion on another canvas."""
    place = largest_of_scales(size, (canvas, canvas))
    assert place.size == shown
    assert place.part == (0, 0, size[1], size[0])
    made = builder(config(**{"data.augment": "multi_scale"})).evaluate(painted(), 0, 0, 1.0)
    assert made["size"].tolist() == list(largest_of_scales((50, 80), (64, 64)).size) == [38, 61]


@pytest.mark.parametrize(("share", "u", "part", "size"), [
    # Twice as large, 1536 x 2048, of which 1024 x 1024 from (256, 512) on: both offsets by the one u.
    (2.0, 0.5, (512 / 3.2, 256 / 3.2, 1536 / 3.2, 1280 / 3.2), (1024, 1024)),
    (2.0, 0.999, (1023 / 3.2, 511 / 3.2, 2047 / 3.2, 1535 / 3.2), (1024, 1024)),
    (0.1, 0.7, (0, 0, 640, 480), (77, 102)),  # 76.8 x 102.4: rounded
    (1.0, 0.7, (0, 0, 640, 480), (768, 1024))])
def test_large_scale_jittering_is_that_of_detectron2(share, u, part, size):
    place = lsj((480, 640), (1024, 1024), (0.1, 2.0), (share - 0.1) / 1.9, u, flip=False)
    np.testing.assert_allclose(place.part, part, atol=1e-9)
    assert place.size == size
    mirrored = lsj((480, 640), (1024, 1024), (0.1, 2.0), (share - 0.1) / 1.9, u, flip=True)
    np.testing.assert_allclose(mirrored.part, (640 - part[2], part[1], 640 - part[0], part[3]), atol=1e-9)


def test_multi_scale_has_the_lengths_of_detr():
    shorts, crops = set(), 0
    for position in range(400):
        place = multi_scale((480, 640), (1344, 1344), rng(0, "augment", position), flip=False)
        left, top, right, bottom = place.part
        if (left, top, right, bottom) == (0, 0, 640, 480):
            shorts.add(min(place.size))
            assert max(place.size) <= 1333
        else:
            crops += 1
            ratio = (right - left) / (bottom - top)  # of the crop
            assert 384 / 600 - 0.01 <= ratio <= 600 / 384 + 0.01
        assert min(place.size) in range(479, 802)
    assert shorts == set(range(480, 801, 32))
    assert 150 < crops < 250
    small = [multi_scale((480, 640), (336, 336), rng(0, "augment", k), False).size for k in range(50)]
    assert max(map(max, small)) <= 334  # everything by a quarter
    assert max(map(min, small)) == 200


def test_a_flip_takes_x_from_the_width():
    place = Placement((0.0, 0.0, 40.0, 20.0), (20, 40), flip=True)
    np.testing.assert_array_equal(place.boxes(np.array([[3.0, 4, 10, 12]])), [[30, 4, 37, 12]])


def test_a_cut_object_has_the_box_of_the_mask_that_is_left():
    mask = np.zeros((40, 40), bool)
    mask[10:30, 10:14] = mask[26:30, 10:30] = True  # an L
    box, region = np.array([10.25, 10, 30, 29.5]), Region(10, 10, mask[10:30, 10:30])
    np.testing.assert_array_equal(visible(box, region, (0, 0, 40, 40)), box)
    np.testing.assert_array_equal(visible(box, region, (0, 0, 40, 20)), [10.25, 10, 14, 20])  # the foot is cut off
    np.testing.assert_array_equal(visible(box, region, (12.5, 0, 40, 40)), [12.5, 10, 30, 29.5])
    np.testing.assert_array_equal(visible(box, region, (20, 0, 40, 40)), [20, 26, 30, 29.5])
    assert visible(box, region, (20, 0, 40, 25)) is None  # of the box something is seen, of the mask nothing
    assert visible(box, region, (31, 0, 40, 40)) is None


def test_what_vanishes_and_crowds_are_left_out_and_rows_are_padded():
    size = (40, 40)
    masks = triangle(size, 2, 2, 8), triangle(size, 20, 20, 10), triangle(size, 25, 5, 10)
    found = fields(objects(size, *masks, label=[5, 6, 7], crowd=[False, False, True]),
                   Placement((15.0, 0.0, 40.0, 40.0), (40, 25)), size, MOST)
    assert found["box_valid"].tolist() == [1, 0, 0, 0]
    assert found["box_class"].tolist() == [6, 0, 0, 0]
    np.testing.assert_allclose(found["box"], [[5, 20, 15, 30], [0] * 4, [0] * 4, [0] * 4])
    assert found["box_mask"][0].any()
    assert not found["box_mask"][1:].any()
    assert {name: value.dtype.name for name, value in found.items()} == {
        "box": "float32", "box_class": "int32", "box_valid": "float32", "box_mask": "uint8", "size": "int32",
        "original_size": "int32"}


def test_more_objects_than_rows_are_told(caplog):
    detection._tell_more.cache_clear()
    size = (40, 40)
    found = fields(objects(size, *(triangle(size, k, k, 9) for k in range(MOST + 2))), whole(size, size), size, MOST)
    assert found["box_valid"].all()
    assert f"more than data.max_objects={MOST} objects" in caplog.text


def test_a_mask_is_resampled_in_the_frame_of_its_box():
    region = Region(3, 5, np.array([[1, 1, 0, 0], [1, 1, 0, 0]], bool))
    made = resampled(region, np.array([3.0, 5, 7, 7]))
    assert made[:, :56].all()
    assert not made[:, 57:].any()
    halved = resampled(region, np.array([4.0, 5, 6, 7]))  # one column of either kind
    assert halved[:, :55].all()
    assert not halved[:, 57:].any()


def test_an_example_is_a_function_of_its_position():
    make = builder(config(**{"data.color": "jitter"}))
    first, again, other = (make.train(painted(), position) for position in (5, 5, 6))
    for name in first:
        np.testing.assert_array_equal(first[name], again[name], err_msg=name)
    assert (first["size"] != other["size"]).any()


def test_stand_ins_have_no_objects():
    make = builder(config())
    for made in (make.gray(3), make.gray_train(3)):
        assert made["valid"] == 0
        assert not made["box_valid"].any()
        assert made["size"].tolist() == made["original_size"].tolist() == [64, 64]
    assert not make.evaluate(Example(painted().image), 0, 0, 1.0)["box_valid"].any()  # an image without annotations


def exif(size, orientation):
    file, tags = io.BytesIO(), Image.Exif()
    tags[ORIENTATION] = orientation
    Image.new("RGB", size[::-1], "red").save(file, "JPEG", exif=tags)
    return file.getvalue()


def test_objects_of_a_turned_image_are_of_the_image_as_it_is_seen():
    make = builder(config(**{"data.augment": "none", "data.exif": "apply"}))
    mask = triangle((60, 20), 2, 30, 12)
    made = make.train(Example(exif((20, 60), 6), objects=objects((60, 20), mask)), 0)
    assert made["size"].tolist() == [64, 21]
    for size, orientation, why in (((20, 60), 6, "of an image of 60 x 20"), ((60, 20), 3, "nothing tells")):
        other = objects(size, triangle(size, 1, 1, 9))
        with pytest.raises(BadImage, match=why):
            make.train(Example(exif(size, orientation), objects=other), 0)


@pytest.mark.parametrize(("field", "value", "why"), [
    ("data.augment", "random", "leaves boxes behind"), ("data.resize", "fast", "by 'exact' alone"),
    ("eval.crop_ratio", (0.875,), "whole images"), ("data.color", "rand", "leaves boxes behind")])
def test_what_would_not_move_boxes_is_refused(field, value, why):
    with pytest.raises(UserError, match=why):
        builder(config(**{field: value}))


def test_images_without_objects_are_not_jittered_in_scale():
    c = config()
    with pytest.raises(UserError, match="of images with objects"):
        ExampleBuilder(c, tiny_method(c).patch_order(), tiny_method(c).batch_spec())


def test_the_pipeline_goes_on_where_it_was(tmp_path):
    from mae_jax import data
    from tests.helpers import coco_data

    coco_data.coco(tmp_path)
    c = config(**{"data.source": "coco", "data.path": str(tmp_path), "data.eval_split": "val", "data.threads": 1})
    method = tiny_method(c)
    spec = method.batch_spec() | {name: jax.ShapeDtypeStruct((c.batch_size, *field.shape[1:]), field.dtype)
                                  for name, field in builder(c)._spec.items()}
    inputs = data.OpenedData(c).batches(spec, method.patch_order())
    batches, later = list(itertools.islice(inputs.train(0), 3)), next(inputs.train(2))
    for name in spec:
        np.testing.assert_array_equal(batches[2][name], later[name], err_msg=name)
    assert batches[0]["box_valid"].sum() > 4
    evaluated, = inputs.evaluate()
    assert evaluated["valid"].tolist() == [1] + [0] * 7
    np.testing.assert_allclose(evaluated["box"][0, 0], np.array([5, 5, 17, 17]) * np.tile([64 / 60, 43 / 40], 2),
                               rtol=1e-6)  # 42.7 rows are 43
    assert not evaluated["box_valid"][1:].any()
    assert inputs.classes == ("cat", "dog", "kite")


def test_a_source_without_objects_says_which_have_some():
    from mae_jax import data

    c = config(**{"data.source": "photo_crops"})
    method = tiny_method(c)
    spec = method.batch_spec() | {"box": jax.ShapeDtypeStruct((8, MOST, 4), np.float32)}
    with pytest.raises(UserError, match="coco, digit_scenes and fashion_scenes"):
        data.OpenedData(c).batches(spec, method.patch_order())
