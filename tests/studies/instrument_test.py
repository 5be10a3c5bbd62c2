"""The study of fine-tuning with few labels: its arms are compared as it says, and chosen by the held-out images."""

import numpy as np
import pytest

from studies.finetune import instrument
from studies.verdicts import OPPOSITE, SEEN, judge


def cell(name, seed, arm, **figures):
    lr, head, steps = arm
    return {"kind": "tuned", "set": name, "seed": seed, "lr": lr, "head": head, "steps": steps, "mixed": False,
            **figures}


def accuracy(arm):
    """Returns an accuracy to which the rate adds 0.2, batch norm takes 0.05 and the steps add 0.1."""
    return 0.3 + 0.2 * (arm[0] == 8e-3) - 0.05 * (arm[1] == "probe") + 0.1 * (arm[2] == 400)


@pytest.fixture
def cells():
    draws, found = np.random.default_rng(0), []
    for name, arms in instrument.PLAIN.items():
        for seed in instrument.SEEDS:
            found.append({"kind": "frozen", "set": name, "seed": seed, "knn_test": 0.4 + 0.01 * draws.normal(),
                          "linear_test": 0.45 + 0.01 * draws.normal()})
            found += [cell(name, seed, arm, val=accuracy(arm), test=accuracy(arm) + 0.01 * draws.normal())
                      for arm in arms]
    return found


def test_each_factor_is_compared_at_its_higher_level_with_its_lower_one(cells):
    found = {finding.claim: finding for finding in judge(instrument.comparisons(cells))}
    for claim, effect, verdict in (("the higher rate", 0.2, SEEN), ("batch norm", -0.05, OPPOSITE),
                                   ("more steps", 0.1, SEEN)):
        finding = found[f"digits: {claim}, mean of 4 pairs"]
        assert (finding.pairs, finding.verdict) == (8, verdict)
        assert abs(finding.mean - effect) < 0.02
    for name in instrument.SETS:
        assert found[f"{name}: the former recipe above k-NN"].verdict == OPPOSITE
    assert [found[f"digits: {step}"].verdict for step in ("more steps alone", "then the higher rate",
                                                          "then batch norm")] == [SEEN, SEEN, OPPOSITE]


def test_the_held_out_images_choose_an_arm_and_the_test_images_do_not(cells):
    assert instrument.chosen(cells, "digits") == (8e-3, "linear", 400)
    other = (2e-3, "probe", 100)
    for each in cells:
        if each.get("head") == "probe" and (each["lr"], each["steps"]) == (2e-3, 100):
            each["test"] = 1.0
    assert instrument.chosen(cells, "digits") != other
    for each in cells:
        if each.get("head") == "probe" and (each["lr"], each["steps"]) == (2e-3, 100):
            each["val"] = 1.0
    assert instrument.chosen(cells, "digits") == other
    assert instrument.chosen([], "digits") == instrument.TODAY


def test_the_varying_share_is_that_of_the_squared_norm_around_the_mean():
    features = np.array([[3.0, 1.0], [3.0, -1.0]])
    assert instrument.varying_share(features) == pytest.approx(1 / 10)
    assert instrument.varying_share(features - features.mean(0)) == pytest.approx(1)


def test_a_layer_alone_learns_separable_features_given_steps_enough():
    draws = np.random.default_rng(1)
    labels = (np.arange(200) % 10).astype(np.int32)
    features = (np.eye(10)[labels] + 0.1 * draws.normal(size=(200, 10))).astype(np.float32)
    layer = np.asarray(instrument.descended(features, labels, 0.05, 60, 0))
    assert layer.shape == (11, 10)
    assert (np.argmax(features @ layer[:-1] + layer[-1], 1) == labels).mean() > 0.95
