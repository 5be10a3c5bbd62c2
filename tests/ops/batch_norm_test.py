"""Batch norm without scale and shift, beside torch's BatchNorm1d (golden/make_torch.py)."""

from pathlib import Path

import jax
import numpy as np
import pytest

from mae_jax.ops import batch_norm


@pytest.fixture(scope="module")
def golden():
    with np.load(Path(__file__).parents[1] / "golden" / "torch.npz") as file:
        return {key.removeprefix("batch_norm/"): file[key] for key in file if key.startswith("batch_norm/")}


def close(found, wanted):
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-6 * np.abs(wanted).max())


def test_outputs_and_running_moments_of_three_batches_are_those_of_torch(golden):
    moments = batch_norm.start(golden["features"].shape[-1])
    weight = np.ones(golden["features"].shape[1], np.float32)
    for number, features in enumerate(golden["features"]):
        out, moments = batch_norm.train(features, weight, moments)
        close(out, golden["outputs"][number])
        close(moments["mean"], golden["means"][number])
        close(moments["var"], golden["variances"][number])
    close(batch_norm.apply(golden["features"][0], moments), golden["evaluated"])


def test_rows_of_weight_0_change_neither_outputs_nor_moments(golden):
    features = golden["features"][0]
    padded = np.concatenate([features[:2], np.full((3, features.shape[1]), 1e3, np.float32), features[2:]])
    weight = np.array([1, 1, 0, 0, 0, 1, 1, 1, 1], np.float32)
    out, moments = batch_norm.train(padded, weight, batch_norm.start(features.shape[1]))
    close(out[weight > 0], golden["outputs"][0])
    close(moments["mean"], golden["means"][0])
    close(moments["var"], golden["variances"][0])


@pytest.mark.parametrize("rows", [0, 1])
def test_a_batch_of_none_or_one_that_counts_stays_finite(rows):
    features = np.full((4, 3), 5, np.float32)
    weight = (np.arange(4) < rows).astype(np.float32)
    out, moments = batch_norm.train(features, weight, batch_norm.start(3))
    assert np.isfinite(out).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(moments))


def test_the_gradient_passes_through_the_batchs_moments_and_not_through_the_running_ones(golden):
    features, weight = golden["features"][0], np.ones(6, np.float32)
    start = batch_norm.start(features.shape[1])
    through = jax.grad(lambda x: (batch_norm.train(x, weight, start)[0] ** 3).sum())(features)
    assert np.abs(through).max() > 0.1
    assert np.abs(through.sum(0)).max() < 1e-5 * np.abs(through).max()  # a constant added to all rows changes nothing
    stopped = jax.grad(lambda x: batch_norm.train(x, weight, start)[1]["var"].sum())(features)
    assert not np.asarray(stopped).any()
