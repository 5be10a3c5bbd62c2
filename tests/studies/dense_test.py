"""The study of dense tasks: valid configs, cells in their order, and an end where nothing can be told."""

import itertools

import pytest

from mae_jax.param_tree import flat
from studies import cells as shared
from studies.dense import study
from tests.helpers.study_runs import run_all

VALUES = {"box AP": 0.2, "mask AP": 0.1, "mIoU": 0.3}


def runs(**measured):
    """Returns all cells of the study; keywords: a measure's (scratch and mae, frozen) in place of VALUES and half."""
    def found(cell):
        if cell["kind"] != "trained":
            return {"val": -abs(cell["lr"] - 0.032)} if cell["kind"] == "pilot" else {}
        pairs = {name: (value, value / 2) for name, value in VALUES.items()} | measured
        return {name: pair[cell["arm"] == "frozen"] for name, pair in pairs.items()}

    return run_all(study, found)


def test_each_seed_pre_trains_and_trains_all_arms_at_the_rate_that_a_part_held_out_chose():
    cells = runs()
    trained = [cell for cell in cells if cell["kind"] == "trained"]
    assert len(trained) == 2 * 3 * 8
    assert {cell["lr"] for cell in trained} == {0.032}
    assert sum(cell["kind"] == "pilot" for cell in cells) == 2 * 3 * 4
    kinds = [kind for kind, _ in itertools.groupby(cell["kind"] for cell in cells)]
    assert kinds == ["pretrained", "pilot", "trained"]  # the encoder that pilots share is there before them


@pytest.mark.parametrize("pair", [(0.09, 0.01), (0.95, 0.5), (0.3, 0.29)],
                         ids=["below the floor", "above the ceiling", "as a frozen encoder"])
def test_a_task_that_does_not_read_the_encoder_ends_after_three_seeds_and_gets_no_verdict(pair):
    cells = runs(mIoU=pair)
    seeds = {task: {cell["seed"] for cell in cells if cell["task"] == task} for task in study.TASKS}
    assert seeds == {"detection": set(range(8)), "segmentation": {0, 1, 2}}
    assert not study.passed(cells, "segmentation")["mIoU"]
    assert all(study.passed(cells, "detection").values())
    assert all(not comparison.check for comparison in study.comparisons(cells) if "mIoU" in comparison.claim)
    assert "| segmentation | mIoU |" in study.table(cells)


def test_the_power_that_eight_seeds_will_have_is_told_before_they_are_there():
    cells = [cell for cell in runs() if cell["seed"] < 3]
    for cell in cells:
        if cell["kind"] == "trained":
            cell["box AP"] += 0.01 * cell["seed"] * (cell["arm"] == "mae")
    assert "detection, box AP: mae above scratch: with 8 seeds" in study.table(cells)
    assert "with 8 seeds" not in study.table(runs())


@pytest.mark.parametrize("task", study.TASKS)
def test_arms_differ_in_the_encoder_alone(task):
    def config(arm, kind="trained"):
        return study.training({"kind": kind, "task": task, "arm": arm, "seed": 3, "lr": 0.01}, 10, "encoder")

    def differing(one, other):
        one, other = (flat(each) for each in (one, other))
        return {name for name in one if one[name] != other[name]}

    scratch, mae, frozen = map(config, study.ARMS)
    assert differing(scratch, mae) == {"init_from"}
    assert differing(scratch, frozen) == {"method.train_blocks"}
    assert (mae.init_from, scratch.init_from) == ("encoder", "")
    assert scratch.eval.test
    assert not config("scratch", "pilot").eval.test
    pretrained = study.pretraining({"task": task, "seed": 3}, 10)
    assert [pretrained.model[name] for name in ("width", "depth", "heads", "patch")] == [
        scratch.model[name] for name in ("width", "depth", "heads", "patch")]
    assert (pretrained.data.source, pretrained.seed) == (scratch.data.source, 3)


def test_a_limit_ends_a_study_between_cells():
    cells, stages = [{"n": 0}], [[{"n": 0}], [{"n": 1}, {"n": 2}, {"n": 3}], [{"n": 4}]]
    found = []
    for part in shared.limited(iter(stages), cells, count=2):
        found.append(part)
        cells += part
    assert found == [[{"n": 1}], [{"n": 2}]]
    assert list(shared.limited(iter(stages), cells, hours=1e-9)) == []
    parts = [[{"n": 0}], [{"n": 1}, {"n": 2}], [{"n": 3}], [{"n": 4}]]
    assert list(shared.limited(iter(stages), [], hours=9, at_once=2)) == parts
    assert list(shared.limited(iter(stages), [], at_once=2)) == stages
