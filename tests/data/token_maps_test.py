"""Tokens of another tokenizer, read by example id."""

import jax
import numpy as np
import pytest

from mae_jax import data
from mae_jax.errors import UserError
from mae_jax.training import loop
from tests.helpers.tiny import tiny_config, tiny_loss, tiny_method

SPLITS = {"train": 3400, "test": 1020}
STILL = {"data.source": "photo_crops", "data.augment": "none", "method.target": "tokens"}


def maps(**changed):
    """Token (id + place) % 24 at each place of each example, so that a wrong row or order shows."""
    return {name: (np.arange(size)[:, None] + np.arange(16)) % 24 for name, size in SPLITS.items()} | changed


def build(tmp_path, method="beit", arrays=None, **fields):
    file = tmp_path / "tokens.npz"
    np.savez(file, **(maps() if arrays is None else arrays))
    config = tiny_config(STILL | {"data.tokens": str(file)} | fields, method)
    some = tiny_method(config)
    return config, some, data.OpenedData(config, some.data_needs(config)).batches(some.eval_spec(), some.patch_order())


def test_every_batch_has_the_tokens_of_its_examples_in_the_order_of_their_patches(tmp_path):
    _, _, inputs = build(tmp_path)
    for batch in (next(inputs.train(3)), next(inputs.support()), next(inputs.evaluate())):
        assert batch["tokens"].dtype == np.int32
        np.testing.assert_array_equal(batch["tokens"], (batch["id"][:, None] + batch["order"]) % 24)


def test_what_the_data_are_known_by_has_the_tokens(tmp_path):
    found = [build(tmp_path, arrays=maps(train=(maps()["train"] + shift) % 24))[2].identity() for shift in (0, 0, 1)]
    assert found[0] == found[1]
    assert found[0]["train"] == found[2]["train"]
    assert found[0]["data.tokens"].keys() == {"train", "test"}
    assert found[0]["data.tokens"]["test"] == found[2]["data.tokens"]["test"]
    assert found[0]["data.tokens"]["train"] != found[2]["data.tokens"]["train"]


@pytest.mark.parametrize("method", ["beit", pytest.param("splitmask", marks=pytest.mark.slow)])
def test_the_loss_asks_for_them(tmp_path, method):
    _, some, inputs = build(tmp_path, method)
    batch = next(inputs.train(0))
    params, extras = jax.jit(some.init)(jax.random.key(0), batch)
    loss = tiny_loss(some)
    assert extras == {}
    name = "loss" if method == "beit" else "inpaint_loss"
    first, second = (loss(params, extras, {**batch, "tokens": tokens}, None, 0, False)[1][0][name]
                     for tokens in (batch["tokens"], (batch["tokens"] + 1) % 24))
    assert float(first[0] / first[1]) == pytest.approx(np.log(24), rel=0.03)
    assert first[0] != second[0]


@pytest.mark.slow
def test_a_run_trains_on_them(tmp_path):
    config, *_ = build(tmp_path, **{"train.duration": "2 steps", "eval.every": "2 steps", "data.eval_split": "test"})
    assert loop.train(config, str(tmp_path / "run")) == 0


@pytest.mark.parametrize(("arrays", "fields", "line"), [
    (None, {"data.augment": "random"}, "one fixed view"),
    (None, {"data.color": "jitter"}, "which a random one does not show"),
    (None, {"data.tokens": ""}, "no file; .*..npz .*.examples, 16."),
    (None, {"eval.crop_ratio": (0.875, 1.0)}, "tokens of one crop"),
    (None, {"method.target": "kmeans"}, "method.target='kmeans'; .*'tokens'"),
    ({"train": maps()["train"]}, {}, "has no array 'test'"),
    (maps(test=np.zeros((7, 16), int)), {}, "'test' .*int64 .7, 16.; .*.1020, 16."),
    (maps(test=np.zeros((1020, 16))), {}, "'test' is float64"),
    (maps(test=np.full((1020, 16), 24)), {}, "24 to 24; .*method.vocabulary - 1 = 23")])
def test_what_does_not_fit_is_refused(tmp_path, arrays, fields, line):
    with pytest.raises(UserError, match=line):
        build(tmp_path, arrays=arrays, **fields)


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "broken.npz").write_bytes(b"PK nothing")
    with pytest.raises(UserError, match=r"broken.npz is damaged"):
        build(tmp_path, **{"data.tokens": str(tmp_path / "broken.npz")})
