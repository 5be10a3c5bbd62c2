"""Checkpoints come back bit for bit or not at all, and a failed save never stops a run."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mae_jax import checkpoint
from mae_jax.checkpoint import Checkpoints, load_params, save_params
from mae_jax.errors import UserError


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
        assert np.all(params["kernel"] == 3 * number - 2) and params["bias"] == 3 * number - 2


def test_leftovers_of_interrupted_saves_go_with_the_first_save(tmp_path):
    left = tmp_path / "checkpoints" / "4.orbax-checkpoint-tmp"
    (left / "state").mkdir(parents=True)
    checkpoints = Checkpoints(tmp_path, 3)
    assert checkpoints.latest() is None and left.exists()
    checkpoints.save(5, make_state(5))
    checkpoints.wait()
    assert names(tmp_path / "checkpoints") == ["5"]


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
    assert names(tmp_path / "refused") == ["2"]
    assert same(Checkpoints(tmp_path, 3).restore(abstract(make_state(0))), make_state(2))


def test_all_refused_is_an_error_every_time_and_never_a_fresh_start(tmp_path):
    save(tmp_path, 1).close()
    (tmp_path / "checkpoints" / "1" / "checksums" / "metadata").unlink()
    for _ in range(2):
        with pytest.raises(UserError, match="every checkpoint .* is damaged .*1"):
            Checkpoints(tmp_path, 3).restore(abstract(make_state(0)))


def test_another_model_is_the_users_mistake_not_damage(tmp_path):
    checkpoints = save(tmp_path, 1)
    with pytest.raises(UserError, match=r"params/encoder/block_00/bias is bfloat16\[24\] there and bfloat16\[32\]"):
        checkpoints.restore(abstract(make_state(0, width=32)))
    more = make_state(0)._replace(ema={"extra": jnp.zeros(2)})
    with pytest.raises(UserError, match="this config has ema/extra, it does not"):
        checkpoints.restore(abstract(more))
    assert checkpoints.latest() == 1


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32, jnp.uint32, jnp.bool_, jnp.int8])
def test_checksum_sees_every_single_bit_and_every_swap(dtype):
    array = np.asarray([0, 0, 1, 1, 0, 1], dtype)
    before = checkpoint.checksum(array)
    for index in range(array.size):
        for bit in range(1 if dtype == jnp.bool_ else 8 * array.itemsize):
            other = array.copy()
            other.view(f"u{array.itemsize}")[index] ^= 1 << bit
            after = checkpoint.checksum(other)
            assert after[0] != before[0] and after[1] != before[1]
    assert checkpoint.checksum(array[[2, 1, 0, 3, 4, 5]])[0] != before[0]
    assert checkpoint.checksum(array.reshape(2, 3))[0].shape == ()


def test_checksum_is_the_same_on_one_device_and_on_eight_however_sharded(tmp_path):
    """Saves on one device, restores and saves again on a mesh of eight, sharded and replicated."""
    save(tmp_path / "one", 3).close()
    script = textwrap.dedent(f"""
        import os, sys
        os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
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
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
    records = [json.loads((tmp_path / name / "checkpoints/3/checksums/metadata").read_text())
               for name in ("one", "eight")]
    assert records[0] == records[1]


def test_load_params_reads_a_workdir_a_step_and_an_exported_file(tmp_path, caplog):
    save(tmp_path, 1, 2).close()
    expected = make_state(2).params["encoder"]["block_01"]["kernel"]
    for path in (tmp_path, tmp_path / "checkpoints" / "2"):
        params = load_params(path)
        assert isinstance(params["encoder"]["block_01"]["kernel"], np.ndarray)
        np.testing.assert_array_equal(params["encoder"]["block_01"]["kernel"], expected)
    path = array_file(tmp_path / "checkpoints" / "2")
    content = path.read_bytes()
    path.write_bytes(bytes(len(content)))
    np.testing.assert_array_equal(load_params(tmp_path)["count"], make_state(1).params["count"])
    assert "2 refused" in warned(caplog)
    with pytest.raises(UserError, match="2 is damaged"):
        load_params(tmp_path / "checkpoints" / "2")
    with pytest.raises(UserError, match="no checkpoint in"):
        load_params(tmp_path / "nowhere")


def test_exported_file_round_trips_and_refuses_every_flipped_byte_of_the_data(tmp_path):
    path = tmp_path / "vit.safetensors"
    params = {"encoder": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3).T, "bias": np.zeros(2, np.int32)}}
    save_params(path, params, {"model": "tiny"})
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
