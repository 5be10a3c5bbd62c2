"""The verb as a user runs it."""

import csv
import subprocess
import sys

import pytest

from tests.helpers.stored import store_images, store_run
from tests.helpers.tiny import tiny_config, tiny_params, tiny_supervised


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("predict")
    store_images(folder / "data", count=9, broken=1)
    config = tiny_supervised({"data.source": "folder", "data.path": str(folder / "data"), "method.classes": 0})
    store_run(folder / "run", config, ("a", "b", "c"), tiny_params(tiny_supervised()))
    store_run(folder / "mae", tiny_config())
    return folder


def predict(*flags):
    return subprocess.run([sys.executable, "-m", "mae_jax", "predict", *flags], capture_output=True, text=True,
                          timeout=300)


@pytest.mark.slow
def test_it_writes_predictions_and_says_how_often_they_are_right(made, tmp_path):
    done = predict(f"--from={made / 'run'}", f"--images={made / 'data'}", f"--to={tmp_path / 'a.csv'}", "--top_k=1")
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "a.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 28
    right = sum(row["class"] == row["label"] for row in rows if not row["error"]) / 27
    assert f"27 images predicted; top1 {right:.4f}" in done.stdout
    assert "c/broken: 0.png: not a JPEG" in done.stdout
    assert (tmp_path / "a_confusion.png").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(("flags", "code", "line"), [
    (["--from={made}/mae", "--to=a.csv"], 2, "has no head: method.name=mae pre-trains an encoder; fine-tune it"),
    (["--from={made}/run", "--to=a.xlsx"], 2, "end in .csv or .json"),
    (["--from={made}/nowhere", "--to=a.csv"], 2, "no checkpoint in"),
    (["--from={made}/run", "--images={made}/data/c/b*", "--to=a.csv"], 3, "1 of 1 images could not be read")])
def test_a_mistake_is_one_line(made, tmp_path, flags, code, line):
    given = [flag.format(made=made).replace("--to=", f"--to={tmp_path}/") for flag in flags]
    done = predict(*given)
    assert done.returncode == code, done.stderr
    assert line in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
