"""DINO: self-distillation without labels (Caron et al., arXiv 2104.14294), a baseline of SplitMask.

The student predicts, from one view of an image, the output of the EMA teacher on another view. The implementation
follows the released code except for these, ours:

- Gradients are clipped by their global norm, not per parameter.
- Positions are fixed, for the grid of each view.
- All schedules, that of the teacher's temperature included, change with every step.
- The directions of the last layer are initialized with standard deviation 0.02; torch's default is 0.036.
- While the last layer is frozen its gradient is zero. Adam counts these steps, and takes larger steps just after.
"""

import itertools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from mae_jax.data.info import DataInfo
from mae_jax.data.masking import ColorAugmentation, PatchOrder, View
from mae_jax.durations import steps
from mae_jax.errors import UserError
from mae_jax.losses.dino import cross_entropy, update_center
from mae_jax.methods import fields
from mae_jax.methods.base import Batch, Extras, Method, Metrics, Params
from mae_jax.models.heads import Projection
from mae_jax.models.vit import make_encoder
from mae_jax.ops.flops import blocks_flops
from mae_jax.ops.patches import normalize

GLOBALS = 2  # number of global (large) views, which the teacher encodes
JITTER, GRAY = 0.8, 0.2  # probabilities in all views; those of blur and solarization differ (DataAugmentationDINO)


class DINO(Method):
    """DINO: the student encodes all views, the teacher the two global ones; the loss compares pairs of distinct views.
    """

    defaults = fields.DINO
    loss_spans_batch = True

    @staticmethod
    def validate(config: ConfigDict) -> None:
        m, data = config.method, config.data
        for key, least in (("out_dim", 2), ("head_width", 1), ("bottleneck", 1)):
            if m[key] < least:
                raise UserError(f"method.{key}={m[key]}; it must be at least {least}")
        for key in ("temperature", "teacher_temperature", "first_teacher_temperature"):
            if m[key] <= 0:
                raise UserError(f"method.{key}={m[key]}; it must be above 0")
        for key in ("momentum", "center_momentum"):
            if not 0 <= m[key] < 1:
                raise UserError(f"method.{key}={m[key]}; expected 0 to below 1")
        for key in ("global_scale", "local_scale", "blur"):
            if len(m[key]) != 2 or not 0 < m[key][0] <= m[key][1] or (key != "blur" and m[key][1] > 1):
                raise UserError(f"method.{key}={tuple(m[key])}; expected two numbers above 0, the smaller one first"
                                f"{'' if key == 'blur' else ', at most 1'}")
        if not 0 <= m.local_views <= 64:
            raise UserError(f"method.local_views={m.local_views}; expected 0 to 64")
        _grid(config, m.local_size)
        for key in ("temperature_warmup", "freeze_last"):
            steps(m[key], config.batch_size, 1)
        if config.model.positions != "fixed":
            raise UserError(f"model.positions={config.model.positions!r}; DINO's views have several grids; use 'fixed'")
        if data.color != "none" or data.augment != "random" or data.resize != "exact" or data.repeats != 1:
            raise UserError(f"data.augment={data.augment!r}, data.color={data.color!r}, data.resize={data.resize!r}, "
                            f"data.repeats={data.repeats}: DINO has its own crops and colors; leave 'random', "
                            "'none', 'exact' and 1")

    def __init__(self, config: ConfigDict, data: DataInfo):
        super().__init__(config, data)
        m = config.method
        self.encoder = make_encoder(config)
        self.head = Projection(m.head_width, m.bottleneck, m.out_dim, config.model.gelu,
                               jnp.dtype(config.model.dtype))
        self.local_grid = _grid(config, m.local_size)

    def views(self) -> tuple[View, ...]:
        m = self.config.method
        blur, large, small = tuple(m.blur), tuple(self.config.data.image_size), tuple(m.local_size)
        first, second, local = (ColorAugmentation(JITTER, GRAY, *chances, blur)
                                for chances in ((1, 0), (0.1, 0.2), (0.5, 0)))
        views = [View("global", large, tuple(m.global_scale), (first, second), self.patch_order())]
        if m.local_views:
            order = PatchOrder("identity", self.local_grid, 0)
            views.append(View("local", small, tuple(m.local_scale), (local,) * m.local_views, order))
        return tuple(views)

    def init(self, key: jax.Array, batch: Batch) -> tuple[Params, Extras]:
        encoder_key, head_key = jax.random.split(key)
        pixels, order = (batch[f"global/{name}"][:1, 0] for name in ("patches", "order"))
        tokens, encoder = self.encoder.init_with_output(encoder_key, normalize(pixels), order)
        head = self.head.init(head_key, tokens[:, 0])
        params = {"encoder": encoder["params"], "head": head["params"]}
        center = jnp.zeros(self.config.method.out_dim, jnp.float32)
        return params, {"teacher": jax.tree.map(jnp.copy, params), "center": center}

    def fit_extras(self, params: Params, extras: Extras, batches: Iterable[dict[str, np.ndarray]] | None) -> Extras:
        """See `Method.fit_extras`; copies the student's initial parameters, after a warm start, to the teacher."""
        return {**extras, "teacher": params}

    def project(self, params: Params, patches: jax.Array, order: jax.Array, grid: tuple[int, int] | None = None,
                drop_path_mask: jax.Array | None = None) -> jax.Array:
        """Returns the head's outputs float32 [B, n, K] for n views of each image.

        Args:
          params: parameters of the student or of the teacher.
          patches: uint8 [B, n, N, P].
          order: int32 [B, n, N].
          grid: (rows, columns) of the patches; None: the grid of data.image_size.
          drop_path_mask: stochastic depth mask float32 [depth, 2, B n]; None: off.
        """
        pixels, places = (value.reshape(-1, *value.shape[2:]) for value in (patches, order))
        tokens = self.encoder.apply({"params": params["encoder"]}, normalize(pixels), places,
                                    drop_path_mask=drop_path_mask, grid=grid)
        return self.head.apply({"params": params["head"]}, tokens[:, 0]).reshape(*order.shape[:2], -1)

    def loss(self, params: Params, extras: Extras, batch: Batch, key: jax.Array, step: jax.Array,
             train: bool) -> tuple[jax.Array, tuple[Metrics, Extras]]:
        """See `Method.loss`; the mean cross-entropy over pairs of distinct views (section 3.1, equation 3).

        In evaluation an image has one view, on which teacher and student are compared. The teacher's temperature is the
        first one, so that losses at different steps are comparable.
        """
        m, valid = self.config.method, batch["valid"]
        if "patches" in batch:
            patches, order = batch["patches"][:, None], batch["order"][:, None]
        else:
            patches, order = batch["global/patches"], batch["global/order"]
        teacher_logits = self.project(extras["teacher"], patches, order)
        student_logits = self._student(self._held(params, step), batch, patches, order, key, train)
        targets = jax.nn.softmax((teacher_logits - extras["center"]) / self._teacher_temperature(step))
        losses = cross_entropy(targets, student_logits / m.temperature, same="patches" in batch)
        entropy = -jnp.where(targets > 0, targets * jnp.log(targets), 0).sum(-1).mean(1)
        weight = valid.sum()
        metrics = {name: ((value * valid).sum(), weight)
                   for name, value in {"loss": losses, "teacher_entropy": entropy}.items()}
        if train:
            extras = {**extras, "center": update_center(extras["center"], teacher_logits, valid, m.center_momentum)}
        return metrics["loss"][0] / jnp.maximum(weight, 1), (metrics, extras)

    def _student(self, params: Params, batch: Batch, patches: jax.Array, order: jax.Array, key: jax.Array,
                 train: bool) -> jax.Array:
        """Returns the student's outputs float32 [B, n, K], for the global views and then the local ones."""
        keys = jax.random.split(key) if train else (key, key)
        drop_path_mask = self.drop_path_mask(keys[0], patches.shape[0] * patches.shape[1]) if train else None
        student_logits = [self.project(params, patches, order, drop_path_mask=drop_path_mask)]
        if "local/patches" in batch:
            small = batch["local/patches"]
            drop_path_mask = self.drop_path_mask(keys[1], small.shape[0] * small.shape[1]) if train else None
            student_logits.append(self.project(params, small, batch["local/order"], self.local_grid, drop_path_mask))
        return jnp.concatenate(student_logits, 1)

    def _held(self, params: Params, step: jax.Array) -> Params:
        """Stops the gradient of the last layer during method.freeze_last; weight decay does not change directions."""
        head = params["head"]
        frozen = step < self.timeline.steps(self.config.method.freeze_last)
        last = jax.tree.map(lambda p: jnp.where(frozen, jax.lax.stop_gradient(p), p), head["last"])
        return {**params, "head": {**head, "last": last}}

    def _teacher_temperature(self, step: jax.Array) -> jax.Array:
        m = self.config.method
        warmup = self.timeline.steps(m.temperature_warmup)
        share = jnp.clip(step / warmup, 0, 1) if warmup else 1.0
        return m.first_teacher_temperature + share * (m.teacher_temperature - m.first_teacher_temperature)

    def after_update(self, params: Params, extras: Extras, step: jax.Array) -> Extras:
        """See `Method.after_update`; an EMA of the student, with a cosine momentum from method.momentum to 1."""
        total = max(self.timeline.total, 1)
        left = (1 - self.config.method.momentum) * 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(step / total, 0, 1)))
        teacher = jax.tree.map(lambda old, new: old + left * (new - old), extras["teacher"], params)
        return {**extras, "teacher": teacher}

    def forward_flops(self) -> int:
        large, small = (self._view_flops(int(np.prod(sides))) for sides in (self.grid.shape, self.local_grid))
        return GLOBALS * large + self.config.method.local_views * small

    def frozen_flops(self) -> int:
        return GLOBALS * self._view_flops(self.grid.num_patches)

    def _view_flops(self, patches: int) -> int:
        m, h = self.config.model, self.config.method
        embed = 2 * patches * self.grid.patch_dim * m.width
        widths = (m.width, h.head_width, h.head_width, h.bottleneck, h.out_dim)
        head = sum(2 * a * b for a, b in itertools.pairwise(widths))
        return embed + blocks_flops(1 + patches, m.width, m.depth, m.mlp_ratio) + head


def _grid(config: ConfigDict, size: tuple[int, int]) -> tuple[int, int]:
    """Returns the grid (rows, columns) of views of `size` pixels; raises UserError if the patch does not divide it."""
    if len(size) != 2 or any(side < 1 or side % patch for side, patch in zip(size, config.model.patch, strict=True)):
        raise UserError(f"method.local_size={tuple(size)}; both sides must be multiples of model.patch="
                        f"{tuple(config.model.patch)}")
    return size[0] // config.model.patch[0], size[1] // config.model.patch[1]
