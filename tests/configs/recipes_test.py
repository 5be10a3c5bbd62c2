"""The recipes for labels against what their papers and published commands say, written out here a second time."""

from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import jax
import pytest
from ml_collections import ConfigDict

from mae_jax import presets
from mae_jax.commands import recipes
from mae_jax.config import for_platform, validate
from mae_jax.data import ASSUMED
from mae_jax.durations import Timeline, steps
from mae_jax.errors import UserError
from mae_jax.methods import build
from mae_jax.methods.base import Method
from mae_jax.models.vit import drop_path_rates
from mae_jax.ops.patches import PatchGrid
from mae_jax.param_tree import flatten
from mae_jax.training.optim import layer_rate, make_schedule, peak_lr
from tests.config.config_test import leaves, recipe
from tests.helpers.tiers import slow

IMAGENET, IMAGENET_21K = 1_281_167, 13_153_500  # training images; of the second, any number does here


def resolved(text: str) -> ConfigDict:
    """Returns the config of 'file:argument'."""
    name, _, arg = text.partition(":")
    return recipe(Path(f"configs/{name}.py"), arg)


def method_of(config: ConfigDict) -> Method:
    """Returns a config's method for the numbers of ImageNet-1K."""
    return build(for_platform(config, "cpu"), ASSUMED)


class Row(NamedTuple):
    """What a recipe comes to."""

    lr: float  # the highest, absolute
    min_lr: float
    batch: int
    steps: int  # of ImageNet-1K or, where the recipe is for it, ImageNet-21K
    warmup: int
    weight_decay: float
    embedding: float  # factor of the embedding's learning rate, to three digits
    drop: tuple[float, float]  # rates of the first and the last block
    side: int  # pixels
    patches: int
    ema: float = 0.0


MAE = {  # MAE Tables 9, 10 and 11; facebookresearch/mae, FINETUNE.md
    "finetune": Row(2e-3, 1e-6, 1024, 125_113, 6_255, 0.05, 3.70e-3, (0, 0.1), 224, 196),
    "finetune:B": Row(2e-3, 1e-6, 1024, 125_113, 6_255, 0.05, 3.70e-3, (0, 0.1), 224, 196),
    "finetune:L": Row(4e-3, 1e-6, 1024, 62_556, 6_255, 0.05, 7.53e-4, (0, 0.2), 224, 196),
    "finetune:H": Row(4e-3, 1e-6, 1024, 62_556, 6_255, 0.05, 7.53e-5, (0, 0.3), 224, 256),
    "finetune:B,paper": Row(4e-3, 1e-6, 1024, 125_113, 6_255, 0.05, 2.38e-2, (0, 0.1), 224, 196),
    "finetune:L,paper": Row(4e-3, 1e-6, 1024, 62_556, 6_255, 0.05, 7.53e-4, (0, 0.1), 224, 196),
    "finetune:H,paper": Row(4e-3, 1e-6, 1024, 62_556, 6_255, 0.05, 7.53e-5, (0, 0.2), 224, 256),
    "finetune:B,scratch": Row(1.6e-3, 1e-6, 4096, 93_835, 6_255, 0.3, 1, (0, 0.1), 224, 196, 0.9999),
    "finetune:L,scratch": Row(1.6e-3, 1e-6, 4096, 62_556, 6_255, 0.3, 1, (0, 0.2), 224, 196, 0.9999),
    "finetune:H,scratch": Row(1.6e-3, 1e-6, 4096, 62_556, 6_255, 0.3, 1, (0, 0.2), 224, 256, 0.9999),
    "linear_probe": Row(6.4, 0, 16384, 7_037, 781, 0, 1, (0, 0), 224, 196),
    "linear_probe:L": Row(6.4, 0, 16384, 3_909, 781, 0, 1, (0, 0), 224, 196),
    "linear_probe:H": Row(6.4, 0, 16384, 3_909, 781, 0, 1, (0, 0), 224, 256),
    "linear_probe:sgd": Row(1.6, 0, 4096, 28_150, 3_127, 0, 1, (0, 0), 224, 196),
}
DEIT3 = {  # facebookresearch/deit, README_revenge.md; 400 epochs: affjljoo3581/deit3-jax
    "deit3:S": Row(4e-3, 1e-5, 2048, 500_455, 3_127, 0.05, 1, (0.05, 0.05), 224, 196, 0.99996),
    "deit3": Row(3e-3, 1e-5, 2048, 500_455, 3_127, 0.05, 1, (0.2, 0.2), 192, 144, 0.99996),
    "deit3:B,800": Row(3e-3, 1e-5, 2048, 500_455, 3_127, 0.05, 1, (0.2, 0.2), 192, 144, 0.99996),
    "deit3:L": Row(3e-3, 1e-5, 2048, 500_455, 3_127, 0.05, 1, (0.45, 0.45), 192, 144, 0.99996),
    "deit3:H": Row(3e-3, 1e-5, 2048, 500_455, 3_127, 0.05, 1, (0.6, 0.6), 154, 121, 0.99996),
    "deit3:H52": Row(3e-3, 1e-5, 2048, 500_455, 3_127, 0.05, 1, (0.6, 0.6), 154, 121, 0.99996),
    "deit3:S,400": Row(4e-3, 1e-5, 2048, 250_227, 3_127, 0.02, 1, (0, 0), 224, 196, 0.99996),
    "deit3:B,400": Row(3e-3, 1e-5, 2048, 250_227, 3_127, 0.02, 1, (0.1, 0.1), 192, 144, 0.99996),
    "deit3:L,400": Row(3e-3, 1e-5, 2048, 250_227, 3_127, 0.02, 1, (0.4, 0.4), 192, 144, 0.99996),
    "deit3:H,400": Row(3e-3, 1e-5, 2048, 250_227, 3_127, 0.02, 1, (0.5, 0.5), 154, 121, 0.99996),
    "deit3:B,to224": Row(1e-5, 1e-5, 512, 50_045, 12_511, 0.1, 1, (0.2, 0.2), 224, 196),
    "deit3:L,to224": Row(1e-5, 1e-5, 512, 50_045, 12_511, 0.1, 1, (0.45, 0.45), 224, 196),
    "deit3:H,to224": Row(1e-5, 1e-5, 512, 50_045, 12_511, 0.1, 1, (0.55, 0.55), 224, 256),
    "deit3:S,to384": Row(1e-5, 1e-5, 512, 50_045, 12_511, 0.1, 1, (0, 0), 384, 576),
    "deit3:B,to384": Row(1e-5, 1e-5, 512, 50_045, 12_511, 0.1, 1, (0.15, 0.15), 384, 576),
    "deit3:L,to384": Row(1e-5, 1e-5, 512, 50_045, 12_511, 0.1, 1, (0.4, 0.4), 384, 576),
    "deit3:S,in21k": Row(1e-3, 1e-5, 2048, 1_541_425, 32_113, 0.02, 1, (0.05, 0.05), 224, 196, 0.99996),
    "deit3:B,in21k": Row(1e-3, 1e-5, 2048, 1_541_425, 32_113, 0.02, 1, (0.1, 0.1), 224, 196, 0.99996),
    "deit3:L,in21k": Row(1e-3, 1e-5, 2048, 1_541_425, 32_113, 0.02, 1, (0.3, 0.3), 224, 196, 0.99996),
    "deit3:H,in21k": Row(1e-3, 1e-5, 2048, 578_034, 32_113, 0.02, 1, (0.5, 0.5), 126, 81, 0.99996),
    "deit3:S,in21k_to_1k": Row(3e-4, 1e-5, 2048, 31_278, 3_127, 0.02, 1, (0.05, 0.05), 224, 196),
    "deit3:B,in21k_to_1k": Row(3e-4, 1e-5, 2048, 31_278, 3_127, 0.02, 1, (0.15, 0.15), 224, 196),
    "deit3:L,in21k_to_1k": Row(3e-4, 1e-5, 2048, 31_278, 3_127, 0.02, 1, (0.4, 0.4), 224, 196),
    "deit3:H,in21k_to_1k": Row(3e-4, 1e-5, 2048, 31_278, 3_127, 0.02, 1, (0.45, 0.45), 224, 256),
}

UPERNET = {  # implus/mae_segmentation; microsoft/unilm, beit; bytedance/ibot; facebookresearch/xcit
    "upernet": Row(1e-4, 0, 16, 160_000, 1_500, 0.05, 3.70e-3, (0, 0.1), 512, 1024),
    "upernet:beit": Row(7e-4, 0, 16, 160_000, 1_500, 0.05, 3.70e-3, (0, 0.1), 512, 1024),
    "upernet:ibot": Row(8e-5, 0, 16, 160_000, 1_500, 0.05, 3.70e-3, (0, 0.1), 512, 1024),
    "upernet:xcit": Row(6e-5, 0, 16, 160_000, 1_500, 0.01, 1, (0.05, 0.05), 512, 1024),
}


@pytest.mark.parametrize("text", [*MAE, *DEIT3, *UPERNET])
def test_a_recipe_comes_to_the_published_numbers(text):
    config, row = resolved(text), {**MAE, **DEIT3, **UPERNET}[text]
    validate(config)
    examples = IMAGENET_21K if text.endswith("in21k") else IMAGENET
    o, rates, patches = config.optim, drop_path_rates(config), PatchGrid.of(config).shape
    found = Row(
        lr=pytest.approx(peak_lr(config)), min_lr=o.min_lr, batch=config.batch_size,
        steps=steps(config.train.duration, config.batch_size, examples),
        warmup=steps(o.warmup, config.batch_size, examples), weight_decay=o.weight_decay,
        embedding=pytest.approx(layer_rate("encoder/patch_embed/kernel", o.layer_decay, config.model.depth), rel=2e-3),
        drop=(rates[0], rates[-1]), side=config.data.image_size[0], patches=prod(patches), ema=o.ema)
    assert found == row
    assert patches[0] == patches[1]


@pytest.mark.parametrize(("text", "start", "peak", "end"), [
    ("finetune:L", 0, 4e-3, 1e-6), ("linear_probe", 0, 6.4, 0), ("deit3:S", 1e-6, 4e-3, 1e-5),
    ("deit3:B,to224", 1e-6, 1e-5, 1e-5), ("deit3:H,in21k_to_1k", 1e-6, 3e-4, 1e-5)])
def test_the_learning_rate_rises_from_and_falls_to_what_is_published(text, start, peak, end):
    config = resolved(text)
    schedule = make_schedule(method_of(config))
    total, warmup = (steps(duration, config.batch_size, IMAGENET)
                     for duration in (config.train.duration, config.optim.warmup))
    assert [float(schedule(step)) for step in (0, warmup, total)] == pytest.approx([start, peak, end], rel=1e-5)


@pytest.mark.parametrize(("text", "own"), [
    ("upernet", {"relative_position_bias": True, "encoder_norm": False, "head_width": 0, "test": "slide"}),
    ("upernet:beit", {"relative_position_bias": True, "encoder_norm": False, "head_width": 0, "test": "slide"}),
    ("upernet:ibot", {"relative_position_bias": False, "encoder_norm": True, "head_width": 0, "test": "slide"}),
    ("upernet:xcit", {"relative_position_bias": False, "encoder_norm": False, "head_width": 512, "test": "whole"})])
def test_upernet_is_that_of_its_protocol(text, own):
    config = resolved(text)
    method = method_of(config)
    assert {name: config.method[name] for name in own} == own
    assert (method.maps, method.stride, method.classes) == ((3, 5, 7, 11), (341, 341), 150)
    head = method.upernet
    assert (head.width, head.aux_width, head.norm) == (own["head_width"] or 768, 256, "batch")
    assert (config.method.aux_weight, config.method.dropout, config.method.train_blocks) == (0.4, 0.1, -1)
    assert (config.data.augment, config.data.color, config.data.scales, config.data.mask_offset) == (
        "scaled", "distort", (0.5, 2.0), 1)
    assert config.optim.warmup_lr == pytest.approx(1e-6 * peak_lr(config))
    assert ("layer_scale" in config.model.auto) == (text != "upernet")
    assert config.model.layer_scale == (text == "upernet")


@pytest.mark.parametrize(("size", "last"), [("B", 0.65), ("L", 0.75), ("H", 0.75)])
def test_fine_tuning_slows_the_last_block_by_one_factor_and_the_head_by_none(size, last):
    config = resolved(f"finetune:{size}")
    decay, depth = config.optim.layer_decay, config.model.depth
    assert layer_rate(f"encoder/block_{depth - 1}/attn/qkv/kernel", decay, depth) == last
    assert layer_rate("head/kernel", decay, depth) == layer_rate("fc_norm/scale", decay, depth) == 1


MAE_FINETUNE = {
    "data.augment": "random", "data.color": "rand", "data.crop_scale": (0.08, 1.0), "data.repeats": 1,
    "eval.crop_ratio": (0.875,), "model.pool": "mean", "model.positions": "learned", "model.layer_scale": 0.0,
    "model.drop_path_rates": "linear", "model.init": "xavier", "method.loss": "cross_entropy", "method.smoothing": 0.1,
    "method.mixup": 0.8, "method.cutmix": 1.0, "method.erase": 0.25, "method.head": "linear", "method.head_std": 2e-5,
    "method.train_blocks": -1.0, "optim.name": "adamw", "optim.betas": (0.9, 0.999), "optim.eps": 1e-8,
    "optim.warmup_lr": 0.0, "optim.clip": 0.0}
PROBE = {
    "data.augment": "single", "data.color": "none", "data.crop_scale": (0.08, 1.0), "eval.crop_ratio": (0.875,),
    "model.pool": "cls", "model.positions": "fixed", "method.loss": "cross_entropy", "method.smoothing": 0.0,
    "method.mixup": 0.0, "method.cutmix": 0.0, "method.erase": 0.0, "method.head": "probe", "method.head_std": 0.01,
    "method.train_blocks": 0.0, "optim.name": "lars", "optim.momentum": 0.9, "optim.clip": 0.0}
DEIT3_800 = {
    "data.augment": "random", "data.color": "three", "data.crop_scale": (0.08, 1.0), "data.repeats": 3,
    "eval.crop_ratio": (1.0,), "model.pool": "cls", "model.positions": "random", "model.layer_scale": 1e-4,
    "model.drop_path_rates": "constant", "model.init": "normal", "method.loss": "bce", "method.smoothing": 0.0,
    "method.mixup": 0.8, "method.cutmix": 1.0, "method.erase": 0.0, "method.head": "linear", "method.head_std": 0.02,
    "optim.name": "lamb", "optim.betas": (0.9, 0.999), "optim.eps": 1e-8, "optim.clip": 1.0, "optim.layer_decay": 1.0}
DEIT3_21K = DEIT3_800 | {
    "data.augment": "simple", "data.repeats": 1, "method.loss": "cross_entropy", "method.smoothing": 0.1,
    "method.mixup": 0.0}
DEIT3_FINETUNE = DEIT3_800 | {
    "data.color": "rand", "data.repeats": 1, "method.loss": "cross_entropy", "method.smoothing": 0.1,
    "optim.name": "adamw", "optim.clip": 0.0}
SETTINGS: dict[str, dict[str, Any]] = {
    "finetune": MAE_FINETUNE,
    "finetune:H": MAE_FINETUNE,
    "finetune:L,paper": MAE_FINETUNE | {"method.erase": 0.0},
    "finetune:B,scratch": MAE_FINETUNE | {"method.erase": 0.0, "optim.betas": (0.9, 0.95), "optim.layer_decay": 1.0},
    "finetune:L,cls": MAE_FINETUNE | {"model.pool": "cls"},
    "linear_probe": PROBE,
    "linear_probe:H,sgd": PROBE | {"optim.name": "sgd"},
    "deit3": DEIT3_800,
    "deit3:L,400": DEIT3_800,
    "deit3:H,in21k": DEIT3_21K | {"data.source": "tfrecord", "data.eval_split": ""},
    "deit3:B,in21k_to_1k": DEIT3_21K | {"data.source": "tfds", "data.eval_split": "validation"},
    "deit3:B,to224": DEIT3_FINETUNE,
    "deit3:S,to384": DEIT3_FINETUNE,
}


@pytest.mark.parametrize("text", SETTINGS)
def test_a_recipe_has_the_published_loss_augmentation_model_and_optimizer(text):
    values = leaves(resolved(text))
    assert {name: values[name] for name in SETTINGS[text]} == SETTINGS[text]


def built(text: str) -> tuple[Method, dict[str, jax.ShapeDtypeStruct]]:
    """Returns the method of a recipe and path → shape of its parameters."""
    config = resolved(text)
    method = method_of(config)
    shapes, _ = jax.eval_shape(method.init, jax.random.key(0), method.batch_spec())
    return method, flatten(shapes)


@pytest.mark.parametrize(("text", "published"), [
    ("finetune:B", 86_567_656), slow("finetune:L", 304_326_632), slow("finetune:H", 632_045_800),
    slow("finetune:L,cls", 304_326_632)])
def test_mae_classifiers_have_the_published_number_of_parameters_but_for_the_class_tokens_position(text, published):
    method, shapes = built(text)
    assert sum(leaf.size for leaf in shapes.values()) == published - method.config.model.width


@pytest.mark.parametrize(("text", "published"), [
    ("linear_probe", 86_567_656), slow("linear_probe:L", 304_326_632), slow("linear_probe:H", 632_045_800)])
def test_probes_have_it_but_for_all_positions_which_are_constants(text, published):
    method, shapes = built(text)
    positions = 1 + prod(PatchGrid.of(method.config).shape)
    assert sum(leaf.size for leaf in shapes.values()) == published - positions * method.config.model.width


@pytest.mark.parametrize(("text", "published"), [  # timm 1.0.31: deit3_small_patch16_224 and so on
    ("deit3:S", 22_059_496), ("deit3:B,to224", 86_585_320), slow("deit3:L,to224", 304_374_760),
    slow("deit3:H,to224", 632_126_440), slow("deit3:B,to384", 86_877_160)])
def test_deit3_classifiers_have_the_number_of_parameters_of_timms(text, published):
    _, shapes = built(text)
    assert sum(leaf.size for leaf in shapes.values()) == published


@pytest.mark.slow
def test_an_h_of_52_blocks_is_an_h_with_20_more():
    block = 12 * 1280**2 + 15 * 1280  # kernels; norms, biases and the scales of both branches
    small, large = (sum(leaf.size for leaf in built(text)[1].values()) for text in ("deit3:H", "deit3:H52"))
    assert large - small == 20 * block


def test_a_probe_learns_the_head_alone():
    method, shapes = built("linear_probe")
    assert {name for name in shapes if method.is_trainable(name)} == {"head/kernel", "head/bias"}


def test_partial_fine_tuning_of_4_of_24_blocks_learns_these_and_the_head():
    config = resolved("finetune:L,paper")
    config.method.train_blocks = 4
    validate(config)
    method, shapes = method_of(config), built("finetune:L,paper")[1]
    learns = {name.split("/")[1] if name.startswith("encoder") else name.split("/")[0]
              for name in shapes if method.is_trainable(name)}
    assert learns == {"block_20", "block_21", "block_22", "block_23", "fc_norm", "head"}


@pytest.mark.parametrize(("text", "line"), [
    ("deit3:S,to224", "the stage 'to224' is published for the sizes B, L, H"),
    ("deit3:H52,to384", "the stage 'to384' is published for the sizes S, B, L"),
    ("deit3:to384,400", "the config arguments '400' and 'to384' exclude each other"),
    ("finetune:L,paper,B", "the config arguments 'B' and 'L' exclude each other"),
    ("finetune:repo,scratch", "the config arguments 'repo' and 'scratch' exclude each other"),
    ("deit3:300", "unknown config argument '300'")])
def test_arguments_for_which_there_is_no_recipe_are_refused_in_one_line(text, line):
    with pytest.raises(UserError) as error:
        resolved(text)
    assert line in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("one", "other"), [
    ("finetune:paper,L", "finetune:L,paper"), ("deit3:to224,H", "deit3:H,to224"),
    ("linear_probe:sgd,H", "linear_probe:H,sgd"), ("folder_finetune:all,scratch,B", "folder_finetune:B,scratch,all")])
def test_the_order_of_arguments_does_not_matter(one, other):
    assert resolved(one).to_dict() == resolved(other).to_dict()


def test_a_folders_validation_part_is_no_part_of_what_is_learned_from():
    data, checkpoint = resolved("folder_finetune").data, resolved("folder_finetune").checkpoint
    assert (data.train_split, data.val_split, checkpoint.best_metric) == ("train[:90%]", "train[90%:]", "top1")
    everything = resolved("folder_finetune:all")
    assert (everything.data.train_split, everything.data.val_split) == ("train", "")
    assert everything.checkpoint.best_metric == ""


def test_fine_tuning_on_a_folder_takes_steps_enough_for_few_images_and_epochs_for_many():
    config = resolved("folder_finetune:all")
    few, many = (Timeline.of(config, examples) for examples in (60, 6400))
    assert (few.total, few.warmup, few.eval_every, few.save_every) == (400, 20, 20, 20)
    assert (many.total, many.warmup, many.eval_every, many.save_every) == (10_000, 500, 500, 500)
    assert Timeline.of(resolved("folder_finetune:scratch,all"), 60).total == 1200


def test_fine_tuning_on_a_folder_mixes_no_images_on_a_laptop_or_where_it_is_told_so():
    def mixing(text):
        config = resolved(text)
        return config.data.color, config.method.mixup, config.method.cutmix

    assert mixing("folder_finetune") == mixing("folder_finetune:S,all") == ("rand", 0.8, 1.0)
    assert mixing("folder_finetune:plain") == mixing("folder_finetune:laptop,all") == ("none", 0.0, 0.0)


@pytest.mark.parametrize(("size", "lr", "scratch"), [
    ("Ti", 2e-3, 5e-4), ("S", 2e-3, 5e-4), ("B", 2.5e-4, 2.5e-4), ("laptop", 5e-3, 1.5e-3)])
def test_fine_tuning_on_a_folder_has_its_head_behind_a_batch_norm_and_these_peak_rates(size, lr, scratch):
    config = resolved(f"folder_finetune:{size}")
    assert config.method.head == "probe"
    assert peak_lr(config) == pytest.approx(lr)
    assert peak_lr(resolved(f"folder_finetune:{size},scratch")) == pytest.approx(scratch)


@pytest.mark.parametrize(("size", "pretraining"), [("Ti", "folder:Ti"), ("S", "folder:S"), ("B", "vit_b_mae"),
                                                   ("laptop", "folder:laptop")])
def test_a_folders_classifier_has_the_encoder_that_its_docstring_names(size, pretraining):
    ours, theirs = resolved(f"folder_finetune:{size}"), resolved(pretraining)
    for name in ("width", "depth", "heads", "patch", "mlp_ratio", "gelu"):
        assert ours.model[name] == theirs.model[name]
    assert ours.data.image_size == theirs.data.image_size


@pytest.mark.parametrize("text", ["finetune:L", "finetune:scratch", "linear_probe:H", "deit3:H52", "deit3:in21k",
                                  "deit3:to224", "deit3:in21k_to_1k", "folder_finetune", "folder_finetune:B"])
def test_runlocal_makes_any_argument_small_and_keeps_its_method(text):
    config, small = resolved(text), resolved(f"{text}{',' if ':' in text else ':'}runlocal")
    validate(small)
    assert (small.batch_size, small.model.depth, small.data.source, small.init_from) == (16, 2, "photo_crops", "")
    assert (small.data.val_split, small.checkpoint.best_metric, small.data.eval_split) == ("", "", "test")
    for group in ("method", "optim"):
        assert {key for key in config[group] if config[group][key] != small[group][key]} <= {"mix_group", "warmup"}
    assert small.data.repeats == config.data.repeats


@pytest.mark.parametrize(("text", "given", "kept"), [
    ("folder:runlocal", {"data.path"}, ("folder", "", "train", "test")),
    ("folder_finetune:runlocal", {"data.path"}, ("folder", "", "train[:90%]", "test")),
    ("segment:voc,runlocal", {"data.path", "data.mask_key"}, ("folder", "", "train", "val")),
    ("transfer:dtd,runlocal", {"data.path"}, ("tfds", "dtd:3.*.*", "train+validation", "test")),
    ("vit_b_mae:runlocal", {"data.path", "data.source"}, ("photo_crops", "", "train", "test")),
    ("folder:runlocal", {"optim.lr"}, ("photo_crops", "", "train", "test"))])
def test_runlocal_keeps_the_data_that_the_command_line_names(text, given, kept):
    with presets.given(given):
        config = resolved(text)
    validate(config)
    data = config.data
    assert (data.source, data.name, data.train_split, data.eval_split) == kept
    assert (config.batch_size, config.model.depth, data.image_size[0] <= 40, config.train.duration) == (
        16, 2, True, "2 steps")
    if "voc" in text:
        assert config.method.classes == 21


def test_the_fields_of_a_command_line():
    argv = ["mae_jax", "--config=folder:runlocal", "--config.data.path=/x", "--config.data.path", "-config.seed=3"]
    assert recipes.overridden(argv) == {"data.path", "seed"}
