import json
import os
import re
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas

from mae_jax.ops import attention as module
from mae_jax.ops import attention_cudnn, attention_tpu, attention_tpu_kernel
from mae_jax.ops.homologous_attention import TopKMask
from tests.helpers.gpu import cudnn_in_jax


def textbook(q, k, v):
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5), v)


def attention(q, k, v, by="plain"):
    """The attention of [B, T, H, d] by one of the implementations; on a CPU that for TPUs is only slower."""
    images, tokens, heads, depth = q.shape
    flat = (x.reshape(images, tokens, heads * depth) for x in (q, k, v))
    return module._attention(*flat, heads, None, by).reshape(q.shape)


def operands(dtype=np.float32, scale=1.0, heads=3, depth=8):
    draws = np.random.default_rng(0).standard_normal((4, 2, 7, heads, depth), np.float32)
    return [jnp.asarray(scale * a, dtype) for a in draws]


def compare_with_textbook(q, k, v, dout, by, tolerance):
    """Holds an implementation and its gradients, in the dtype of [B, T, H, d], beside the textbook's in float64."""
    out, backward = jax.vjp(partial(attention, by=by), q, k, v)
    with jax.enable_x64(True):
        truth, exact = jax.vjp(textbook, *(np.float64(np.float32(a)) for a in (q, k, v)))
        gradients = exact(np.float64(np.float32(dout)))
    for ours, expected in zip((out, *backward(dout)), (truth, *gradients), strict=True):
        assert ours.dtype == q.dtype
        np.testing.assert_allclose(np.float32(ours), expected, rtol=0, atol=tolerance * np.abs(expected).max())


on_any_device = pytest.mark.parametrize("by", ["plain", "cudnn", *attention_tpu.WAYS])


@pytest.fixture(autouse=True)
def _cudnn_in_jax(monkeypatch):
    monkeypatch.setattr(attention_cudnn, "_call", cudnn_in_jax)


@pytest.fixture(autouse=True)
def _kernels_in_jax(monkeypatch):
    monkeypatch.setattr(attention_tpu_kernel, "_call", partial(pallas.pallas_call, interpret=True))


@pytest.mark.parametrize(("heads", "depth"), [(3, 8), (4, 32), (4, 64)])  # some kinds have some side by side
@on_any_device
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
def test_attention_and_its_gradients_are_those_of_the_textbook(dtype, tolerance, heads, depth, by):
    compare_with_textbook(*operands(dtype, heads=heads, depth=depth), by, tolerance)


@on_any_device
def test_large_scores_do_not_overflow(by):
    *inputs, dout = operands(scale=100)
    out, backward = jax.vjp(partial(attention, by=by), *inputs)
    np.testing.assert_allclose(out, textbook(*inputs), rtol=1e-4, atol=1e-4)
    assert all(np.isfinite(gradient).all() for gradient in backward(dout))


@pytest.mark.parametrize(("by", "products"), [("plain", 6), *((kind, 8) for kind in attention_tpu.WAYS)])
def test_no_product_mixes_float32_with_bfloat16(by, products):
    """Besides the sums of each head's products of float32, where these are a product."""
    *inputs, dout = operands(jnp.bfloat16)
    program = jax.make_jaxpr(lambda *a: jax.vjp(partial(attention, by=by), *a)[1](dout))(*inputs)
    found = [eqn for eqn in program.eqns if eqn.primitive.name == "dot_general"]
    sums = [eqn for eqn in found if eqn.params["precision"] is not None]
    assert len(sums) == (by in attention_tpu.WAYS and attention_tpu.WAYS[by].inner_by_product)
    assert all(var.aval.dtype == jnp.float32 for eqn in sums for var in eqn.invars)
    found = [eqn for eqn in found if eqn not in sums]
    assert len(found) == products
    assert all(var.aval.dtype == jnp.bfloat16 for eqn in found for var in eqn.invars)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
@pytest.mark.parametrize(("images", "tokens", "heads", "depth"), [(3, 7, 4, 32), (6, 5, 4, 64), (2, 9, 2, 128)])
def test_the_kernels_of_tpus_are_the_attention_of_the_textbook(images, tokens, heads, depth, dtype, tolerance,
                                                               monkeypatch):
    """In several groups of lanes, and several programs of two images where their number is even."""
    monkeypatch.setattr(attention_tpu_kernel, "TOKENS", 2 * tokens)
    draws = np.random.default_rng(0).standard_normal((4, images, tokens, heads, depth), np.float32)
    *inputs, dout = (jnp.asarray(a, dtype) for a in draws)
    compare_with_textbook(*inputs, dout, "tpu kernel", tolerance)
    large = [100 * x for x in inputs]
    out, backward = jax.vjp(partial(attention, by="tpu kernel"), *large)
    assert all(np.isfinite(np.float32(x)).all() for x in (out, *backward(dout)))


@pytest.mark.processes
def test_the_kernels_of_tpus_take_each_devices_own_heads_and_images():
    code = """
import jax, numpy as np
from functools import partial
from jax.experimental import pallas
from jax.sharding import AxisType
from mae_jax.ops import attention, attention_tpu_kernel as kernel
kernel._call = partial(pallas.pallas_call, interpret=True)
q, k, v, dout = np.random.default_rng(0).standard_normal((4, 4, 5, 256), np.float32)
def passes(by):
    out, backward = jax.vjp(lambda *x: attention._attention(*x, 8, None, by), q, k, v)
    return out, *backward(dout)
wanted = jax.jit(partial(passes, "plain"))()
with jax.set_mesh(jax.make_mesh((2, 1, 2, 2), ("data", "zero", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 4)):
    found = jax.jit(partial(passes, "tpu kernel"))()
for ours, theirs in zip(found, wanted, strict=True):
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
print("same")
"""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ, **flags}, capture_output=True, text=True,
                          check=True).stdout == "same\n"


AXES = ("data", "zero", "fsdp", "tensor")


@pytest.mark.parametrize(("platform", "kind", "dtype", "changes", "by"), [
    ("gpu", "NVIDIA H200", jnp.bfloat16, {}, "cudnn"),
    ("gpu", "NVIDIA A10G", jnp.bfloat16, {}, "cudnn"),
    ("gpu", "NVIDIA H200", jnp.float32, {}, "plain"),
    ("gpu", "NVIDIA H200", jnp.bfloat16, {"kept": TopKMask(3, 7)}, "plain"),
    ("gpu", "NVIDIA H200", jnp.bfloat16, {"heads": 16}, "plain"),  # of 4 each
    ("gpu", "NVIDIA H200", jnp.bfloat16, {"images": 1}, "plain"),  # of two devices
    ("gpu", "NVIDIA GeForce RTX 2080 Ti", jnp.bfloat16, {}, "plain"),
    ("gpu", "Tesla V100-SXM2-16GB", jnp.bfloat16, {}, "plain"),
    ("gpu", "AMD Instinct MI300X", jnp.bfloat16, {}, "plain"),
    ("tpu", "TPU v3", jnp.bfloat16, {}, "TPU v3"),
    ("tpu", "TPU v3", jnp.bfloat16, {"width": 256}, "TPU v3"),
    ("tpu", "TPU v5 lite", jnp.float32, {"width": 256}, "TPU v5 lite"),
    ("tpu", "TPU v5 lite", jnp.bfloat16, {"width": 256}, "tpu kernel"),
    ("tpu", "TPU v6 lite", jnp.bfloat16, {"width": 128}, "tpu kernel"),
    ("tpu", "TPU v6 lite", jnp.bfloat16, {}, "TPU v6 lite"),  # half a group of lanes
    ("tpu", "TPU v6 lite", jnp.bfloat16, {"width": 320}, "TPU v6 lite"),  # heads of 80
    ("tpu", "TPU v6 lite", jnp.bfloat16, {"width": 256, "tokens": 513}, "TPU v6 lite"),
    ("tpu", "TPU v6 lite", jnp.bfloat16, {"width": 256, "images": 1}, "TPU v6 lite"),
    ("tpu", "TPU v4", jnp.bfloat16, {"kept": TopKMask(3, 7)}, "plain"),
    ("cpu", "cpu", jnp.bfloat16, {}, "plain"),
])
def test_the_devices_of_the_mesh_say_how_attention_is_computed(platform, kind, dtype, changes, by):
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=None, platform=platform)
    mesh = jax.sharding.AbstractMesh((2, 1, 1, 1), AXES, abstract_device=device)
    q = jax.ShapeDtypeStruct((changes.get("images", 4), changes.get("tokens", 7), changes.get("width", 64)), dtype)
    with jax.sharding.use_abstract_mesh(mesh):
        assert module.implementation(q, changes.get("heads", 4), changes.get("kept")) == by
    assert module.implementation(q, 4) == "plain"  # without a mesh


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_the_calls_of_cudnn_are_those_of_jax(backward, monkeypatch):
    monkeypatch.undo()  # of the fixture: the true calls
    library = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(library, "check_cudnn_version", lambda: 91000)
    q = jax.ShapeDtypeStruct((2, 6, 3, 8), jnp.bfloat16)

    def calls(way):
        function = (lambda *x: jax.vjp(way, *x[:3])[1](x[3])) if backward else way
        text = jax.jit(function).trace(*[q] * (4 if backward else 3)).lower(lowering_platforms=("cuda",)).as_text()
        return [called(line) for line in text.splitlines() if "@__cudnn$fmha" in line]

    theirs = calls(partial(jax.nn.dot_product_attention, implementation="cudnn"))
    ours = calls(partial(attention, by="cudnn"))
    assert len(ours) == len(theirs) == 1 + backward
    # For no gradient, JAX leaves the statistics out.
    for (target, config, kinds), (wanted, full, types) in zip(ours, theirs, strict=True):
        assert (target, kinds) == (wanted, types) or not backward
        assert included(config["cudnn_fmha_backend_config"], full["cudnn_fmha_backend_config"])


def called(line):
    """Returns target, configuration, and the types and layouts of operands and results of a custom call."""
    config = re.search(r'backend_config = "(.*?)"(?:,|\})', line)[1].replace(r"\22", '"')
    layouts = re.findall(r"(?:operand|result)_layouts = (\[.*?\])[,}]", line)
    return re.search(r"@(\S+?)\(", line)[1], json.loads(config), (layouts, line[line.rindex(" : ("):].split(" loc")[0])


def included(part, whole):
    """Says whether a configuration says what another does, and leaves out only what it has empty."""
    if isinstance(part, dict):
        return all(included(value, whole[key]) for key, value in part.items()) and not any(
            value for key, value in whole.items() if key not in part and value not in ("0", "PRIMITIVE_TYPE_INVALID",
                                                                                       [False]))
    return part == (pytest.approx(whole) if isinstance(whole, float) else whole)
