"""Made-up objects and detections, with crowds, ties, objects of all sizes and classes without any."""

import numpy as np

from mae_jax.data.objects import Region
from mae_jax.evals.average_precision import Found, Mask

SIZE = (150, 180)


def scenes(images: int = 30, classes: int = 4, seed: int = 0) -> tuple[list[Found], list[Found]]:
    """Returns what is in images, and what is found there: about half of it right."""
    rng = np.random.default_rng(seed)
    truth, found = [], []
    for _ in range(images):
        count = int(rng.integers(0, 7))
        box, label = boxes(rng, count), rng.integers(0, classes, count)
        masks = tuple(ellipse(each) for each in box)
        area = np.array([mask.whole().sum() for mask in masks], np.float64)
        truth.append(Found(box, label, masks, None, area, rng.random(count) < 0.15))
        near = box.repeat(3, 0) + rng.normal(0, 1, (3 * count, 4)) * rng.choice([1, 4, 12], (3 * count, 1))
        wide = np.concatenate([near, boxes(rng, 4)])
        wide = np.clip(np.concatenate([wide[:, :2], np.maximum(wide[:, 2:], wide[:, :2] + 1)], 1), 0, SIZE[::-1] * 2)
        wide = wide[(wide[:, 2:] > wide[:, :2] + 0.5).all(1)]
        guess = np.concatenate([label.repeat(3), rng.integers(0, classes, 4)])[:len(wide)]
        score = rng.integers(1, 12, len(wide)) / 12  # so that there are ties
        found.append(Found(wide, guess, tuple(ellipse(each) for each in wide), score))
    return truth, found


def boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    side = np.exp(rng.uniform(np.log(6), np.log(140), (count, 2)))
    corner = rng.random((count, 2)) * (np.array(SIZE[::-1]) - side)
    return np.concatenate([corner, corner + side], 1)


def ellipse(box: np.ndarray) -> Mask:
    """Returns the mask of the ellipse in a box; at least one pixel."""
    (x1, y1, x2, y2), (rows, columns) = box, np.indices(SIZE) + 0.5
    inside = ((columns - (x1 + x2) / 2) / (x2 - x1))**2 + ((rows - (y1 + y2) / 2) / (y2 - y1))**2 <= 0.25
    inside[min(int((y1 + y2) / 2), SIZE[0] - 1), min(int((x1 + x2) / 2), SIZE[1] - 1)] = True
    return Mask.of(Region(0, 0, inside), SIZE)


def flat(truth: list[Found], found: list[Found]) -> dict[str, np.ndarray]:
    """Returns scenes as arrays of numbers; masks are ellipses."""
    def image(part: list[Found]) -> np.ndarray:
        return np.repeat(np.arange(len(part)), [len(each.label) for each in part])

    joined = {f"truth_{name}": np.concatenate([getattr(each, name) for each in truth])
              for name in ("box", "label", "crowd")}
    joined |= {f"found_{name}": np.concatenate([getattr(each, name) for each in found])
               for name in ("box", "label", "score")}
    return joined | {"truth_image": image(truth), "found_image": image(found), "images": np.array(len(truth))}


def unflat(arrays: dict[str, np.ndarray]) -> tuple[list[Found], list[Found]]:
    """Returns the scenes of `flat`."""
    truth, found = [], []
    for i in range(int(arrays["images"])):
        ours, theirs = arrays["truth_image"] == i, arrays["found_image"] == i
        masks = tuple(ellipse(box) for box in arrays["truth_box"][ours])
        area = np.array([mask.whole().sum() for mask in masks], np.float64)
        truth.append(Found(arrays["truth_box"][ours], arrays["truth_label"][ours], masks, None, area,
                           arrays["truth_crowd"][ours]))
        box = arrays["found_box"][theirs]
        found.append(Found(box, arrays["found_label"][theirs], tuple(map(ellipse, box)), arrays["found_score"][theirs]))
    return truth, found
