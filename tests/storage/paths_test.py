"""A path as somebody gives it: one reading of it everywhere, or one line at the start that names its flag."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from mae_jax.data.cluster_ids import Clusters
from mae_jax.data.sources import registry
from mae_jax.errors import UserError
from mae_jax.storage import paths, step_dirs, vocabulary
from mae_jax.storage.checkpoint import load_params
from mae_jax.training import run, workdir
from tests.helpers.tiny import tiny_config

FIELDS = ("init_from", "data.tokens", "train.compilation_cache")  # that are paths, in every config
STRANGE = {"two\nlines": r"two\nlines", "bell\a": r"bell\x07", "s3://bucket/run": "s3://bucket/run",
           "hdfs://host/run": "hdfs://host/run", "s3a://b/run": "s3a://b/run", "GS://bucket/run": "GS://bucket/run",
           "file:///run": "file:///run", "gs:/bucket": "gs:/bucket", "not\udcffutf8": r"not\udcffutf8",
           "gs://bucket/../run": "gs://bucket/../run", "~no_such_user/run": "~no_such_user/run"}


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("path", STRANGE)
def test_a_path_that_cannot_be_meant_is_refused_by_the_name_of_its_flag(path):
    with pytest.raises(UserError) as error:
        paths.locate(path, "--from")
    assert str(error.value).startswith(f"--from={STRANGE[path]}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("path", ["s3://bucket/x", "two\nlines"])
def test_a_config_with_such_a_path_is_refused_before_its_data_are_opened(field, path):
    with pytest.raises(UserError, match=f"^{field}="):
        tiny_config({field: path})


@pytest.mark.parametrize("source", ["folder", "npz", "tfds", "tfrecord", "clipart"])
def test_a_source_refuses_it_as_data_path(source):
    config = tiny_config()
    config.data.update(source=source, path="az://bucket/pictures", name="toy")
    with pytest.raises(UserError, match=r"^data.path=az://bucket/pictures: .*gs://"):
        registry.load(config.data, "train")


@pytest.mark.parametrize("source", ["clipart", "tfds", "tfrecord"])
def test_a_source_that_reads_no_s3_says_which_do(source):
    config = tiny_config()
    config.data.update(source=source, path="s3://bucket/pictures", name="toy")
    with pytest.raises(UserError, match=r"does not read s3://; folder"):
        registry.load(config.data, "train")


def test_a_home_is_one_everywhere(home, monkeypatch):
    given = "~/x"
    assert str(paths.locate(given)) == str(paths.locate_checkpoints(given, "--workdir")) == f"{home}/x"
    assert str(step_dirs.absolute(given)) == str(paths.output(given, "--json")) == f"{home}/x"
    assert os.listdir(home) == ["x"]
    os.unlink(home / "x")
    vocabulary.save("~/v.npz", np.ones((3, 4), np.float32), "kmeans")
    assert vocabulary.load("~/v.npz", "kmeans", (3, 4)).shape == (3, 4)
    with pytest.raises(UserError, match=re.escape(str(home / "nothing"))):
        load_params("~/nothing")
    (home / "clusters.npz").write_bytes(b"no arrays")
    with pytest.raises(UserError, match=re.escape(str(home / "clusters.npz"))):
        Clusters.read("~")
    assert not Path("~").exists()


def test_a_run_in_a_home_and_the_other_commands_on_it(home):
    config = tiny_config({"train.compilation_cache": "~/programs"})
    assert run.open_run(config, "~/run").workdir == paths.locate(str(home / "run"))
    assert workdir.config_of("~/run") is None
    with run.compiled_programs(config, paths.locate("~/run")):
        assert run.jax.config.jax_compilation_cache_dir == str(home / "programs")


def test_environment_variables_and_most_characters_are_themselves(tmp_path, monkeypatch):
    monkeypatch.setenv("NAME", "value")
    for name in ("$NAME", "a b", "a%20b", "ä", "全角　空白", "a#b", "a:b", "{split}", "a~", "-x"):
        assert paths.locate_checkpoints(str(tmp_path / name), "--workdir").name == name


@pytest.mark.parametrize("name", ["lr[1e-4]", "a*", "a?", "[", "]", "back\\slash"])
def test_a_workdir_that_orbax_would_read_as_a_pattern_is_refused_at_the_start(tmp_path, monkeypatch, name):
    with pytest.raises(UserError, match=r"^--workdir: .*pattern"):
        run.open_run(tiny_config(), str(tmp_path / name))
    assert not list(tmp_path.iterdir())
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / name)
    with pytest.raises(UserError, match=r"^--workdir: .*pattern"):
        run.open_run(tiny_config(), "run")
    assert paths.locate(str(tmp_path / name)).is_dir()  # what is only read may have any name


def test_a_file_to_write_at_the_end_is_tried_at_the_start(tmp_path):
    (tmp_path / "there.json").write_text("kept")
    assert paths.output("", "--json") is None
    assert paths.output(str(tmp_path / "there.json"), "--json").read_text() == "kept"
    assert paths.output(str(tmp_path / "new" / "x.json"), "--json").parent.is_dir()
    for path in (tmp_path, tmp_path / "there.json" / "x.json"):
        with pytest.raises(UserError, match=r"^--json="):
            paths.output(str(path), "--json")


def test_a_full_disk_is_told_by_the_name_of_the_file(tmp_path):
    (tmp_path / "page.html.partial").symlink_to("/dev/full")
    with pytest.raises(OSError, match=rf"No space left on device: '{tmp_path}/page.html'"):
        paths.replace_bytes(epath.Path(tmp_path / "page.html"), b"text")
    assert not os.listdir(tmp_path)
    with pytest.raises(OSError, match=r"Input/output error$"), paths.naming(tmp_path):  # perhaps of another file
        raise OSError(5, "Input/output error")
