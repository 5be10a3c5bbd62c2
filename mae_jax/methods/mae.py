"""Masked autoencoder (He et al., 'Masked Autoencoders Are Scalable Vision Learners', arXiv 2111.06377)."""

from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from mae_jax.data.info import DataInfo
from mae_jax.data.masking import PatchOrder
from mae_jax.errors import UserError
from mae_jax.losses import pixel_targets
from mae_jax.methods import fields
from mae_jax.methods.base import (
    Batch,
    Extras,
    Method,
    Metrics,
    Params,
    check_choices,
    check_decoder,
    kind_of_order,
    mean_square,
)
from mae_jax.models.vit import make_decoder, make_encoder
from mae_jax.ops.flops import blocks_flops
from mae_jax.ops.patches import PatchGrid, normalize

TARGETS = {  # method.target → note on the colors of reconstructions
    "norm_pix": "predictions are given each patch's own true mean and deviation",
    "pixel": "pixels are predicted",
    "pca": "components of pixels are predicted",
}
MASKINGS = ("random", "block", "grid")


def visible_patches(patches: int, mask_ratio: float) -> int:
    """Returns the number of visible patches int(N · (1 - r)), truncated as in MAE's code: r = 0.9 leaves 4 of 50."""
    return int(patches * (1 - mask_ratio))


class MAE(Method):
    """MAE: encodes the visible patches only, decodes all patches, and reconstructs the masked ones."""

    defaults = fields.MAE
    reconstructs = True

    @staticmethod
    def check_targets(config: ConfigDict) -> None:
        """Raises UserError for an unknown target, an invalid decoder, or stochastic depth."""
        m = config.method
        check_choices(m, target=tuple(TARGETS))
        check_decoder(m)
        if config.model.drop_path:
            raise UserError(f"model.drop_path={config.model.drop_path}; {m.name} pre-trains without stochastic depth "
                            "(MAE A.1)")

    @staticmethod
    def validate(config: ConfigDict) -> None:
        m = config.method
        MAE.check_targets(config)
        check_choices(m, masking=MASKINGS)
        patches = PatchGrid.of(config).num_patches
        visible = visible_patches(patches, m.mask_ratio)
        if not 0 < visible < patches:
            raise UserError(f"method.mask_ratio={m.mask_ratio} leaves {visible} of {patches} patches visible; "
                            "at least one must be visible and one masked")

    def __init__(self, config: ConfigDict, data: DataInfo):
        super().__init__(config, data)
        self.target = config.method.target
        self.mask_ratio = config.method.get("mask_ratio")  # a subclass may lack this field
        self.reconstruction_note = TARGETS[self.target]
        self.outputs = self.grid.patch_dim
        if self.target == "pca":
            self.outputs = min(pixel_targets.PCA_COMPONENTS, self.outputs)
        self.encoder = make_encoder(config)
        self.decoder = make_decoder(config, self.outputs)
        self.patches = self.grid.num_patches
        self.num_visible = self.num_visible_of(config, self.patches)
        self.num_masked = self.patches - self.num_visible

    @staticmethod
    def num_visible_of(config: ConfigDict, patches: int) -> int:
        """Returns the number of visible patches V of an image with N patches."""
        return visible_patches(patches, config.method.mask_ratio)

    def at_mask_ratio(self, ratio: float) -> Method:
        config = self.config.copy_and_resolve_references()
        config.method.update(mask_ratio=ratio, masking="random")
        return type(self)(config, self.data)

    def patch_order(self) -> PatchOrder:
        return PatchOrder(kind_of_order(self.config), self.grid.shape, self.num_masked)

    def init(self, key: jax.Array, batch: Batch) -> tuple[Params, Extras]:
        encoder_key, decoder_key = jax.random.split(key)
        one = {name: value[:1] for name, value in batch.items()}
        pixels, order = normalize(one["patches"]), one["order"]
        masks = self.num_masked if self.config.method.encoder_mask_tokens else 0
        seen = order[:, : self.num_visible + masks]
        tokens, encoder = self.encoder.init_with_output(encoder_key, pixels[:, : self.num_visible], seen, masks)
        decoder = self.decoder.init(decoder_key, tokens, order, self.num_masked)
        return {"encoder": encoder["params"], "decoder": decoder["params"]}, self.fitted_targets(batch)

    def fitted_targets(self, batch: Batch) -> Extras:
        """Returns the extras of target 'pca', fitted on the first batch (our choice: MAE does not name the data)."""
        return {"pca": pixel_targets.fit_pca(normalize(batch["patches"]), self.outputs)} if self.target == "pca" else {}

    def predict(self, params: Params, batch: Batch) -> jax.Array:
        """Returns the predicted targets of the masked patches, float32 [B, M, outputs], in the batch's order."""
        masks = self.num_masked if self.config.method.encoder_mask_tokens else 0
        pixels = normalize(batch["patches"][:, : self.num_visible])
        seen = batch["order"][:, : self.num_visible + masks]
        tokens = self.encoder.apply({"params": params["encoder"]}, pixels, seen, masks)
        return self.decoder.apply({"params": params["decoder"]}, tokens, batch["order"], self.num_masked)

    def targets(self, extras: Extras, pixels: jax.Array) -> jax.Array:
        """Returns the targets float32 [B, M, outputs] of normalized pixels float32 [B, M, P]."""
        if self.target == "norm_pix":
            return pixel_targets.norm_pix(pixels)
        return pixel_targets.project_pca(pixels, extras["pca"]) if self.target == "pca" else pixels

    def loss(self, params: Params, extras: Extras, batch: Batch, key: jax.Array, step: jax.Array,
             train: bool) -> tuple[jax.Array, tuple[Metrics, Extras]]:
        """See `Method.loss`; the mean squared error over masked patches (MAE, section 3).

        For target 'pixel', evaluation adds the baseline `mean_colour_loss`: the error of predicting the mean color of
        the visible patches.
        """
        pixels = normalize(batch["patches"][:, self.num_visible :])
        wanted, valid = self.targets(extras, pixels), batch["valid"]
        metrics = {"loss": mean_square(self.predict(params, batch) - wanted, valid)}
        if not train and self.target == "pixel":
            seen = normalize(batch["patches"][:, : self.num_visible])
            color = seen.reshape(seen.shape[0], -1, 3).mean(1)
            guess = jnp.tile(color, (1, pixels.shape[-1] // 3))[:, None]
            metrics["mean_colour_loss"] = mean_square(guess - wanted, valid)
        total, weight = metrics["loss"]
        return total / jnp.maximum(weight, 1), (metrics, extras)

    def forward_flops(self) -> int:
        m, d, values = self.config.model, self.config.method, self.grid.patch_dim
        seen = self.patches if d.encoder_mask_tokens else self.num_visible
        embed = 2 * self.num_visible * values * m.width
        join = 2 * (1 + seen) * m.width * d.decoder_width
        head = 2 * self.num_masked * d.decoder_width * self.outputs
        encoder = blocks_flops(1 + seen, m.width, m.depth, m.mlp_ratio)
        decoder = blocks_flops(1 + self.patches, d.decoder_width, d.decoder_depth, m.mlp_ratio)
        return embed + encoder + join + decoder + head

    def reconstruct(self, params: Params, extras: Extras, batch: Batch) -> dict[str, Any]:
        """Predicts the masked patches as normalized pixels.

        Returns:
          'pixels': float32 [B, M, P]. Predictions for target 'norm_pix' are scaled with the true mean and standard
          deviation of each masked patch, which the model has not seen; captions must state this.
        """
        return {"pixels": self.as_pixels(self.predict(params, batch), extras, batch)}

    def as_pixels(self, predicted: jax.Array, extras: Extras, batch: Batch) -> jax.Array:
        """Converts predictions float32 [B, M, outputs] to normalized pixels float32 [B, M, P]."""
        if self.target == "norm_pix":
            mean, deviation = pixel_targets.patch_moments(normalize(batch["patches"][:, self.num_visible :]))
            return predicted * deviation + mean
        return pixel_targets.unproject_pca(predicted, extras["pca"]) if self.target == "pca" else predicted
