"""Parameters by path: the table, and starting from others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax import param_tree
from mae_jax.errors import UserError


def tree(**extra):
    return {"encoder": {"block_00": {"kernel": jnp.zeros((2, 3))}, "block_01": {"kernel": jnp.zeros((2, 3))}}, **extra}


def test_merge_takes_what_has_the_same_path_and_reports_the_rest():
    loaded = {"encoder": {"block_00": {"kernel": np.ones((2, 3), np.float64)}}, "head": {"bias": np.ones(4)}}
    merged, report = param_tree.merge(tree(), loaded)
    assert report == "taken: 1 (encoder/block_*); new: 1 (encoder/block_*); left over: 1 (head/bias)"
    np.testing.assert_array_equal(merged["encoder"]["block_00"]["kernel"], np.ones((2, 3)))
    assert not merged["encoder"]["block_01"]["kernel"].any()
    assert {leaf.dtype for leaf in jax.tree.leaves(merged)} == {jnp.dtype("float32")}


@pytest.mark.parametrize(("loaded", "line"), [
    ({"encoder": {"block_00": {"kernel": np.ones((2, 4))}}},
     r"encoder/block_00/kernel .*\(2, 4\), .*\(2, 3\)"),
    ({"vit": {"kernel": np.ones((2, 3))}}, "no parameter .*vit/kernel"),
    ({}, "no parameter "),
])
def test_parameters_of_another_model_are_refused(loaded, line):
    with pytest.raises(UserError, match=line):
        param_tree.merge(tree(), loaded)

