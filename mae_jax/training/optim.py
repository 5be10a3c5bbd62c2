"""Optimizers, schedules, weight decay and freezing, by parameter path and by the step of the train state."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from mae_jax import plugins
from mae_jax.config import DEFAULTS, OPTIMIZERS
from mae_jax.methods.base import Method, Params
from mae_jax.ops import partitioning
from mae_jax.param_tree import path

Schedule = Callable[[jax.Array], jax.Array]
Mask = Callable[[Params], Any]  # parameters → tree of booleans
Transformations = list[optax.GradientTransformation]

LARS_TRUST = 1e-3  # trust coefficient of MAE's published linear probe, and of LARS (arXiv 1708.03888) for AlexNet
STEP = 0.1  # factor of the learning rate at each of optim.milestones
SHARED = {"name", "lr", "schedule", "min_lr", "warmup", "warmup_lr", "weight_decay", "final_weight_decay",
          "layer_decay", "milestones", "clip", "ema"}  # fields of config.optim for all rules


@dataclass(frozen=True)
class Rule:
    """An update rule: the optax transformations between gradient clipping and the learning rate.

    Attributes:
      build: (config.optim, step → weight decay, mask of decayed parameters) → list of optax transformations.
      fields: the fields of config.optim that `build` reads.
    """

    build: Callable[[ConfigDict, Schedule, Mask], Transformations]
    fields: tuple[str, ...]


def reads(*fields: str) -> Callable[[Callable[[ConfigDict, Schedule, Mask], Transformations]], Rule]:
    """Returns a decorator that makes a `Rule` of a function that reads these fields of config.optim."""
    return lambda build: Rule(build, fields)


def get(name: str) -> Rule:
    """Returns the rule of `optim.name`; raises UserError for an unknown name."""
    return plugins.find("optimizers", name, OPTIMIZERS, "optim.name")


def unread(config: ConfigDict) -> list[str]:
    """Returns the fields of config.optim that differ from their defaults but are not read by the rule."""
    read = SHARED.union(get(config.optim.name).fields)
    return [f"optim.{field}" for field, value in DEFAULTS["optim"].items()
            if field not in read and config.optim[field] != value]


def decay_mask(params: Params, decays: Callable[[str], bool]) -> Any:
    """Returns a tree of booleans, True for parameters with weight decay; `decays` is a function of the path."""
    return jax.tree_util.tree_map_with_path(lambda keys, _: decays(path(keys)), params)


def decay_words(params: Params, method: Method) -> Any:
    """Returns a tree of strings: 'yes' or 'no' for weight decay, 'frozen' for parameters that are not trained."""
    def word(keys: tuple[Any, ...], decays: bool) -> str:
        return ("yes" if decays else "no") if method.is_trainable(path(keys)) else "frozen"

    return jax.tree_util.tree_map_with_path(word, decay_mask(params, method.decays))


def peak_lr(config: ConfigDict) -> float:
    """Returns the peak learning rate: the base rate optim.lr, per 256 images, scaled by the batch size."""
    return config.optim.lr * config.batch_size / 256


def warmup_cosine(peak: float, minimum: float, warmup: int, total: int, start: float = 0.0) -> Schedule:
    """Returns a schedule: linear warm-up from `start` to `peak`, then a half cosine to `minimum` at step `total`.

    The rate changes with every step, as in MAE's published code. DeiT's rate changes once per epoch, one epoch late,
    and its cosine counts from epoch 0 (timm 0.3.2), which is not reproduced here. The schedule takes the step of the
    train state, int32 [], not that of the optimizer, and returns float32 [].
    """
    def schedule(step: jax.Array) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        rise = start + (peak - start) * step / max(warmup, 1)
        progress = jnp.clip((step - warmup) / max(total - warmup, 1), 0, 1)
        fall = minimum + (peak - minimum) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
        return jnp.where(step < warmup, rise, fall)

    return schedule


def warmup_steps(peak: float, milestones: tuple[float, ...], warmup: int, total: int, start: float = 0.0) -> Schedule:
    """Returns a step schedule: linear warm-up from `start` to `peak`, then times STEP after each milestone.

    Args:
      peak: the learning rate after the warm-up.
      milestones: positions as shares of the `total` steps.
      warmup, total: numbers of steps.
      start: the learning rate at step 0.
    """
    at = np.array([round(share * total) for share in milestones])

    def schedule(step: jax.Array) -> jax.Array:
        rise = start + (peak - start) * jnp.asarray(step, jnp.float32) / max(warmup, 1)
        return jnp.where(step < warmup, rise, peak * STEP ** (step >= at).sum())

    return schedule


def poly(peak: float, minimum: float, warmup: int, total: int, start: float = 0.0) -> Schedule:
    """Returns a polynomial schedule of power 1: linear from `peak` at step 0 to `minimum` at `total`, with warm-up.

    As in mmsegmentation, the decay begins at step 0. The warm-up is a further factor, which rises linearly from
    start / peak to 1 in `warmup` steps.
    """
    def schedule(step: jax.Array) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        fall = minimum + (peak - minimum) * jnp.clip((total - step) / max(total, 1), 0, 1)
        risen = jnp.clip(step / max(warmup, 1), 0, 1)
        return fall * (risen + (1 - risen) * (start / peak if peak else 0)) if warmup else fall

    return schedule


SCHEDULES = {"cosine": warmup_cosine, "poly": poly}  # by optim.schedule


def global_norm(grads: Params) -> jax.Array:
    """Returns the global norm of the gradients, float32 [].

    On GPUs, matrices are summed by rows first: this takes one kernel per matrix, a sum over a whole leaf takes two.
    """
    if partitioning.platform() != "gpu":
        return optax.tree.norm(grads)
    rows = [jnp.square(leaf.reshape(len(leaf), -1)).sum(-1) if leaf.ndim > 1 else jnp.square(leaf.ravel())
            for leaf in jax.tree.leaves(grads)]
    # Without the barrier, XLA would sum each part separately.
    return jnp.sqrt(jax.lax.optimization_barrier(jnp.concatenate(rows)).sum())


def make_schedule(method: Method) -> Schedule:
    """Builds the learning rate schedule from the method's config and timeline.

    optim.lr is scaled by the batch size; optim.min_lr and optim.warmup_lr are not, as in MAE and timm.
    """
    o, timeline = method.config.optim, method.timeline
    if o.milestones:
        return warmup_steps(peak_lr(method.config), o.milestones, timeline.warmup, timeline.total, o.warmup_lr)
    return SCHEDULES[o.schedule](peak_lr(method.config), o.min_lr, timeline.warmup, timeline.total, o.warmup_lr)


def layer_rate(name: str, decay: float, depth: int) -> float:
    """Returns the factor of layer-wise learning rate decay for a parameter path: decay ** (depth + 1 - layer).

    The layer is 0 for the encoder's embedding, i + 1 for its block i, and depth + 1 for other parameters: the factor is
    `decay` for the last block, and 1 for final norm, head and decoder (MAE's fine-tuning, after BEiT, arXiv
    2106.08254).
    """
    if re.match(r"encoder/(patch_embed/|(cls_token|mask_token|pos_embed)$)", name):
        layer = 0
    else:
        block = re.match(r"encoder/block_(\d+)/", name)
        layer = int(block[1]) + 1 if block else depth + 1
    return decay ** (depth + 1 - layer)


def weight_decay(method: Method) -> Schedule:
    """Returns step → weight decay: constant, or a half cosine from weight_decay to final_weight_decay (DINO)."""
    o = method.config.optim
    if o.final_weight_decay < 0:
        return lambda step: o.weight_decay
    return warmup_cosine(o.weight_decay, o.final_weight_decay, 0, method.timeline.total)


def make_optimizer(method: Method) -> optax.GradientTransformationExtraArgs:
    """Builds the method's optimizer without the learning rate; the train step multiplies updates by -schedule(step).

    Gradients are clipped first, by their global norm. Layer-wise learning rate decay comes last: it is a factor of the
    learning rate, and so also scales decoupled weight decay and is not undone by a trust ratio. Frozen parameters have
    no optimizer state, and their update is zero.

    Returns:
      A transformation whose `update` takes the step of the train state as the keyword `step`.
    """
    o = method.config.optim
    clip = [optax.clip_by_global_norm(o.clip)] if o.clip else []
    decay = weight_decay(method)
    rates = [_layer_rates(o.layer_decay, method.config.model.depth)] if o.layer_decay != 1 else []
    decayed = partial(decay_mask, decays=method.decays)
    return _only(method.is_trainable, optax.chain(*clip, *get(o.name).build(o, decay, decayed), *rates))


def _add_decay(decay: Schedule, decayed: Mask) -> optax.GradientTransformation:
    """Adds weight decay, at the step of the train state, to the updates of the decayed parameters."""
    def update(updates: Params, state: Any, params: Params, *, step: jax.Array, **_: Any) -> tuple[Params, Any]:
        rate = decay(step)
        return jax.tree.map(lambda u, p: u + rate * p, updates, params), state

    return optax.masked(optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update), decayed)


@reads("betas", "eps")
def adamw(o: ConfigDict, decay: Schedule, decayed: Mask) -> Transformations:
    """AdamW as in PyTorch: decoupled weight decay is added before the multiplication by the learning rate."""
    b1, b2 = o.betas
    return [optax.scale_by_adam(b1, b2, o.eps), _add_decay(decay, decayed)]


@reads("betas", "eps")
def lamb(o: ConfigDict, decay: Schedule, decayed: Mask) -> Transformations:
    """LAMB (arXiv 1904.00962) as in DeiT III: AdamW's update times |parameter| / |update|, per leaf.

    The ratio is 1 for parameters without weight decay, as in NVIDIA's FusedLAMB and timm, and where either norm is 0.
    FusedLAMB also clips the gradient to norm 1 by default; here `optim.clip` does.
    """
    return [*adamw.build(o, decay, decayed), optax.masked(optax.scale_by_trust_ratio(), decayed)]


@reads("betas")
def lion(o: ConfigDict, decay: Schedule, decayed: Mask) -> Transformations:
    """Lion (arXiv 2302.06675, Algorithm 2): the sign of the interpolated momentum and gradient; decoupled weight decay.

    The paper uses betas (0.9, 0.99), and suggests a learning rate 3 to 10 times smaller and a weight decay 3 to 10
    times larger than those of AdamW (section 5).
    """
    b1, b2 = o.betas
    return [optax.scale_by_lion(b1, b2), _add_decay(decay, decayed)]


@reads("momentum")
def sgd(o: ConfigDict, decay: Schedule, decayed: Mask) -> Transformations:
    """SGD as in PyTorch: weight decay is added to the gradient before momentum; no Nesterov, no dampening."""
    return [_add_decay(decay, decayed), optax.trace(o.momentum)]


@reads("momentum")
def lars(o: ConfigDict, decay: Schedule, decayed: Mask) -> Transformations:
    """LARS (arXiv 1708.03888) as in MAE's linear probe: SGD whose decayed leaves are scaled before momentum.

    The factor, per leaf, is LARS_TRUST · |parameter| / |gradient with weight decay|; 1 where either norm is 0.
    """
    added, momentum = sgd.build(o, decay, decayed)
    return [added, optax.masked(optax.scale_by_trust_ratio(trust_coefficient=LARS_TRUST), decayed), momentum]


def _layer_rates(decay: float, depth: int) -> optax.GradientTransformation:
    """Multiplies every update by the `layer_rate` of its path."""
    def scale(updates: Params, _: Params | None) -> Params:
        return jax.tree_util.tree_map_with_path(lambda keys, u: u * layer_rate(path(keys), decay, depth), updates)

    return optax.stateless(scale)


def _only(learns: Callable[[str], bool],
          inner: optax.GradientTransformationExtraArgs) -> optax.GradientTransformationExtraArgs:
    """Applies `inner` to trainable parameters only; the others have no state, and their update is zero."""
    def hide(tree: Params) -> Params:
        return jax.tree_util.tree_map_with_path(
            lambda keys, leaf: leaf if learns(path(keys)) else optax.MaskedNode(), tree)

    def update(grads: Params, state: Any, params: Params, **extra: Any) -> tuple[Params, Any]:
        updates, state = inner.update(hide(grads), state, hide(params), **extra)
        shown = jax.tree.map(lambda g, u: jnp.zeros_like(g) if isinstance(u, optax.MaskedNode) else u, grads, updates)
        return shown, state

    return optax.GradientTransformationExtraArgs(lambda params: inner.init(hide(params)), update)
