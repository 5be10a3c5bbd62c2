"""Two processes save, refuse and stop together."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.faults.processes import free_port
from tests.helpers.devices import simulated

pytestmark = pytest.mark.processes

SCRIPT = """
import asyncio, os, resource, signal, sys, time
from pathlib import Path
number, port, workdir = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
sys.path.insert(0, sys.argv[4])
from checkpoint_test import Checkpoints, array_file, flip, make_state, names
from mae_jax.commands import cli
from mae_jax.runtime import peers
from mae_jax.runtime.discovery import ProcessInfo
from mae_jax.runtime.signals import SignalHandler

def cancelled(*args, **kwargs):
    raise asyncio.CancelledError

def run():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def place(x):
        return NamedSharding(mesh, P("data") if x.ndim and x.shape[0] % 4 == 0 else P())

    def state(step):
        return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, place(x), lambda i: np.asarray(x)[i]),
                            make_state(step))

    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place(x)), make_state(0))
    with SignalHandler() as stopper:
        checkpoints = Checkpoints(workdir, 2)
        for step in (1, 2, 3):
            checkpoints.save(step, state(step))
        checkpoints.wait()
        assert checkpoints.failed is None
        if number == 0:
            path = array_file(workdir / "checkpoints" / "3")
            flip(path, path.stat().st_size // 2)
        peers.gather("damaged")
        checkpoints = Checkpoints(workdir, 2)
        assert int(checkpoints.restore(abstract).step) == 2
        checkpoints.save(3, state(3))
        checkpoints.wait()
        assert checkpoints.latest() == 3
        assert "3" in names(workdir / "refused")
        if number == 0:  # process 0 alone cannot save: no process may wait for it
            checkpoints._prepare = lambda step: (workdir / "no" / "folder").mkdir()
        checkpoints.save(4, state(4))
        assert "checkpoint of step 4 not saved: FileNotFoundError" in checkpoints.failed
        assert checkpoints.latest() == 3
        checkpoints, began = Checkpoints(workdir, 2), time.monotonic()
        if number == 1:  # it alone cannot write its part, while the other one waits for it
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        checkpoints.save(4, state(4))
        checkpoints.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        assert "checkpoint of step 4 not saved: " in checkpoints.failed and "File too large" in checkpoints.failed
        assert time.monotonic() - began < 20
        assert checkpoints.latest() == 3
        checkpoints.save(5, state(5))
        checkpoints.wait()
        assert checkpoints.latest() == 5
        module = sys.modules[type(checkpoints._checkpointer).__module__]
        commit = module._background_wait_for_commit_futures
        if number == 1:
            module._background_wait_for_commit_futures = cancelled
        checkpoints.save(6, state(6))
        checkpoints.wait()
        module._background_wait_for_commit_futures = commit
        assert "checkpoint of step 6 not saved: OSError: writing was cancelled" in checkpoints.failed
        assert checkpoints.latest() == 5
        checkpoints = Checkpoints(workdir, 2)
        stopper.mark_unsaved()
        if number == 1:
            os.kill(os.getpid(), signal.SIGINT)
        step = 6
        while not stopper.should_stop(step):
            time.sleep(0.02)
            step += 1
        checkpoints.save(step, state(step))
        checkpoints.close()
        restored = Checkpoints(workdir, 2).restore(abstract)
        for got, wanted in zip(jax.tree.leaves(restored), jax.tree.leaves(make_state(step)), strict=True):
            for shard in got.addressable_shards:
                assert np.asarray(shard.data).tobytes() == np.asarray(wanted)[shard.index].tobytes()
        print("stopped at", step, flush=True)
    return 0

here = ProcessInfo("127.0.0.1", port, number, 2)
sys.exit(cli.guarded(lambda: peers.launch(run, here, {}, 60, 30)))
"""


def test_two_processes_save_refuse_a_damaged_step_and_stop_at_the_same_step(tmp_path):
    port = free_port()
    processes = [subprocess.Popen([sys.executable, "-c", textwrap.dedent(SCRIPT), str(number), str(port), str(tmp_path),
                                   str(Path(__file__).parents[1] / "storage")],
                                  env=simulated(2), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
                 for number in range(2)]
    ends = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], ends[0][1] + ends[1][1]
    stops = [[line for line in out.splitlines() if line.startswith("stopped at")] for out, _ in ends]
    assert stops[0] == stops[1] != []
    assert all("step 3 refused: params/" in err for _, err in ends)
