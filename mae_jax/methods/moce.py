"""MoCE: 'Task-customized Masked Autoencoder via Mixture of Cluster-conditional Experts' (Liu et al., arXiv 2402.05382).
"""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from mae_jax.data.info import DataInfo, DataNeeds
from mae_jax.errors import UserError
from mae_jax.methods import fields
from mae_jax.methods.base import Batch, Extras, Metrics, Params, check_choices, named_blocks
from mae_jax.methods.mae import MAE
from mae_jax.models.intermediates import block_name
from mae_jax.models.moe import GATES, Gating
from mae_jax.models.upcycling import extract_path
from mae_jax.ops.flops import blocks_flops
from mae_jax.ops.patches import normalize
from mae_jax.ops.routing import Choice, choose, imbalance, uncertainty
from mae_jax.rng import stream_key

GATE_KINDS = ("cluster", "token")
WEIGHTS = ("straight", "value")
GATE_STD = 0.02  # initial standard deviation of gates; zero would route every cluster to the first expert
EPS = 1e-6
CENTROID_TOLERANCE = 1e-4  # maximum difference of a centroid from that of training


class MoCE(MAE):
    """MoCE: a masked autoencoder with a mixture of expert MLPs, routed by the cluster of an image.

    The gate of a block reads the centroid of the image's cluster, so that all tokens of all images of a cluster use the
    same expert. One path of experts can be extracted for a task, as an ordinary ViT. With method.gate='token', gates
    read tokens instead.
    """

    defaults = fields.MOCE

    @staticmethod
    def validate(config: ConfigDict) -> None:
        m = config.method
        MAE.validate(config)
        check_choices(m, gate=GATE_KINDS, gate_weight=WEIGHTS)
        if m.encoder_mask_tokens:
            raise UserError("method.encoder_mask_tokens=True is an ablation of MAE without experts; use False")
        if m.experts < 2:
            raise UserError(f"method.experts={m.experts} must be at least 2")
        if m.temperature <= 0:
            raise UserError(f"method.temperature={m.temperature} must be above 0")
        if min(m.noise, m.balance_weight, m.confidence_weight, m.distill_weight) < 0:
            raise UserError("method.noise and method.*_weight must not be negative")
        named_blocks(config)

    @staticmethod
    def data_needs(config: ConfigDict) -> DataNeeds:
        return DataNeeds(clusters=config.method.clusters if config.method.gate == "cluster" else None)

    def check_data(self) -> None:
        m = self.config.method
        if not self.by_token and m.num_clusters not in (0, self.num_clusters):
            raise UserError(f"method.num_clusters={m.num_clusters}, but {m.clusters} has {self.num_clusters}")

    def __init__(self, config: ConfigDict, data: DataInfo):
        super().__init__(config, data)
        m = config.method
        self.blocks = sorted(named_blocks(config))
        self.straight = m.gate_weight == "straight"
        # Without clusters (plan and bench do not open data), their number and width are those of the config.
        self.num_clusters, self.width = data.clusters.centroids.shape if data.clusters else (
            m.num_clusters or 1, m.centroid_width or config.model.width)
        self.by_token = m.gate == "token"
        self.loss_spans_batch = self.by_token and max(m.balance_weight, m.confidence_weight) > 0
        self.extra_encode_fields = () if self.by_token else ("cluster",)
        gating = Gating(m.experts, self.by_token, m.temperature, self.straight)
        self.dense = self.encoder
        self.encoder = self.encoder.clone(
            gating=tuple(gating if i in self.blocks else None for i in range(config.model.depth)))

    def eval_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        cluster = {"cluster": jax.ShapeDtypeStruct((self.config.batch_size,), jnp.int32)}
        return super().eval_spec() | ({} if self.by_token else cluster)

    def init(self, key: jax.Array, batch: Batch) -> tuple[Params, Extras]:
        encoder_key, decoder_key, *gate_keys = jax.random.split(key, 2 + len(self.blocks))
        one = {name: value[:1] for name, value in batch.items()}
        seen = normalize(one["patches"][:, : self.num_visible]), one["order"][:, : self.num_visible]
        first = None if self.by_token else Choice(jnp.zeros(1, jnp.int32), jnp.ones(1))
        tokens, encoder = self.encoder.init_with_output(encoder_key, *seen, choices=dict.fromkeys(self.blocks, first))
        decoder = self.decoder.init(decoder_key, tokens, one["order"], self.num_masked)
        params = {"encoder": encoder["params"], "decoder": decoder["params"]}
        if not self.by_token:
            shape = (self.width, self.config.method.experts)
            params["gates"] = {block_name(block): {"kernel": GATE_STD * jax.random.normal(gate_key, shape)}
                               for block, gate_key in zip(self.blocks, gate_keys, strict=True)}
        extras = self.fitted_targets(batch)
        if not self.by_token:
            extras |= {"centroids": jnp.zeros((self.num_clusters, self.width)),
                       "share": jnp.full(self.num_clusters, 1 / self.num_clusters)}
        if self.config.method.distill_weight:
            extras["start"] = extract_path(params["encoder"], dict.fromkeys(self.blocks, 0))
        return params, extras

    def fit_extras(self, params: Params, extras: Extras, batches: Iterable[dict[str, np.ndarray]] | None) -> Extras:
        """See `Method.fit_extras`; adds centroids, the share of images of each cluster, and the initial encoder.

        Centroids are normalized as by a layer norm. The initial encoder, for method.distill_weight, has the first
        experts: upcycling makes all experts equal.
        """
        fitted: Extras = {}
        if found := self.data.clusters:
            fitted = {"centroids": found.standard(), "share": found.sizes / found.sizes.sum()}
        if "start" in extras:
            fitted["start"] = extract_path(params["encoder"], dict.fromkeys(self.blocks, 0))
        return {**extras, **fitted} if fitted else extras

    def check_extras(self, extras: Extras) -> None:
        folder, found = self.config.method.clusters, self.data.clusters
        if found is None:
            return
        wanted = found.standard()
        read = extras["centroids"]
        if wanted.shape != read.shape or jnp.abs(read - wanted).max() > CENTROID_TOLERANCE:
            raise UserError(f"method.clusters={folder!r} has other centroids than those that this mixture was trained "
                            "with; name the folder of its clusters")

    def probabilities(self, params: Params, extras: Extras, key: jax.Array | None = None) -> dict[int, jax.Array]:
        """Returns the routing table: block → gate probabilities of the experts for each cluster, float32 [m, E].

        Args:
          params, extras: the state.
          key: key of the gate noise in training, independent per block; None: no noise.
        """
        m, table = self.config.method, {}
        for block in self.blocks:
            kernel = params["gates"][block_name(block)]["kernel"]
            logits = jnp.matmul(extras["centroids"], kernel, precision="highest")
            if key is not None and m.noise:
                logits += m.noise / m.experts * jax.random.normal(jax.random.fold_in(key, block), logits.shape)
            table[block] = jax.nn.softmax(logits / m.temperature)
        return table

    def choices(self, params: Params, extras: Extras, batch: Batch,
                key: jax.Array | None = None) -> dict[int, Choice | jax.Array]:
        """Returns block → `Choice` of the experts of the images.

        With method.gate='token', tokens choose in the block: the result is block → gate noise float32 [B, 1 + V, E], {}
        without noise.
        """
        m = self.config.method
        if self.by_token:
            shape = (len(batch["order"]), 1 + self.num_visible, m.experts)
            return {} if key is None or not m.noise else {
                block: m.noise / m.experts * jax.random.normal(jax.random.fold_in(key, block), shape)
                for block in self.blocks}
        rows = jnp.maximum(batch["cluster"], 0)  # padding has no cluster
        return {block: choose(each, self.straight).of(rows)
                for block, each in self.probabilities(params, extras, key).items()}

    def encode(self, params: Params, extras: Extras, batch: Batch, block: int = -1) -> jax.Array:
        return self.encoder.apply({"params": params["encoder"]}, normalize(batch["patches"]), batch["order"],
                                  block=block, choices=self.choices(params, extras, batch))

    def encode_visible(self, params: Params, extras: Extras, batch: Batch,
                       key: jax.Array | None = None) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Encodes the visible patches.

        Returns:
          Tokens [B, 1 + V, D]; and, with method.gate='token', block → gate probabilities [B, 1 + V, E], otherwise {}.
        """
        seen = normalize(batch["patches"][:, : self.num_visible]), batch["order"][:, : self.num_visible]
        tokens, sown = self.encoder.apply({"params": params["encoder"]}, *seen, mutable=[GATES],
                                          choices=self.choices(params, extras, batch, key))
        return tokens, {name: value[0] for name, value in sown.get(GATES, {}).items()}

    def loss(self, params: Params, extras: Extras, batch: Batch, key: jax.Array, step: jax.Array,
             train: bool) -> tuple[jax.Array, tuple[Metrics, Extras]]:
        """See `Method.loss`; the error over masked patches plus balance and confidence losses (3.2, in our form).

        The gate noise of clusters depends on the step only, so that micro-batches share it; that of tokens does not.
        """
        m, valid = self.config.method, batch["valid"]
        noise = key if self.by_token else stream_key(self.config.seed, step, "gates")
        tokens, of_tokens = self.encode_visible(params, extras, batch, noise if train else None)
        predicted = self.decoder.apply({"params": params["decoder"]}, tokens, batch["order"], self.num_masked)
        wanted = self.targets(extras, normalize(batch["patches"][:, self.num_visible :]))
        per_image = {"reconstruction_loss": jnp.square(predicted - wanted).mean((1, 2))}
        if m.distill_weight:
            per_image["distill_loss"] = self.distance(extras, batch, tokens)
        weight = valid.sum()
        sums = {name: (value * valid).sum() for name, value in per_image.items()}
        about = self.about_gates(params, extras, of_tokens, valid)
        total = (sums["reconstruction_loss"] + m.distill_weight * sums.get("distill_loss", 0)
                 + weight * (m.balance_weight * about["balance_loss"] + m.confidence_weight * about["confidence_loss"]))
        metrics = {"loss": (total, weight), **{name: (value, weight) for name, value in sums.items()},
                   **{name: (value * weight, weight) for name, value in about.items()}}
        return total / jnp.maximum(weight, 1), (metrics, extras)

    def about_gates(self, params: Params, extras: Extras, of_tokens: Mapping[str, jax.Array],
                    valid: jax.Array) -> dict[str, jax.Array]:
        """Returns the metrics of the gates, each a mean over blocks, float32 [].

        They are 'balance_loss', 'confidence_loss', 'gate_cv' (the square root of the imbalance) and 'gate_confidence'
        (the mean largest probability): over all images of the data for cluster gates, over the batch for token gates.
        """
        if self.by_token:
            share = jnp.repeat(valid / jnp.maximum(valid.sum(), 1) / (1 + self.num_visible), 1 + self.num_visible)
            tables = [(gate.reshape(-1, gate.shape[-1]), share) for gate in of_tokens.values()]
        else:
            tables = [(table, extras["share"]) for table in self.probabilities(params, extras).values()]

        def mean(function: Any) -> jax.Array:
            return sum(function(*each) for each in tables) / len(tables)

        balance = mean(imbalance)
        return {"balance_loss": balance, "confidence_loss": mean(uncertainty),
                "gate_cv": jnp.sqrt(balance), "gate_confidence": mean(lambda table, share: share @ table.max(-1))}

    def distance(self, extras: Extras, batch: Batch, tokens: jax.Array) -> jax.Array:
        """Returns the distillation loss float32 [B]: Huber loss between normalized tokens and the initial encoder's."""
        seen = normalize(batch["patches"][:, : self.num_visible]), batch["order"][:, : self.num_visible]
        start = jax.lax.stop_gradient(self.dense.apply({"params": extras["start"]}, *seen))

        def standard(x: jax.Array) -> jax.Array:
            x = x[:, 1:].astype(jnp.float32)
            return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + EPS)

        apart = jnp.abs(standard(tokens) - standard(start))
        return jnp.where(apart < 1, 0.5 * jnp.square(apart), apart - 0.5).mean((1, 2))

    def predict(self, params: Params, batch: Batch, extras: Extras | None = None) -> jax.Array:
        """See `MAE.predict`; images are routed by the centroids in the extras."""
        tokens, _ = self.encode_visible(params, extras or {}, batch)
        return self.decoder.apply({"params": params["decoder"]}, tokens, batch["order"], self.num_masked)

    def reconstruct(self, params: Params, extras: Extras, batch: Batch) -> dict[str, Any]:
        return {"pixels": self.as_pixels(self.predict(params, batch, extras), extras, batch)}

    def frozen_flops(self) -> int:
        if not self.config.method.distill_weight:
            return 0
        m = self.config.model
        return 2 * self.num_visible * self.grid.patch_dim * m.width + blocks_flops(
            1 + self.num_visible, m.width, m.depth, m.mlp_ratio)
