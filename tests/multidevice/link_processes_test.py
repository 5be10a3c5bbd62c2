"""Two real processes meet at an IPv6 address, agree, and add up what their devices hold; strangers call meanwhile."""

import contextlib
import socket
import subprocess
import sys
import threading

import pytest

from benchmarks import link
from mae_jax.runtime.discovery import address
from tests.faults.processes import free_port
from tests.helpers.devices import simulated

pytestmark = pytest.mark.processes

SCRIPT = """
import sys
import jax
import numpy as np
from mae_jax.commands import cli
from mae_jax.runtime import discovery, peers

def run():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    here = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    rows = jax.make_array_from_callback((2,), here, lambda index: np.asarray([20, 22])[index])
    number = jax.process_index()
    said = [peers.broadcast(["of", number]), peers.first_true(number), peers.gather(number),
            peers.first_true("", "save")]
    print("sum", int(jax.jit(lambda x: x.sum())(rows)), said, flush=True)
    return 0

place = discovery.find(sys.argv[1], 2, int(sys.argv[2]))
sys.exit(cli.guarded(lambda: peers.launch(run, place, {"--x": 1}, 60, 30)))
"""


@pytest.mark.parametrize("host", [pytest.param("::1", marks=pytest.mark.skipif(
    not socket.has_ipv6, reason="needs IPv6")), "localhost"])
def test_two_processes_meet_agree_and_compute_among_strangers(host):
    port, stop, strangers = free_port(), threading.Event(), []
    coordinator = address(host, port)
    run = [subprocess.Popen([sys.executable, "-c", SCRIPT, coordinator, str(number)], env=simulated(1),
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for number in range(2)]

    def bother() -> None:
        while not stop.wait(0.1):
            with contextlib.suppress(OSError):
                strangers.append(socket.create_connection((host, port), timeout=1))
                strangers[-1].sendall([b"[" * 99_000 + b"\n", b"", b'{"mae_jax": 5}\n'][len(strangers) % 3])

    thread = threading.Thread(target=bother)
    thread.start()
    ends = [process.communicate(timeout=200) for process in run]
    stop.set()
    thread.join()
    for line in strangers:
        line.close()
    assert [process.returncode for process in run] == [0, 0], ends[0][1] + ends[1][1]
    said = [next(line for line in out.splitlines() if line.startswith("sum")) for out, _ in ends]
    assert said == ["sum 42 [['of', 0], 1, [0, 1], '']", "sum 42 [['of', 0], 1, [1], '']"]


@pytest.mark.slow
def test_more_processes_than_descriptors_of_old_start_agree_and_end_in_seconds():
    """Three real ones, and the others played."""
    found = link.measured(1100, 1.0, 100.0)
    assert found["start_seconds"] < 30
    assert found["mib_at_the_end"] < 200
    assert found["stopped_after"] >= 8
