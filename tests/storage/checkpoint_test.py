"""Checkpoints come back bit for bit or not at all, and a failed save never stops a run."""

import collections
import errno
import json
import os
import random
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mae_jax.errors import UserError
from mae_jax.storage import safetensors_file
from mae_jax.storage.checkpoint import Checkpoints, load_params
from tests.helpers.devices import simulated


class State(NamedTuple):
    step: jax.Array
    params: dict
    opt: tuple
    ema: dict


def make_state(step: int, width: int = 24) -> State:
    draw = np.random.default_rng(step)
    params = {"encoder": {f"block_{i:02d}": {"kernel": jnp.asarray(draw.normal(size=(width, 2 * width)), jnp.float32),
                                             "bias": jnp.asarray(draw.normal(size=width), jnp.bfloat16)}
                          for i in range(2)},
              "seen": jnp.asarray(draw.random(5) < 0.5), "count": jnp.arange(step, step + 3, dtype=jnp.uint32)}
    return State(jnp.int32(step), params, optax.adamw(1e-3).init(params["encoder"]), {})


def abstract(state: State) -> State:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def same(one: State, other: State) -> bool:
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


def save(workdir: Path, *steps: int, keep_last: int = 3, keep_every: int = 0) -> Checkpoints:
    checkpoints = Checkpoints(workdir, keep_last, keep_every)
    for step in steps:
        checkpoints.save(step, make_state(step))
    checkpoints.wait()
    return checkpoints


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_restores_every_leaf_bit_for_bit_into_the_same_types(tmp_path):
    save(tmp_path, 7).close()
    checkpoints = Checkpoints(tmp_path, 3)
    assert checkpoints.latest() == 7
    restored = checkpoints.restore(abstract(make_state(0)))
    assert same(restored, make_state(7))
    assert jax.tree.structure(restored) == jax.tree.structure(make_state(7))


def test_no_checkpoint_is_none_and_touches_nothing(tmp_path):
    checkpoints = Checkpoints(tmp_path / "new", 3)
    assert checkpoints.restore(abstract(make_state(0))) is None
    assert checkpoints.latest() is None
    assert not (tmp_path / "new").exists()


def test_keeps_the_last_and_the_multiples(tmp_path):
    save(tmp_path, *range(1, 9), keep_last=2, keep_every=3)
    assert names(tmp_path / "checkpoints") == ["3", "6", "7", "8"]


def test_saving_a_step_again_keeps_it(tmp_path):
    checkpoints = save(tmp_path, 1, 1)
    assert checkpoints.failed is None
    assert same(checkpoints.restore(abstract(make_state(0))), make_state(1))


def test_state_may_be_donated_right_after_save(tmp_path):
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    checkpoints = Checkpoints(tmp_path, 9)
    tree = {"params": {"kernel": jnp.zeros((1500, 1500)), "bias": jnp.zeros(())}}
    for number in range(1, 6):
        tree = step(tree)
        checkpoints.save(number, tree)
        tree = step(step(tree))
    checkpoints.wait()
    for number in range(1, 6):
        params = load_params(tmp_path / "checkpoints" / str(number))
        assert np.all(params["kernel"] == 3 * number - 2)
        assert params["bias"] == 3 * number - 2


def test_leftovers_of_interrupted_saves_go_with_the_first_save(tmp_path):
    left = tmp_path / "checkpoints" / "4.orbax-checkpoint-tmp"
    (left / "state").mkdir(parents=True)
    foreign = ["99", "notes.txt", "²"]
    for name in foreign:
        (tmp_path / "checkpoints" / name).touch()
    checkpoints = Checkpoints(tmp_path, 3)
    assert checkpoints.latest() is None
    assert left.exists()
    checkpoints.save(5, make_state(5))
    checkpoints.wait()
    assert names(tmp_path / "checkpoints") == sorted(["5", *foreign])


def flip(path: Path, at: int = -1, bit: int = 1) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= bit
    path.write_bytes(content)


def array_file(step: Path) -> Path:
    return max((step / "state").rglob("d/*"), key=lambda path: path.stat().st_size)


def warned(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(record.message for record in caplog.records if record.levelname == "WARNING")


def test_a_flipped_bit_in_array_data_refuses_the_step_by_name_and_restores_the_one_before(tmp_path, caplog):
    save(tmp_path, 1, 2).close()
    path = array_file(tmp_path / "checkpoints" / "2")
    flip(path, path.stat().st_size // 2)
    checkpoints = Checkpoints(tmp_path, 3)
    assert same(checkpoints.restore(abstract(make_state(0))), make_state(1))
    assert "step 2 refused" in warned(caplog)
    assert checkpoints.latest() == 1
    checkpoints.save(2, make_state(2))
    checkpoints.wait()
    assert names(tmp_path / "refused") == ["2", "README.txt"]
    assert same(Checkpoints(tmp_path, 3).restore(abstract(make_state(0))), make_state(2))


def damage(path: Path, draw: random.Random) -> str:
    """Flips a bit, replaces a byte, cuts the file or removes it; returns what was done."""
    content, at = path.read_bytes(), draw.randrange(path.stat().st_size)
    kind = draw.choice(["bit", "bit", "byte", "cut", "remove"])
    path.unlink()
    if kind == "cut":
        path.write_bytes(content[:at])
    elif kind != "remove":
        mask = 1 << draw.randrange(8) if kind == "bit" else draw.randrange(1, 256)
        path.write_bytes(content[:at] + bytes([content[at] ^ mask]) + content[at + 1:])
    return f"{kind} at {at} of {path}"


@pytest.mark.slow
def test_damage_to_any_file_restores_bit_equal_or_refuses_by_name(tmp_path, caplog):
    save(tmp_path / "good", 1, 2).close()
    draw, outcomes = random.Random(0), collections.Counter()
    files = sorted(path.relative_to(tmp_path / "good") for path in (tmp_path / "good/checkpoints/2").rglob("*")
                   if path.is_file())
    assert len(files) > 10
    for path in files * 8:
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(tmp_path / "good", tmp_path / "run")
        what = damage(tmp_path / "run" / path, draw)
        caplog.clear()
        start = time.monotonic()
        restored = Checkpoints(tmp_path / "run", 3).restore(abstract(make_state(0)))
        assert time.monotonic() - start < 10, what
        step = int(restored.step)
        outcomes[step] += 1
        assert same(restored, make_state(step)), what
        assert (step == 1) == ("step 2 refused" in warned(caplog)), what
    assert outcomes[1] > 30
    assert outcomes[2] > 10


def test_a_refused_step_is_moved_to_another_disk_where_checkpoints_is_a_link(tmp_path, monkeypatch):
    save(tmp_path, 1, 2)
    shutil.rmtree(tmp_path / "checkpoints" / "2" / "checksums")
    rename = os.rename

    def across(source, target):
        if Path(target).parent.name == "refused":
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        rename(source, target)

    monkeypatch.setattr(os, "rename", across)
    checkpoints = Checkpoints(tmp_path, 3)
    assert same(checkpoints.restore(abstract(make_state(1))), make_state(1))
    checkpoints.save(2, make_state(2))
    checkpoints.close()
    assert not checkpoints.failed
    assert names(tmp_path / "refused") == ["2", "README.txt"]
    assert same(Checkpoints(tmp_path, 3).restore(abstract(make_state(1))), make_state(2))


def test_a_file_in_the_place_of_a_step_does_not_keep_it_from_being_saved(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "checkpoints" / "2").write_text("mine")
    assert not save(tmp_path, 2).failed
    assert (tmp_path / "refused" / "2").read_text() == "mine"


def test_a_step_under_the_name_of_another_is_refused(tmp_path, caplog):
    save(tmp_path, 1, 2)
    (tmp_path / "checkpoints" / "2").rename(tmp_path / "checkpoints" / "5")
    assert same(Checkpoints(tmp_path, 3).restore(abstract(make_state(1))), make_state(1))
    assert "checkpoint of step 5 refused: " in caplog.text
    assert "it holds step 2" in caplog.text


def test_all_refused_is_an_error_every_time_and_never_a_fresh_start(tmp_path):
    save(tmp_path, 1).close()
    (tmp_path / "checkpoints" / "1" / "checksums" / "metadata").unlink()
    for _ in range(2):
        with pytest.raises(UserError, match=r"no checkpoint in .*\(steps 1,"):
            Checkpoints(tmp_path, 3).restore(abstract(make_state(0)))


def test_another_model_is_the_users_mistake_not_damage(tmp_path):
    checkpoints = save(tmp_path, 1)
    with pytest.raises(UserError, match=r"params/encoder/block_00/bias .*bfloat16\[24\] .*bfloat16\[32\]"):
        checkpoints.restore(abstract(make_state(0, width=32)))
    more = make_state(0)._replace(ema={"extra": jnp.zeros(2)})
    with pytest.raises(UserError, match="ema/extra"):
        checkpoints.restore(abstract(more))
    assert checkpoints.latest() == 1


@pytest.mark.slow
def test_checksum_is_the_same_on_one_device_and_on_eight_however_sharded(tmp_path):
    """Saves on one device, restores and saves again on a mesh of eight, sharded and replicated."""
    save(tmp_path / "one", 3).close()
    script = textwrap.dedent(f"""
        import sys
        import jax
        from jax.sharding import NamedSharding, PartitionSpec as P
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from checkpoint_test import Checkpoints, make_state, same
        mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
        def place(x):
            spec = {{2: P("fsdp", "data"), 1: P("fsdp")}}.get(x.ndim, P()) if x.size % 8 == 0 else P()
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))
        state = Checkpoints({str(tmp_path / "one")!r}, 3).restore(jax.tree.map(place, make_state(0)))
        assert len(state.params["encoder"]["block_00"]["kernel"].sharding.device_set) == 8
        assert same(state, make_state(3))
        again = Checkpoints({str(tmp_path / "eight")!r}, 3)
        again.save(3, state)
        again.close()
    """)
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120, env=simulated(8))
    records = [json.loads((tmp_path / name / "checkpoints/3/checksums/metadata").read_text())
               for name in ("one", "eight")]
    assert records[0] == records[1]


def test_load_params_reads_a_workdir_a_step_and_an_exported_file(tmp_path, caplog):
    save(tmp_path, 1, 2).close()
    expected = make_state(2).params["encoder"]["block_01"]["kernel"]
    for path in (tmp_path, tmp_path / "checkpoints", tmp_path / "checkpoints" / "2"):
        params = load_params(path)
        assert isinstance(params["encoder"]["block_01"]["kernel"], np.ndarray)
        np.testing.assert_array_equal(params["encoder"]["block_01"]["kernel"], expected)
    path = array_file(tmp_path / "checkpoints" / "2")
    content = path.read_bytes()
    path.write_bytes(bytes(len(content)))
    np.testing.assert_array_equal(load_params(tmp_path)["count"], make_state(1).params["count"])
    assert "2 refused" in warned(caplog)
    with pytest.raises(UserError, match="could be read"):
        load_params(tmp_path / "checkpoints" / "2")
    with pytest.raises(UserError, match="no checkpoint in"):
        load_params(tmp_path / "nowhere")


def test_load_params_gives_the_average_when_asked_and_there_is_one(tmp_path):
    checkpoints = Checkpoints(tmp_path, 2)
    checkpoints.save(1, {"params": {"kernel": jnp.ones(2)}, "ema": {"kernel": jnp.full(2, 0.5)}})
    checkpoints.close()
    assert load_params(tmp_path)["kernel"].tolist() == [1, 1]
    assert load_params(tmp_path, ema=True)["kernel"].tolist() == [0.5, 0.5]
    save(tmp_path / "plain", 1).close()
    assert load_params(tmp_path / "plain", ema=True)["count"].tolist() == [1, 2, 3]


def test_exported_file_round_trips_and_refuses_every_flipped_byte_of_the_data(tmp_path):
    path = tmp_path / "vit.safetensors"
    params = {"encoder": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3).T, "bias": np.zeros(2, np.int32)}}
    safetensors_file.save(path, params, {"model": "tiny"})
    loaded = load_params(path)
    np.testing.assert_array_equal(loaded["encoder"]["kernel"], params["encoder"]["kernel"])
    np.testing.assert_array_equal(loaded["encoder"]["bias"], params["encoder"]["bias"])
    good = path.read_bytes()
    for at in range(len(good)):
        path.write_bytes(good)
        flip(path, at, 1 << at % 8)
        try:
            loaded = load_params(path)
        except UserError:
            continue
        np.testing.assert_array_equal(loaded["encoder"]["kernel"], params["encoder"]["kernel"])
        np.testing.assert_array_equal(loaded["encoder"]["bias"], params["encoder"]["bias"])
    with pytest.raises(UserError, match="no such file"):
        load_params(tmp_path / "none.safetensors")


@pytest.mark.slow
def test_a_full_disk_is_a_warning_and_the_next_save_works(tmp_path):
    """RLIMIT_FSIZE makes writes fail as a full disk does, at different points of a save."""
    script = textwrap.dedent(f"""
        import resource, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from pathlib import Path
        from checkpoint_test import Checkpoints, abstract, make_state, names, same, save
        workdir, limits = Path({str(tmp_path)!r}), resource.getrlimit(resource.RLIMIT_FSIZE)
        checkpoints = save(workdir, 1, 2)
        for step, size in enumerate([0, 100, 3000], 3):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
            checkpoints.save(step, make_state(step))
            checkpoints.wait()
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            assert f"step {{step}} not saved" in checkpoints.failed and "File too large" in checkpoints.failed
            assert checkpoints.latest() == 2
            assert same(Checkpoints(workdir, 3).restore(abstract(make_state(0))), make_state(2))
        checkpoints.save(9, make_state(9))
        checkpoints.close()
        assert checkpoints.failed is None
        assert [name for name in names(workdir / "checkpoints") if name.isdigit()] == ["1", "2", "9"]
    """)
    done = subprocess.run([sys.executable, "-c", script], check=False, timeout=120, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("training goes on") == 3
    assert "Traceback" not in done.stderr


def test_a_failed_delete_of_an_old_step_is_a_warning(tmp_path, monkeypatch, caplog):
    checkpoints = save(tmp_path, 1, 2, keep_last=2)
    def refuse(path, *args, **kwargs):
        raise PermissionError(f"cannot delete {path}")
    monkeypatch.setattr(type(checkpoints._folder), "rmtree", refuse)
    checkpoints.save(3, make_state(3))
    checkpoints.wait()
    assert checkpoints.failed is None
    assert "could not delete the old checkpoint of step 1" in warned(caplog)
    assert checkpoints.latest() == 3
    monkeypatch.undo()
    checkpoints.save(4, make_state(4))
    checkpoints.wait()
    assert names(tmp_path / "checkpoints") == ["3", "4"]


def test_a_workdir_that_cannot_be_written_is_a_failed_save_not_an_exception(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    checkpoints = Checkpoints(tmp_path / "file" / "run", 3)
    checkpoints.save(1, make_state(1))
    checkpoints.close()
    assert "step 1 not saved: NotADirectoryError" in checkpoints.failed


@pytest.mark.slow
def test_kill_9_at_any_moment_loses_nothing_that_was_committed(tmp_path):
    script = textwrap.dedent(f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from checkpoint_test import Checkpoints, abstract, make_state, same
        checkpoints = Checkpoints({str(tmp_path)!r}, 2)
        state = checkpoints.restore(abstract(make_state(0, width=300)))
        step = int(state.step) if state else 0
        while True:
            step += 1
            checkpoints.save(step, make_state(step, width=300))
            print("committed" if step > 1 else "begun", step - 1, flush=True)
    """)
    draw, before = random.Random(1), 0
    for attempt in range(4):
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
        lines = [process.stdout.readline() for _ in range(1 if attempt else 3)]  # two are committed at first
        time.sleep(draw.uniform(0, 0.2))
        process.kill()
        committed = int(("".join(lines) + process.communicate()[0]).split()[-1])
        checkpoints = Checkpoints(tmp_path, 2)
        state = checkpoints.restore(abstract(make_state(0, width=300)))
        if state is None:
            assert committed == 0
            continue
        before = int(state.step)
        assert before >= committed
        assert checkpoints._refused == []
        assert same(state, make_state(before, width=300))
    assert before > 1
