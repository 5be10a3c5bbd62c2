"""Windows, relative positions, pyramid and heads of a detector: against torch's, and what they start from."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.models.detection import BoxHead, MaskHead, ProposalHead
from mae_jax.models.map_norms import GroupNorm
from mae_jax.models.pyramid import Conv, Deconv, FeaturePyramid, SimplePyramid
from mae_jax.models.vit import Encoder
from mae_jax.ops import pos_embed, windows
from mae_jax.ops.convolution import convolve, greatest
from mae_jax.ops.patches import PatchGrid
from mae_jax.ops.windows import Spatial
from mae_jax.param_tree import flatten, nest

GOLDEN = dict(np.load(Path(__file__).parents[1] / "golden/detector.npz"))
GRID, WINDOW, WIDTH = (7, 7), 3, 24
SPATIAL = tuple(Spatial(GRID, window, True) for window in (WINDOW, 0, WINDOW, 0))


def part(prefix):
    return {name.removeprefix(prefix): leaf for name, leaf in GOLDEN.items() if name.startswith(prefix)}


def backbone_params():
    """The weights of VitDetBackbone in our names."""
    theirs, found = part("backbone/"), {}
    kernel = theirs["embeddings.projection.weight"]
    found["patch_embed/kernel"] = kernel.transpose(2, 3, 1, 0).reshape(-1, WIDTH)
    found["patch_embed/bias"] = theirs["embeddings.projection.bias"]
    found["pos_embed"] = pos_embed.resize(theirs["embeddings.position_embeddings"][0, 1:], (4, 4), GRID)
    for block in range(4):
        for here, there in (("norm1", "norm1"), ("norm2", "norm2"), ("attn/qkv", "attention.qkv"),
                            ("attn/proj", "attention.proj"), ("mlp/fc1", "mlp.fc1"), ("mlp/fc2", "mlp.fc2")):
            weight, bias = (theirs[f"encoder.layer.{block}.{there}.{kind}"] for kind in ("weight", "bias"))
            found[f"block_{block:02d}/{here}/{'scale' if weight.ndim == 1 else 'kernel'}"] = weight.T
            found[f"block_{block:02d}/{here}/bias"] = bias
        for name in ("rel_pos_h", "rel_pos_w"):
            found[f"block_{block:02d}/attn/{name}"] = theirs[f"encoder.layer.{block}.attention.{name}"]
    return nest(found)


def encoder(**options):
    return Encoder(WIDTH, 4, 3, 4, "erf", jnp.float32, False, options.pop("remat", "none"), grid=GRID,
                   positions="learned", class_token=False, spatial=SPATIAL, **options)


def patches():
    grid = PatchGrid(*GRID, 4, 4)
    order = np.tile(np.arange(49, dtype=np.int32), (2, 1))
    return np.stack([grid.patchify(image) for image in GOLDEN["pixels"]]), order


def test_windows_and_relative_positions_are_those_of_vitdet():
    found = jax.jit(encoder().apply, static_argnames="block")({"params": backbone_params()}, *patches(), block=3)
    np.testing.assert_allclose(found.reshape(2, *GRID, WIDTH), GOLDEN["map"], atol=2e-5)


def test_maps_of_several_blocks_are_what_these_blocks_give(monkeypatch):
    params, given = {"params": backbone_params()}, patches()
    apply = jax.jit(encoder(remat="full").apply, static_argnames=("block", "maps"))
    several = apply(params, *given, maps=(1, 3))
    for block, found in zip((1, 3), several, strict=True):
        np.testing.assert_allclose(found, apply(params, *given, block=block), atol=1e-5)


def test_many_tokens_are_attended_to_by_parts_with_the_same_gradients(monkeypatch):
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(3, 2, 35, 16)).astype(np.float32)
    tables = tuple(rng.normal(size=(2 * side - 1, 8)).astype(np.float32) for side in (5, 7))

    def loss(q, k, v, tables):
        return (windows.relative_attention(q, k, v, 2, tables, (5, 7)) ** 2).sum()

    run = lambda: jax.jit(jax.value_and_grad(lambda *a: loss(*a), argnums=(0, 1, 2, 3)))(q, k, v, tables)  # noqa: E731
    whole = run()
    monkeypatch.setattr(windows, "MANY", 8)
    monkeypatch.setattr(windows, "TOGETHER", 8)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), run(), whole)


def test_relative_positions_are_added_to_scores_by_query_and_distance():
    rng = np.random.default_rng(1)
    q, k, v = rng.normal(size=(3, 1, 6, 4)).astype(np.float32)
    down, across = (rng.normal(size=(2 * side - 1, 4)).astype(np.float32) for side in (2, 3))
    scores = q[0] @ k[0].T / 2
    for a, b in np.ndindex(6, 6):
        scores[a, b] += q[0, a] @ down[a // 3 - b // 3 + 1] + q[0, a] @ across[a % 3 - b % 3 + 2]
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    found = jax.jit(lambda *a: windows.relative_attention(*a, 1, (down, across), (2, 3)))(q, k, v)
    np.testing.assert_allclose(found[0], weights @ v[0], atol=1e-5)


def test_windows_are_put_together_as_they_were_and_padded_with_zeros():
    x = np.arange(2 * 35 * 3, dtype=np.float32).reshape(2, 35, 3) + 1
    parts = windows.part(jnp.asarray(x), (5, 7), 4)
    assert parts.shape == (2 * 2 * 2, 16, 3)
    assert (parts == 0).sum() == 2 * (64 - 35) * 3
    np.testing.assert_array_equal(parts[0].reshape(4, 4, 3), x[0].reshape(5, 7, 3)[:4, :4])
    np.testing.assert_array_equal(windows.join(parts, (5, 7), 4), x)


def test_relative_positions_of_another_size_lie_between_the_given_ones():
    table = np.arange(5, dtype=np.float32)[:, None]
    np.testing.assert_allclose(windows.resized(table, 10)[:, 0], np.clip((np.arange(10) + 0.5) / 2 - 0.5, 0, 4))


def conv(weight):
    return weight.transpose(2, 3, 1, 0)


def test_the_simple_pyramid_is_that_of_torch():
    module = SimplePyramid((4.0, 2.0, 1.0), 1, 16, "layer", "group", jnp.float32)
    found = {}
    for number, (deconvs, rest) in enumerate((((0, 3), 4), ((0,), 1), ((), 0))):
        theirs = part(f"level{number}/")
        for count, place in enumerate(deconvs, 1):
            found[f"scale{number}/deconv{count}/kernel"] = theirs[f"{place}.weight"].transpose(0, 2, 3, 1)
            found[f"scale{number}/deconv{count}/bias"] = theirs[f"{place}.bias"]
        norms = {f"lateral{number}_norm": rest + 1, f"output{number}_norm": rest + 3}
        norms |= {"scale0/norm": 1} if number == 0 else {}
        for name, place in norms.items():
            found[f"{name}/scale"], found[f"{name}/bias"] = theirs[f"{place}.weight"], theirs[f"{place}.bias"]
        found[f"lateral{number}/kernel"] = conv(theirs[f"{rest}.weight"])
        found[f"output{number}/kernel"] = conv(theirs[f"{rest + 2}.weight"])
    maps = jax.jit(module.apply)({"params": nest(found)}, [GOLDEN["map"]])
    for number in range(3):
        np.testing.assert_allclose(maps[number], GOLDEN[f"pyramid/{number}"], atol=2e-5)
    np.testing.assert_array_equal(maps[3], maps[2][:, ::2, ::2])


def test_the_mask_head_is_that_of_torch():
    theirs, found = part("masks/"), {}
    for number, place in ((1, 0), (2, 3)):
        found[f"conv{number}/kernel"] = conv(theirs[f"{place}.weight"])
        found[f"conv{number}_norm/scale"] = theirs[f"{place + 1}.weight"]
        found[f"conv{number}_norm/bias"] = theirs[f"{place + 1}.bias"]
    found["deconv/kernel"], found["deconv/bias"] = theirs["6.weight"].transpose(0, 2, 3, 1), theirs["6.bias"]
    found["logits/kernel"], found["logits/bias"] = conv(theirs["8.weight"]), theirs["8.bias"]
    logits = jax.jit(MaskHead(2, 3, "layer", jnp.float32).apply)({"params": nest(found)}, GOLDEN["regions"][None])
    np.testing.assert_allclose(logits[0], GOLDEN["logits"], atol=2e-5)


def test_gradients_of_a_convolution_are_those_of_the_plain_one():
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(2, 6, 5, 3)).astype(np.float32), rng.normal(size=(3, 3, 3, 4)).astype(np.float32)

    def plain(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    found, wanted = (jax.jit(jax.value_and_grad(lambda *a, f=f: (f(*a) ** 2).sum(), argnums=(0, 1)))(x, kernel)
                     for f in (convolve, plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3), found, wanted)


def test_the_gradient_of_a_kernel_is_float32_whatever_the_activations_are():
    x, kernel = jnp.full((1, 64, 64, 1), 1.0, jnp.bfloat16), jnp.zeros((1, 1, 1, 1))
    gradient = jax.jit(jax.grad(lambda kernel: convolve(x, kernel).astype(jnp.float32).sum()))(kernel)
    assert gradient.dtype == jnp.float32
    assert gradient == 4096
    other = jax.jit(jax.grad(lambda kernel: (convolve(x, kernel) * jnp.bfloat16(1.0078125)).astype(
        jnp.float32).sum()))(kernel)
    np.testing.assert_allclose(other, 4096 * 1.0078125, rtol=1e-6)


def test_the_gradient_of_a_maximum_goes_to_the_first_of_equal_cells():
    x = jnp.asarray([[[1, 5, 2, 2], [5, 0, 2, 2]]], jnp.float32)[..., None]
    gradient = jax.jit(jax.grad(lambda x: (greatest(x) * jnp.array([[[[3.0], [7.0]]]])).sum()))(x)
    np.testing.assert_array_equal(gradient[0, ..., 0], [[0, 3, 7, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(greatest(x)[0, ..., 0], [[5, 2]])


def starts(module, *given):
    return flatten(jax.jit(module.init)(jax.random.key(0), *given)["params"])


@pytest.mark.parametrize(("module", "shape", "deviations"), [
    (Conv(64, 3, jnp.float32, "torch"), (1, 4, 4, 32), {"kernel": (9 * 32) ** -0.5 / 3**0.5,
                                                        "bias": (9 * 32) ** -0.5 / 3**0.5}),
    (Conv(64, 3, jnp.float32, "msra"), (1, 4, 4, 32), {"kernel": (2 / (9 * 64)) ** 0.5, "bias": 0}),
    (Conv(64, 1, jnp.float32, "xavier"), (1, 4, 4, 32), {"kernel": 32**-0.5, "bias": 0}),
    (Deconv(64, jnp.float32), (1, 4, 4, 32), {"kernel": 256**-0.5 / 3**0.5, "bias": 256**-0.5 / 3**0.5}),
    (Deconv(64, jnp.float32, "msra"), (1, 4, 4, 32), {"kernel": (2 / 128) ** 0.5, "bias": 0}),
    (ProposalHead(1, 3, jnp.float32), (1, 4, 4, 64), {
        "conv0/kernel": 0.01, "conv0/bias": 0, "logits/kernel": 0.01, "logits/bias": 0, "deltas/kernel": 0.01,
        "deltas/bias": 0}),
    (BoxHead(1, 1, 256, 10, True, "layer", jnp.float32), (1, 1, 7, 7, 32), {
        "conv1/kernel": (2 / (9 * 32)) ** 0.5, "conv1_norm/scale": 0, "conv1_norm/bias": 0,
        "fc1/kernel": (49 * 32) ** -0.5, "fc1/bias": 0, "logits/kernel": 0.01, "logits/bias": 0,
        "deltas/kernel": 0.001, "deltas/bias": 0})])
def test_layers_start_as_detectron2_fills_them(module, shape, deviations):
    found = starts(module, np.zeros(shape, np.float32))
    assert found.keys() == deviations.keys()
    for name, deviation in deviations.items():
        np.testing.assert_allclose(found[name].std(), deviation, rtol=0.12, err_msg=name)


def test_a_pyramid_of_blocks_adds_coarse_maps_to_fine_ones():
    module = FeaturePyramid((4.0, 2.0, 1.0, 0.5), 1, 8, "layer", "group", jnp.float32)
    maps = list(np.random.default_rng(0).normal(size=(4, 1, 4, 4, 16)).astype(np.float32))
    params = jax.jit(module.init)(jax.random.key(0), maps)
    apply = jax.jit(module.apply)
    found = apply(params, maps)
    assert [x.shape for x in found] == [(1, side, side, 8) for side in (16, 8, 4, 2, 1)]
    changed = apply(params, [*maps[:3], maps[3] + 1 + np.arange(16)])
    assert all(abs(a - b).max() > 1e-3 for a, b in zip(found, changed, strict=True))
    changed = apply(params, [maps[0] + 1 + np.arange(16), *maps[1:]])
    assert [bool(abs(a - b).max() > 1e-3) for a, b in zip(found, changed, strict=True)] == [True, *[False] * 4]


def test_group_norm_is_of_each_image_and_group():
    x = np.random.default_rng(0).normal(2, 3, (2, 4, 4, 64)).astype(np.float32)
    out = np.asarray(jax.jit(GroupNorm(jnp.float32).init_with_output)(jax.random.key(0), x)[0])
    groups = out.reshape(2, 16, 32, 2)
    np.testing.assert_allclose(groups.mean((1, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(groups.std((1, 3)), 1, atol=1e-4)
