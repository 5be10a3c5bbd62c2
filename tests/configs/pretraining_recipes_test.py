"""The recipes of SplitMask, BEiT-style prediction, DINO and MixedAE: published values, how long small data is shown."""

import jax
import pytest

from mae_jax.config import validate
from mae_jax.data.sources.expected_sizes import SIZES
from mae_jax.durations import steps
from mae_jax.param_tree import flatten
from tests.configs.recipes_test import leaves, method_of, resolved

BEIT_OPTIMIZER = {"batch_size": 2048, "optim.lr": 1.5e-3 / 8, "optim.betas": (0.9, 0.98), "optim.clip": 3.0,
                  "optim.weight_decay": 0.05, "optim.min_lr": 1e-5, "model.layer_scale": 0.1, "model.drop_path": 0.1}
SETTINGS = {
    "vit_b_beit": BEIT_OPTIMIZER | {
        "method.masked": 75, "method.masking": "block", "optim.warmup": "10 epochs", "train.duration": "800 epochs",
        "method.vocabulary": 8192, "data.crop_scale": (0.08, 1.0)},
    "vit_b_splitmask": BEIT_OPTIMIZER | {
        "method.decoder_depth": 2, "method.decoder_width": 768, "method.vocabulary": 8192, "method.match_weight": 1.0,
        "train.duration": "300 epochs"},
    "vit_s_splitmask": BEIT_OPTIMIZER | {
        "method.decoder_depth": 2, "method.decoder_width": 384, "train.duration": "300 epochs", "model.width": 384},
    "vit_s_dino": {
        "batch_size": 512, "optim.lr": 5e-4, "optim.min_lr": 1e-6, "optim.weight_decay": 0.04,
        "optim.final_weight_decay": 0.4, "optim.clip": 3.0, "model.drop_path": 0.1, "optim.warmup": "10 epochs",
        "method.out_dim": 65_536, "method.temperature": 0.1, "method.teacher_temperature": 0.04,
        "method.momentum": 0.996, "method.center_momentum": 0.9, "method.local_views": 8,
        "method.local_size": (96, 96), "method.global_scale": (0.4, 1.0), "method.local_scale": (0.05, 0.4),
        "method.freeze_last": "1 epochs", "train.duration": "100 epochs"},
    "vit_b_mixedae": {
        "batch_size": 4096, "optim.lr": 1.5e-4, "optim.betas": (0.9, 0.95), "optim.weight_decay": 0.05,
        "optim.warmup": "40 epochs", "train.duration": "1600 epochs", "method.ratio": 0.25, "method.mixing": "compose",
        "method.attention": "topk", "method.blocks": "all", "method.target": "norm_pix", "method.decoder_depth": 8},
    "vit_b_mixedae:naive,300": {"method.attention": "all", "method.contrast_weight": 0.0, "method.segments": False,
                                "train.duration": "300 epochs"},
    "vit_b_mixedae:half,oracle,no_segments,last_half": {
        "method.ratio": 0.5, "method.attention": "oracle", "method.segments": False, "method.blocks": "last_half"},
    "vit_s_dino:800": {"batch_size": 1024, "method.local_views": 10, "method.teacher_temperature": 0.07,
                       "method.first_teacher_temperature": 0.04, "method.temperature_warmup": "30 epochs"},
}
TARGETS = {"cars": "cars196", "sketch": "domainnet/sketch", "clipart": "domainnet/clipart",
           "painting": "domainnet/painting", "food101": "food101", "coco": "coco/2017"}


@pytest.mark.parametrize("text", SETTINGS)
def test_a_recipe_has_the_published_values(text):
    values = leaves(resolved(text))
    assert {name: values[name] for name in SETTINGS[text]} == SETTINGS[text]


@pytest.mark.parametrize(("text", "parts"), [
    # ViT-B without positions, and LayerScale (BEiT: a mask token); two blocks, joint, norm and a head of 8192.
    ("vit_b_splitmask", {"encoder": 85_647_360 + 24 * 768,
                         "decoder": 2 * 7_087_872 + 768 * 769 + 768 + 2 * 768 + 8192 * 769}),
    ("vit_b_beit", {"encoder": 85_647_360 + 24 * 768 + 768, "head": 8192 * 769}),
    # A decoder of ViT-B's MAE, 8 blocks of 512; four segments; two layers behind the contrast.
    ("vit_b_mixedae", {"encoder": 85_647_360, "decoder": 8 * 3_152_384 + 512 * 769 + 512 + 2 * 512 + 768 * 513,
                       "segments": 4 * 768, "projector": 768 * 769 + 256 * 769}),
    ("vit_s_dino", {"encoder": 21_589_632 + 384,
                    "head": 384 * 2048 + 2048 + 2048 * 2049 + 2048 * 256 + 256 + 256 * 65_536})])
def test_the_parameters_are_as_many_as_published(text, parts):
    method = method_of(resolved(text))
    shapes = flatten(jax.eval_shape(method.init, jax.random.key(0), method.batch_spec())[0])
    found = {part: sum(leaf.size for name, leaf in shapes.items() if name.split("/")[0] == part) for part in parts}
    assert found == parts
    assert sum(parts.values()) == sum(leaf.size for leaf in shapes.values())


def test_small_data_are_iterated_as_often_as_imagenet_and_at_most_5000_epochs():
    def length(argument, examples):
        config = resolved(f"splitmask_small:{argument}")
        return steps(config.train.duration, config.batch_size, examples)

    imagenet = SIZES["imagenet2012"]["train"]
    whole = steps("300 epochs", 2048, imagenet)
    for argument, epochs in (("imagenet_10pct", 3_000), ("imagenet_1pct", 30_000)):
        size = SIZES[f"imagenet2012_subset/{argument.split('_')[1]}"]["train"]
        assert length(argument, size) == whole
        assert whole * 2048 / size == pytest.approx(epochs, rel=2e-3)
    for argument, name in TARGETS.items():
        size = SIZES[name]["train"]
        assert length(argument, size) == min(whole, size * 5000 // 2048)
    assert length("cars", SIZES["cars196"]["train"]) < whole
    assert length("coco", SIZES["coco/2017"]["train"]) == whole
    assert length("folder", 1_000) == 1_000 * 5000 // 2048


@pytest.mark.parametrize("argument", [*TARGETS, "imagenet_1pct", "imagenet_10pct", "folder", "cars,S", "S"])
def test_small_data_keep_the_best_checkpoint_by_a_part_of_what_they_train_on(argument):
    config = resolved(f"splitmask_small:{argument}")
    validate(config)
    assert (config.data.train_split, config.data.val_split) == ("train[:95%]", "train[95%:]")
    unlabeled = argument.split(",")[0] in ("folder", "coco", "S")
    assert config.checkpoint.best_metric == ("loss" if unlabeled else "knn/top1")
    every, total = (steps(text, 2048, 8144) for text in (config.eval.every, config.train.duration))
    assert total // every in (19, 20)
    assert config.method.decoder_width == config.model.width == (384 if argument.endswith("S") else 768)
