"""Tokens between blocks, attention weights and patch features, against a restatement in NumPy."""

import jax
import numpy as np
import pytest

from mae_jax.errors import UserError
from mae_jax.models import intermediates
from mae_jax.ops.patches import normalize
from tests.helpers.tiers import slow
from tests.helpers.tiny import tiny_batch, tiny_config, tiny_method, tiny_params

VARIANTS = [{}, slow({"model.scan": True, "model.layer_scale": 0.1, "model.positions": "learned"})]


def norm(x: np.ndarray, p: dict[str, np.ndarray]) -> np.ndarray:
    x = np.asarray(x, np.float64)
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]


def numpy_attention(x: np.ndarray, block: dict, heads: int) -> np.ndarray:
    """Returns softmax(q kᵀ / √d), [B, H, T, T], the rows of the kernel being queries, keys, values."""
    images, tokens, width = x.shape
    qkv = norm(x, block["norm1"]) @ block["attn"]["qkv"]["kernel"] + block["attn"]["qkv"]["bias"]
    q, k, _ = qkv.reshape(images, tokens, 3, heads, width // heads).transpose(2, 0, 3, 1, 4)
    weights = np.exp(q @ k.swapaxes(2, 3) / np.sqrt(width // heads))
    return weights / weights.sum(-1, keepdims=True)


@pytest.mark.parametrize("fields", VARIANTS)
def test_tokens_between_blocks_are_those_that_encode_stops_at(fields):
    config = tiny_config(fields)
    method, params, batch = tiny_method(config), tiny_params(config), tiny_batch(config)
    tokens = list(intermediates.block_inputs(
        method.encoder, params["encoder"], normalize(batch["patches"]), batch["order"]))
    assert len(tokens) == 3
    for block in (0, 1):
        wanted = method.encode(params, {}, batch, block)
        np.testing.assert_allclose(tokens[block + 1], wanted, atol=1e-5)


def test_attention_weights_are_those_of_a_restatement_and_rows_sum_to_one():
    config = tiny_config()
    method, params, batch = tiny_method(config), tiny_params(config), tiny_batch(config)
    tokens = method.encode(params, {}, batch, 0)
    block = params["encoder"]["block_01"]
    weights = intermediates.attention_weights(method.encoder, block, tokens)
    assert weights.shape == (8, 2, 17, 17)
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)
    np.testing.assert_allclose(weights, numpy_attention(tokens, block, 2), rtol=1e-4, atol=1e-6)


def test_attention_weights_are_those_that_the_block_attends_with():
    config = tiny_config()
    method, params, batch = tiny_method(config), tiny_params(config), tiny_batch(config)
    block = jax.tree.map(np.copy, params["encoder"]["block_01"])
    tokens = np.asarray(method.encode(params, {}, batch, 0))
    weights = intermediates.attention_weights(method.encoder, block, tokens)
    kernel, bias = block["attn"]["qkv"]["kernel"], block["attn"]["qkv"]["bias"]
    values = (norm(tokens, block["norm1"]) @ kernel[:, 64:] + bias[64:]).reshape(8, 17, 2, 16)
    mixed = np.einsum("bhqk,bkhd->bqhd", weights, values).reshape(8, 17, 32)
    block["mlp"]["fc2"] = jax.tree.map(np.zeros_like, block["mlp"]["fc2"])
    after = tokens + mixed @ block["attn"]["proj"]["kernel"] + block["attn"]["proj"]["bias"]
    params["encoder"]["block_01"] = block
    np.testing.assert_allclose(method.encode(params, {}, batch, 1), after, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fields", VARIANTS)
def test_a_pyramid_has_each_chosen_block_in_raster_order_whatever_the_batch_has(fields):
    config = tiny_config({"data.image_size": (16, 24), **fields})
    method, params, batch = tiny_method(config), tiny_params(config), tiny_batch(config)
    levels = intermediates.pyramid(method.encoder, params["encoder"], batch, (1, 0, -1))
    assert [level.shape for level in levels] == [(8, 4, 6, 32)] * 3
    straight = {"patches": np.zeros_like(batch["patches"]), "order": np.sort(batch["order"], 1)}
    np.put_along_axis(straight["patches"], batch["order"][..., None], batch["patches"], 1)
    for level, block in zip(levels, (1, 0, -1), strict=True):
        tokens = method.encode(params, {}, straight, block)[:, 1:]
        np.testing.assert_allclose(level, tokens.reshape(8, 4, 6, 32), atol=1e-4)


def test_a_pyramid_is_one_forward_pass_up_to_the_last_chosen_block():
    config = tiny_config({"model.depth": 4})
    method, params, batch = tiny_method(config), tiny_params(config), tiny_batch(config)

    def softmaxes(blocks):
        jitted = jax.jit(lambda p: intermediates.pyramid(method.encoder, p, batch, blocks))
        text = jitted.lower(params["encoder"]).as_text()
        return text.count("stablehlo.exponential")

    one = softmaxes((0,))
    assert one > 0
    assert softmaxes((0, 1, 2)) == softmaxes((2,)) == 3 * one


def test_a_block_that_is_not_there_is_refused():
    config = tiny_config()
    method = tiny_method(config)
    for block in (2, -2):
        with pytest.raises(UserError, match=rf"block {block}; .*0 to 1"):
            intermediates.pyramid(method.encoder, tiny_params(config)["encoder"], tiny_batch(config), (block,))
