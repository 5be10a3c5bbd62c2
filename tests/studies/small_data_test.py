"""The study of small data: rates chosen on the held-out part, ends where nothing can be told, verdicts of effects."""

import pytest

from mae_jax.config import validate
from mae_jax.data.sources import splits
from mae_jax.errors import GuardError
from studies.small_data import study as small
from studies.verdicts import INSENSITIVE, OPPOSITE, SEEN
from tests.helpers.study_runs import noise, run_all, verdicts

LOST = {"splitmask": 0.02, "beit": 0.05, "mae": 0.1, "dino": 0.05}  # with the least images


def learned(dino=0.1, beit=0.1, knn=None):
    """Returns what a run measures: gains over no pre-training, and a method's k-NN where it is not low."""
    def measured(cell):
        method, images = cell["method"], cell["images"]
        if cell["kind"] == "pilot":
            return {"val": 0.6 - abs(cell["lr"] - 4e-3)}
        if cell["kind"] == "pretrained":
            return {"knn": (knn or {}).get(method, 0.5)}
        gain = {"scratch": 0.0, "dino": dino, "beit": beit}.get(method, 0.1)
        gain -= LOST.get(method, 0.0) * (images == small.LEAST)
        best = cell["lr"] == 8e-3 and cell["steps"] == (small.LONGER if method == "scratch" else small.STEPS)
        return {"val": 0.6 + best, "test": 0.6 + gain + noise(method, images, cell["seed"])}
    return measured


def test_methods_that_lose_less_or_more_than_dino_are_seen():
    cells = run_all(small, learned())
    assert verdicts(small, cells) == {
        "splitmask loses less than dino": SEEN, "beit loses less than dino": "no effect larger than 0.015",
        "mae loses less than dino": OPPOSITE}
    assert {cell["lr"] for cell in cells if cell["kind"] == "pretrained"} == {4e-3}
    assert {(cell["lr"], cell["steps"]) for cell in cells if cell["kind"] == "tuned" and cell["seed"]} == {
        (8e-3, small.STEPS), (8e-3, small.LONGER)}
    assert sum(cell["kind"] == "pretrained" for cell in cells) == 4 * (8 + 3 + 8)


def test_small_data_end_after_three_seeds_where_dino_has_nothing_to_lose():
    cells = run_all(small, learned(dino=0.04))
    assert {cell["images"] for cell in cells if cell["method"] != "scratch"} == {small.ALL}
    assert {cell["seed"] for cell in cells} == {0, 1, 2}
    assert set(verdicts(small, cells).values()) == {INSENSITIVE}


def test_an_interruption_changes_no_check_of_small_data():
    """DINO passes with three seeds and not with five: a run that goes on after five must not end there."""
    def measured(cell):
        found = learned()(cell)
        if cell["method"] == "dino" and cell["seed"] in (3, 4) and "test" in found:
            found["test"] -= 0.4
        return found

    whole = run_all(small, measured)
    five = [cell for cell in whole if cell["seed"] < 5 and cell["images"] != small.MIDDLE]
    assert small.passed(small.shared.of_seeds(five, range(3)), "dino")
    assert not small.passed(five, "dino")
    stages = small.plan(five)
    assert any(cell["seed"] == 5 for stage in stages for cell in stage)


def test_a_rate_that_diverges_is_not_chosen_and_ends_no_study(tmp_path, monkeypatch):
    def diverges(*_):
        raise GuardError("10 steps were not finite")

    monkeypatch.setattr(small.shared, "trained", diverges)
    cell = {"kind": "pilot", "method": "mae", "images": small.ALL, "seed": 0, "lr": 1.0}
    assert small.run(cell, tmp_path)["val"] == 0.0
    with pytest.raises(GuardError):
        small.run(cell | {"kind": "pretrained"}, tmp_path)


def test_small_data_end_where_finetuning_is_below_knn():
    cells = run_all(small, learned(knn={"dino": 0.75}))
    assert {cell["seed"] for cell in cells} == {0, 1, 2}


def test_a_method_that_gains_nothing_or_whose_finetuning_fails_is_not_judged():
    for measured, method in ((learned(beit=0.04), "beit"), (learned(knn={"splitmask": 0.75}), "splitmask")):
        cells = run_all(small, measured)
        found = verdicts(small, cells)
        assert found[f"{method} loses less than dino"] == INSENSITIVE
        assert found["mae loses less than dino"] == OPPOSITE
        [line] = [line for line in small.table(cells).splitlines() if line.startswith(f"| {method} |")]
        assert line.endswith("| no |")


def test_nothing_is_judged_where_dino_fails_the_check_with_all_seeds():
    cells = [cell | ({"knn": 0.75} if cell["kind"] == "pretrained" and cell["method"] == "dino" else {})
             for cell in run_all(small, learned())]
    assert set(verdicts(small, cells).values()) == {INSENSITIVE}


def test_the_images_that_choose_are_in_no_other_part(tmp_path):
    cell = small.tuned("mae", small.ALL, 4e-3, 8e-3)
    data = small.finetuning(cell, tmp_path, "").data
    held = splits.parse(data.val_split).bounds(60_000)
    assert held == (58_000, 60_000)
    assert splits.parse(data.train_split).bounds(60_000) == (0, 1000)
    for images in small.PARTS:
        config = small.pretraining(cell | {"kind": "pretrained", "images": images}, tmp_path)
        assert splits.parse(config.data.train_split).bounds(60_000) == (0, images)
        assert images <= held[0]


def test_configs_of_small_data_are_valid(tmp_path):
    (tmp_path / "clothes.npz").touch()
    for method in small.METHODS:
        cell = {"kind": "pilot", "method": method, "images": small.ALL, "seed": 0, "lr": 4e-3}
        validate(small.pretraining(cell, tmp_path))
        tuning = small.finetuning(cell | {"steps": 10}, tmp_path, "")
        validate(tuning)
        assert not tuning.eval.test
    assert small.finetuning(small.tuned("mae", 580, 4e-3, 8e-3), tmp_path, "").eval.test
