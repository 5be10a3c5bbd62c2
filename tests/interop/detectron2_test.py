"""Detectron2's names of a detector on ViTDet: there and back, from its model zoo's pickles, and refusals."""

import pickle

import jax
import numpy as np
import pytest

from mae_jax.errors import UserError
from mae_jax.interop import layouts
from mae_jax.interop.detectron2 import LAYOUT, from_detectron2, to_detectron2
from mae_jax.param_tree import flatten
from mae_jax.storage.checkpoint import load_params
from tests.helpers.tiny import tiny_config, tiny_params
from tests.training.warm_start_test import started

SCALES = {"method.scales": (4.0, 2.0, 1.0, 0.5), "method.anchor_sizes": (2.0, 4.0, 8.0, 12.0, 16.0),
          "model.positions": "learned", "method.proposal_convs": 2}
CASCADE = {"method.stage_overlaps": (0.5, 0.6, 0.7), "method.stage_weights": (1.0, 1.0, 1.0),
           "method.class_boxes": False}


def detector(fields=None):
    return tiny_config(SCALES | (fields or {}), "detection")


@pytest.fixture(scope="module")
def params():
    return tiny_params(detector())


@pytest.mark.parametrize("fields", [{}, CASCADE], ids=["one stage", "cascade"])
def test_all_parameters_come_back_as_they_were(fields):
    params = tiny_params(detector(fields))
    state = to_detectron2(params)
    again = layouts.read(state | {"pixel_mean": np.zeros((3, 1, 1), np.float32)}, None)
    ours, theirs = flatten(params), flatten(again)
    assert theirs.keys() == ours.keys()
    for name, leaf in ours.items():
        np.testing.assert_array_equal(theirs[name], leaf, err_msg=name)


def test_the_names_and_shapes_are_those_of_detectron2(params):
    state = to_detectron2(params)
    wanted = {
        "backbone.net.pos_embed": (1, 17, 32), "backbone.net.patch_embed.proj.weight": (32, 3, 4, 4),
        "backbone.net.blocks.0.attn.qkv.weight": (96, 32), "backbone.net.blocks.0.attn.rel_pos_h": (5, 16),
        "backbone.net.blocks.1.attn.rel_pos_w": (7, 16), "backbone.net.blocks.1.norm2.weight": (32,),
        "backbone.net.blocks.1.mlp.fc1.bias": (128,), "backbone.simfp_2.0.weight": (32, 16, 2, 2),
        "backbone.simfp_2.1.weight": (16,), "backbone.simfp_2.3.bias": (8,), "backbone.simfp_2.4.weight": (8, 8, 1, 1),
        "backbone.simfp_2.4.norm.weight": (8,), "backbone.simfp_2.5.weight": (8, 8, 3, 3),
        "backbone.simfp_3.0.weight": (32, 16, 2, 2), "backbone.simfp_3.2.norm.bias": (8,),
        "backbone.simfp_4.0.weight": (8, 32, 1, 1), "backbone.simfp_5.2.weight": (8, 8, 3, 3),
        "proposal_generator.rpn_head.conv.conv1.weight": (8, 8, 3, 3),
        "proposal_generator.rpn_head.objectness_logits.weight": (3, 8, 1, 1),
        "proposal_generator.rpn_head.anchor_deltas.bias": (12,), "roi_heads.box_head.conv1.norm.weight": (8,),
        "roi_heads.box_head.fc1.weight": (16, 8 * 49), "roi_heads.box_predictor.cls_score.weight": (4, 16),
        "roi_heads.box_predictor.bbox_pred.weight": (12, 16), "roi_heads.mask_head.mask_fcn1.weight": (8, 8, 3, 3),
        "roi_heads.mask_head.deconv.weight": (8, 8, 2, 2), "roi_heads.mask_head.predictor.weight": (3, 8, 1, 1)}
    assert {name: state[name].shape for name in wanted} == wanted
    several = to_detectron2(tiny_params(detector(CASCADE)))
    assert {"roi_heads.box_head.0.fc1.weight", "roi_heads.box_head.2.conv1.norm.bias",
            "roi_heads.box_predictor.1.bbox_pred.weight"} <= several.keys()
    assert several["roi_heads.box_predictor.1.bbox_pred.weight"].shape == (4, 16)


def test_the_box_heads_first_layer_reads_the_same_region(params):
    region = np.random.default_rng(0).normal(size=(7, 7, 8)).astype(np.float32)
    state = to_detectron2(params)
    theirs = state["roi_heads.box_head.fc1.weight"] @ region.transpose(2, 0, 1).ravel()
    np.testing.assert_allclose(theirs, region.ravel() @ params["boxes"]["fc1"]["kernel"], atol=1e-4)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_pickle_of_the_model_zoo_is_what_a_run_starts_from(tmp_path, params, protocol):
    file = tmp_path / "model_final.pkl"
    file.write_bytes(pickle.dumps({"model": to_detectron2(params), "__author__": "someone"}, protocol))
    ours, report = started(str(file), detector())
    assert report.endswith("new: none; left over: none")
    for name, leaf in flatten(params).items():
        np.testing.assert_array_equal(ours[name], leaf, err_msg=name)


@pytest.mark.parametrize("array", [np.array([{}], object), np.array(["a"]), np.zeros(2, ">f4"),
                                   np.zeros(2, [("a", "f4")])], ids=["objects", "texts", "big end", "records"])
def test_arrays_of_other_things_than_numbers_are_refused(tmp_path, array):
    file = tmp_path / "model.pkl"
    file.write_bytes(pickle.dumps({"model": {"backbone.simfp_2.0.bias": array}}))
    with pytest.raises(UserError, match=r"^[^\n]*(plain little-endian numbers|pickle names)[^\n]*$"):
        load_params(file)


def test_unknown_names_are_refused_with_the_nearest(params):
    state = to_detectron2(params) | {"roi_heads.box_head.fc1.wait": np.zeros(1, np.float32)}
    with pytest.raises(UserError, match=r"fc1\.wait is not a parameter .* expected is roi_heads\.box_head\.fc1"):
        from_detectron2(state)


@pytest.mark.parametrize(("fields", "why"), [({}, ""), ({"method.norm": "group"}, "is not a ViTDet"), (
    {"method.pyramid": "blocks", "method.map_blocks": (0, 1), "method.scales": (2.0, 1.0),
     "method.anchor_sizes": (4.0, 8.0)}, "is not a ViTDet"), (
    {"data.image_size": (16, 32)}, "has images of 16 x 32")])
def test_what_detectron2_has_no_names_for_is_refused(fields, why):
    assert LAYOUT.refuses(detector(fields)).startswith(why)
    assert bool(LAYOUT.refuses(detector(fields))) == bool(why)


def test_other_methods_are_refused():
    assert "is not a detector" in LAYOUT.refuses(tiny_config())
    with pytest.raises(UserError, match="no place in Detectron2"):
        to_detectron2(tiny_params(tiny_config()) | {"boxes": {}})


def test_jax_arrays_are_written_too(params):
    some = to_detectron2(jax.tree.map(jax.numpy.asarray, params))
    assert all(isinstance(leaf, np.ndarray) for leaf in some.values())
