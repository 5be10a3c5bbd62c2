"""The study of negative transfer: cells in order, ends where nothing can be told, verdicts of effects."""

import pytest

from studies.negative_transfer import study as transfer
from studies.verdicts import INSENSITIVE, SEEN
from tests.helpers.study_runs import noise, run_all, verdicts

ARMS = {"untrained": 0.4, "alone": 0.6, "all": 0.55, "alone, longer": 0.62, "all, longer": 0.57}


def transferred(learned=True, voted=0.05):
    """Returns what a run measures: encoders that have learned or not, and by how much a voted path is above others."""
    def of_domains(arm, seed, top1, mine=tuple(transfer.CLASSES)):
        return {domain: {"probe": top1 + noise(arm, domain, seed), "loss": 1.0 - top1} for domain in mine}

    def measured(cell):
        arm, seed = cell["arm"], cell["seed"]
        if cell.get("kind") == "pilot":
            return {"val": 0.5 - cell["lr"]}
        if arm == "MoCE":
            ways = {how: of_domains(how, seed, 0.6 + voted * (how != "random")) for how in transfer.WAYS}
            return ways | {"from_start": 0.7, "from_each_other": 0.9, "paths": 4}
        top1 = ARMS[arm] if learned else ARMS["untrained"]
        return of_domains(arm, seed, top1, (cell["domain"],) if "domain" in cell else tuple(transfer.CLASSES))
    return measured


def test_a_domain_alone_and_a_mixture_are_seen_above_all_domains():
    cells = run_all(transfer, transferred())
    found = verdicts(transfer, cells)
    assert found["one domain alone above all"] == found["one domain alone above all, both longer"] == SEEN
    assert found["MoCE's voted path above all, longer"] == SEEN
    assert sum(cell["arm"] == "MoCE" for cell in cells) == 8
    assert {cell["lr"] for cell in cells if "longer" in cell["arm"] and "kind" not in cell} == {1e-2}


def test_no_mixture_is_trained_beyond_three_seeds_where_its_paths_are_alike():
    cells = run_all(transfer, transferred(voted=0.005))
    assert [cell["seed"] for cell in cells if cell["arm"] == "MoCE"] == [0, 1, 2]
    found = verdicts(transfer, cells)
    assert found["one domain alone above all"] == SEEN
    assert {verdict for claim, verdict in found.items() if "MoCE" in claim} == {INSENSITIVE}
    assert "above others: no (+0.00" in transfer.table(cells)


def test_what_fails_a_check_with_all_seeds_is_not_judged():
    def lowered(cells, arm, domains):
        return [cell | {domain: {"probe": 0.0} for domain in domains} if cell["arm"] == arm else cell for cell in cells]

    cells = run_all(transfer, transferred())
    alike = [cell | {"random": cell["vote"]} if cell["arm"] == "MoCE" else cell for cell in cells]
    assert {verdict for claim, verdict in verdicts(transfer, alike).items() if "MoCE" in claim} == {INSENSITIVE}
    assert set(verdicts(transfer, lowered(cells, "all", transfer.CLASSES)).values()) == {INSENSITIVE}


def test_the_study_ends_after_three_seeds_where_training_gives_nothing():
    cells = run_all(transfer, transferred(learned=False))
    assert {cell["seed"] for cell in cells if cell["arm"] != "untrained"} == {0, 1, 2}
    assert set(verdicts(transfer, cells).values()) == {INSENSITIVE}


def test_a_mean_is_of_seeds_with_all_tasks():
    cells = [{"arm": "alone", "domain": domain, "seed": seed, domain: {"probe": 0.1 * seed}}
             for seed, domains in ((1, list(transfer.CLASSES)), (2, list(transfer.CLASSES)[1:])) for domain in domains]
    assert transfer.means(cells, "alone") == {1: pytest.approx(0.1)}


def test_an_encoder_sees_as_many_images_of_a_domain_alone_as_with_all(monkeypatch, tmp_path):
    trained = []
    monkeypatch.setattr(transfer.mixtures, "masked", lambda file, domain, seed, steps, lr, start: (domain, steps, lr))
    monkeypatch.setattr(transfer.shared, "trained", lambda config, folder, work: trained.append((folder.name, *config)))
    transfer.dense({"arm": "alone, longer", "domain": "emoji", "seed": 3, "lr": 1e-2}, tmp_path)
    transfer.dense({"arm": "all, longer", "seed": 3, "lr": 4e-2}, tmp_path)
    assert trained == [
        ("alone_emoji_0.02_3", "emoji", 3600, 2e-2), ("alone_longer_emoji_0.01_3", "emoji", 1200, 1e-2),
        ("all_0.02_3", "", 14_400, 2e-2), ("all_longer_0.04_3", "", 4800, 4e-2)]
