"""Starting a detector from encoders of other methods, from a detector, and from one of other classes."""

import numpy as np
import pytest

from mae_jax.errors import UserError
from mae_jax.ops import pos_embed, windows
from tests.helpers.tiny import tiny_config
from tests.training.warm_start_test import started, written

LEARNED = {"model.positions": "learned"}


def detector(fields=None):
    return tiny_config(LEARNED | (fields or {}), "detection")


@pytest.mark.parametrize("method", ["mae", "splitmask", "mixedae", "dino", "supervised", "beit"])
def test_an_encoder_of_any_method_is_taken_without_its_class_token_and_norm(tmp_path, method):
    source, theirs = written(tmp_path, tiny_config(method=method))
    ours, report = started(source, detector())
    for name in ("patch_embed/kernel", "block_00/attn/qkv/kernel", "block_01/mlp/fc2/bias", "block_01/norm1/scale"):
        first, *rest = name.split("/")
        leaf = theirs["encoder"][first]
        for key in rest:
            leaf = leaf[key]
        np.testing.assert_array_equal(ours[f"encoder/{name}"], leaf, err_msg=name)
    assert "encoder/block_*" in report.partition("new: ")[2].partition(";")[0]  # relative positions
    assert "encoder/cls_token" in report.partition("left over: ")[2]


def test_a_mixture_has_no_single_encoder_and_is_refused(tmp_path):
    source, _ = written(tmp_path, tiny_config({"method.num_clusters": 3, "method.centroid_width": 32}, "moce"))
    with pytest.raises(UserError, match="--for-task=vote"):
        started(source, detector())


def test_positions_are_resized_and_relative_positions_stay_as_they_start(tmp_path):
    source, theirs = written(tmp_path, tiny_config(LEARNED, "supervised"))
    ours, _ = started(source, detector({"data.image_size": (24, 32)}))
    np.testing.assert_array_equal(
        ours["encoder/pos_embed"], pos_embed.resize(theirs["encoder"]["pos_embed"], (4, 4), (6, 8)))


def test_a_layer_scale_may_begin_at_1_alone(tmp_path):
    source, _ = written(tmp_path, tiny_config())
    ours, report = started(source, detector({"model.layer_scale": 1.0}))
    assert "encoder/block_00/ls1/gamma" in ours
    assert "new: " in report
    with pytest.raises(UserError, match=r"--config\.model\.layer_scale=0$"):
        started(source, detector({"model.layer_scale": 0.1}))


def test_an_encoder_with_layer_scales_begins_with_relative_positions_too(tmp_path):
    scaled = {"model.layer_scale": 0.1}
    source, theirs = written(tmp_path, tiny_config(scaled))
    ours, _ = started(source, detector(scaled))
    np.testing.assert_array_equal(ours["encoder/block_00/ls1/gamma"], theirs["encoder"]["block_00"]["ls1"]["gamma"])


def test_relative_positions_of_a_detector_are_no_part_of_another_encoder(tmp_path):
    source, _ = written(tmp_path, detector())
    with pytest.raises(UserError, match="has another encoder: encoder/block_00/attn/rel_pos_h"):
        started(source, detector({"method.relative_positions": False}))


def test_a_detector_of_other_classes_gives_all_but_its_classes(tmp_path):
    source, theirs = written(tmp_path, detector(), classes=("a", "b", "c"))
    same, report = started(source, detector(), ("a", "b", "c"))
    assert report.endswith("new: none; left over: none")
    np.testing.assert_array_equal(same["boxes/logits/kernel"], theirs["boxes"]["logits"]["kernel"])
    other, report = started(source, detector(), ("a", "b", "z"))
    assert (other["boxes/logits/kernel"] != theirs["boxes"]["logits"]["kernel"]).any()
    assert (other["masks/logits/kernel"] != theirs["masks"]["logits"]["kernel"]).any()
    np.testing.assert_array_equal(other["boxes/fc1/kernel"], theirs["boxes"]["fc1"]["kernel"])
    assert "other classes/boxes" in report
    assert (other["boxes/deltas/kernel"] != theirs["boxes"]["deltas"]["kernel"]).any()
    kept, _ = started(source, detector({"init_head": "keep"}), ("a", "b", "z"))
    np.testing.assert_array_equal(kept["boxes/logits/kernel"], theirs["boxes"]["logits"]["kernel"])


def test_boxes_of_all_classes_in_one_are_kept_for_others(tmp_path):
    fields = {"method.class_boxes": False}
    source, theirs = written(tmp_path, detector(fields), classes=("a", "b", "c"))
    other, _ = started(source, detector(fields), ("a", "b", "z"))
    assert (other["boxes/logits/kernel"] != theirs["boxes"]["logits"]["kernel"]).any()
    np.testing.assert_array_equal(other["boxes/deltas/kernel"], theirs["boxes"]["deltas"]["kernel"])


def test_relative_positions_of_another_grid_are_resized(tmp_path):
    fields = {"data.image_size": (32, 32), "method.window": 0}
    source, theirs = written(tmp_path, detector({"method.window": 0}))
    ours, _ = started(source, detector(fields))
    table = theirs["encoder"]["block_00"]["attn"]["rel_pos_h"]
    assert len(ours["encoder/block_00/attn/rel_pos_h"]) == 2 * 8 - 1 != len(table)
    np.testing.assert_array_equal(ours["encoder/block_00/attn/rel_pos_h"], windows.resized(table, 15))
