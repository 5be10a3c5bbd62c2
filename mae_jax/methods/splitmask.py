"""SplitMask (El-Nouby et al., 'Are Large-scale Datasets Necessary for Self-Supervised Pre-training?', 2112.10740)."""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from mae_jax.data.info import DataInfo, DataNeeds
from mae_jax.data.masking import PatchOrder
from mae_jax.errors import UserError
from mae_jax.losses.contrastive import info_nce
from mae_jax.methods import fields
from mae_jax.methods.base import Batch, Extras, Method, Metrics, Params, check_decoder
from mae_jax.methods.patch_targets import PatchTargets
from mae_jax.models.vit import make_decoder, make_encoder
from mae_jax.ops.flops import blocks_flops
from mae_jax.ops.patches import PatchGrid, normalize


class SplitMask(Method):
    """SplitMask: encodes two disjoint halves of the patches separately.

    Each half predicts the patches of the other one (inpaint), and its pooled descriptor is matched with that of the
    other half by InfoNCE (match). With an odd number of patches, the last one of the order is in neither half, and both
    halves predict it.
    """

    defaults = fields.SPLITMASK
    loss_spans_batch = True

    @staticmethod
    def validate(config: ConfigDict) -> None:
        m = config.method
        PatchTargets.validate(config)
        check_decoder(m)
        if m.temperature <= 0:
            raise UserError(f"method.temperature={m.temperature}; it must be above 0")
        if m.match_weight < 0:
            raise UserError(f"method.match_weight={m.match_weight}; it must not be negative")
        if PatchGrid.of(config).num_patches < 2:
            raise UserError("one patch cannot be split; use a larger data.image_size or a smaller model.patch")

    def __init__(self, config: ConfigDict, data: DataInfo):
        super().__init__(config, data)
        self.patches = self.grid.num_patches
        self.half = self.patches // 2
        self.targets = PatchTargets(config)
        self.encoder = make_encoder(config)
        self.decoder = make_decoder(config, self.targets.outputs, describes=True, head_init=self.targets.head_init)

    @staticmethod
    def data_needs(config: ConfigDict) -> DataNeeds:
        return DataNeeds(vocabulary=config.method.vocabulary)

    def patch_order(self) -> PatchOrder:
        return PatchOrder("random", self.grid.shape, self.patches - self.half)

    def eval_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        spec = super().eval_spec()
        return spec | self.targets.fields(spec)

    def init(self, key: jax.Array, batch: Batch) -> tuple[Params, Extras]:
        encoder_key, decoder_key = jax.random.split(key)
        pixels, order = normalize(batch["patches"][:1]), batch["order"][:1]
        tokens, encoder = self.encoder.init_with_output(encoder_key, pixels[:, : self.half], order[:, : self.half])
        decoder = self.decoder.init(decoder_key, tokens, order, self.patches - self.half)
        return {"encoder": encoder["params"], "decoder": decoder["params"]}, self.targets.start()

    def fit_extras(self, params: Params, extras: Extras, batches: Iterable[dict[str, np.ndarray]] | None) -> Extras:
        return self.targets.fit_extras(extras, batches)

    def stored_vocabulary(self) -> tuple[str, str, tuple[int, int]] | None:
        return self.targets.stored_vocabulary()

    def branches(self, values: jax.Array) -> jax.Array:
        """Splits [B, N, ...] into halves [2B, N // 2, ...]: rows 2b and 2b + 1 are the halves A and B of image b."""
        return values[:, : 2 * self.half].reshape(2 * len(values), self.half, *values.shape[2:])

    def swapped(self, values: jax.Array) -> jax.Array:
        """Returns [2B, N, ...]: values in the order A, B, rest for branch A, and B, A, rest for branch B."""
        a, b, rest = jnp.split(values, (self.half, 2 * self.half), axis=1)
        both = jnp.stack([jnp.concatenate([a, b, rest], 1), jnp.concatenate([b, a, rest], 1)], 1)
        return both.reshape(2 * len(values), *values.shape[1:])

    def input_images(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        places = np.arange(self.patches)
        return {"input": self.only(batch, True), "half A": self.only(batch, places < self.half),
                "half B": self.only(batch, (places >= self.half) & (places < 2 * self.half))}

    def predict(self, params: Params, batch: Batch,
                drop_path_mask: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """Predicts the other patches of the image from each half.

        Args:
          params: the parameters.
          batch: `patches` uint8 [B, N, P] and `order` int32 [B, N].
          drop_path_mask: stochastic depth mask float32 [depth, 2, 2B]; None: off.

        Returns:
          Predictions float32 [2B, N - N // 2, outputs], in the order of `swapped`; and descriptors float32 [2B, D].
        """
        pixels = normalize(self.branches(batch["patches"]))
        tokens = self.encoder.apply({"params": params["encoder"]}, pixels, self.branches(batch["order"]),
                                    drop_path_mask=drop_path_mask)
        order = self.swapped(batch["order"])
        return self.decoder.apply({"params": params["decoder"]}, tokens, order, self.patches - self.half)

    def loss(self, params: Params, extras: Extras, batch: Batch, key: jax.Array, step: jax.Array,
             train: bool) -> tuple[jax.Array, tuple[Metrics, Extras]]:
        """See `Method.loss`; the inpainting loss of unseen patches plus the weighted matching loss (3.2, 3.3)."""
        m, images = self.config.method, len(batch["valid"])
        drop_path_mask = self.drop_path_mask(key, 2 * images) if train else None
        predicted, described = self.predict(params, batch, drop_path_mask)
        wanted = self.swapped(batch[self.targets.field])[:, self.half :]
        inpaint, figures = self.targets.losses(predicted, wanted, extras)
        per_image = {"inpaint_loss": inpaint, **figures}
        per_image = {name: value.reshape(images, 2).mean(1) for name, value in per_image.items()}
        total = per_image["inpaint_loss"]
        if m.match_weight:
            pairs = described.reshape(images, 2, -1)
            match, found = info_nce(pairs, batch["valid"], batch["id"], m.temperature, m.normalize)
            per_image |= {"match_loss": match, "match_top1": found.astype(jnp.float32)}
            total = total + m.match_weight * match
        weight = batch["valid"].sum()
        metrics = {name: ((value * batch["valid"]).sum(), weight)
                   for name, value in {"loss": total, **per_image}.items()}
        return metrics["loss"][0] / jnp.maximum(weight, 1), (metrics, extras)

    def forward_flops(self) -> int:
        m, d = self.config.model, self.config.method
        num_masked = self.patches - self.half
        embed = 2 * self.half * self.grid.patch_dim * m.width
        encoder = blocks_flops(1 + self.half, m.width, m.depth, m.mlp_ratio)
        join = 2 * (1 + self.half) * m.width * d.decoder_width
        decoder = blocks_flops(1 + self.patches, d.decoder_width, d.decoder_depth, m.mlp_ratio)
        head = 2 * num_masked * d.decoder_width * self.targets.outputs
        match = 4 * self.config.batch_size * d.decoder_width * bool(d.match_weight)
        return 2 * (embed + encoder + join + decoder + head + match)

    def frozen_flops(self) -> int:
        return self.targets.flops(2 * (self.patches - self.half))
