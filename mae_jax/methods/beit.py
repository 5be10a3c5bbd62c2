"""BEiT: masked image modeling (Bao et al., arXiv 2106.08254), with tokens or pixels as targets.

Differences from BEiT, ours: absolute positions instead of a relative position bias, and tokens of a simple vocabulary
of training patches (as in SplitMask's ablation) instead of those of a trained tokenizer.
"""

import math
import re
import zlib
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from mae_jax.data.info import DataInfo, DataNeeds
from mae_jax.data.masking import PatchOrder
from mae_jax.errors import UserError
from mae_jax.methods import fields
from mae_jax.methods.base import Batch, Extras, Method, Metrics, Params, check_choices, kind_of_order
from mae_jax.methods.patch_targets import PatchTargets
from mae_jax.models.heads import Head
from mae_jax.models.layers import TOKEN_STD
from mae_jax.models.vit import make_encoder
from mae_jax.ops.flops import blocks_flops
from mae_jax.ops.patches import PatchGrid, normalize
from mae_jax.param_tree import path as path_of
from mae_jax.recipe_version import has

MASKINGS = ("block", "random")
NOISE = ("/kernel", "_token", "/pos_embed")  # ends of the paths of randomly initialized parameters
LAST_OF_BRANCH = re.compile(r"block_(\d+)/(?:attn/proj|mlp/fc2)/kernel$")


class BEiT(Method):
    """BEiT: encodes all patches, masked ones as a learned mask token, and predicts the targets of masked patches."""

    defaults = fields.BEIT

    @staticmethod
    def validate(config: ConfigDict) -> None:
        m, patches = config.method, PatchGrid.of(config).num_patches
        PatchTargets.validate(config)
        check_choices(m, masking=MASKINGS)
        if not 0 < m.masked < patches:
            raise UserError(f"method.masked={m.masked}; expected 1 to {patches - 1} of {patches} patches")

    def __init__(self, config: ConfigDict, data: DataInfo):
        super().__init__(config, data)
        self.patches, self.masked = self.grid.num_patches, config.method.masked
        self.targets = PatchTargets(config)
        self.encoder = make_encoder(config)
        self.head = Head(self.targets.outputs, TOKEN_STD)

    @staticmethod
    def data_needs(config: ConfigDict) -> DataNeeds:
        return DataNeeds(vocabulary=config.method.vocabulary)

    def patch_order(self) -> PatchOrder:
        return PatchOrder(kind_of_order(self.config), self.grid.shape, self.masked)

    def eval_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        spec = super().eval_spec()
        return spec | self.targets.fields(spec)

    def init(self, key: jax.Array, batch: Batch) -> tuple[Params, Extras]:
        encoder_key, head_key = jax.random.split(key)
        pixels, order = normalize(batch["patches"][:1, : -self.masked]), batch["order"][:1]
        tokens, encoder = self.encoder.init_with_output(encoder_key, pixels, order, self.masked)
        head = self.head.init(head_key, tokens.astype(jnp.float32))
        params = {"encoder": encoder["params"], "head": head["params"]}
        if self.config.model.init == "normal" and has(self.config, "beit_start_and_decay"):
            params = _published_start(key, params, self.config.model.positions)
        return params, self.targets.start()

    def decays(self, path: str) -> bool:
        """See `Method.decays`; the mask token decays, the class token does not (BEiT's released optim_factory.py)."""
        kept = path.endswith("/cls_token") and has(self.config, "beit_start_and_decay")
        return super().decays(path) and not kept

    def fit_extras(self, params: Params, extras: Extras, batches: Iterable[dict[str, np.ndarray]] | None) -> Extras:
        return self.targets.fit_extras(extras, batches)

    def stored_vocabulary(self) -> tuple[str, str, tuple[int, int]] | None:
        return self.targets.stored_vocabulary()

    def predict(self, params: Params, batch: Batch, drop_path_mask: jax.Array | None = None) -> jax.Array:
        """Returns predictions float32 [B, M, outputs] for the masked patches, the last M of the order.

        Args:
          params: the parameters.
          batch: `patches` uint8 [B, N, P] and `order` int32 [B, N].
          drop_path_mask: stochastic depth mask float32 [depth, 2, B]; None: off.
        """
        pixels = normalize(batch["patches"][:, : -self.masked])
        tokens = self.encoder.apply({"params": params["encoder"]}, pixels, batch["order"], self.masked,
                                    drop_path_mask=drop_path_mask)
        return self.head.apply({"params": params["head"]}, tokens[:, -self.masked :].astype(jnp.float32))

    def loss(self, params: Params, extras: Extras, batch: Batch, key: jax.Array, step: jax.Array,
             train: bool) -> tuple[jax.Array, tuple[Metrics, Extras]]:
        """See `Method.loss`; the mean loss over masked patches (BEiT, equation 2, with the target of the config)."""
        drop_path_mask = self.drop_path_mask(key, len(batch["valid"])) if train else None
        wanted = batch[self.targets.field][:, -self.masked :]
        losses, figures = self.targets.losses(self.predict(params, batch, drop_path_mask), wanted, extras)
        weight = batch["valid"].sum()
        figures = {"loss": losses, **figures}
        metrics = {name: ((value * batch["valid"]).sum(), weight) for name, value in figures.items()}
        return metrics["loss"][0] / jnp.maximum(weight, 1), (metrics, extras)

    def forward_flops(self) -> int:
        m = self.config.model
        embed = 2 * (self.patches - self.masked) * self.grid.patch_dim * m.width
        encoder = blocks_flops(1 + self.patches, m.width, m.depth, m.mlp_ratio)
        head = 2 * self.masked * m.width * self.targets.outputs
        return embed + encoder + head

    def frozen_flops(self) -> int:
        return self.targets.flops(self.masked)


def _published_start(key: jax.Array, params: Params, positions: str) -> Params:
    """Returns the parameters with BEiT's initialization of kernels and tokens (released code, modeling_pretrain.py).

    It is a normal distribution of standard deviation 0.02, truncated at one standard deviation, which leaves 0.0108.
    The last kernel of each branch of the k-th block, counted from 1, is divided by sqrt(2 k). Biases, norms, layer
    scales and sine-cosine positions are not changed.
    """
    def start(keys: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        name = path_of(keys)
        if not name.endswith(NOISE if positions == "random" else NOISE[:-1]):
            return leaf
        named = jax.random.fold_in(key, zlib.crc32(name.encode()))
        drawn = TOKEN_STD * jax.random.truncated_normal(named, -1, 1, leaf.shape, leaf.dtype)
        block = LAST_OF_BRANCH.search(name)
        return drawn / math.sqrt(2 * (1 + int(block[1]))) if block else drawn

    return jax.tree_util.tree_map_with_path(start, params)
