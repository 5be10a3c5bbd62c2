"""The verb as a user runs it, and runs that share what it wrote."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from mae_jax.errors import UserError
from mae_jax.storage import vocabulary
from mae_jax.training import run as training_run
from tests.helpers.tiny import tiny_config

RECIPE = "--config=configs/splitmask_small.py:runlocal"


def cluster(*flags):
    command = [sys.executable, "-m", "mae_jax", "cluster", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    file = tmp_path_factory.mktemp("vocabulary") / "inside" / "vocabulary.npz"
    done = cluster(RECIPE, "--config.data.augment=none", "--config.method.vocabulary=40", f"--to={file}")
    assert done.returncode == 0, done.stderr
    assert "39 entries and the token of constant patches" in done.stdout
    assert "sampled patches" in done.stderr
    return file


@pytest.mark.slow
def test_it_writes_the_vocabulary_that_a_run_builds_and_a_picture_of_it(written, tmp_path):
    with np.load(written) as stored:
        entries = stored["vocabulary"]
        assert str(stored["kind"]) == "kmeans"
    assert entries.shape == (39, 48)
    with Image.open(written.with_suffix(".png")) as picture:
        assert picture.size == (32 * 17, 2 * 17)
    fields = {"data.source": "photo_crops", "data.image_size": (32, 32), "batch_size": 16, "eval.max_examples": 64,
              "method.vocabulary": 40}
    built, read = (training_run.prepare(tiny_config(fields | more, "splitmask"), tmp_path) for more in
                   ({}, {"method.vocabulary_file": str(written)}))
    vocabularies = [np.asarray(training_run.initial_state(run).extras["vocabulary"]) for run in (built, read)]
    np.testing.assert_array_equal(vocabularies[1], entries)
    np.testing.assert_allclose(vocabularies[0], entries, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("flags", "line"), [
    ([f"{RECIPE[:9]}configs/vit_b_mae.py:runlocal", "--to=v.npz"], "has no vocabulary; use splitmask or beit"),
    ([RECIPE, "--to=v.txt"], "the file's name must end in .npz"),
    ([RECIPE, "--clusters=5", "--to=v.npz"], "--clusters is for clusters of images, with --from"),
    (["--from=nowhere", "--to=v.npz"], "clusters of images are a folder; leave out --from"),
    ([RECIPE, "--config.method.vocabulary=100000", "--to=v.npz"], "use at most")])
def test_a_mistake_is_one_line_and_exit_code_2(flags, line, tmp_path):
    done = cluster(*flags[:-1], f"--to={tmp_path / flags[-1].removeprefix('--to=')}")
    assert done.returncode == 2
    assert line in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "shape", "line"), [
    ("patches", (39, 48), "'kmeans' .*.39, 48. .*'patches'"),
    ("kmeans", (23, 48), "config .*'kmeans' .*.23, 48.")])
def test_another_vocabulary_than_the_config_asks_for_is_refused(written, kind, shape, line):
    with pytest.raises(UserError, match=line):
        vocabulary.load(written, kind, shape)


@pytest.mark.slow
@pytest.mark.parametrize("there", ["v.npz", "v.png"])
def test_what_is_there_is_not_overwritten(tmp_path, there):
    (tmp_path / there).write_bytes(b"mine")
    done = cluster(RECIPE, f"--to={tmp_path}/v.npz")
    assert done.returncode == 2
    assert f"{tmp_path / there} exists" in done.stderr
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [(there, b"mine")]


@pytest.mark.parametrize("entries", [np.full((23, 48), np.nan, np.float32), np.full((23, 48), "a")])
def test_values_that_are_no_finite_numbers_are_no_vocabulary(tmp_path, entries):
    vocabulary.save(tmp_path / "v.npz", entries, "kmeans")
    with pytest.raises(UserError, match=r"v\.npz .*not a vocabulary"):
        vocabulary.load(tmp_path / "v.npz", "kmeans", (23, 48))


def test_what_is_no_vocabulary_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"absent\.npz.* is not a file"):
        vocabulary.load(tmp_path / "absent.npz", "kmeans", (23, 48))
    np.savez(tmp_path / "other.npz", x=1)
    with pytest.raises(UserError, match=r"other.npz is not a vocabulary"):
        vocabulary.load(tmp_path / "other.npz", "kmeans", (23, 48))
