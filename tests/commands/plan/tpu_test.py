"""Names of topologies, the table of chips, and how a slice is wired."""

import importlib.util
import math
from types import SimpleNamespace

import jax
import pytest

from mae_jax.commands.plan import tpu
from mae_jax.errors import UserError
from mae_jax.training import throughput


@pytest.mark.parametrize(("name", "shape"), [
    ("v2:2x2", (2, 2)), ("v3:8x8", (8, 8)), ("v4:2x2x1", (2, 2, 1)), ("v5e:4x8", (4, 8)), ("v5p:4x4x4", (4, 4, 4)),
    ("v6e:16x16", (16, 16)), ("7x:2x2x1", (2, 2, 1)), ("tpu7x:4x4x4", (4, 4, 4)),
    ("v3-128", (8, 8)), ("v5litepod-8", (2, 4)), ("v5litepod-1", (1, 1)), ("v5litepod:4x4", (4, 4)),
    ("v5p-8", (2, 2, 1)), ("v5p-128", (4, 4, 4)),
    ("v5litepod-16", (4, 4)), ("v6e-8", (2, 4)), ("v6e-16", (4, 4)), ("v6e-1", (1, 1)), ("tpu7x-8", (2, 2, 1))])
def test_a_topology_is_a_generation_and_the_chips_along_each_dimension(name, shape):
    chip, found = tpu.parse(name)
    assert found == shape
    assert chip in tpu.CHIPS.values()


@pytest.mark.parametrize(("name", "words"), [
    ("v9:2x2", ["unknown topology 'v9:2x2'", "known: 7x, v2, v3, v4, v5e, v5p, v6e"]),
    ("vv3:2x2", ["did you mean 'v3'?"]),
    ("v3-127", ["'v3-127'", "nearest: v3-128;", "v3-8, v3-32, ", "v3:8x8"]),
    ("v5e-8", ["'v5e-8'", "nearest: v5litepod-8;", "v5litepod-1, v5litepod-4, v5litepod-8", "v5e:8x8"]),
    ("v6e-7", ["'v6e-7'", "nearest: v6e-8;", "v6e-1, v6e-4, v6e-8", "v6e:8x8"]),
    ("h100-8", ["unknown topology 'h100-8'", "v5litepod-8"]),
    ("v3:1x1", ["even", "nearest: v3:2x2"]),
    ("v3", ["chips along each dimension", "v3:8x8"]),
    ("v3:axb", ["chips along each dimension", "v3:8x8"]),
    ("v3:0x8", ["chips along each dimension", "v3:8x8"]),
    ("v4:4x4", ["3 dimensions", "v4:4x4x4"]),
    ("v3:4x4x4", ["2 dimensions", "v3:8x8"]),
    ("v3:3x8", ["even", "nearest: v3:4x8"]),
])
def test_a_name_that_is_no_topology_ends_with_one_line_that_shows_one(name, words):
    with pytest.raises(UserError) as error:
        tpu.parse(name)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_every_accelerator_type_has_a_shape_of_as_many_cores_or_chips_as_its_name_says():
    assert len(tpu.types()) > 40
    assert len(set(tpu.types().values())) == len(tpu.types())  # the launcher takes either
    for name, topology in tpu.types().items():
        chip, shape = tpu.parse(name)
        assert (chip, shape) == tpu.parse(topology)
        cores = 1 if chip in (tpu.CHIPS["v5e"], tpu.CHIPS["v6e"]) else 2
        assert int(name.split("-")[1]) == cores * math.prod(shape), name


def test_without_libtpu_the_line_says_what_to_install(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "libtpu" else find(name))
    with pytest.raises(UserError, match=r"pip install 'mae_jax\[plan\]'"):
        tpu.devices("v3:2x2")


class Libtpu:
    """Fails like libtpu while another process loads it, `busy` times, or with a complaint."""

    def __init__(self, busy: int, complaint: str = "Internal error when accessing libtpu multi-process lockfile"):
        self.busy, self.complaint, self.asked = busy, complaint, []

    def __call__(self, **options):
        self.asked.append(options)
        if len(self.asked) <= self.busy:
            raise jax.errors.JaxRuntimeError(f"INTERNAL: {self.complaint}\nmore")
        return SimpleNamespace(devices=("a", "b"))


@pytest.fixture
def libtpu(monkeypatch):
    from jax.experimental import topologies as described

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: "here" if name == "libtpu" else find(name))
    monkeypatch.setattr(tpu.time, "sleep", lambda _: None)
    return lambda *args: monkeypatch.setattr(described, "get_topology_desc", fake := Libtpu(*args)) or fake


def test_libtpu_is_asked_again_while_another_process_loads_it(libtpu):
    fake = libtpu(3)
    assert tpu.devices("v4:2x2x1") == ["a", "b"]
    assert fake.asked == [{"platform": "tpu", "topology_name": "v4:2x2x1", "chip_config_name": "megacore"}] * 4
    assert tpu.devices("v3:2x2", 2) == ["a", "b"]
    assert fake.asked[-1] == {"platform": "tpu", "topology_name": "v3:2x2", "num_slices": 2}
    libtpu(99)
    with pytest.raises(UserError, match="in use by another process"):
        tpu.devices("v3:2x2")


def test_what_libtpu_refuses_is_passed_on_in_one_line(libtpu):
    libtpu(1, "no such shape")
    with pytest.raises(UserError) as error:
        tpu.devices("v3:2x2")
    assert str(error.value) == "libtpu refuses the topology 'v3:2x2': INTERNAL: no such shape"


def test_every_generation_has_a_peak_in_the_one_table_of_peaks():
    kinds = {"v2": "TPU v2", "v3": "TPU v3", "v4": "TPU v4", "v5e": "TPU v5 lite", "v5p": "TPU v5",
             "v6e": "TPU v6 lite", "7x": "TPU7x"}  # what libtpu 0.0.52 calls their devices
    assert kinds.keys() == tpu.CHIPS.keys()
    peaks = {name: throughput.peak_flops(SimpleNamespace(device_kind=kind)) for name, kind in kinds.items()}
    assert peaks == {"v2": 22.5e12, "v3": 61.5e12, "v4": 275e12, "v5e": 197e12, "v5p": 459e12, "v6e": 918e12,
                     "7x": 1153e12}


@pytest.mark.parametrize(("name", "rings"), [
    ("v3:8x8", (True, True, False)),  # assumed for all v2 and v3 slices
    ("v3:2x2", (False, False, False)),  # two chips are neighbors once
    ("v5e:8x16", (False, True, False)),
    ("v5p:4x4x8", (True, True, True)),
    ("v4:2x2x4", (False, False, True)),
])
def test_a_dimension_is_a_ring_where_its_generation_closes_it(name, rings):
    chip, shape = tpu.parse(name)
    shape = (*shape, 1)[:3]
    places = [SimpleNamespace(coords=[x, y, z]) for x in range(shape[0]) for y in range(shape[1])
              for z in range(shape[2])]
    torus = tpu.torus(chip, places)
    assert torus.rings == rings
    assert torus.shape == shape


def test_slices_are_alike_and_the_devices_of_a_chip_share_its_network():
    chip, _ = tpu.parse("v3:2x2")
    places = [SimpleNamespace(coords=[x, y, 0], slice_index=index)
              for index in range(2) for y in range(2) for x in range(2) for _ in range(2)]
    torus = tpu.torus(chip, places)
    assert (torus.slices, torus.shape, len(torus.coords)) == (2, (2, 2, 1), 8)
    assert torus.network_rate == chip.network_rate / 2


def test_more_chips_than_a_pod_has_are_refused():
    with pytest.raises(UserError, match=r"'v3:256x256' .*65536 .* v3 .*1024"):
        tpu.parse("v3:256x256")
