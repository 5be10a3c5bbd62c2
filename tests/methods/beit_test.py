"""BEiT starts and decays as its released code does; a stored run does as it began."""

import re

import jax
import numpy as np
import pytest

from mae_jax.methods import beit
from mae_jax.methods.base import Params
from mae_jax.param_tree import flatten
from mae_jax.training import optim
from tests.helpers.tiny import tiny_batch, tiny_config, tiny_method

DEPTH = 2
CUT = 0.5395627  # the deviation of a standard normal that is cut at one: root of 1 - 2 φ(1) / (2 Φ(1) - 1)


def start(**fields) -> dict[str, np.ndarray]:
    """Returns path → value of a BEiT at its start."""
    config = tiny_config({"model.width": 64, "model.depth": DEPTH, "model.layer_scale": 0.1, **fields}, method="beit")
    method = tiny_method(config)
    params: Params = jax.jit(method.init)(jax.random.key(3), tiny_batch(config))[0]
    return {name: np.asarray(leaf) for name, leaf in flatten(params).items()}


def test_the_start_is_a_normal_cut_at_one_deviation_and_the_branches_ends_are_smaller_by_their_depth():
    found = start(**{"model.init": "normal", "model.positions": "random"})
    noise = {name: leaf for name, leaf in found.items() if name.endswith(("kernel", "token", "pos_embed"))}
    assert len(noise) == 4 + DEPTH * 4 + 1  # embedding, two tokens, positions; qkv, proj, fc1, fc2 each; head
    for name, leaf in noise.items():
        ends = re.search(r"block_(\d+)/(attn/proj|mlp/fc2)", name)
        bound = 0.02 / (np.sqrt(2 * (int(ends[1]) + 1)) if ends else 1)
        assert 0.9 * bound < np.abs(leaf).max() <= bound * (1 + 1e-6), name
        if leaf.size > 1000:
            assert leaf.std() == pytest.approx(CUT * bound, rel=0.05), name
    for name in found.keys() - noise.keys():
        value = 0.1 if name.endswith("gamma") else float(name.endswith("scale"))
        np.testing.assert_array_equal(found[name], np.float32(value), name)
    first, second = (found[f"encoder/block_{number:02d}/attn/qkv/kernel"] for number in range(DEPTH))
    assert np.abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.05


def test_a_stored_run_starts_from_a_normal_that_is_not_cut():
    found = start(**{"model.init": "normal", "recipe_version": 5})["encoder/block_00/attn/qkv/kernel"]
    assert found.std() == pytest.approx(0.02, rel=0.05)


def test_sine_cosine_positions_and_what_is_no_noise_stay():
    given = {"pos_embed": np.ones((4, 8)), "norm": {"bias": np.zeros(8), "scale": np.ones(8)},
             "ls1": {"gamma": np.ones(8)}, "fc1": {"kernel": np.ones((8, 8), np.float32)}}
    found = beit._published_start(jax.random.key(0), {"encoder": given}, "learned")["encoder"]
    assert np.abs(found.pop("fc1")["kernel"]).max() < 0.02
    given.pop("fc1")
    jax.tree.map(np.testing.assert_array_equal, found, given)


@pytest.mark.parametrize(("version", "tokens"), [(6, {"mask_token"}), (5, {"mask_token", "cls_token"})])
def test_of_tokens_the_masks_alone_decays_but_in_a_stored_run(version, tokens):
    config = tiny_config({"recipe_version": version}, method="beit")
    method = tiny_method(config)
    params = jax.eval_shape(method.init, jax.random.key(0), tiny_batch(config))[0]
    decayed = {name for name, does in flatten(optim.decay_mask(params, method.decays)).items() if does}
    assert {name.rsplit("/", 1)[-1] for name in decayed} == {"kernel", *tokens}
