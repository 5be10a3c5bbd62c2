"""A copied checkpoint is read as the original is, or is not there: local and in a bucket."""

import jax
import numpy as np
import pytest
from etils import epath

from mae_jax.commands.export import weights
from mae_jax.errors import UserError
from mae_jax.param_tree import flatten
from mae_jax.storage import paths
from mae_jax.storage.checkpoint import Checkpoints, load_params
from mae_jax.training import workdir
from tests.helpers.tiny import tiny_config, tiny_state
from tests.storage.checkpoint_test import abstract, array_file, flip, same


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A workdir with two steps."""
    folder = tmp_path_factory.mktemp("copies") / "run"
    config = tiny_config({"optim.ema": 0.9})
    workdir.record(epath.Path(folder), config)
    checkpoints = Checkpoints(folder, 2)
    for step in (1, 2):
        checkpoints.save(step, tiny_state(config)._replace(step=np.int32(step)))
    checkpoints.close()
    return folder


def test_what_a_bucket_names_does_not_lead_out_of_the_copy(run, gcs, tmp_path):
    weights.export(str(run), f"gs://bucket/{tmp_path.name}", "mae_jax")
    gcs.store.put("bucket", f"{tmp_path.name}/checkpoints/2/", b"", {}, {})  # consoles make such a folder
    to = tmp_path / "a" / "b"
    weights.export(f"gs://bucket/{tmp_path.name}", str(to / "good"), "mae_jax")
    assert same(load_params(to / "good"), load_params(run))
    gcs.store.put("bucket", f"{tmp_path.name}/checkpoints/2/../../../evil.txt", b"evil", {}, {})
    with pytest.raises(UserError, match=r"\.\.: .*nothing was copied"):
        weights.export(f"gs://bucket/{tmp_path.name}", str(to / "copy"), "mae_jax")
    assert not list(tmp_path.rglob("evil*"))


@pytest.fixture(params=["disk", pytest.param("gs", marks=pytest.mark.bucket)])
def to(request, tmp_path) -> str:
    """A folder for the copy."""
    if request.param == "disk":
        return str(tmp_path / "copy")
    request.getfixturevalue("gcs")
    return f"gs://bucket/{tmp_path.name}/"


def copy(source, to) -> int:
    return weights.export(str(source), str(to), "mae_jax")


def restored(folder: str):
    return Checkpoints(folder, 2).restore(abstract(tiny_state(tiny_config({"optim.ema": 0.9}))))


@pytest.mark.slow
def test_the_newest_step_is_read_there_with_its_config_and_all_of_its_state(run, to, capsys):
    assert copy(run, to) == 0
    assert "/checkpoints/2: " in (line := capsys.readouterr().out)
    assert line.endswith(" values, verified\n")
    assert workdir.config_of(to).to_dict() == workdir.config_of(str(run)).to_dict()
    assert int(restored(to).step) == 2
    assert same(restored(to), restored(str(run)))
    params = flatten(load_params(to, ema=True))
    assert params.keys() == flatten(load_params(run, ema=True)).keys()
    assert copy(run, to) == 0
    assert "there already, verified" in capsys.readouterr().out


@pytest.mark.slow
def test_a_copy_is_copied_back_and_a_named_step_joins_the_others(run, to, tmp_path):
    copy(run / "checkpoints" / "1", to)
    assert int(restored(to).step) == 1
    copy(run, to)
    copy(f"{to.rstrip('/')}/checkpoints/1", tmp_path / "back")
    assert int(restored(str(tmp_path / "back")).step) == 1
    assert int(restored(to).step) == 2


@pytest.mark.parametrize("after", [0, 3, 8])
def test_an_interrupted_copy_is_not_taken_for_a_whole_one_and_is_done_again(run, gcs, tmp_path, after):
    to = f"gs://bucket/{tmp_path.name}"
    gcs.add({"path": "upload.*checkpoints/2", "status": 403, "times": -1, "after": after})
    with pytest.raises(OSError, match="access denied"):
        copy(run, to)
    with pytest.raises(UserError, match="no checkpoint in"):
        load_params(to)
    gcs.clear()
    assert copy(run, to) == 0
    assert int(restored(to).step) == 2


def test_a_copy_on_a_full_disk_is_not_taken_for_a_whole_one(run, tmp_path, monkeypatch):
    replace, written = paths.replace_bytes, []

    def full(file, content):
        written.append(file)
        if len(written) == 6:
            raise OSError(28, "No space left on device")
        replace(file, content)

    monkeypatch.setattr(paths, "replace_bytes", full)
    with pytest.raises(OSError, match="No space"):
        copy(run, tmp_path / "copy")
    with pytest.raises(UserError, match="no checkpoint in"):
        load_params(tmp_path / "copy")
    assert copy(run, tmp_path / "copy") == 0
    assert int(restored(str(tmp_path / "copy")).step) == 2


@pytest.mark.slow
def test_a_damaged_step_is_passed_over_and_a_damaged_copy_replaced(run, tmp_path, caplog):
    copy(run, tmp_path / "first")
    copy(run / "checkpoints" / "1", tmp_path / "first")
    file = array_file(tmp_path / "first" / "checkpoints" / "2")
    flip(file, file.stat().st_size // 2)
    copy(tmp_path / "first", tmp_path / "second")
    assert "checkpoints/2: " in caplog.text
    assert int(restored(str(tmp_path / "second")).step) == 1
    copy(run, tmp_path / "first")
    assert int(restored(str(tmp_path / "first")).step) == 2


def test_what_arrives_damaged_is_read_again(run, gcs, tmp_path):
    to = f"gs://bucket/{tmp_path.name}"
    gcs.add({"path": "copy|/d/", "method": "GET", "kind": "flip"})
    assert copy(run, to) == 0
    assert same(restored(to), restored(str(run)))


def test_a_folder_of_another_run_is_refused_and_so_is_the_run_itself(run, tmp_path):
    workdir.record(epath.Path(tmp_path), tiny_config({"optim.lr": 0.1}))
    with pytest.raises(UserError, match=r"another run.*optim.lr: 0.1 -> 0\.\d+\)$"):  # no word of --workdir
        copy(run, tmp_path)
    with pytest.raises(UserError, match="workdir itself"):
        copy(run, f"{run}/")
    with pytest.raises(UserError, match=r"no config\.json"):
        copy(tmp_path / "nothing", tmp_path / "to")


def test_a_copy_does_not_go_into_the_run_itself(run):
    with pytest.raises(UserError, match="workdir itself"):
        weights.export(str(run), str(run / "checkpoints" / "50"), "mae_jax")


@pytest.mark.slow
def test_another_checkpoint_of_the_same_step_is_not_overwritten(run, tmp_path):
    copy(run, tmp_path)
    other = Checkpoints(tmp_path / "other", 2)
    state = tiny_state(tiny_config({"optim.ema": 0.9}))
    other.save(2, jax.tree.map(lambda x: x + 1, state)._replace(step=np.int32(2)))
    other.close()
    workdir.record(epath.Path(tmp_path / "other"), tiny_config({"optim.ema": 0.9}))
    with pytest.raises(UserError, match=r"checkpoints/2 .*another checkpoint.*--to"):
        copy(tmp_path / "other", tmp_path)
