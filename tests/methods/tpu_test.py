"""What methods compute by the attention of TPUs is what they compute as on a CPU: losses and gradients, in float32."""

import jax
import numpy as np
import pytest

from mae_jax import methods
from mae_jax.ops import attention, attention_tpu, partitioning
from mae_jax.param_tree import flatten
from tests.helpers.tiers import slow
from tests.helpers.tiny import tiny_config
from tests.methods.gpu_test import found

KIND = "TPU v5 lite"
# Heads of 16 are the encoder's, of 8 the decoder's.
WAY = attention_tpu.Way(3, {8: 2}, in_place=(16,), inner_by_product=True)


@pytest.mark.parametrize("method", ["mae", *(slow(method) for method in methods.TABLE if method != "mae")])
def test_losses_and_gradients_are_those_of_a_cpu(method, monkeypatch):
    config = tiny_config({}, method)
    loss, gradients, norm = found(config, method)
    device = jax.sharding.AbstractDevice(device_kind=KIND, num_cores=None, platform="tpu")
    monkeypatch.setattr(partitioning, "device", lambda: device)
    monkeypatch.setitem(attention.IMPLEMENTATIONS, KIND, attention.on_tpu(WAY))
    ours, others, length = found(config, method)
    np.testing.assert_allclose(ours, loss, rtol=1e-5)
    np.testing.assert_allclose(length, norm, rtol=1e-4)
    for name, wanted in flatten(gradients).items():
        np.testing.assert_allclose(flatten(others)[name], wanted, rtol=0, atol=1e-4 * float(norm), err_msg=name)
