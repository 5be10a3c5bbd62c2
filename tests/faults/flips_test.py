"""A changed byte in a checkpoint never becomes another value of an array."""

import json
import subprocess
import sys

import pytest

from tests.helpers.devices import simulated

pytestmark = pytest.mark.slow

FLIPS = 6  # anywhere, and as many in arrays; more by `python -m tests.faults.flips 1000 1`


@pytest.mark.parametrize("devices", [1, 8])
def test_changed_bytes_leave_every_array_bit_equal_or_the_step_refused_by_name(devices):
    done = subprocess.run([sys.executable, "-m", "tests.faults.flips", str(FLIPS), "0"], env=simulated(devices),
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["devices"], found["wrong"]) == (devices, [])
    assert sum(found["anywhere"].values()) == FLIPS
    assert found["in_arrays"] == {"equal": 0, "refused": FLIPS}
