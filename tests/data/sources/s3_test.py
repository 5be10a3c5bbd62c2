"""Data on s3://: every source of files reads there what it reads on a disk, and what fails is one line."""

import io
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mae_jax.data.sources import registry
from mae_jax.errors import UserError
from mae_jax.methods import with_data
from mae_jax.storage import paths
from mae_jax.storage.paths import check_bucket
from tests.helpers.s3_server import Server
from tests.helpers.tiny import tiny_config

s3fs = pytest.importorskip("s3fs")
pytestmark = [pytest.mark.bucket, pytest.mark.filterwarnings("ignore::DeprecationWarning")]


def image(seed):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def shard(count):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for i in range(count):
            for kind, content in (("png", image(i)), ("cls", str(i % 2).encode())):
                member = tarfile.TarInfo(f"{i:04d}.{kind}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


def parquet(count):
    file = io.BytesIO()
    pq.write_table(pa.table({"image": [image(i) for i in range(count)], "label": [i % 2 for i in range(count)]}), file)
    return file.getvalue()


def npz(count):
    file = io.BytesIO()
    np.savez(file, image=np.stack([np.asarray(Image.open(io.BytesIO(image(i)))) for i in range(count)]),
             label=np.arange(count) % 2)
    return file.getvalue()


CONTENT = {
    **{f"folder/train/{'ab'[i % 2]}/{i}.png": image(i) for i in range(8)},
    **{f"folder/val/{'ab'[i % 2]}/{i}.png": image(i + 50) for i in range(4)},
    "tars/train-000.tar": shard(8), "tars/val-000.tar": shard(4),
    "parquet/train-00000-of-00001.parquet": parquet(8), "parquet/val-00000-of-00001.parquet": parquet(4),
    "list.csv": "".join(["path,label,split\n", *(
        f"folder/{split}/{'ab'[i % 2]}/{i}.png,{i % 2},{split}\n"
        for split, count in (("train", 8), ("val", 4)) for i in range(count))]).encode(),
    "all.npz": npz(8),
}


@pytest.fixture(scope="module")
def server():
    found = Server()
    found.buckets["images"] = CONTENT
    yield found
    found.shutdown()
    found.server_close()


@pytest.fixture(autouse=True)
def _reached(server, monkeypatch, tmp_path):
    monkeypatch.setenv("MAE_JAX_CACHE", str(tmp_path / "cache"))
    for name, value in {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1",
                        "AWS_ENDPOINT_URL": server.address}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    s3fs.S3FileSystem.clear_instance_cache()
    yield
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def local(tmp_path):
    for name, content in CONTENT.items():
        file = tmp_path / "local" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return tmp_path / "local"


SOURCES = [("folder", "folder"), ("tar", "tars"), ("tar", "tars/{split}-*.tar"), ("parquet", "parquet"),
           ("table", "list.csv"), ("npz", "all.npz")]


@pytest.mark.parametrize(("source", "path"), SOURCES)
def test_a_source_reads_in_a_bucket_what_it_reads_on_a_disk(source, path, local):
    def opened(root):
        held = "test" if source == "npz" else "val"
        data = tiny_config({"data.source": source, "data.path": f"{root}/{path}", "data.eval_split": held}).data
        return [registry.load(data, split) for split in ("train", held)]

    for here, there in zip(opened(local), opened("s3://images"), strict=True):
        assert (here.size, here.classes) == (there.size, there.classes)
        for i in range(here.size):
            assert here.name(i) == there.name(i)
            np.testing.assert_array_equal(here.read(i).image, there.read(i).image)
            assert here.read(i).label == there.read(i).label


def test_a_run_has_the_batches_that_it_has_from_a_disk(local):
    def batch(root):
        config = tiny_config({"data.source": "folder", "data.path": f"{root}/folder", "data.eval_split": "val"})
        method, opened = with_data(config)
        return next(opened.batches(method.eval_spec(), method.patch_order()).train(3))

    here, there = batch(local), batch("s3://images")
    for name, value in here.items():
        np.testing.assert_array_equal(value, there[name])


def one_line(path, source="folder"):
    data = tiny_config({"data.source": source, "data.path": path}).data
    with pytest.raises(UserError) as raised:
        registry.load(data, "train")
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_what_is_wrong_with_a_bucket_is_said_in_one_line(server, monkeypatch):
    assert "there is no bucket s3://not-there" in one_line("s3://not-there/folder")
    server.buckets["secret"], server.forbidden = {}, {"secret"}
    assert "access denied" in one_line("s3://secret/folder")
    assert "is not a folder" in one_line("s3://images/nothing")
    assert "not a valid bucket" in one_line("s3://A/x")
    assert "no file matches" in one_line("s3://images/nothing-*.tar", "tar")
    assert "does not read s3://" in one_line("s3://images/x", "tfrecord")
    assert "parts . and .." in one_line("s3://images/../x")


def test_without_a_network_a_line_says_so_in_seconds(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    assert "cannot be reached" in one_line("s3://images/folder")


def test_without_credentials_a_line_says_so(monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "no valid credentials" in one_line("s3://images/folder")


def test_without_its_package_a_line_names_the_extra(monkeypatch):
    monkeypatch.setattr(paths, "_importable", lambda name: False)
    with pytest.raises(UserError, match=r"pip install 'mae_jax\[s3\]'"):
        check_bucket("s3://images/folder")


@pytest.mark.parametrize("flag", ["--workdir", "init_from", "--to", ""])
def test_what_is_written_or_is_no_data_is_refused_on_s3(flag):
    with pytest.raises(UserError, match="s3:// is supported for data only"):
        paths.normalized("s3://images/run", flag)


def test_an_object_that_vanishes_is_a_bad_image(server):
    server.buckets["short"] = {f"{i}.png": image(i) for i in range(4)}
    source = registry.load(tiny_config({"data.source": "folder", "data.path": "s3://short/",
                                        "data.eval_split": ""}).data, "train")
    del server.buckets["short"]["2.png"]
    with pytest.raises(OSError, match=r"2\.png"):
        source.read(2)
