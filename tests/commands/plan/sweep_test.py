"""What a sweep compares, in which order it compiles, and what it recommends."""

import contextlib

import pytest

from mae_jax.commands.plan import cost
from mae_jax.commands.plan import sweep as plan_sweep
from mae_jax.errors import UserError
from tests.commands.plan.cost_test import FOUND, V3
from tests.helpers.tiny import tiny_config


def test_a_sweep_is_every_combination_of_values_of_the_fields_types():
    assert plan_sweep.parse("batch_size=8,16; model.remat=none,full;", tiny_config()) == [
        {"batch_size": 8, "model.remat": "none"}, {"batch_size": 8, "model.remat": "full"},
        {"batch_size": 16, "model.remat": "none"}, {"batch_size": 16, "model.remat": "full"}]
    assert plan_sweep.parse("model.scan=True,false;optim.lr=1e-3", tiny_config()) == [
        {"model.scan": True, "optim.lr": 1e-3}, {"model.scan": False, "optim.lr": 1e-3}]


@pytest.mark.parametrize(("text", "words"), [
    ("batch_sise=8", ["unknown config field 'batch_sise'", "did you mean 'batch_size'?"]),
    ("checkpoint.best=,top1", ["unknown config field 'checkpoint.best'", "is checkpoint.best_metric since"]),
    ("batch_size", ["cannot read 'batch_size'", "batch_size=2048,4096"]),
    ("batch_size=big", ["batch_size=big", "such as 8"]),
    ("model.scan=maybe", ["model.scan=maybe", "such as False"]),
    ("model.patch=4", ["model.patch=4"]),
])
def test_a_sweep_that_cannot_be_read_ends_with_one_line(text, words):
    with pytest.raises(UserError) as error:
        plan_sweep.parse(text, tiny_config())
    for word in words:
        assert word in str(error.value)


@pytest.fixture
def compiled(monkeypatch):
    """Replaces the compiler by one that gives each cell a time and a size; returns the log of what it was asked."""
    asked = []

    def measure(config, target, examples, cache, progress):
        asked.append((config.batch_size, config.model.remat, config.model.scan))
        if config.batch_size == 24:
            raise UserError("does not divide")
        full = config.model.remat == "full"
        return FOUND | {
            "bytes_accessed": config.batch_size * (1.5e9 if full else 1e9),
            "total_bytes": (30 if config.batch_size == 32 and not full else 4) * 2**30,
            "unpriced": ["while"] if config.model.scan else [],
            "optimal_seconds": config.batch_size / 8 + full,
        }

    monkeypatch.setattr(cost, "measure", measure)
    return asked


def sweep(text, best=3):
    config = tiny_config()
    return plan_sweep.run(config, V3, plan_sweep.parse(text, config), best, 64, "", contextlib.nullcontext)


def test_few_cells_are_compiled_without_loops_at_once(compiled):
    result = sweep("batch_size=8,16")
    assert compiled == [(8, "none", False), (16, "none", False)]
    assert result["recommended"] == {"batch_size": 16}  # 16 / 2.25 s beats 8 / 1.25 s
    table = plan_sweep.table(result)
    assert table.startswith("recommended: --config.batch_size=16\nfits; ")
    assert "loops" not in table
    assert "cost" not in table
    # 6 steps on 8 devices at 2 per device-hour: of 1.25 s, and of 2.25
    assert [line.split()[-1] for line in plan_sweep.table(result, 2.0).splitlines()[-3:]] == ["cost", "0.0333", "0.06"]


def test_of_many_cells_the_best_that_fit_are_compiled_again_without_loops(compiled):
    result = sweep("batch_size=8,16,24,32;model.remat=none,full", best=2)
    assert [scan for *_, scan in compiled] == [True] * 8 + [False] * 2
    assert compiled[8:] == [(8, "none", False), (16, "none", False)]  # (32, none) does not fit, full moves more
    assert result["recommended"] == {"batch_size": 16, "model.remat": "none"}
    table = plan_sweep.table(result)
    assert table.count("impossible: does not divide") == 2
    assert "ranks cells of equal depth only" in table


def test_where_nothing_fits_nothing_is_recommended(compiled):
    result = sweep("batch_size=32")
    assert result["recommended"] is None
    assert plan_sweep.table(result).startswith("none: nothing fits\n")


@pytest.mark.parametrize(("text", "line"), [(";", "--sweep is empty"),
                                            ("batch_size=8;batch_size=16", "batch_size is given twice")])
def test_a_sweep_of_nothing_and_a_field_given_twice_are_refused(text, line):
    with pytest.raises(UserError, match=line):
        plan_sweep.parse(text, tiny_config())
