"""What GPUs compute, on a CPU: all but kernels of cuDNN and Triton, which JAX computes in their place."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas

from mae_jax.ops import attention_cudnn, normalization_gpu, partitioning

H200 = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")


def pretend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes all that asks the mesh for its devices take these for an H200; cuDNN takes any dtype."""
    monkeypatch.setattr(partitioning, "device", lambda: H200)
    monkeypatch.setattr(attention_cudnn, "takes", lambda *_: True)
    monkeypatch.setattr(attention_cudnn, "_call", cudnn_in_jax)
    monkeypatch.setattr(normalization_gpu, "_call", in_jax)
    monkeypatch.setattr(normalization_gpu, "PROGRAMS", 3)  # one after the other


def in_jax(kernel: Any, results: Any) -> Any:
    """What a kernel of layer norm computes, by JAX."""
    return pallas.pallas_call(kernel, results, grid=(normalization_gpu.PROGRAMS,), interpret=True)


def cudnn_in_jax(target: str, products: Any, operands: list[jax.Array], results: list[Any]) -> list[jax.Array]:
    """What cuDNN's calls return, by JAX in float32: of [B, T, H, d], the results [B, H, T, d], statistics [B, H, T]."""
    q, k, v, *saved = (x.astype(jnp.float32) for x in operands)
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    if target == "__cudnn$fmhaSoftmax":
        found = jnp.einsum("bhqk,bkhd->bhqd", jax.nn.softmax(scores), v), jax.nn.logsumexp(scores, -1)
    else:
        assert target == "__cudnn$fmhaSoftmaxBackward"
        statistics, dout, out = saved
        weights = jnp.exp(scores - statistics[..., None])
        dscores = weights * (jnp.einsum("bqhd,bkhd->bhqk", dout, v) - (dout * out).sum(-1).swapaxes(1, 2)[..., None])
        dscores *= q.shape[-1] ** -0.5
        found = (jnp.einsum("bhqk,bkhd->bhqd", dscores, k), jnp.einsum("bhqk,bqhd->bhkd", dscores, q),
                 jnp.einsum("bhqk,bqhd->bhkd", weights, dout))
    assert [x.shape for x in found] == [shape for shape, _, _ in results]
    return [x.astype(dtype) for x, (_, dtype, _) in zip(found, results, strict=True)]
