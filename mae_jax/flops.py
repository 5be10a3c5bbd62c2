"""Analytic FLOPs of a train step, and the peaks of chips that they are measured against."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax

if TYPE_CHECKING:
    from mae_jax.methods import Method

# Dense bfloat16 FLOP/s per JAX device, from the vendors' product pages; a TPU v2 or v3 device is one of a chip's two
# cores. The first entry whose name the device kind contains is taken.
PEAKS = {
    "TPU v2": 22.5e12,
    "TPU v3": 61.5e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v6": 918e12,
    "TPU7x": 1153e12,
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "V100": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 3090": 71e12,
    "RTX 4090": 165e12,
}


def peak_flops(device: jax.Device) -> float | None:
    """Returns the device's peak in bfloat16 FLOP/s, or None when it is not in the table."""
    return next((peak for name, peak in PEAKS.items() if name in device.device_kind), None)


def blocks_flops(tokens: int, width: int, depth: int, mlp_ratio: int) -> int:
    """Forward FLOPs of Transformer blocks over one sequence: 2 per multiply-add of every matrix product."""
    linears = (4 + 2 * mlp_ratio) * tokens * width**2
    attention = 2 * tokens**2 * width
    return 2 * depth * (linears + attention)


def train_flops(method: Method) -> int:
    """FLOPs of one image in a train step: the backward pass costs twice the forward pass that it belongs to."""
    return 3 * method.forward_flops() + method.frozen_flops()
