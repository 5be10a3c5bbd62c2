"""The instrument of experts: the voted path's figures beside those of other paths, and distances between experts."""

import numpy as np
import pytest

from studies.negative_transfer import instrument


def test_the_voted_path_is_compared_with_others():
    def domains(probe, loss):
        return {domain: {"probe": probe, "loss": loss} for domain in instrument.CLASSES}

    cells = [{"kind": "first", "seed": 0, **domains(0.5, 1.0)}, {
        "kind": "mixture", "seed": 0, "variant": "before", "vote": domains(0.6, 0.9), "random": domains(0.5, 1.0),
        "from_start": 0.3, "from_each_other": 0.2, "paths": 3, "confidence": 0.8}]
    assert "| before | 1 | 0.30 | 0.20 | 0.80 | 3.0 | 0.600 | 0.100 | -10.00 |" in instrument.table(cells)


def test_each_change_is_one_and_all_changes_are_all():
    before, *single, every = (variant._asdict() for variant in instrument.VARIANTS.values())
    for variant in single[:1] + single[2:]:  # the second goes further than the first
        changed = {name for name in variant if variant[name] != before[name]}
        assert len(changed) == 1
        assert all(every[name] == variant[name] for name in changed)
    assert all(every[name] != before[name] for name in before)


def test_distances_are_relative_to_the_mlp_that_experts_are_copies_of(monkeypatch):
    kernel = np.full((2, 3), 2.0)
    trees = {"start": {"encoder": {"block_01": {"mlp": {"fc1": {"kernel": kernel}}}}},
             "mixture": {"encoder": {"block_01": {"experts": {"fc1": {"kernel": np.stack([kernel, 1.5 * kernel])}}}}}}
    monkeypatch.setattr(instrument.mixtures, "load_params", trees.__getitem__)
    assert instrument.mixtures.moved("start", "mixture") == pytest.approx({"from_start": 0.25, "from_each_other": 0.5})
