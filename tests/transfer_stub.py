"""Stands in for the method 'supervised' until it is there: an encoder and a linear head."""

import jax
import jax.numpy as jnp
import optax

from mae_jax import methods
from mae_jax.methods.mae import MAE
from mae_jax.ops.patches import normalize


class Stub(MAE):
    defaults = {**MAE.defaults, "classes": 0, "multi_label": False, "head": "linear", "train_blocks": -1.0,
                "loss": "cross_entropy", "smoothing": 0.0, "mixup": 0.0, "cutmix": 0.0, "mix_group": 0, "erase": 0.0,
                "head_std": 0.01}
    reconstruct = None

    def __getattribute__(self, name):
        if name == "reconstruct":
            raise AttributeError(name)
        return super().__getattribute__(name)

    def init(self, key, batch):
        tokens, encoder = self.encoder.init_with_output(key, normalize(batch["patches"][:1]), batch["order"][:1], 0)
        head = {"kernel": jnp.zeros((tokens.shape[-1], 20)), "bias": jnp.zeros(20)}
        return {"encoder": encoder["params"], "head": head}, {}

    def loss(self, params, extras, batch, key, step, train):
        features = self.encode(params, extras, batch)[:, 1:].mean(1)
        logits = features @ params["head"]["kernel"] + params["head"]["bias"]
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]) * batch["valid"]
        right = (logits.argmax(-1) == batch["label"]) * batch["valid"]
        weight = batch["valid"].sum()
        metrics = {"loss": (loss.sum(), weight), "top1": (right.sum(), weight), "mean_per_class": (right.sum(), weight)}
        return loss.sum() / jnp.maximum(weight, 1), (metrics, extras)


methods.TABLE.setdefault("supervised", Stub)
jax.config.update("jax_threefry_partitionable", True)
