"""The verb as a user runs it."""

import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.faults.processes import free_port
from tests.helpers.stored import store_images, store_run
from tests.helpers.tiny import tiny_config


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("embed")
    store_images(folder / "data", count=9, broken=1)
    store_run(folder / "run", tiny_config({"data.source": "folder", "data.path": str(folder / "data")}))
    return folder


def start(*flags):
    return subprocess.Popen([sys.executable, "-m", "mae_jax", "embed", *flags], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)


def embed(*flags):
    out, err = (process := start(*flags)).communicate(timeout=300)
    return process.returncode, out, err


@pytest.mark.slow
def test_it_embeds_the_runs_own_images_and_those_of_another_config(made, tmp_path):
    code, out, err = embed(f"--from={made / 'run'}", f"--to={tmp_path / 'a.parquet'}")
    assert code == 0, err
    assert "c/broken: 0.png: not a JPEG" in out
    assert out.splitlines()[-1] == f"{tmp_path / 'a.parquet'}: features of 27 images"
    assert pq.read_table(tmp_path / "a.parquet").num_rows == 27
    code, out, err = embed(f"--from={made / 'run'}", "--config=folder", f"--config.data.path={made / 'data'}",
                           "--split=train", "--features=cls", "--block=0", f"--to={tmp_path / 'b.npz'}")
    assert code == 0, err
    with np.load(tmp_path / "b.npz") as stored:
        assert stored["features"].shape[1] == 32


@pytest.mark.slow
@pytest.mark.parametrize(("flags", "code", "line"), [
    (["--to=a.txt"], 2, "the file's name must end in .parquet or .npz"),
    (["--features=mena", "--to=a.npz"], 2, "did you mean 'mean'?"),
    (["--block=7", "--to=a.npz"], 2, "the encoder has the blocks 0 to 1"),
    (["--images=nowhere", "--to=a.npz"], 2, "no image matches images='nowhere'"),
    (["--images={made}/data/c/b*", "--to=a.npz"], 3, "1 of 1 images could not be read")])
def test_a_mistake_is_one_line(made, tmp_path, flags, code, line):
    given = [flag.format(made=made).replace("--to=", f"--to={tmp_path}/") for flag in flags]
    found, _, err = embed(f"--from={made / 'run'}", *given)
    assert found == code, err
    assert line in err.splitlines()[-1]
    assert "Traceback" not in err


@pytest.mark.processes
def test_two_processes_write_what_one_does(made, tmp_path):
    """Each reads a half of the rows, and what it could not read is named all the same."""
    code, _, err = embed(f"--from={made / 'run'}", "--batch_size=8", f"--to={tmp_path / 'one.parquet'}")
    assert code == 0, err
    place = f"--coordinator=127.0.0.1:{free_port()}"
    flags = (f"--from={made / 'run'}", "--batch_size=8", f"--to={tmp_path / 'two.parquet'}", place, "--processes=2")
    both = [start(*flags, f"--process={number}") for number in range(2)]
    said = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert "c/broken: 0.png: not a JPEG" in said[0][0]
    one, two = (pq.read_table(tmp_path / f"{name}.parquet") for name in ("one", "two"))
    assert one.drop(["features"]).equals(two.drop(["features"]))
    np.testing.assert_allclose(np.array(one["features"].to_pylist()), np.array(two["features"].to_pylist()), atol=1e-5)
