"""A MAE so small that it compiles in seconds, and random batches for it; for all tests."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from mae_jax import methods
from mae_jax.config import default, resolved, validate
from mae_jax.data import DataInfo, Inputs, OpenedData
from mae_jax.data.masking import rolled
from mae_jax.methods.base import Batch, Extras, Method, Params
from mae_jax.param_tree import path
from mae_jax.state import TrainState
from mae_jax.training import optim
from mae_jax.training.train_step import TrainStep, build, build_train_step
from tests.helpers.scenes import scenes

EXAMPLES = 64  # of the training split that durations in epochs are counted with
TINY_DATA = DataInfo(EXAMPLES, ("a", "b", "c"))


OWN = {  # method → its fields
    "beit": {"masked": 6, "vocabulary": 24},
    "detection": {
        "window": 3, "global_blocks": (1,), "map_blocks": (0, 1), "scales": (2.0, 1.0), "channels": 8,
        "anchor_sizes": (4.0, 8.0, 12.0), "anchor_samples": 32, "candidates": (24, 24), "proposals": (24, 24),
        "regions": 16, "box_convs": 1, "box_width": 16, "mask_convs": 1, "samples": 2, "max_detections": 6},
    "dino": {"out_dim": 32, "head_width": 24, "bottleneck": 8, "local_views": 3, "local_size": (8, 8)},
    "mae": {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2},
    "mixedae": {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2, "projection": 8},
    "moce": {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2, "experts": 4, "clusters": "unread"},
    "segment": {"classes": 3},
    "splitmask": {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2, "vocabulary": 24},
    "supervised": {"classes": 3},
}


def tiny_config(fields: dict[str, Any] | None = None, method: str = "mae") -> ConfigDict:
    """Returns a valid config for CPUs of 16 patches (MAE: 4 visible) or of 3 classes, with dotted `fields` changed."""
    config = default(method)
    config.batch_size = 8
    config.data.update(image_size=(16, 16), threads=2, max_objects=4)
    config.model.update(width=32, depth=2, heads=2, patch=(4, 4), dtype="float32")  # no 'auto' is left to resolve
    config.mesh.zero = "off"
    config.method.update(OWN[method])
    config.optim.update(lr=0.05, warmup="2 steps")
    config.train.duration = "6 steps"
    config.checkpoint.every = config.eval.every = "3 steps"
    config.log.update(every="1 steps", tensorboard=False)
    config.eval.max_examples = 32
    config.update_from_flattened_dict(fields or {})
    validate(config)
    return config


def tiny_segment(fields: dict[str, Any] | None = None) -> ConfigDict:
    """Returns a valid config of a dense probe with 3 classes on 16 patches, with dotted `fields` changed."""
    return tiny_config(fields, "segment")


def tiny_supervised(fields: dict[str, Any] | None = None) -> ConfigDict:
    """Returns a valid config of a classifier of 3 classes on the mean of 16 patches, with dotted `fields` changed."""
    return tiny_config({"model.pool": "mean"} | (fields or {}), "supervised")


def tiny_segment_batch(config: ConfigDict, seed: int = 0) -> Batch:
    """Returns a batch in raster order whose masks have the values 0 to 5, and 255, at random."""
    batch, rng = raster_batch(config, seed), np.random.default_rng(seed)
    pixels = batch["patches"].shape[2] // 3
    batch["pixel_label"] = rng.choice([0, 1, 2, 3, 4, 5, 255], size=(*batch["order"].shape, pixels)).astype(np.uint8)
    return batch


def raster_batch(config: ConfigDict, seed: int = 0) -> Batch:
    """Returns a `tiny_batch` in raster order, as methods that hide nothing have it."""
    batch = tiny_batch(config, seed, train=False)
    batch["order"][:] = np.arange(batch["order"].shape[1])
    return batch


def tiny_batch(config: ConfigDict, seed: int = 0, train: bool = True) -> Batch:
    """Returns a batch of smooth random images (neighboring pixels alike) with random orders, all valid.

    Those of training have the views of the method, where it has its own.
    """
    rng, method = np.random.default_rng(seed), tiny_method(config)
    images, shown = config.batch_size, {}
    for name, struct in (method.batch_spec() if train else method.eval_spec()).items():
        if name.endswith("patches"):
            pixels = rng.normal(size=struct.shape).cumsum(-1) * 8 + 128
            shown[name] = pixels.clip(0, 255).astype(np.uint8)
        elif name.endswith("order"):
            raster = np.broadcast_to(np.arange(struct.shape[-1], dtype=np.int32), struct.shape)
            shown[name] = rng.permuted(raster, axis=-1)
            group = method.patch_order().group
            for row in range(images * (group > 1)):
                shown[name][row] = rolled(shown[name][row // group * group], row % group, group)
    if method.task == "detection":
        shown |= scenes(config, seed)
    return {
        **shown,
        "label": rng.integers(3, size=images).astype(np.int32),
        "id": np.arange(images, dtype=np.int32),
        "valid": np.ones(images, np.float32),
        "replaced": np.zeros(images, np.int32),
        **({"cluster": rng.integers(3, size=images).astype(np.int32)} if config.method.name == "moce" else {}),
    }


def tiny_method(config: ConfigDict, examples: int = EXAMPLES) -> Method:
    """Returns the config's method on these devices, for data of so many examples and three classes."""
    return methods.build(resolved(config), DataInfo(examples, ("a", "b", "c")))


def tiny_program(config: ConfigDict, devices: list[jax.Device] | None = None) -> TrainStep:
    """Returns the config's step on all devices or those given, for the same data."""
    return build(config, TINY_DATA, devices)


def open_inputs(config: ConfigDict, method: Method | None = None, rows: np.ndarray | None = None) -> Inputs:
    """Returns the config's data as its method, or this one, wants them."""
    method = method or tiny_method(config)
    opened = OpenedData(config, method.data_needs(config))
    return opened.batches(method.eval_spec(), method.patch_order(), method.views(), rows)


def tinted(batch: Batch) -> Batch:
    """Returns the batch with each image in the color of its label, so that classes are told apart by wide margins."""
    strong = np.full((3, 3), 40) + 160 * np.eye(3, dtype=int)

    def shown(patches: np.ndarray) -> np.ndarray:
        pixels = patches.reshape(len(patches), -1, 3)
        return (pixels // 8 + strong[batch["label"]][:, None]).astype(np.uint8).reshape(patches.shape)

    return {name: shown(field) if name.endswith("patches") else field for name, field in batch.items()}


def tiny_loss(method: Method) -> Any:
    """Returns the method's jitted loss: one program, where op by op each operation is compiled on its own."""
    return jax.jit(method.loss, static_argnums=5)


def tiny_params(config: ConfigDict, seed: int = 0) -> Params:
    """Returns random parameters away from their symmetric start; drawn by NumPy, which needs no compilation."""
    method, rng = tiny_method(config), np.random.default_rng(seed)

    def draw(keys: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        scale = leaf.shape[0] ** -0.5 if len(leaf.shape) == 2 else 0.1
        values = rng.normal(size=leaf.shape) * scale + path(keys).endswith("scale")
        return values.astype(leaf.dtype)

    shapes, _ = jax.eval_shape(method.init, jax.random.key(0), method.batch_spec())
    return jax.tree_util.tree_map_with_path(draw, shapes)


def tiny_optimizer(config: ConfigDict, method: Method) -> tuple[optax.GradientTransformation, optim.Schedule]:
    return optim.make_optimizer(method), optim.make_schedule(method)


def tiny_state(config: ConfigDict, extras: Extras | None = None, method: Method | None = None) -> TrainState:
    """Returns the state before the first step, with `tiny_params`."""
    params = jax.tree.map(jnp.asarray, tiny_params(config))
    ema = jax.tree.map(jnp.copy, params) if config.optim.ema else {}
    opt = tiny_optimizer(config, method or tiny_method(config))[0].init(params)
    return TrainState(jnp.zeros((), jnp.int32), params, opt, extras or {}, ema, jnp.zeros((), jnp.int32))


def tiny_step(config: ConfigDict, method: Method | None = None) -> Any:
    """Returns the jitted train step, which donates its state."""
    method = method or tiny_method(config)
    step = build_train_step(method, *tiny_optimizer(config, method))
    return jax.jit(step, donate_argnums=0)
