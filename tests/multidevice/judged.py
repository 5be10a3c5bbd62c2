"""Run by multidevice_test on 8 simulated devices: the figures of one detector on meshes of 1, 2 and 8 devices."""

import json
import tempfile
from pathlib import Path

import jax

from tests.helpers.oracle import made, write

found = {}
with tempfile.TemporaryDirectory() as folder:
    write(Path(folder))
    for devices in (1, 2, 8):
        evaluator, state = made(Path(folder), 0.2, batch=8, devices=devices)
        with jax.set_mesh(evaluator.mesh):
            figures = evaluator.scalars(state)
            results = [json.loads(text) for _, text in evaluator.files(state)]
        found[devices] = {"results": len(results[0]), **{
            name: value for name, value in figures.items() if value == value}}
print(json.dumps(found))
