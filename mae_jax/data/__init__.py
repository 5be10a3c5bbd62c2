"""The input: images to batches of permuted uint8 patches. The only package that imports TensorFlow, when built."""

from mae_jax.data.inputs import Batch, Inputs, Spec, build, check_apart
from mae_jax.data.masking import Order, View

__all__ = ["Batch", "Inputs", "Order", "Spec", "View", "build", "check_apart"]
