"""The mesh and the rows of a process, on one device; more devices: multidevice_test."""

import jax
import numpy as np
import pytest

from mae_jax.config import resolved
from mae_jax.errors import UserError
from mae_jax.runtime import sharding
from mae_jax.training.throughput import peak_flops
from tests.helpers.tiny import tiny_config


@pytest.mark.parametrize(("fields", "count", "line"), [
    ({"batch_size": 20}, 8, "batch_size=20 in 1 .* 8 devices.* 16 and 24"),
    ({"batch_size": 8, "train.accumulate": 4}, 4, "batch_size=8 in 4 .* 16$"),
    ({"batch_size": 4}, 8, "batch_size=4 in 1 .* 8 devices.* 8$"),
    ({"mesh.data": 4}, 8, "mesh.data=4, mesh.fsdp=1, mesh.tensor=1 .* 8 devices.* -1"),
    ({"mesh.fsdp": 3}, 8, "mesh.data=-1, mesh.fsdp=3, mesh.tensor=1 .* 8 devices"),
    ({"mesh.data": 0}, 1, "mesh.data=0, .* one .* -1"),
    ({"mesh.slices": 3}, 8, "mesh.slices=3 does not divide 8 devices$"),
    ({"mesh.slices": 2}, 1, "mesh.slices=2 does not divide 1 device$"),
    ({"mesh.slices": -2}, 8, "mesh.slices=-2; expected how many .* -1"),
    ({"mesh.slices": 4, "mesh.fsdp": 4}, 8, "mesh.data=2 does not divide over 4 slices, .*mesh.fsdp or mesh.tensor"),
    ({"mesh.fsdp": -1}, 8, "mesh.data=-1, mesh.fsdp=-1, .* one .* -1"),
])
def test_devices_that_the_batch_does_not_divide_over_are_refused_with_the_nearest_sizes(fields, count, line):
    with pytest.raises(UserError, match=line):
        sharding.make_mesh(resolved(tiny_config(fields)), jax.devices()[:1] * count)


def test_one_process_holds_all_rows_and_a_batch_arrives_whole():
    mesh = sharding.make_mesh(resolved(tiny_config()))
    np.testing.assert_array_equal(sharding.local_rows(mesh, 8), np.arange(8))
    batch = {"id": np.arange(8), "patches": np.ones((8, 2, 3), np.uint8)}
    arrays = sharding.to_devices(batch, mesh, 8)
    for name, value in batch.items():
        np.testing.assert_array_equal(arrays[name], value)
        assert arrays[name].sharding == sharding.batch_sharding(mesh)


class Device:
    def __init__(self, device_kind):
        self.device_kind = device_kind


@pytest.mark.parametrize(("kind", "peak"), [
    ("TPU v3", 61.5e12), ("TPU v4", 275e12), ("TPU v5 lite", 197e12), ("TPU v5", 459e12), ("TPU v5p", 459e12),
    ("TPU v6 lite", 918e12), ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H200", 989e12),
    ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA L4", 121e12), ("NVIDIA L40S", 362e12), ("cpu", None)])
def test_the_peak_is_that_of_the_chip(kind, peak):
    assert peak_flops(Device(kind)) == peak
