"""mIoU at the images' own size: windows, how they are put together, and that none is lost, against NumPy and scipy."""

import jax
import numpy as np
import pytest
import scipy.ndimage
import scipy.special
from PIL import Image
from sklearn import metrics

from mae_jax.config import validate
from mae_jax.data.reading import Reading
from mae_jax.data.sources.base import Example, Source
from mae_jax.errors import UserError
from mae_jax.evals import own_size, windows
from mae_jax.ops.resampling import interpolation
from mae_jax.runtime.sharding import make_mesh
from tests.helpers.tiny import tiny_config, tiny_method, tiny_params, tiny_segment

SIZES = ((23, 40), (16, 16), (40, 21), (9, 50), (31, 33), (23, 40), (17, 80))


def picture(number: int) -> Example:
    rng = np.random.default_rng(number)
    height, width = SIZES[number]
    small = rng.integers(256, size=(4, 5, 3)).astype(np.uint8)
    pixels = np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))
    mask = rng.choice([0, 1, 2, 255], size=SIZES[number]).astype(np.uint8)
    if number == 4:
        return Example(np.zeros((2, 2, 3), np.uint8), mask=mask)  # of another size: cannot be used
    return Example(pixels, mask=mask)


def source() -> Source:
    return Source(len(SIZES), picture, str, fields=("pixel_label",))


def method_of(test: str, **more):
    config = tiny_segment({"method.test": test, "method.stride": (10, 12), "batch_size": 4, "data.threads": 2} | more)
    return tiny_method(config), tiny_params(config)


def bilinear(x: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resizes [h, w, C] as scipy does it."""
    centers = np.meshgrid(*((np.arange(n) + 0.5) * have / n - 0.5 for n, have in zip(size, x.shape, strict=False)),
                          indexing="ij")
    return np.stack([scipy.ndimage.map_coordinates(x[..., c], centers, order=1, mode="nearest")
                     for c in range(x.shape[-1])], -1)


def reference(method, params, example: Example, scale: float = 1.0) -> np.ndarray:
    """Returns logits [height, width, C] of an image, window by window on a canvas, as mmsegmentation has them."""
    height, width = example.image.shape[:2]
    factor = scale * min(16 / min(height, width), 64 / max(height, width))
    resized = int(height * factor + 0.5), int(width * factor + 0.5)
    image = Image.fromarray(example.image).resize(resized[::-1], Image.Resampling.BICUBIC)
    total, count = np.zeros((*resized, 3)), np.zeros((*resized, 1))
    tops, lefts = ([min(n * step, max(side - 16, 0)) for n in range(max(side - 16 + step - 1, 0) // step + 1)]
                   for side, step in zip(resized, (10, 12), strict=True))
    for top in tops:
        for left in lefts:
            part = np.full((16, 16, 3), (124, 116, 104), np.uint8)
            seen = np.asarray(image)[top:top + 16, left:left + 16]
            part[:len(seen), :seen.shape[1]] = seen
            batch = {"patches": method.grid.patchify(part)[None], "order": np.arange(16, dtype=np.int32)[None]}
            logits = bilinear(np.asarray(method.cell_logits(params, {}, batch))[0], (16, 16))
            total[top:top + 16, left:left + 16] += logits[:len(seen), :seen.shape[1]]
            count[top:top + 16, left:left + 16] += 1
    return bilinear(total / count, (height, width))


def run(method, params, numbers, mesh=None):
    """Returns what is said of the images, of those that can be read."""
    mesh = mesh or make_mesh(method.config)
    with jax.set_mesh(mesh):
        found = list(own_size.predictions(method, params, {}, mesh, source(), np.array(numbers),
                                          Reading.of(method.config.data)))
    assert [each.number for each in found] == list(numbers)
    assert [each.number for each in found if each.error] == [number for number in numbers if number == 4]
    return {each.number: (each.mask, each.classes) for each in found if not each.error}


def test_predictions_of_sliding_windows_are_those_of_a_canvas_and_every_image_counts_once():
    method, params = method_of("slide")
    found = run(method, params, range(len(SIZES)))
    assert sorted(found) == [0, 1, 2, 3, 5, 6]
    for number in (0, 2, 3, 6):
        logits = reference(method, params, picture(number))
        top = np.sort(logits, -1)
        clear = top[..., -1] - top[..., -2] > 1e-4
        assert clear.mean() > 0.95
        np.testing.assert_array_equal(found[number][1][clear], logits.argmax(-1)[clear])
        np.testing.assert_array_equal(found[number][0], picture(number).mask)


def test_probabilities_are_averaged_over_scales_and_mirrored_images():
    method, params = method_of("slide", **{"eval.scales": (0.75, 1.5), "eval.flip": True})
    views = own_size.views_of(method, SIZES[0])
    assert [(view.layout.rows.resized, view.flipped) for view in views] == [(12, False), (12, True), (24, False),
                                                                            (24, True)]
    example = picture(0)
    mirrored = Example(np.ascontiguousarray(example.image[:, ::-1]))
    each = [reference(method, params, example, scale) for scale in (0.75, 1.5)]
    each += [reference(method, params, mirrored, scale)[:, ::-1] for scale in (0.75, 1.5)]
    shares = np.mean([scipy.special.softmax(logits, -1) for logits in each], 0)
    top = np.sort(shares, -1)
    clear = top[..., -1] - top[..., -2] > 1e-5
    assert clear.mean() > 0.95
    found = run(method, params, [0])[0][1]
    np.testing.assert_array_equal(found[clear], shares.argmax(-1)[clear])
    assert any((found != logits.argmax(-1)).any() for logits in each)  # not what one of them says
    assert own_size.OwnSize().metric_names(method, None)[0] == "multi_scale/miou"  # another protocol
    assert own_size.OwnSize().metric_names(method_of("slide")[0], None)[0] == "own_size/miou"
    large = [own_size.views_of(method_of("whole", **{"eval.scales": (2.0,)})[0], (17, 80))[0].layout.shape]
    assert large == [(28, 128)]


def test_scales_and_mirroring_are_refused_where_nothing_is_seen_at_its_own_size():
    for fields in ({"eval.scales": (0.5, 1.0)}, {"eval.flip": True}):
        with pytest.raises(UserError, match=r"method\.test=slide"):
            validate(tiny_segment({"method.test": "none"} | fields))
        with pytest.raises(UserError, match=r"method\.test=slide"):
            validate(tiny_config(fields))
    with pytest.raises(UserError, match=r"eval\.scales=\(0\.5, 0\.0\)"):
        validate(tiny_segment({"method.test": "slide", "eval.scales": (0.5, 0.0)}))


def test_figures_are_scikit_learns_over_all_pixels_that_have_a_class():
    rng = np.random.default_rng(0)
    truth, predicted = rng.choice([0, 1, 2, 255], size=(2, 30, 20)), rng.integers(4, size=(2, 30, 20))
    counts = sum(own_size.confusion(t.astype(np.uint8), p.astype(np.uint8), 5) for t, p in
                 zip(truth, predicted, strict=True))
    found = own_size.figures(counts)
    keep = truth < 255
    truth, predicted = truth[keep], predicted[keep]
    each = metrics.jaccard_score(truth, predicted, labels=[0, 1, 2, 3], average=None, zero_division=0)
    recalls = metrics.recall_score(truth, predicted, labels=[0, 1, 2], average=None)
    assert found == {"miou": pytest.approx(each.mean()), "mean_accuracy": pytest.approx(recalls.mean()),
                     "pixel_accuracy": pytest.approx(metrics.accuracy_score(truth, predicted))}
    assert np.isnan(list(own_size.figures(np.zeros((3, 3), np.int64)).values())).all()


@pytest.mark.parametrize("test", ["slide", pytest.param("whole", marks=pytest.mark.slow)])
def test_predictions_do_not_depend_on_devices_or_on_the_size_of_batches(test):
    method, params = method_of(test)
    one = run(method, params, range(len(SIZES)), make_mesh(method.config, jax.devices()[:1]))
    other, _ = method_of(test, batch_size=8)
    eight = run(other, params, range(len(SIZES)), make_mesh(other.config, jax.devices()[:8]))
    assert one.keys() == eight.keys()
    for number, (_, predicted) in one.items():
        assert predicted.shape == SIZES[number]
        assert (predicted == eight[number][1]).mean() > 0.999


def test_whole_images_have_the_ratio_of_their_own_sides_to_the_nearest_patch():
    layout = windows.whole((400, 680), (16, 16), (4, 4), 4)
    assert layout.shape == (16, 28)  # of 16 x 27 pixels
    method, params = method_of("whole")
    found = run(method, params, [0])[0][1]
    image = np.asarray(Image.fromarray(picture(0).image).resize((28, 16), Image.Resampling.BICUBIC))
    patches = image.reshape(4, 4, 7, 4, 3).swapaxes(1, 2).reshape(1, 28, 48)
    cells = method.cell_logits(params, {}, {"patches": patches, "order": np.arange(28, dtype=np.int32)[None]}, (4, 7))
    logits = bilinear(bilinear(np.asarray(cells)[0], (16, 28)), (23, 40))
    assert (logits.argmax(-1) == found).mean() > 0.99


@pytest.mark.parametrize("pixels", [16, 17, 40, 64])
def test_each_pixel_is_the_mean_of_the_windows_that_cover_it(pixels):
    axis = windows.sliding((pixels, 16), (16, 16), (10, 10)).rows
    assert axis.starts[-1] + 16 == axis.resized
    logits = np.ones((len(axis.starts), 4, 1), np.float32)
    total = sum(matrix @ cells for matrix, cells in zip(axis.matrices(4), logits, strict=True))
    np.testing.assert_allclose(total, 1, rtol=1e-5)
    np.testing.assert_allclose(sum(m @ np.full((4, 1), n) for n, m in enumerate(axis.matrices(4)))[0], 0, atol=1e-6)
    assert interpolation(4, 16).shape == (16, 4)


def test_data_without_numbers_are_refused_in_one_line():
    class Inputs:
        parts: dict = {}

    with pytest.raises(UserError, match=r"^method.test='slide'[^\n]+$"):
        own_size.OwnSize().applies(method_of("slide")[0], Inputs())
    assert not own_size.OwnSize().applies(method_of("none")[0], Inputs())


def test_processes_share_the_images_and_each_counts_once(monkeypatch):
    config = tiny_segment({"eval.max_examples": 10})
    shares = []
    for process in range(3):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        monkeypatch.setattr(jax, "process_count", lambda: 3)
        shares.append(own_size.own_numbers(config, 40))
    assert sorted(len(share) for share in shares) == [3, 3, 4]
    together = np.sort(np.concatenate(shares))
    assert len(np.unique(together)) == 10
    monkeypatch.undo()
    np.testing.assert_array_equal(together, own_size.own_numbers(config, 40))


def test_a_process_without_windows_runs_the_batches_of_the_others(monkeypatch):
    """As though another process had two more batches, one of them of a shape of its own."""
    method, params = method_of("whole")
    shapes, asked = [[16, 16], [16, 32]], []

    def first_true(value):
        if isinstance(value, list):
            asked.append(value or shapes.pop(0))
            return asked[-1]
        return value or bool(shapes)

    monkeypatch.setattr(own_size.peers, "first_true", first_true)
    assert sorted(run(method, params, [0, 1])) == [0, 1]
    assert asked[-2:] == [[16, 16], [16, 32]]
    assert not shapes
