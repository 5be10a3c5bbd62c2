"""Optimiser, schedule and decay mask, all by parameter path and by the step of the train state."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from mae_jax.config import steps
from mae_jax.params import path

# Matrices and the class and mask tokens decay, biases and norms do not: timm 0.3.2's add_weight_decay as MAE calls it.
DECAYED = ("kernel", "cls_token", "mask_token")
Schedule = Callable[[jax.Array], jax.Array]


def decay_mask(params: Any) -> Any:
    """Returns a tree of booleans: which parameters weight decay applies to, by the last name of the path."""
    return jax.tree_util.tree_map_with_path(lambda keys, _: path(keys).rsplit("/", 1)[-1] in DECAYED, params)


def peak_lr(config: ConfigDict) -> float:
    """Returns the learning rate at the top of the schedule: the base rate, per 256 images, scaled by the batch."""
    return config.optim.lr * config.batch_size / 256


def warmup_cosine(peak: float, minimum: float, warmup: int, total: int) -> Schedule:
    """Returns step → learning rate: linear from 0 over `warmup` steps, then half a cosine to `minimum` at `total`.

    Per iteration, as MAE's published code does it. The argument is the step of the train state, not of the optimiser.
    """
    def schedule(step: jax.Array) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        rise = peak * step / max(warmup, 1)
        progress = jnp.clip((step - warmup) / max(total - warmup, 1), 0, 1)
        fall = minimum + (peak - minimum) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
        return jnp.where(step < warmup, rise, fall)

    return schedule


def make_schedule(config: ConfigDict, examples: int) -> Schedule:
    """Builds the schedule of `config.optim` for a training split of `examples` images."""
    total = steps(config.train.duration, config.batch_size, examples)
    warmup = steps(config.optim.warmup, config.batch_size, examples)
    return warmup_cosine(peak_lr(config), config.optim.min_lr, min(warmup, total), total)


def make_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """Builds AdamW without its learning rate: the step multiplies the update by -schedule(step).

    Decoupled weight decay is added before the multiplication, as in PyTorch's AdamW.
    """
    o = config.optim
    clip = [optax.clip_by_global_norm(o.clip)] if o.clip else []
    decay = optax.add_decayed_weights(o.weight_decay, decay_mask)
    return optax.chain(*clip, optax.scale_by_adam(*o.betas, eps=o.eps), decay)
