"""A data set of more examples than 31 bits count: trained, named, resumed."""

import numpy as np
import pytest

from mae_jax.data import inputs
from mae_jax.data.sources import registry
from mae_jax.data.sources.base import Example, Source
from mae_jax.methods import with_data
from mae_jax.ops import example_ids
from mae_jax.training import run
from tests.helpers.tiny import tiny_config

SIZE = 10**9 * 7
IMAGE = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)


def load(data, split):
    size = SIZE if split.name == "train" else 20
    return Source(size, lambda i: Example(IMAGE ^ np.uint8(i % 251), i % 3), str, ("a", "b", "c"), (), lambda i: i % 3)


@pytest.fixture
def _huge(monkeypatch):
    monkeypatch.setitem(registry.MODULES, "huge", "tests.training.wide_ids_test")
    monkeypatch.setattr("mae_jax.data.sources.base.MAX_DIGESTED", 100)


@pytest.mark.usefixtures("_huge")
def test_ids_of_seven_billion_examples_are_whole_on_the_host_and_two_words_on_devices():
    config = tiny_config({"data.source": "huge"}, "splitmask")
    method, opened = with_data(config)
    assert method.batch_spec()["id"].shape == (8, 2)
    made = opened.batches(method.eval_spec(), method.patch_order())
    batch = next(made.train(3))
    ids = example_ids.whole(batch["id"])
    assert batch["id"].dtype == np.int32
    assert ids.max() > 2**31
    assert len(set(ids.tolist())) == 8
    np.testing.assert_array_equal(batch["label"], ids % 3)
    later = [next(made.train(step))["id"] for step in (3, 4)]
    np.testing.assert_array_equal(later[0], batch["id"])
    assert not np.array_equal(later[0], later[1])
    last = list(made.evaluate())[-1]
    assert example_ids.whole(last["id"]).tolist()[-4:] == [-1] * 4
    assert isinstance(inputs.OpenedData(tiny_config()).info.wide_ids, bool)


@pytest.mark.slow
@pytest.mark.usefixtures("_huge")
def test_splitmask_trains_on_seven_billion_examples(tmp_path):
    from mae_jax.training import loop

    config = tiny_config({"data.source": "huge", "train.duration": "2 steps", "checkpoint.every": "1 steps",
                          "eval.every": ""}, "splitmask")
    assert loop.train(config, str(tmp_path)) == 0
    assert run.open_run(config, str(tmp_path)).program.batch["id"].shape == (8, 2)
