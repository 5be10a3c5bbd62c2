"""Folders, tars, Parquet, lists, arrays and the quickstart train, resume and evaluate where TensorFlow is missing."""

import io
import subprocess
import sys
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

BLOCKED = """
import sys
sys.modules["tensorflow"] = sys.modules["tensorflow_datasets"] = sys.modules["clu"] = None
from mae_jax.__main__ import main
sys.argv[0] = "mae_jax"
sys.exit(main())
"""


def encoded(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 36), (number, 90, 200 - number)).save(file, "JPEG")
    return file.getvalue()


def folder(place):
    for number in range(64):
        (place / str(number % 2)).mkdir(exist_ok=True)
        (place / str(number % 2) / f"{number}.jpg").write_bytes(encoded(number))
    return place


def tar(place):
    with tarfile.open(place / "a.tar", "w") as archive:
        for number in range(64):
            for kind, content in (("jpg", encoded(number)), ("cls", b"%d" % (number % 2))):
                info = tarfile.TarInfo(f"{number:03d}.{kind}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return place / "a.tar"


def parquet(place):
    images = pa.array([{"bytes": encoded(number)} for number in range(64)])
    pq.write_table(pa.table({"image": images, "label": [number % 2 for number in range(64)]}), place / "a.parquet")
    return place / "a.parquet"


def table(place):
    folder(place)
    (place / "list.csv").write_text("path,label\n" + "".join(f"{n % 2}/{n}.jpg,{n % 2}\n" for n in range(64)))
    return place / "list.csv"


def npz(place):
    images = np.random.default_rng(0).integers(0, 256, (64, 36, 40, 3), dtype=np.uint8)
    np.savez(place / "a.npz", image=images, label=np.arange(64) % 2)
    return place / "a.npz"


def run(*flags):
    done = subprocess.run([sys.executable, "-c", BLOCKED, *map(str, flags)], capture_output=True, text=True,
                          timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("make", [folder, tar, parquet, table, npz])
def test_own_images_are_trained_on_resumed_and_evaluated(tmp_path, monkeypatch, make):
    monkeypatch.setenv("MAE_JAX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    path = make(tmp_path / "data")
    flags = ("--config=folder:runlocal", f"--config.data.source={make.__name__}", f"--config.data.path={path}",
             f"--workdir={tmp_path / 'run'}")
    assert "finished 2 steps" in run("train", *flags)
    assert any((tmp_path / "run" / "tensorboard").iterdir())
    assert "finished 3 steps" in (said := run("train", *flags, "--config.train.duration=3 steps"))
    assert "step 2/3" not in said
    assert "eval/loss" in run("eval", f"--workdir={tmp_path / 'run'}")


@pytest.mark.slow
def test_the_quickstart_never_asks_for_tensorflow(tmp_path):
    assert "finished 2 steps" in run("train", "--config=quickstart:runlocal", f"--workdir={tmp_path / 'run'}")


@pytest.mark.slow
def test_where_it_is_needed_one_line_says_so(tmp_path):
    done = subprocess.run([sys.executable, "-c", BLOCKED, "inspect", "--config=folder", "--config.data.source=tfrecord",
                           f"--config.data.path={tmp_path}/*"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "TensorFlow" in done.stderr
    assert "Traceback" not in done.stderr
