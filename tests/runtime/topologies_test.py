"""Meshes over the devices that libtpu describes, of slices that need not be there."""

import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
from ml_collections import ConfigDict

from mae_jax.commands.plan import tpu
from mae_jax.config import default, for_platform
from mae_jax.errors import UserError
from mae_jax.runtime import sharding
from tests.helpers.tiers import all_slow_but

pytest.importorskip("libtpu")
SETTINGS = (
    {}, {"data": 1, "fsdp": -1}, {"fsdp": 2}, {"fsdp": 4}, {"tensor": 2}, {"tensor": 4}, {"data": 2, "fsdp": -1},
    {"data": 1, "fsdp": -1, "tensor": 4}, {"fsdp": 2, "tensor": 2}, {"data": 1, "tensor": -1},
)
NAMES = sorted({name for name in tpu.types().values() if 4 <= math.prod(tpu.parse(name)[1]) <= 512} | {
    "v2:2x2", "v3:16x32", "v4:4x4x8", "v5e:8x8", "v5p:4x4x4", "v6e:4x4", "v6e:8x16", "7x:2x2x2", "7x:4x4x8"})
FAST = ("v3:2x2", "v4:4x4x4", "v5e:4x4", "v5p:4x4x4", "v6e:4x4", "7x:2x2x1")


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Sets what a description needs, so that it does not stay set."""
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")


def tpu_config(fields: dict[str, int | str], devices: int) -> ConfigDict:
    config = for_platform(default(), "tpu").unlock()
    config.batch_size = 4 * devices
    config.mesh.update(fields)
    return config


def places(devices: np.ndarray) -> np.ndarray:
    """Returns the chip of each device [*, 3]."""
    return np.array([device.coords for device in devices.flat])


@pytest.mark.parametrize("name", all_slow_but(FAST, NAMES))
def test_every_slice_makes_every_mesh(name):
    devices = tpu.devices(name)
    for fields in SETTINGS:
        for zero in ("on", "off"):
            mesh = sharding.make_mesh(tpu_config(fields | {"zero": zero}, len(devices)), devices)
            assert set(mesh.devices.flat) == set(devices)
            sizes = {"data": 1, "fsdp": 1, "tensor": 1, **({} if "data" in fields else {"data": -1}), **fields}
            known = math.prod(size for size in sizes.values() if size > 0)
            sizes = {axis: len(devices) // known if size < 0 else size for axis, size in sizes.items()}
            assert mesh.shape["tensor"] == sizes["tensor"]
            assert mesh.shape["data"] == (1 if zero == "on" else sizes["data"])
            assert mesh.size == len(devices)


def test_there_are_as_many_topologies_as_promised():
    assert len(NAMES) >= 32
    assert {name.split(":")[0] for name in NAMES} == set(tpu.CHIPS)


@pytest.mark.parametrize("name", ["v3:2x2", "v3:8x8", "7x:2x2x1", "7x:4x4x4"])
def test_the_cores_of_a_chip_add_up_first(name):
    devices = tpu.devices(name)
    mesh = sharding.make_mesh(tpu_config({}, len(devices)), devices)
    assert mesh.shape["zero"] == 2
    assert all(len(np.unique(places(pair), axis=0)) == 1 for pair in mesh.devices.reshape(2, -1).T)


@pytest.mark.parametrize("name", ["v4:4x4x4", "v4:2x2x4", "v5e:4x4", "v5e:8x16", "v5p:4x4x8", "v6e:4x4", "v6e:16x16"])
def test_on_chips_of_one_core_the_halves_of_a_slice_add_up_first_and_each_is_a_box(name):
    devices = tpu.devices(name)
    mesh = sharding.make_mesh(tpu_config({}, len(devices)), devices)
    assert mesh.shape["fsdp"] == 2
    for half in mesh.devices.reshape(-1, 2).T:
        coords = places(half)
        assert np.prod(np.ptp(coords, axis=0) + 1) == len(devices) // 2


@pytest.mark.parametrize("name", ["v4:2x2x1", "v5e:2x4", "v5p:2x2x2"])
def test_a_few_chips_add_up_at_once(name):
    devices = tpu.devices(name)
    mesh = sharding.make_mesh(tpu_config({}, len(devices)), devices)
    assert (mesh.shape["zero"], mesh.shape["fsdp"]) == (len(devices), 1)


@pytest.mark.parametrize("name", ["v3:2x2", "v5e:4x4", "v4:2x2x2"])
def test_slices_share_rows_and_everything_else_lies_inside_one(name):
    devices, single = tpu.devices(name, 2), len(tpu.devices(name))
    assert len(devices) == 2 * single
    mesh = sharding.make_mesh(tpu_config({}, len(devices)), devices)
    assert mesh.shape["data"] == 2
    assert mesh.shape["zero"] * mesh.shape["fsdp"] == single
    assert [{device.slice_index for device in part.flat} for part in mesh.devices] == [{0}, {1}]
    mesh = sharding.make_mesh(tpu_config({"zero": "off", "tensor": 2}, len(devices)), devices)
    assert mesh.devices.shape == (single, 1, 1, 2)
    assert all(one.slice_index == two.slice_index for one, two in mesh.devices.reshape(-1, 2))


@pytest.mark.parametrize(("fields", "line"), [
    ({"slices": 1}, "mesh.slices=1, but the devices are in 2 slices"),
    ({"slices": 4}, "mesh.slices=4, but the devices are in 2 slices"),
    ({"data": 1, "fsdp": -1}, "mesh.data=1 does not divide over 2 slices.*mesh.fsdp"),
    ({"slices": 0}, "mesh.slices=0; expected .* -1"),
])
def test_what_does_not_fit_the_slices_is_refused(fields, line):
    with pytest.raises(UserError, match=line) as error:
        sharding.make_mesh(tpu_config(fields, 16), tpu.devices("v3:2x2", 2))
    assert "\n" not in str(error.value)


@pytest.mark.compile
@pytest.mark.timeout(900)
def test_gradients_are_scattered_within_a_slice_and_their_pieces_summed_over_slices():
    """A kernel has 4,194,304 values, so that both have 33.6 MB in float32."""
    cases = ["v5e:4x4*1", "v4:4x4x4*1", "v5e:2x4*2"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}  # libtpu ends at flags that are for CPUs
    done = subprocess.run([sys.executable, "-m", "tests.multidevice.compile_stages", *cases], capture_output=True,
                          text=True, timeout=900, env=environment)
    assert done.returncode == 0, done.stderr
    rows = {case: {(row["kind"], row["group_size"]): row for row in found if row["bytes"] > 2**18}
            for case, found in json.loads(done.stdout.splitlines()[-1]).items()}
    for case, half in (("v5e:4x4*1", 8), ("v4:4x4x4*1", 32)):
        kinds = {("reduce-scatter", half), ("reduce-scatter", 2), ("all-gather", half), ("all-gather", 2)}
        assert rows[case].keys() == kinds
        assert rows[case]["reduce-scatter", 2]["bytes"] == rows[case]["reduce-scatter", half]["bytes"] // half
    found = rows["v5e:2x4*2"]
    assert found.keys() == {("reduce-scatter", 8), ("all-gather", 8), ("DCN all-reduce", 2)}
    # Each device sends its eighth, twice the half of it; a bias's gradient is small, and counted too.
    sent = found["DCN all-reduce", 2]["bytes_sent"]
    assert 33554432 / 8 <= sent < 1.1 * 33554432 / 8
    assert found["DCN all-reduce", 2]["seconds"] == pytest.approx(sent / 3.125e9)
