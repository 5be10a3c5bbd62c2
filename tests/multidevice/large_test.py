"""What changes hands between meshes, and a step of the largest kind compiled for 128 devices."""

import pytest

from tests.multidevice.multidevice_test import run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_states_move_between_meshes_bit_for_bit_and_no_device_holds_a_large_one_whole():
    found = run("meshes", 8)
    assert found["restored"]
    assert found["held"] < 0.75  # parameters and two moments, an eighth of each, and what making them takes
    assert found["collectives"] == 0
    # Each gradient of what is cut passes two stages, the second with half of it.
    assert found["float32"] == {"f32": found["cut"] * 3 // 2}
    assert found["bfloat16"] == {"bf16": found["cut"] * 3 // 2}


def test_the_vit_l_step_of_4096_images_compiles_for_128_devices():
    found = run("compile_vit_l", 128)
    assert (found["devices"], found["batch"], found["parameters"]) == (128, 4096, 329_239_296)
    assert found["replicated"]
    assert found["all_reduces"] > 0
    print(f"lowered and compiled in {found['seconds']:.0f} s")
