"""The parameters as text: what is alike is one line, and nothing is left out."""

import jax
import numpy as np

from mae_jax.methods.mae import MAE
from mae_jax.param_tree import flatten
from mae_jax.training import parameter_table
from tests.helpers.tiny import TINY_DATA, tiny_config, tiny_method, tiny_supervised


def shapes(method):
    return jax.eval_shape(method.init, jax.random.key(0), method.batch_spec())[0]


class HalfFrozen(MAE):
    """A MAE of which the first block, and all that is not of the encoder, stays as it is."""

    def is_trainable(self, path):
        return path.startswith("encoder/") and "block_00" not in path


def test_blocks_that_are_alike_are_one_line_and_the_total_is_of_all():
    method = tiny_method(tiny_config({"model.depth": 5}))
    params = shapes(method)
    lines = parameter_table.summary(params, method).splitlines()
    rows = {line.split()[0]: line for line in lines[1:-1]}
    assert list(rows) == ["encoder/cls_token", "encoder/patch_embed", "encoder/block_*", "encoder/norm",
                          "decoder/embed", "decoder/mask_token", "decoder/block_*", "decoder/head", "decoder/norm"]
    blocks = {name: leaf for name, leaf in flatten(params).items() if name.startswith("encoder/block_")}
    size = sum(leaf.size for leaf in blocks.values())
    shown = " ".join(rows["encoder/block_*"].split()[1:])
    assert shown == f"5 {size:,} (32, 128) float32 4 of 12 x 1"
    assert lines[-1] == f"{sum(leaf.size for leaf in jax.tree.leaves(params)):,} parameters"
    assert sum(int(line.split()[2].replace(",", "")) for line in rows.values()) == sum(
        leaf.size for leaf in jax.tree.leaves(params))


def test_a_head_is_one_line_and_layer_decay_shows_as_rates():
    method = tiny_method(tiny_supervised({"optim.layer_decay": 0.5}))
    rows = {line.split()[0]: line.split() for line in parameter_table.summary(shapes(method), method).splitlines()}
    assert rows["head"][1:3] == ["1", "99"]
    assert rows["head"][-2:] == ["x", "1"]
    assert rows["encoder/block_*"][-4:] == ["x", "0.25", "to", "0.5"]
    assert rows["encoder/patch_embed"][-2:] == ["x", "0.125"]


def test_what_is_frozen_has_lines_of_its_own_and_no_rate():
    method = HalfFrozen(tiny_config(), TINY_DATA)
    params = shapes(method)
    lines = parameter_table.summary(params, method).splitlines()
    blocks = [line.split() for line in lines if line.startswith("encoder/block_*")]
    assert sorted((row[1], row[6], row[-1]) for row in blocks) == [("1", "4", "1"), ("1", "frozen", "0")]
    learn = sum(int(np.prod(leaf.shape)) for name, leaf in flatten(params).items() if method.is_trainable(name))
    assert lines[-1].endswith(f" parameters, {learn:,} of them learn")


def test_the_table_has_every_parameter_with_shape_decay_and_rate():
    method = tiny_method(tiny_config())
    params = shapes(method)
    rows = [line.split("  ") for line in parameter_table.table(params, method).splitlines()[1:-1]]
    assert [row[0] for row in rows] == list(flatten(params))
    found = {row[0]: [cell.strip() for cell in row[1:] if cell.strip()] for row in rows}
    assert found["encoder/block_01/attn/qkv/kernel"] == ["(32, 96)", "float32", "yes", "x 1"]
    assert found["encoder/block_01/attn/qkv/bias"] == ["(96,)", "float32", "no", "x 1"]
