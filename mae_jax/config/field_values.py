"""Allowed values of single config fields; each method checks its own fields."""

import math
from collections.abc import Collection
from typing import Any

import numpy as np

from mae_jax.errors import UserError, did_you_mean

CHOICES: dict[str, Collection[str]] = {  # `config.choices` adds those that plug-ins extend
    "data.layout": ("auto", "flat", "classes", "splits", "0.1.0"),
    "init_head": ("match", "keep", "new"),
    "data.augment": ("none", "fixed", "simple", "single", "random", "scaled", "lsj", "multi_scale"),
    "data.crowds": ("ignored", "objects"),
    "data.exif": ("auto", "apply", "ignore"),
    "data.formats": ("auto", "all", "common"),
    "data.resize": ("exact", "fast", "graph"),
    "model.dtype": ("auto", "float32", "bfloat16"),
    "model.gelu": ("erf", "tanh"),
    "eval.attention_query": ("cls", "mean"),
    "model.pool": ("mean", "cls"),
    "model.positions": ("fixed", "learned", "random"),
    "model.drop_path_rates": ("linear", "constant"),
    "model.init": ("xavier", "normal"),
    "optim.schedule": ("cosine", "poly"),
    "checkpoint.best_mode": ("auto", "min", "max"),
    "model.remat": ("none", "full", "dots"),
    "mesh.zero": ("auto", "on", "off"),
    "mesh.reduce": ("float32", "bfloat16"),
}
PAIRS = ("data.image_size", "data.crop_scale", "data.crop_ratio", "data.scales", "data.lsj_scale", "model.patch",
         "optim.betas")
POSITIVE = ("batch_size", "data.image_size", "model.patch", "model.width", "model.depth", "model.heads",
            "model.mlp_ratio", "train.accumulate", "checkpoint.keep_last", "data.prefetch", "eval.max_examples",
            "eval.knn_k", "eval.pictures", "guard.max_nonfinite", "data.repeats", "data.max_objects")
NOT_NEGATIVE = ("optim.lr", "optim.min_lr", "optim.eps", "optim.weight_decay", "optim.clip", "optim.betas",
                "optim.ema", "optim.momentum", "optim.warmup_lr", "optim.layer_decay", "data.crop_scale",
                "data.crop_ratio", "data.threads", "data.mask_offset", "model.drop_path", "model.layer_scale",
                "guard.max_bad_fraction", "guard.spike", "guard.stall_seconds")
BELOW_ONE = ("optim.betas", "optim.ema", "optim.momentum", "model.drop_path")
EXAMPLES = {"plugins": ("package.module",), "eval.sets": ("imagenet_v2",), "log.sinks": ("tensorboard",),
            "data.mix": ("3:/data/a", "1:/data/b"), "model.auto": ("width", "heads")}
LARGEST = {"seed": 2**63 - 1, "eval.max_examples": 2**31}  # fields that may exceed 31 bits
LARGEST_SCALE = 8  # of eval.scales: an image then has hundreds of windows
DURATIONS = ("train.duration", "train.patience", "optim.warmup", "checkpoint.every", "checkpoint.keep_every",
             "eval.every", "log.every")


def check_types(values: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Raises UserError for the first value with another element type than its default, or that is not finite."""
    for key, default in defaults.items():
        value = values.get(key, default)
        if isinstance(default, list):
            whole = all(isinstance(item, int) for item in default)
            kinds: tuple[type, ...] = (int,) if whole else (int, float)
            if not default:  # an empty default has no element type
                kinds = (str,) if key in EXAMPLES else (object,)
            if not isinstance(value, list) or not all(isinstance(item, kinds) for item in value):
                shown = tuple(default) or EXAMPLES.get(key, ("value",))
                what = "whole numbers" if whole and default else "values"
                raise UserError(f"{key}={value!r}; expected {what} such as {shown}")
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                raise UserError(f"{key}={value}; it must be finite")
            if isinstance(number, int) and abs(number) > (most := LARGEST.get(key, 2**31 - 1)):
                raise UserError(f"{key} is a number of {number.bit_length()} bits; it must be at most {most}")


def check_ranges(values: dict[str, Any]) -> None:
    """Raises UserError for the first value that is not an allowed choice, or is too small or too large."""
    for key, allowed in CHOICES.items():
        if values[key] not in allowed:
            raise UserError(f"{key}={values[key]!r}; {did_you_mean(str(values[key]), allowed)}")
    for key in PAIRS:
        if len(values[key]) != 2:
            raise UserError(f"{key}={tuple(values[key])}; expected two numbers")
    for key in POSITIVE:
        if np.min(values[key]) < 1:
            raise UserError(f"{key}={values[key]}; it must be at least 1")
    for key in NOT_NEGATIVE:
        if np.min(values[key]) < 0:
            raise UserError(f"{key}={values[key]}; it must not be negative")
    for key in ("data.crop_scale", "data.crop_ratio", "data.scales", "data.lsj_scale"):
        low, high = values[key]
        if not 0 < low <= high:
            raise UserError(f"{key}={(low, high)}; expected two numbers above 0, the smaller one first")
    ratios = values["eval.crop_ratio"]
    if values["data.crop_scale"][1] > 1 or not ratios or not all(0 < ratio <= 1 for ratio in ratios):
        raise UserError("data.crop_scale and eval.crop_ratio are shares of an image: above 0, at most 1")
    if not values["eval.scales"] or not all(0 < scale <= LARGEST_SCALE for scale in values["eval.scales"]):
        raise UserError(f"eval.scales={tuple(values['eval.scales'])}; expected numbers above 0, "
                        f"at most {LARGEST_SCALE}")
    if values["optim.milestones"] and (values["optim.schedule"] != "cosine" or values["optim.min_lr"]):
        raise UserError("optim.milestones are a schedule of their own: leave optim.schedule and optim.min_lr as they "
                        "are, or set optim.milestones=()")
    if values["optim.layer_decay"] > 1:
        raise UserError(f"optim.layer_decay={values['optim.layer_decay']}; it must be at most 1")
    for key in BELOW_ONE:
        if np.max(values[key]) >= 1:
            raise UserError(f"{key}={values[key]}; it must be below 1")
