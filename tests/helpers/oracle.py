"""A detector that knows the truth, and moves it; and data in COCO's format that it is judged on."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from mae_jax import config as configs
from mae_jax import data
from mae_jax.evals.evaluator import Evaluator
from mae_jax.methods.base import Method
from mae_jax.ops.detection.instance_masks import unpack
from mae_jax.runtime import sharding
from mae_jax.state import TrainState
from tests.helpers import coco_data
from tests.helpers.coco_data import SIZE, square
from tests.helpers.tiny import TINY_DATA

MOST, IMAGES = 5, 6


class Oracle(Method):
    """Detects what is there, moved to the right by `shift` of its width."""

    task = "detection"

    def eval_spec(self):
        spec = super().eval_spec()
        del spec["label"]
        shapes = {"box": ((MOST, 4), jnp.float32), "box_class": ((MOST,), jnp.int32),
                  "box_valid": ((MOST,), jnp.float32), "box_mask": ((MOST, 1568), jnp.uint8),
                  "size": ((2,), jnp.int32), "original_size": ((2,), jnp.int32)}
        return spec | {name: jax.ShapeDtypeStruct((self.config.batch_size, *shape), dtype)
                       for name, (shape, dtype) in shapes.items()}

    def init(self, key, batch):
        return {"shift": jnp.float32(0)}, {}

    def loss(self, params, extras, batch, key, step, train):
        return params["shift"], ({"loss": (params["shift"] * batch["valid"].sum(), batch["valid"].sum())}, extras)

    def detections(self, params, extras, batch):
        width = batch["box"][..., 2] - batch["box"][..., 0]
        box = batch["box"] + (params["shift"] * width)[..., None] * jnp.array([1.0, 0, 1, 0])
        cells = unpack(batch["box_mask"]).astype(jnp.float32)
        mask = cells.reshape(*cells.shape[:2], 28, 4, 28, 4).mean((3, 5))
        score = jnp.where(batch["box_valid"] > 0, jnp.linspace(0.9, 0.5, MOST), 0.0)
        return {"box": box, "score": score, "box_class": batch["box_class"], "detected": batch["box_valid"],
                "mask": mask, "crowded": jnp.full(len(box), 2.0)}


def write(root: Path) -> None:
    """Writes COCO's folders with six images to evaluate, of which the last has no object and the third a crowd."""
    coco_data.coco(root)
    boxes = []
    for k in range(IMAGES - 1):  # one image without any object is judged too
        boxes += [square(2 * k, k + 70, 4 + k, 6, 14, 90), square(2 * k + 1, k + 70, 30.5, 9.5, 20, 1)]
    boxes.append(square(99, 72, 0, 0, 30, 1, iscrowd=1, segmentation={"size": list(SIZE), "counts": [0, 1200, 1200]}))
    for k in range(IMAGES):
        coco_data.image(root / "val2017", f"{k}.png", k)
    coco_data.write(root / "annotations" / "instances_val2017.json", {k + 70: f"{k}.png" for k in range(IMAGES)},
                    boxes)


def made(root: Path, shift: float, batch: int = 4, devices: int = 1) -> tuple[Evaluator, TrainState]:
    """Returns the evaluator of the images to evaluate, and a state that moves what is there by `shift`."""
    config = configs.default()
    config.batch_size = batch
    config.data.update(source="coco", path=str(root), eval_split="val", image_size=(90, 96), augment="none",
                       max_objects=MOST, threads=1)
    config.model.patch = (6, 8)
    config.eval.crop_ratio = (1.0,)
    method = Oracle(config, TINY_DATA)
    mesh = sharding.make_mesh(configs.resolved(config), jax.devices()[:devices])
    rows = sharding.local_rows(mesh, batch)
    inputs = data.OpenedData(config).batches(method.eval_spec(), method.patch_order(), rows=rows)
    params = jax.device_put({"shift": np.float32(shift)}, sharding.replicated(mesh))
    return Evaluator(method, inputs, mesh), TrainState(np.zeros((), np.int32), params, (), {}, {}, np.zeros(()))
