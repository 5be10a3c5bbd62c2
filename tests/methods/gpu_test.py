"""What methods compute as on a GPU is what they compute as on a CPU: losses, gradients and their norm, in float32."""

from typing import Any
from unittest import mock

import jax
import numpy as np
import optax
import pytest

from mae_jax import methods
from mae_jax.ops import attention, attention_cudnn
from mae_jax.param_tree import flatten
from mae_jax.training.optim import global_norm
from tests.helpers.gpu import pretend
from tests.helpers.tiers import slow
from tests.helpers.tiny import tiny_batch, tiny_config, tiny_method, tiny_params
from tests.methods.training_test import MAKE, extras

# Tokens of an image in MAE's encoder and decoder: 5 and 17; of images of 16 by 20 pixels 6 and 21.
CASES = [("mae", (16, 20)), *((method, (16, 16)) for method in methods.TABLE)]


def found(config: Any, method: str) -> tuple[Any, Any, Any]:
    """Returns loss, gradients and their norm."""
    built, batch = tiny_method(config), MAKE.get(method, tiny_batch)(config)

    def loss(params: Any) -> jax.Array:
        total, _ = built.loss(params, extras(method, config), batch, jax.random.key(0), 1, True)
        return total

    def both(params: Any) -> tuple[Any, Any, Any]:
        value, gradients = jax.value_and_grad(loss)(params)
        return value, gradients, global_norm(gradients)

    return jax.jit(both)(tiny_params(config))


@pytest.mark.parametrize(("method", "size"), [case if case == CASES[0] else slow(*case) for case in CASES])
def test_losses_and_gradients_are_those_of_a_cpu(method, size, monkeypatch):
    config = tiny_config({"data.image_size": size}, method)
    loss, gradients, norm = found(config, method)
    pretend(monkeypatch)
    with mock.patch.object(attention_cudnn, "backward", wraps=attention_cudnn.backward) as backward, mock.patch.dict(
            attention.IMPLEMENTATIONS, cudnn=attention.Implementation(attention_cudnn.forward, backward)):
        ours, others, length = found(config, method)
    assert backward.called == (method != "segment")  # whose encoder is frozen
    np.testing.assert_allclose(ours, loss, rtol=1e-5)
    np.testing.assert_allclose(length, norm, rtol=1e-4)
    np.testing.assert_allclose(length, optax.tree.norm(others), rtol=1e-6)
    for name, wanted in flatten(gradients).items():
        np.testing.assert_allclose(flatten(others)[name], wanted, rtol=0, atol=1e-4 * float(norm), err_msg=name)
