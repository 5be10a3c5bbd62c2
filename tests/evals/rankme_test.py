"""RankMe on spectra that are known, and of encoders that collapse."""

import jax
import numpy as np
import pytest

from mae_jax.evals import rankme as module
from mae_jax.evals.evaluator import Evaluator
from mae_jax.evals.rankme import EPSILON, chosen, rankme
from mae_jax.runtime import sharding
from tests.evals.evaluator_test import Inputs
from tests.helpers.tiny import tiny_config, tiny_method, tiny_state


def orthonormal(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Returns [rows, columns] with orthonormal columns."""
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(rows, columns)))[0]


def with_spectrum(sigma: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Returns a matrix [rows, columns] of these singular values."""
    return orthonormal(rows, len(sigma), 1) * sigma @ orthonormal(columns, len(sigma), 2).T


def by_definition(sigma: np.ndarray, total: int) -> float:
    """Returns equations 1 and 2 for `total` singular values, of which those beyond `sigma` are zero."""
    shares = np.pad(sigma / sigma.sum(), (0, total - len(sigma))) + EPSILON
    return float(np.prod(shares ** -shares))


def test_features_along_one_direction_have_rank_one():
    features = np.outer(np.random.default_rng(0).normal(size=40), np.arange(1.0, 9))
    assert rankme(features) == pytest.approx(1, abs=1e-4)
    assert rankme(np.full((40, 8), 3.5)) == pytest.approx(1, abs=1e-4)  # the same features for every image


def test_orthonormal_features_use_all_dimensions():
    assert rankme(orthonormal(40, 8)) == pytest.approx(8, rel=1e-5)


@pytest.mark.parametrize(("rows", "columns"), [(50, 12), (12, 50), (20, 20)])
def test_a_known_spectrum_has_the_entropy_of_its_shares(rows, columns):
    sigma = np.array([8.0, 4, 2, 1, 1e-3])
    found = rankme(with_spectrum(sigma, rows, columns))
    assert found == pytest.approx(by_definition(sigma, min(rows, columns)), rel=1e-6)
    assert 3 < found < 4  # shares of 8, 4, 2 and 1 fifteenths: 3.16


def test_float32_features_give_what_float64_ones_do():
    features = with_spectrum(np.geomspace(1, 1e-4, 32), 200, 32)
    assert rankme(features.astype(np.float32)) == pytest.approx(rankme(features), rel=1e-5)


def test_neither_a_rotation_nor_a_scale_changes_the_rank():
    features = np.random.default_rng(0).normal(size=(60, 16)) * np.geomspace(1, 0.01, 16)
    wanted = rankme(features)
    assert rankme(features @ orthonormal(16, 16)) == pytest.approx(wanted, rel=1e-9)
    for scale in (1e-30, 7.0, 1e30):
        assert rankme(scale * features) == pytest.approx(wanted, rel=1e-9)
    assert rankme(features[::-1]) == pytest.approx(wanted, rel=1e-9)


def test_fewer_images_than_dimensions_bound_the_rank():
    features = np.random.default_rng(0).normal(size=(5, 64))
    sigma = np.linalg.svd(features, compute_uv=False)
    assert rankme(features) == pytest.approx(by_definition(sigma, 5), rel=1e-6)
    assert 4 < rankme(features) <= 5 + 1e-4
    assert rankme(features[:1]) == pytest.approx(1, abs=1e-4)


def test_zeros_have_rank_zero_and_what_is_not_finite_has_none():
    assert rankme(np.zeros((7, 4))) == 0
    for bad in (np.nan, np.inf):
        features = np.ones((7, 4))
        features[3, 2] = bad
        assert np.isnan(rankme(features))


def test_images_are_drawn_from_all_of_the_split_and_always_alike():
    features = np.arange(1000.0)[:, None]
    some = chosen(features, 100)
    assert len(np.unique(some)) == 100
    assert some.min() < 100
    assert some.max() > 900
    np.testing.assert_array_equal(some, chosen(features, 100))
    assert chosen(features) is features


def test_the_rank_falls_when_the_encoder_collapses(monkeypatch):
    """The last norm's scale decides how many dimensions of the features differ between images."""
    config = tiny_config()
    mesh = sharding.make_mesh(config, jax.devices()[:1])
    evaluator = Evaluator(tiny_method(config), Inputs(config, classes=()), mesh)
    state, found = tiny_state(config), {}
    for alive in (32, 3, 0):
        scale = state.params["encoder"]["norm"]["scale"] * (np.arange(32) < alive)
        norm = {"scale": scale, "bias": 0 * scale}
        params = state.params | {"encoder": state.params["encoder"] | {"norm": norm}}
        found[alive] = evaluator.scalars(state._replace(params=params))["eval/rankme"]
    assert found[32] > found[3] + 1
    assert 1 < found[3] <= 3 + 1e-3
    assert found[0] == 0
    monkeypatch.setattr(module, "chosen", lambda features: features[:2])
    assert evaluator.scalars(state)["eval/rankme"] <= 2 + 1e-4
