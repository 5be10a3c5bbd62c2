"""The arms of the study, its data and sizes, and the configs of what is trained."""

from typing import Any, NamedTuple

from cells import Cell
from ml_collections import ConfigDict

from mae_jax.config import default

BATCH, SEEDS = 64, tuple(range(8))
DRAWINGS = 1231  # of clip art's training split
HELD = 10  # percent of the training split, which choose
TUNED, TUNED_BATCH = 400, 32  # steps and batch of fine-tuning
NAIVE = {"attention": "all", "contrast_weight": 0.0, "segments": False}
ARMS: dict[str, dict[str, Any] | None] = {"mae": None, "naive": NAIVE, "mixedae": {}}  # fields of MixedAE; None: MAE
LONGER = "mae, longer"
ABLATIONS: dict[str, dict[str, Any]] = {
    "oracle": {"attention": "oracle"}, "no segments": {"segments": False}, "r = 0.5": {"ratio": 0.5},
    "first half": {"blocks": "first_half"}, "last half": {"blocks": "last_half"}}


class Set(NamedTuple):
    """A data set and the encoder for it."""

    side: int
    patch: int
    width: int
    depth: int
    heads: int


class Size(NamedTuple):
    """How much is trained."""

    images: int  # shown in pre-training
    dense: int  # epochs of the dense probe
    seeds: tuple[int, ...] = SEEDS


SETS = {"clipart": Set(48, 6, 96, 4, 3), "photo_crops": Set(40, 4, 96, 6, 3)}
SIZES = {"cpu": Size(60_000, 5), "gpu": Size(100_000, 10)}


def common(config: ConfigDict, cell: Cell, clipart: str, steps: int) -> ConfigDict:
    """Sets data, encoder and duration."""
    about = SETS[cell["set"]]
    config.seed, config.batch_size = cell["seed"], BATCH
    config.data.update(source=cell["set"], path=clipart if cell["set"] == "clipart" else "", crop_scale=(0.4, 1.0),
                       image_size=(about.side, about.side))
    config.model.update(width=about.width, depth=about.depth, heads=about.heads, patch=(about.patch,) * 2, pool="mean")
    config.eval.update(crop_ratio=(1.0,), attention_query="mean", every=f"{steps} steps")
    config.checkpoint.every = f"{steps} steps"
    config.log.update(every="25 steps", tensorboard=False)
    config.train.duration, config.optim.warmup = f"{steps} steps", f"{max(1, steps // 20)} steps"
    return config


def pretraining(cell: Cell, clipart: str, size: Size) -> ConfigDict:
    """Returns the config of a pre-training; evaluations come before the first step, half-way and after the last."""
    arm = cell["arm"]
    fields = (ARMS | ABLATIONS | {LONGER: None})[arm]
    config = default("mae" if fields is None else "mixedae")
    common(config, cell, clipart, cell.get("steps") or size.images // BATCH)
    about = SETS[cell["set"]]
    config.method.update(decoder_width=about.width, decoder_depth=2, decoder_heads=about.heads, **(fields or {}))
    config.optim.lr = 6e-3
    config.eval.every = f"{(cell.get('steps') or size.images // BATCH) // 2 + 1} steps"
    return config.lock()


def finetuning(cell: Cell, clipart: str, encoder: str) -> ConfigDict:
    """Returns the config of a fine-tuning with all labels but those held out."""
    config = common(default("supervised"), cell, clipart, TUNED)
    config.data.update(train_split=f"train[:{100 - HELD}%]", val_split=f"train[{100 - HELD}%:]")
    config.init_from, config.batch_size = encoder, TUNED_BATCH
    config.model.positions = "learned"
    config.method.update(head="probe", head_std=0.01, smoothing=0.1)  # so few steps need the batch norm
    config.optim.update(lr=cell["lr"], betas=(0.9, 0.999), layer_decay=0.75)
    return config.lock()


def dense(cell: Cell, clipart: str, encoder: str, size: Size) -> ConfigDict:
    """Returns the config of a linear layer over the frozen encoder's patches, which also measures attention."""
    config = common(default("segment"), cell, clipart, size.dense * DRAWINGS // BATCH)
    config.init_from = encoder
    config.optim.update(lr=0.08, betas=(0.9, 0.999), weight_decay=0.0)
    return config.lock()
