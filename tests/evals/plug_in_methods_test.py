"""Methods as plug-ins have them, without a config field of their own, in every evaluation that applies to them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mae_jax import methods
from mae_jax.data.masking import PatchOrder
from mae_jax.evals import reconstruction
from mae_jax.losses import segmentation
from mae_jax.methods.base import Method, mean_square, pool
from mae_jax.models.vit import make_encoder
from mae_jax.ops import resampling
from mae_jax.ops.patches import normalize
from tests.evals.evaluations_test import evaluated
from tests.helpers import tiny
from tests.helpers.tiers import all_slow_but


class Plain(Method):
    """An encoder, and a linear layer of so many outputs."""

    outputs = 3

    def __init__(self, config, data):
        super().__init__(config, data)
        self.encoder = make_encoder(config)

    def init(self, key, batch):
        encoder = self.encoder.init(key, normalize(batch["patches"][:1]), batch["order"][:1])["params"]
        return {"encoder": encoder, "kernel": jax.random.normal(key, (self.config.model.width, self.outputs))}, {}


class Classifier(Plain):
    task, classes = "classification", 3

    def logits(self, params, extras, batch):
        return pool(self.encode(params, extras, batch), "mean") @ params["kernel"]

    def loss(self, params, extras, batch, key, step, train):
        each = optax.softmax_cross_entropy(self.logits(params, extras, batch), jax.nn.one_hot(batch["label"], 3))
        total, weight = (each * batch["valid"]).sum(), batch["valid"].sum()
        return total / weight, ({"loss": (total, weight)}, extras)


class Tagger(Classifier):
    """Of several labels per image."""

    def eval_spec(self):
        return super().eval_spec() | {"labels": jax.ShapeDtypeStruct((self.config.batch_size, 3), jnp.uint8)}


class Segmenter(Plain):
    task, classes, background = "segmentation", 3, 0

    def eval_spec(self):
        shape = self.config.batch_size, self.grid.num_patches, self.grid.patch_dim // 3
        return super().eval_spec() | {"pixel_label": jax.ShapeDtypeStruct(shape, jnp.uint8)}

    def pixel_logits(self, params, extras, batch):
        logits = self.encode(params, extras, batch)[:, 1:] @ params["kernel"]
        return resampling.upsample(logits.reshape(-1, *self.grid.shape, self.classes), self.grid.patch)

    def pixel_classes(self, batch):
        return segmentation.pixels(batch["pixel_label"], self.grid)

    def loss(self, params, extras, batch, key, step, train):
        each = segmentation.cross_entropy(self.pixel_logits(params, extras, batch), self.pixel_classes(batch))
        total, weight = (each.mean((1, 2)) * batch["valid"]).sum(), batch["valid"].sum()
        return total / weight, ({"loss": (total, weight)}, extras)


class Reconstructor(Plain):
    """Reads clusters, without experts, and makes all masked patches alike."""

    reconstructs, outputs, masked = True, 4 * 4 * 3, 6
    extra_encode_fields = ("cluster",)

    def eval_spec(self):
        return super().eval_spec() | {"cluster": jax.ShapeDtypeStruct((self.config.batch_size,), jnp.int32)}

    def patch_order(self):
        return PatchOrder("random", self.grid.shape, self.masked)

    def reconstruct(self, params, extras, batch):
        visible = self.grid.num_patches - self.masked
        tokens = self.encoder.apply({"params": params["encoder"]}, normalize(batch["patches"][:, :visible]),
                                    batch["order"][:, :visible])
        pixels = pool(tokens, "mean") @ params["kernel"]
        return {"pixels": jnp.repeat(pixels[:, None], self.masked, 1)}

    def loss(self, params, extras, batch, key, step, train):
        wanted = normalize(batch["patches"][:, -self.masked :])
        total, weight = mean_square(self.reconstruct(params, extras, batch)["pixels"] - wanted, batch["valid"])
        return total / weight, ({"loss": (total, weight)}, extras)


class Rebuilt(Reconstructor):
    """Tells how it is built for another share of masked patches."""

    mask_ratio, reconstruction_note = 0.375, "all patches alike"

    def at_mask_ratio(self, ratio):
        other = type(self)(self.config, self.data)
        other.masked = round(ratio * self.grid.num_patches)
        return other


PROBED = {"linear/top1", "knn/top1", "rankme"}
CASES = {  # class → its figures besides the loss, those at a run's end, its images
    Classifier: ({"top1", "mean_per_class"}, {"imagenet_v2/top1"}, ["attention", "confusion"]),
    Tagger: ({"map", "map_all"}, {"imagenet_v2/top1"}, ["attention"]),
    Segmenter: ({"miou", "pixel_accuracy"}, {"attention_iou", "attention_mass", "attention_head", "foreground_share"},
             ["attention", "segment"]),
    Rebuilt: (PROBED, set(), ["attention", "ratios", "reconstruct"]),
}


@pytest.mark.parametrize("kind", all_slow_but((Classifier,), CASES))
def test_a_method_without_fields_of_its_own_is_evaluated_by_all_that_applies(kind, monkeypatch):
    monkeypatch.setitem(methods.TABLE, "plain", kind)
    monkeypatch.setitem(tiny.OWN, "plain", {})
    evaluator, state = evaluated("plain", {"eval.sets": ("imagenet_v2",)})
    assert set(evaluator.method.config.method) == {"name"}
    figures, last, images = CASES[kind]
    figures = figures | {"loss"}
    found = evaluator.scalars(state)
    assert found.keys() == {f"eval/{name}" for name in figures}
    assert all(np.isfinite(value) for value in found.values())
    assert set(evaluator.metric_names(state)) == figures
    assert evaluator.final_evaluations(state).keys() == {f"eval/{name}" for name in last}
    drawn = dict(evaluator.images(state))
    assert sorted(drawn) == images
    assert all(image.dtype == np.uint8 and image.shape[2] == 3 for image in drawn.values())
    if kind is Classifier:
        assert "eval/sgd/top1" in evaluator.on_demand("frozen_probes", state)
    assert bool(evaluator.last_evaluations(state)) == (evaluator.method.task == "pretraining")


@pytest.mark.parametrize(("kind", "titles"), [
    (Reconstructor, ["Reconstructions: visible patches are copied; colors are as the method has them"]),
    (Rebuilt, ["Reconstructions: 38% of the patches are masked; visible patches are copied; all patches alike",
               "Reconstructions at several mask ratios: trained at 38%; all patches alike"])])
def test_images_of_masked_patches_say_what_the_method_says_of_them(kind, titles, monkeypatch):
    monkeypatch.setitem(methods.TABLE, "plain", kind)
    monkeypatch.setitem(tiny.OWN, "plain", {})
    evaluator, state = evaluated("plain", {})
    shown = []
    monkeypatch.setattr(reconstruction, "tile", lambda rows, captions, title, *_, **__: shown.append((rows, title)))
    ctx = evaluator._context((), state.params, state, "eval")
    list(reconstruction.Reconstruction().images(ctx))
    assert [title for _, title in shown] == titles
    gray = [(row[1] == reconstruction.GRAY).all(-1).mean() for row in shown[-1][0]]
    wanted = [4 / 16, 8 / 16, 12 / 16, 14 / 16] if kind is Rebuilt else [6 / 16] * len(gray)
    np.testing.assert_allclose(gray, wanted, atol=0.02)  # an image may have gray pixels of its own
