"""Two real processes judge a detector: every image counts once, and both have the figures of one process."""

import json
import subprocess
import sys

import pytest

from tests.faults.processes import free_port
from tests.helpers.devices import simulated
from tests.helpers.oracle import IMAGES, made, write

pytestmark = [pytest.mark.processes, pytest.mark.timeout(300)]

SCRIPT = """
import json
import sys
from pathlib import Path
import jax
from mae_jax.commands import cli
from mae_jax.runtime import discovery, peers

def run():
    from tests.helpers.oracle import made
    evaluator, state = made(Path(sys.argv[3]), 0.2, batch=4, devices=4)
    with jax.set_mesh(evaluator.mesh):
        figures = evaluator.scalars(state)
        results = [json.loads(text) for _, text in evaluator.files(state)]
        pictures = [name for name, _ in evaluator.images(state)]
    figures = {name: value for name, value in figures.items() if value == value}
    print(json.dumps([figures, results, pictures]), flush=True)
    return 0

place = discovery.find(sys.argv[1], 2, int(sys.argv[2]))
sys.exit(cli.guarded(lambda: peers.launch(run, place, {"--x": 1}, 60, 30)))
"""


def test_two_processes_judge_every_image_once_as_one_does(tmp_path):
    write(tmp_path)
    port = free_port()
    run = [subprocess.Popen([sys.executable, "-c", SCRIPT, f"localhost:{port}", str(number), str(tmp_path)],
                            env=simulated(2), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
           for number in range(2)]
    ends = [process.communicate(timeout=200) for process in run]
    assert [process.returncode for process in run] == [0, 0], ends
    found = [json.loads(out.splitlines()[-1]) for out, _ in ends]
    assert found[0] == found[1]
    figures, (results,), pictures = found[0]
    evaluator, state = made(tmp_path, 0.2, batch=4)
    for name, value in evaluator.scalars(state).items():
        assert name not in figures or figures[name] == pytest.approx(value, rel=1e-6), name
    assert figures["eval/box_ap"] == pytest.approx(0.4)
    assert len(results) == 2 * (IMAGES - 1)
    assert pictures == ["detection"]
