"""The recipes of detection against what their papers and published code say, written out here a second time."""

import jax
import numpy as np
import pytest

from mae_jax.config import for_platform, validate
from mae_jax.data.info import DataInfo
from mae_jax.durations import steps
from mae_jax.methods import build
from mae_jax.models.vit import drop_path_rates
from mae_jax.param_tree import flatten
from mae_jax.training.optim import layer_rate, make_schedule, peak_lr
from tests.config.config_test import leaves
from tests.configs.recipes_test import resolved

IMAGES = 117_266  # of COCO's train2017 that have objects
COCO = DataInfo(IMAGES, tuple(map(str, range(80))))
# batch, steps, learning rate, weight decay, factor of the embedding's rate, drop path of the last block, image side
RUNS = {
    "vitdet_b": (64, 184_375, 1e-4, 0.1, 0.7**13, 0.1, 1024),
    "vitdet_l": (64, 184_375, 1e-4, 0.1, 0.8**25, 0.4, 1024),
    "vitdet_h": (64, 138_281, 1e-4, 0.1, 0.9**33, 0.5, 1024),
    "benchmarking_b": (64, 183_228, 8e-5, 0.1, 1, 0.1, 1024),
    "benchmarking_l,25": (64, 45_807, 8e-5, 0.1, 1, 0.1, 1024),
    "ibot_cascade_b": (16, 87_949, 1e-4, 0.05, 0.75**13, 0.2, 1344),
    "xcit_3x_s": (16, 263_848, 1e-4, 0.05, 1, 0.05, 1344),
    "xcit_3x_b": (16, 263_848, 1e-4, 0.05, 1, 0.05, 1344),
}
VITDET = {
    "model.patch": (16, 16), "model.positions": "learned", "data.augment": "lsj", "data.lsj_scale": (0.1, 2.0),
    "data.flip": True, "data.max_objects": 100, "method.window": 14, "method.relative_positions": True,
    "method.class_token": False, "method.pyramid": "simple", "method.scales": (4.0, 2.0, 1.0, 0.5),
    "method.channels": 256, "method.norm": "layer", "method.anchor_sizes": (32.0, 64.0, 128.0, 256.0, 512.0),
    "method.anchor_ratios": (0.5, 1.0, 2.0), "method.proposal_convs": 2, "method.anchor_samples": 256,
    "method.anchor_positives": 0.5, "method.anchor_overlaps": (0.7, 0.3), "method.least_overlap": 0.0,
    "method.candidates": (2000, 1000), "method.proposals": (1000, 1000), "method.proposal_overlap": 0.7,
    "method.regions": 512, "method.region_positives": 0.25, "method.stage_overlaps": (0.5,), "method.samples": 0,
    "method.box_convs": 4, "method.box_layers": 1, "method.box_width": 1024, "method.class_boxes": True,
    "method.mask_convs": 4, "method.score": 0.05, "method.overlap": 0.5, "method.max_detections": 100,
    "method.beta": 0.0, "method.box_loss": "l1", "optim.name": "adamw", "optim.betas": (0.9, 0.999), "optim.clip": 0.0}
BENCHMARKING = VITDET | {
    "model.positions": "fixed", "method.window": 16, "method.pyramid": "blocks", "method.map_blocks": (2, 5, 8, 11),
    "method.global_blocks": (2, 5, 8, 11), "method.norm": "batch", "optim.milestones": (),
    "optim.warmup": "0.25 epochs", "method.upsampling_norm": "group"}
MMDETECTION = VITDET | {
    "data.augment": "multi_scale", "method.window": 0, "method.relative_positions": False, "method.class_token": True,
    "method.pyramid": "blocks", "method.map_blocks": (3, 5, 7, 11), "method.proposal_convs": 1,
    "method.least_overlap": 0.3, "method.upsampling_norm": "batch"}
SETTINGS = {
    "vitdet_b": VITDET | {"method.global_blocks": (2, 5, 8, 11), "method.decayed": "detectron2"},
    "vitdet_l": VITDET | {"method.global_blocks": (5, 11, 17, 23), "method.decayed": "detectron2"},
    "vitdet_h": VITDET | {"method.global_blocks": (7, 15, 23, 31), "method.decayed": "all"},
    "vitdet_b,cascade": VITDET | {"method.stage_overlaps": (0.5, 0.6, 0.7), "method.stage_weights": (1.0, 1.0, 1.0),
                                  "method.class_boxes": False},
    "benchmarking_b": BENCHMARKING,
    "benchmarking_l": BENCHMARKING | {"method.map_blocks": (5, 11, 17, 23), "method.global_blocks": (5, 11, 17, 23)},
    "ibot_cascade_b": MMDETECTION | {
        "method.beta": 1 / 9, "method.proposals": (2000, 1000), "method.stage_overlaps": (0.5, 0.6, 0.7),
        "method.stage_weights": (1.0, 0.5, 0.25), "method.box_loss": "giou", "method.box_weight": 10.0,
        "method.norm": "none", "method.box_norm": "batch", "method.allowed_border": 0, "method.decayed": "matrices",
        "model.drop_path_rates": "linear"},
    "xcit_3x_b": MMDETECTION | {"method.norm": "none", "method.box_convs": 0, "method.box_layers": 2,
                               "method.allowed_border": -1, "method.decayed": "detectron2",
                               "model.drop_path_rates": "constant"},
}


def method_of(config):
    return build(for_platform(config, "cpu"), COCO)


@pytest.mark.parametrize("text", RUNS)
def test_a_recipe_comes_to_the_published_numbers(text):
    config = resolved(f"detect:{text}")
    validate(config)
    o, depth = config.optim, config.model.depth
    found = (config.batch_size, steps(config.train.duration, config.batch_size, IMAGES), peak_lr(config),
             o.weight_decay, layer_rate("encoder/patch_embed/kernel", o.layer_decay, depth),
             drop_path_rates(config)[-1], config.data.image_size[0])
    assert found == pytest.approx(RUNS[text])
    assert layer_rate("pyramid/output0/kernel", o.layer_decay, depth) == 1
    assert drop_path_rates(config)[0] == (0.05 if text.startswith("xcit") else 0)
    assert config.data.source == "coco"


@pytest.mark.parametrize("text", SETTINGS)
def test_a_recipe_has_the_published_model_and_losses(text):
    values = leaves(resolved(f"detect:{text}"))
    assert {name: values[name] for name in SETTINGS[text]} == SETTINGS[text]


def test_vitdets_rate_falls_where_it_is_published_to_fall():
    rate = jax.jit(make_schedule(method_of(resolved("detect:vitdet_b"))))
    at = {step: float(rate(step)) for step in (0, 125, 250, 163_888, 163_889, 177_545, 177_546)}
    wanted = {0: 1e-7, 125: 0.5 * (1e-4 + 1e-7), 250: 1e-4, 163_888: 1e-4, 163_889: 1e-5, 177_545: 1e-5, 177_546: 1e-6}
    assert at == pytest.approx(wanted, rel=1e-4)


def test_vitdet_b_has_as_many_parameters_as_its_layers_say():
    shapes = flatten(jax.eval_shape(
        (method := method_of(resolved("detect:vitdet_b"))).init, jax.random.key(0), method.batch_spec())[0])
    found: dict[str, int] = {}
    for name, leaf in shapes.items():
        part = name.split("/")[0]
        found[part] = found.get(part, 0) + int(np.prod(leaf.shape))
    relative = 8 * 2 * 27 * 64 + 4 * 2 * 127 * 64
    wide, norms = 768, 2 * 2 * 256
    deconvs = wide * 4 * 384 + 384 + 2 * 384 + 384 * 4 * 192 + 192 + wide * 4 * 384 + 384
    laterals = (192 + 384 + wide + wide) * 256
    conv = 9 * 256 * 256
    heads = 1024 * 81 + 81 + 1024 * 320 + 320
    assert found == {
        "encoder": 12 * (12 * wide**2 + 13 * wide) + 768 * wide + wide + 4096 * wide + relative,
        "pyramid": deconvs + laterals + 4 * (conv + norms),
        "proposals": 2 * (conv + 256) + 257 * 15,
        "boxes": 4 * (conv + 512) + 49 * 256 * 1024 + 1024 + heads,
        "masks": 4 * (conv + 512) + 4 * 256 * 256 + 256 + 257 * 80}


@pytest.mark.parametrize("text", ["", *RUNS, "vitdet_b,cascade"])
def test_runlocal_makes_any_protocol_small_and_keeps_what_it_is(text):
    config, small = resolved(f"detect:{text}"), resolved(f"detect:{text},runlocal")
    validate(small)
    assert (small.batch_size, small.model.depth, small.data.source) == (16, 2, "digit_scenes")
    for field in ("pyramid", "stage_overlaps", "class_token", "relative_positions", "norm", "box_norm", "box_loss"):
        assert small.method[field] == config.method[field]
    assert bool(small.method.window) == bool(config.method.window)
