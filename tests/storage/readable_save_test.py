"""A save counts when it can be read."""

import json
import re
from pathlib import Path

import pytest

from mae_jax.errors import UserError
from mae_jax.storage import checkpoint, checksum, step_dirs
from mae_jax.storage.checkpoint import Checkpoints, load_params
from tests.storage.checkpoint_test import abstract, make_state, names, same, save


def broken(monkeypatch, file: str, times: int) -> list[Path]:
    """From now on so many commits lose a file, as where orbax puts nothing together; returns those that did."""
    done, finish = [], Checkpoints._check_readable

    def lose(self, step):
        if len(done) < times:
            done.append(Path(self._folder) / str(step))
            (done[-1] / file).unlink()
        finish(self, step)

    monkeypatch.setattr(Checkpoints, "_check_readable", lose)
    return done


@pytest.mark.parametrize("file", ["state/manifest.ocdbt", "state/_METADATA", "checksums/metadata"])
def test_a_save_that_cannot_be_read_is_none_and_nothing_older_is_deleted(tmp_path, monkeypatch, caplog, file):
    save(tmp_path, 1, 2, keep_last=2).close()
    broken(monkeypatch, file, times=1)
    checkpoints = save(tmp_path, 3, keep_last=2)
    assert checkpoints.failed.startswith("checkpoint of step 3 not saved: ")
    assert checkpoints.latest() == 2
    assert names(tmp_path / "checkpoints") == ["1", "2", "3"]
    checkpoints.save(3, make_state(3))  # as a run does at its end
    checkpoints.wait()
    assert checkpoints.failed is None
    assert names(tmp_path / "checkpoints") == ["2", "3"]
    assert names(tmp_path / "refused") == ["3", "README.txt"]
    assert same(checkpoints.restore(abstract(make_state(0))), make_state(3))


def test_a_save_of_other_arrays_than_its_checksums_name_is_none(tmp_path):
    save(tmp_path, 1).close()
    file = tmp_path / "checkpoints" / "1" / "checksums" / "metadata"
    record = json.loads(file.read_text())
    record["arrays"]["params/more"] = record["arrays"]["step"]
    file.write_text(json.dumps(checksum.seal(record["arrays"])))
    with pytest.raises(checksum.Damaged, match="state"):
        checkpoint._open_all(step_dirs.absolute(tmp_path / "checkpoints" / "1"))


@pytest.mark.parametrize("name", ["lr[1e-4]", "a*b"])
def test_a_folder_that_orbax_takes_for_a_pattern_is_named_and_not_called_damaged(tmp_path, name):
    save(tmp_path / "a", 1).close()
    (tmp_path / "a").rename(tmp_path / name)
    for read in (load_params, lambda path: Checkpoints(path, 2)):
        with pytest.raises(UserError, match=re.escape(name) + ".*pattern"):
            read(tmp_path / name)
