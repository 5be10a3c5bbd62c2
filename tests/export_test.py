"""Exports are read back by us and by transformers."""

import numpy as np
import pytest
from etils import epath

from mae_jax import export, workdir
from mae_jax.checkpoint import Checkpoints, load_params
from mae_jax.errors import UserError
from mae_jax.params import flatten
from tests.tiny import tiny_config, tiny_state


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A workdir with one checkpoint, and its parameters."""
    folder = tmp_path_factory.mktemp("export") / "run"
    config = tiny_config()
    state = tiny_state(config)
    params = {name: np.array(leaf) for name, leaf in flatten(state.params).items()}
    workdir.record(epath.Path(folder), config)
    checkpoints = Checkpoints(folder, 2)
    checkpoints.save(1, state)
    checkpoints.wait()
    checkpoints.close()
    return folder, params


def test_an_export_gives_back_every_parameter_bit_for_bit(run, tmp_path):
    folder, params = run
    file = tmp_path / "out.safetensors"
    assert export.export(str(folder / "checkpoints" / "1"), str(file), "mae_jax") == 0
    loaded = flatten(load_params(file))
    assert loaded.keys() == params.keys()
    for name, value in loaded.items():
        np.testing.assert_array_equal(value, params[name])


def test_transformers_loads_the_hf_layout_without_a_missing_or_unexpected_name(run, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    export.export(str(run[0]), str(tmp_path / "hf"), "hf")
    model, found = transformers.ViTMAEForPreTraining.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(found.values())
    ours = run[1]["encoder/norm/scale"]
    np.testing.assert_array_equal(model.vit.layernorm.weight.detach().numpy(), ours)


def test_a_name_without_the_suffix_is_refused(run, tmp_path):
    with pytest.raises(UserError, match=r"must end in \.safetensors"):
        export.export(str(run[0]), str(tmp_path / "out.bin"), "mae_jax")
