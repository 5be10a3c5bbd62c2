"""One process and what befalls it: output that cannot be written, a short draw of the soak."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults import soak
from tests.faults.processes import environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("compiled")


@pytest.mark.parametrize("output", ["full disk", "closed pipe"])
def test_a_run_outlives_whatever_reads_its_output(tmp_path, cache, output):
    command = [sys.executable, "-m", "tests.faults.peer", str(tmp_path / "run"), "off", "-1", "-1", "5"]
    if output == "full disk":
        with open("/dev/full", "w") as full:
            code = subprocess.run(command, env=environment(1, cache), stdout=full, stderr=full, timeout=120).returncode
    else:
        process = subprocess.Popen(command, env=environment(1, cache), stdout=subprocess.PIPE,
                                   stderr=subprocess.STDOUT)
        process.stdout.readline()
        process.stdout.close()
        code = process.wait(120)
    assert code == 0
    assert (tmp_path / "run" / "DONE").read_text() == "20\n"


@pytest.mark.bucket
def test_faults_at_random_moments_change_no_bit_and_end_no_run_unexplained(tmp_path):
    table = soak.campaign(3, 7, tmp_path / "soak.jsonl", ("one device", "bucket"))
    lines = [json.loads(line) for line in (tmp_path / "soak.jsonl").read_text().splitlines()]
    assert sum(len(line["faults"]) for line in lines) >= 3
    assert all(fault["explained"] for line in lines for fault in line["faults"]), table
    assert all(line["same"] for line in lines), table
    assert "0 runs did not end with the bits and the examples" in table
