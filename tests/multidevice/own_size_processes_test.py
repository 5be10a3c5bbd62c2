"""Two real processes evaluate an UperNet at the images' own size: every pixel counts once, as in one process."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from mae_jax.data.reading import Reading
from mae_jax.evals import own_size
from mae_jax.runtime.sharding import make_mesh
from tests.evals.own_size_test import SIZES, picture, source
from tests.faults.processes import free_port
from tests.helpers.devices import simulated
from tests.helpers.tiny import tiny_method, tiny_segment

pytestmark = [pytest.mark.processes, pytest.mark.timeout(300)]

SCRIPT = """
import json
import sys
from mae_jax.commands import cli
from mae_jax.runtime import discovery, peers

def run():
    from tests.multidevice.own_size_processes_test import counted
    print(json.dumps(counted().tolist()), flush=True)
    return 0

place = discovery.find(sys.argv[1], 2, int(sys.argv[2]))
sys.exit(cli.guarded(lambda: peers.launch(run, place, {"--x": 1}, 60, 30)))
"""


def counted() -> np.ndarray:
    """Returns the confusions of all images, those of this process's share evaluated here, on four devices."""
    config = tiny_segment({
        "method.test": "slide", "method.stride": (10, 12), "method.head": "upernet", "method.train_blocks": -1,
        "method.head_width": 16, "method.aux_width": 8, "model.positions": "learned", "eval.flip": True,
        "batch_size": 4, "data.threads": 2})
    method, mesh = tiny_method(config), make_mesh(config, jax.devices()[:4])
    spec = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), method.batch_spec())
    params, extras = jax.device_get(jax.jit(method.init)(jax.random.key(0), spec))
    counts = np.zeros((3, 3), np.int64)
    with jax.set_mesh(mesh):
        for found in own_size.predictions(method, params, extras, mesh, source(), own_size.own_numbers(
                config, len(SIZES)), Reading.of(config.data)):
            if not found.error:
                counts += own_size.confusion(found.mask, found.classes, 3)
        return own_size.summed(counts)


def test_two_processes_count_every_pixel_once_as_one_does():
    port = free_port()
    run = [subprocess.Popen([sys.executable, "-c", SCRIPT, f"localhost:{port}", str(number)], env=simulated(2),
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for number in range(2)]
    ends = [process.communicate(timeout=200) for process in run]
    assert [process.returncode for process in run] == [0, 0], ends
    first, second = (np.array(json.loads(out.splitlines()[-1])) for out, _ in ends)
    np.testing.assert_array_equal(first, second)
    one = counted()
    masks = np.concatenate([picture(number).mask.ravel() for number in range(len(SIZES)) if number != 4])
    np.testing.assert_array_equal(one.sum(1), np.bincount(masks, minlength=3)[:3])
    np.testing.assert_array_equal(first.sum(1), one.sum(1))
    assert (one.sum(0) > 0).sum() > 1  # not of one class alone
    assert np.abs(first - one).sum() <= 2e-3 * one.sum()  # sums in another order decide near ties otherwise
