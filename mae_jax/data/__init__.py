"""Input pipeline: images to batches of permuted uint8 patches. The only package that imports TensorFlow, on first use.
"""

from mae_jax.data.info import ASSUMED, NO_DATA, DataInfo, DataNeeds
from mae_jax.data.inputs import Batch, Inputs, OpenedData, Spec, check_apart
from mae_jax.data.masking import PatchOrder, View

__all__ = ["ASSUMED", "NO_DATA", "Batch", "DataInfo", "DataNeeds", "Inputs", "OpenedData", "PatchOrder",
           "Spec", "View", "check_apart"]
