"""The study of mixing: cells in order, an end where nothing can be told, verdicts of effects."""

from mae_jax.param_tree import flat
from studies.mixing import study as mixing
from studies.verdicts import INSENSITIVE, SEEN
from tests.helpers.study_runs import noise, run_all, verdicts


def mixed(gain, better=0.05):
    """Returns what a run of mixing measures: MAE's gain over its start, and MixedAE's over MAE."""
    def measured(cell):
        if cell["kind"] == "timed":
            return {"ms": {"mae": 10.0, "naive": 10.0, "mixedae": 11.0}, "device": "cpu"}
        both = {"first": 0.25, "last": 0.4}
        mixes = {"purity": both, "neighbour_homology": both} if cell["arm"] in ("naive", "mixedae") else {}
        last = 0.2 + gain + better * (cell["arm"] == "mixedae") + noise(cell["arm"], cell["seed"])
        return {"linear": {"first": 0.2, "last": last}, **mixes}
    return measured


def test_mixing_trains_mae_for_as_long_as_mixedae_and_sees_what_is_better():
    cells = run_all(mixing, mixed(gain=0.15))
    found = verdicts(mixing, cells)
    assert found["MixedAE above MAE"] == found["MixedAE above MAE of the same time"] == SEEN
    assert found["MAE above naive mixing"] == "no effect larger than 0.02"
    assert {cell["steps"] for cell in cells if "steps" in cell} == {3300}
    assert sum(cell["kind"] == "pretrained" for cell in cells) == 4 * 8


def test_mixing_ends_after_three_seeds_where_mae_learns_nothing():
    cells = run_all(mixing, mixed(gain=0.05))
    assert [(cell["arm"], cell["seed"]) for cell in cells[1:]] == [("mae", 0), ("mae", 1), ("mae", 2)]
    assert set(verdicts(mixing, cells).values()) == {INSENSITIVE}
    assert "start: no" in mixing.table(cells)


def test_arms_of_mixing_differ_in_the_method_alone():
    one, other = (flat(mixing.pretraining({"arm": arm, "seed": 1})) for arm in ("mae", "mixedae"))
    differing = {name for name in one.keys() & other.keys() if one[name] != other[name]}
    assert differing == {"method.name"}
