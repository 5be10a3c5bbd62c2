"""The study of small data: rates chosen on the held-out part, ends where nothing can be told, verdicts of effects."""

from studies.small_data import study as small
from studies.verdicts import INSENSITIVE, OPPOSITE, SEEN
from tests.helpers.study_runs import noise, run_all, verdicts

LOST = {"splitmask": 0.02, "beit": 0.05, "mae": 0.1, "dino": 0.05}  # with the least images


def learned(dino=0.1, knn=0.6):
    """Returns what a run measures: DINO's gain over no pre-training, and k-NN on frozen features."""
    def measured(cell):
        method, images = cell["method"], cell["images"]
        if cell["kind"] != "tuned":
            part = "val" if cell["kind"] == "pilot" else "test"
            return {part: 0.6 - abs(cell["lr"] - 4e-3), "knn": knn}
        gain = {"scratch": 0.0, "dino": dino}.get(method, 0.1) - LOST.get(method, 0.0) * (images == small.LEAST)
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
    assert sum(cell["kind"] == "pretrained" for cell in cells) == 8 * 4 * 3


def test_small_data_end_after_three_seeds_where_dino_has_nothing_to_lose():
    cells = run_all(small, learned(dino=0.04))
    assert {cell["images"] for cell in cells if cell["method"] != "scratch"} == {small.ALL}
    assert {cell["seed"] for cell in cells} == {0, 1, 2}
    assert set(verdicts(small, cells).values()) == {INSENSITIVE}
    assert "pre-training: no (+0.04" in small.table(cells)


def test_small_data_end_where_finetuning_is_below_knn():
    cells = run_all(small, learned(knn=0.75))
    assert {cell["seed"] for cell in cells} == {0, 1, 2}
    assert set(verdicts(small, cells).values()) == {INSENSITIVE}
    assert "above k-NN: of no method" in small.table(cells)


def test_the_images_that_choose_are_in_no_other_part(tmp_path):
    assert max(small.PARTS) + small.HELD == 60_000
    cell = small.tuned("mae", small.ALL, 4e-3, 8e-3)
    data = small.finetuning(cell, tmp_path, "").data
    assert (data.train_split, data.val_split) == ("train[:1000]", "train[-2000:]")
    assert small.pretraining(cell | {"kind": "pretrained", "images": 580}, tmp_path).data.train_split == "train[:580]"
