"""MixedAE (Chen et al., 'Mixed Autoencoder for Self-supervised Visual Representation Learning', arXiv 2303.17152)."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from mae_jax.data.info import DataInfo, DataNeeds
from mae_jax.data.masking import PatchOrder
from mae_jax.errors import UserError
from mae_jax.losses.contrastive import supervised_contrast
from mae_jax.methods import fields
from mae_jax.methods.base import Batch, Extras, Metrics, Params, check_choices, mean_square, named_blocks
from mae_jax.methods.mae import MAE
from mae_jax.models import intermediates
from mae_jax.models.heads import Perceptron
from mae_jax.models.layers import TOKEN_STD
from mae_jax.models.vit import make_decoder
from mae_jax.ops.flops import blocks_flops
from mae_jax.ops.homologous_attention import OracleMask, TopKMask, neighbor_homology, purity, same_source
from mae_jax.ops.patches import PatchGrid, normalize

MIXINGS = ("compose", "full")
ATTENTIONS = ("topk", "all", "oracle")
GROUP_TOLERANCE = 1e-6  # relative tolerance of 1 / r, which must be an integer
MIN_RATIO = 1e-6  # smallest accepted r


class MixedAE(MAE):
    """MixedAE: mixes the patches of a group of images, with homologous attention, and reconstructs every image.

    The G = 1 / r images of a group are consecutive in the batch and share one permutation, which is rolled by i · N / G
    for image i. The first N / G patches of the G images then cover each position of the grid once, and mixing and
    unmixing are reshapes.
    """

    defaults = fields.MIXEDAE

    @staticmethod
    def validate(config: ConfigDict) -> None:
        m = config.method
        MAE.check_targets(config)
        check_choices(m, mixing=MIXINGS, attention=ATTENTIONS)
        patches, group = PatchGrid.of(config).num_patches, _group(config)
        if group > patches:
            raise UserError(f"method.ratio={m.ratio} divides {patches} patches among {group} images; use fewer images, "
                            "with a larger ratio")
        if patches % group:
            raise UserError(f"method.ratio={m.ratio} does not divide {patches} patches evenly among {group} images; "
                            f"nearest data.image_size: {' or '.join(map(str, _sizes(config, group)))}")
        if not 0 <= m.keep <= patches:
            raise UserError(f"method.keep={m.keep}; expected 1 to {patches} keys, or 0 for method.ratio of them")
        if m.temperature <= 0 or min(m.contrast_weight, m.projection) < 0:
            raise UserError(f"method.temperature={m.temperature} must be above 0, method.contrast_weight="
                            f"{m.contrast_weight} and method.projection={m.projection} not negative")
        if m.contrast_weight and patches == group:
            raise UserError(f"method.ratio={m.ratio} puts one patch of each image into a mix, which leaves nothing to "
                            "contrast; use a larger one")
        if m.attention == "all" and m.blocks != "all":
            raise UserError(f"method.blocks={m.blocks!r} selects blocks for homologous attention, but "
                            "method.attention='all' has none; leave it 'all'")
        if config.eval.max_examples < group:
            raise UserError(f"eval.max_examples={config.eval.max_examples} is less than the {group} images of a mix")
        if config.data.repeats > 1 and -(-config.batch_size // config.data.repeats) < group:
            raise UserError(f"data.repeats={config.data.repeats} would mix an image with itself; use fewer")
        named_blocks(config)

    def __init__(self, config: ConfigDict, data: DataInfo):
        super().__init__(config, data)
        m = config.method
        self.turns = self.group if m.mixing == "full" else 1
        self.keep = m.keep or self.num_visible
        kept = {"topk": TopKMask(self.keep, self.patches), "all": None,
                "oracle": OracleMask(self.group, self.patches)}[m.attention]
        blocks = named_blocks(config)
        self.mixer = self.encoder.clone(kept=tuple(kept if i in blocks else None for i in range(config.model.depth)))
        self.decoder = make_decoder(config, self.outputs, class_token=False)
        self.projector = Perceptron(config.model.width, m.projection, config.model.gelu, jnp.float32)

    @staticmethod
    def data_needs(config: ConfigDict) -> DataNeeds:
        return DataNeeds(_group(config))

    @staticmethod
    def num_visible_of(config: ConfigDict, patches: int) -> int:
        return patches // _group(config)

    def patch_order(self) -> PatchOrder:
        return PatchOrder("random", self.grid.shape, self.num_masked, _group(self.config))

    def init(self, key: jax.Array, batch: Batch) -> tuple[Params, Extras]:
        m = self.config.method
        encoder_key, decoder_key, segment_key, projector_key = jax.random.split(key, 4)
        few = {name: value[: self.group] for name, value in batch.items()}
        pixels, order = self.mixed(normalize(few["patches"])), self.mixed(few["order"])
        tokens, encoder = self.mixer.init_with_output(encoder_key, pixels, order)
        own = self.unmixed(tokens)
        params = {"encoder": encoder["params"],
                  "decoder": self.decoder.init(decoder_key, own, few["order"], self.num_masked)["params"]}
        if m.segments:
            params["segments"] = TOKEN_STD * jax.random.normal(segment_key, (self.group, self.config.model.width))
        if m.contrast_weight and m.projection:
            params["projector"] = self.projector.init(projector_key, own)["params"]
        return params, self.fitted_targets(batch)

    def turned(self, values: jax.Array) -> jax.Array:
        """Repeats values [B, N, ...] or [B] for each turn, to [B · turns, ...]; full mixing has G turns, otherwise 1.

        In turn j, every image of a group contributes its j-th share of patches.
        """
        if self.turns == 1:
            return values
        turns = [values if values.ndim == 1 else jnp.roll(values, -number * self.num_visible, 1)
                 for number in range(self.turns)]
        groups = [turn.reshape(-1, self.group, *turn.shape[1:]) for turn in turns]
        return jnp.stack(groups, 1).reshape(self.turns * len(values), *values.shape[1:])

    def mixed(self, values: jax.Array) -> jax.Array:
        """Mixes values [B, N, ...] to [B / G, N, ...]: token k of a mix is from image k // (N / G) of the group."""
        return values[:, : self.num_visible].reshape(-1, self.patches, *values.shape[2:])

    def unmixed(self, tokens: jax.Array) -> jax.Array:
        """Returns the tokens of each image [B, N / G, D] from mixed tokens [B / G, 1 + N, D], without class tokens."""
        return tokens[:, -self.patches :].reshape(-1, self.num_visible, tokens.shape[-1])

    def input_images(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See `Method.input_images`; also shows the (first) mix of each image, and the image's share of it."""
        mixes = self.grid.unpatchify(*(np.asarray(self.mixed(batch[name])) for name in ("patches", "order")))
        share = self.only(batch, np.arange(self.patches) < self.num_visible)
        return {"input": self.only(batch, True), "its share": share, "mix": np.repeat(mixes, self.group, 0)}

    def segments(self, params: Params) -> jax.Array | None:
        """Returns the segment embeddings of the tokens of a mix, float32 [N, D], one per image; None if off."""
        return jnp.repeat(params["segments"], self.num_visible, 0) if self.config.method.segments else None

    def encode_mixed(self, params: Params, batch: Batch) -> jax.Array:
        """Encodes the mixes of a batch with turns to tokens [B / G, 1 + N, D]."""
        pixels, order = normalize(self.mixed(batch["patches"])), self.mixed(batch["order"])
        return self.mixer.apply({"params": params["encoder"]}, pixels, order, added=self.segments(params))

    def predict(self, params: Params, batch: Batch) -> jax.Array:
        """Returns the predicted targets of each image's masked patches, float32 [B, M, outputs], in its order."""
        return self.decode(params, self.encode_mixed(params, batch), batch["order"])

    def decode(self, params: Params, tokens: jax.Array, order: jax.Array) -> jax.Array:
        """Decodes every image, with order int32 [B, N], from its tokens in the mixes [B / G, 1 + N, D].

        Returns:
          float32 [B, M, outputs].
        """
        return self.decoder.apply({"params": params["decoder"]}, self.unmixed(tokens), order, self.num_masked)

    def loss(self, params: Params, extras: Extras, batch: Batch, key: jax.Array, step: jax.Array,
             train: bool) -> tuple[jax.Array, tuple[Metrics, Extras]]:
        """See `Method.loss`; the mean squared error over masked patches plus the weighted homologous contrast.

        Evaluation adds how well homologous tokens are found: `purity` of each block (ops/homologous_attention; of the K
        largest scores, for any method.attention), their mean, and `neighbour_homology` of the encoder's output.
        """
        m = self.config.method
        batch = {name: self.turned(batch[name]) for name in ("patches", "order", "valid")}
        tokens = self.encode_mixed(params, batch)
        wanted = self.targets(extras, normalize(batch["patches"][:, self.num_visible :]))
        errors = self.decode(params, tokens, batch["order"]) - wanted
        metrics = {"reconstruction_loss": mean_square(errors, batch["valid"])}
        total, weight = metrics["reconstruction_loss"]
        if m.contrast_weight:
            contrast = self.contrast(params, tokens)
            metrics["contrast_loss"] = ((contrast * batch["valid"]).sum(), weight)
            total = total + m.contrast_weight * metrics["contrast_loss"][0]
        if not train:
            metrics |= self.homology(params, batch, tokens)
        return total / jnp.maximum(weight, 1), ({"loss": (total, weight), **metrics}, extras)

    def contrast(self, params: Params, tokens: jax.Array) -> jax.Array:
        """Returns the contrastive loss float32 [B], the mean over each image's tokens, of tokens [B / G, 1 + N, D]."""
        features = tokens[:, -self.patches :]
        if self.config.method.projection:
            features = self.projector.apply({"params": params["projector"]}, features)
        losses = supervised_contrast(features, same_source(self.patches, self.group), self.config.method.temperature)
        return losses.reshape(-1, self.num_visible).mean(1)

    def homology(self, params: Params, batch: Batch, tokens: jax.Array) -> Metrics:
        """Returns the homology metrics of `loss`, over the mixes whose images are all valid."""
        whole = batch["valid"].reshape(-1, self.group).min(1)
        found = {f"purity/{name}": each.mean((1, 2)) for name, each in self.purities(params, batch)}
        found["purity"] = sum(found.values()) / len(found)
        found["neighbour_homology"] = neighbor_homology(tokens[:, -self.patches :], self.group)
        return {name: ((value * whole).sum(), whole.sum()) for name, value in found.items()}

    def purities(self, params: Params, batch: Batch) -> Iterator[tuple[str, jax.Array]]:
        """Yields (name, purity of the queries of each head, float32 [B / G, H, N]) of each block."""
        pixels, order = normalize(self.mixed(batch["patches"])), self.mixed(batch["order"])
        between = intermediates.block_inputs(self.mixer, params["encoder"], pixels, order, self.segments(params))
        for number, entering in zip(range(self.config.model.depth), between, strict=False):
            name = intermediates.block_name(number)
            scores = intermediates.attention_scores(self.mixer, params["encoder"][name], entering)
            yield name, purity(scores, self.keep, self.group, self.patches)

    def forward_flops(self) -> int:
        m, d = self.config.model, self.config.method
        embed = 2 * self.num_visible * self.grid.patch_dim * m.width
        encoder = blocks_flops(1 + self.patches, m.width, m.depth, m.mlp_ratio) // self.group
        join = 2 * self.num_visible * m.width * d.decoder_width
        decoder = blocks_flops(self.patches, d.decoder_width, d.decoder_depth, m.mlp_ratio)
        head = 2 * self.num_masked * d.decoder_width * self.outputs
        contrast = 0
        if d.contrast_weight:
            projector = m.width * (m.width + d.projection) if d.projection else 0
            contrast = 2 * self.num_visible * (projector + self.patches * (d.projection or m.width))
        return self.turns * (embed + encoder + join + decoder + head + contrast)


def _group(config: ConfigDict) -> int:
    """Returns the number of images of a mix G = 1 / r; raises UserError unless it is an integer above 1."""
    ratio = config.method.ratio
    group = round(1 / ratio) if MIN_RATIO < ratio < 1 else 0
    if group < 2 or abs(1 / ratio - group) > GROUP_TOLERANCE * group:
        raise UserError(f"method.ratio={ratio}; expected 1 over a whole number of images: 0.5, 0.3333333, 0.25")
    return group


def _sizes(config: ConfigDict, group: int) -> list[tuple[int, int]]:
    """Returns the nearest smaller and larger (height, width) in pixels whose number of patches is a multiple of G.

    Each image then contributes at least two patches to a mix.
    """
    height, width, *patch = PatchGrid.of(config)
    found = []
    for step in (-1, 1):
        rows, columns = height, width
        while ((rows * columns) % group or rows * columns == group) and min(rows, columns) > 0:
            rows, columns = rows + step, columns + step
        if min(rows, columns) > 0:
            found.append((rows * patch[0], columns * patch[1]))
    return found
