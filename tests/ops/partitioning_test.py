import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from mae_jax.ops import partitioning

MESH = {"data": 1, "zero": 2, "fsdp": 64, "tensor": 1}


@pytest.mark.parametrize(("shape", "split", "changed", "spec"), [
    ((1024, 4096), "", {}, P(("zero", "fsdp"), None)),
    ((588, 1280), "", {}, P(None, ("zero", "fsdp"))),  # 588 rows do not divide by 128, 1280 columns do
    ((588, 1000), "", {}, P(None, None)),  # neither does
    ((1024,), "", {}, P(None)),  # small
    ((1024, 4096), "", {"zero": 1, "data": 2}, P("fsdp", None)),
    ((1024, 4096), "", {"zero": 1, "fsdp": 1}, P(None, None)),
    ((1024, 4096), "out", {"fsdp": 16, "tensor": 4}, P(("zero", "fsdp"), "tensor")),
    ((4096, 1024), "in", {"fsdp": 16, "tensor": 4}, P(("tensor", "zero", "fsdp"), None)),
    ((4096,), "out", {"fsdp": 16, "tensor": 4}, P("tensor")),
])
def test_a_kernel_is_cut_along_the_first_dimension_that_divides(shape, split, changed, spec):
    assert partitioning.kernel_spec(shape, split, MESH | changed) == spec


def test_without_a_mesh_nothing_happens():
    x = jnp.arange(6.0).reshape(2, 3)
    assert partitioning.sizes() == {}
    np.testing.assert_array_equal(partitioning.constrain(x, partitioning.ROWS), x)
    np.testing.assert_array_equal(partitioning.gather(x, "out"), x)
    jaxpr = jax.make_jaxpr(lambda x: partitioning.gather(partitioning.constrain(x, partitioning.ROWS), ""))(x)
    assert "sharding" not in str(jaxpr)
