"""Stored runs keep what they began with, new ones have what is now, and former names of fields are understood."""

import contextlib
import json
import logging
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from mae_jax import __version__, config, param_tree, recipe_version
from mae_jax.errors import UserError
from mae_jax.methods import fields
from mae_jax.recipe_version import BATCH_FIELDS, BEHAVIORS, CURRENT, FIELDS
from mae_jax.training import workdir
from tests.golden import runs
from tests.golden.record_test import CLOSE
from tests.golden.runs import METHODS, RECORD, STOP, TOTAL
from tests.helpers.tiny import tiny_config, tiny_method

SHOWN = {"published_blocks": "beit"}  # behavior → the method whose stored run shows it
# Of data that no stored run has read, and of orders: shown by a stored config, in tests/data/sources/layouts_test.py,
# tests/data/exif_test.py, tests/data/deep_images_test.py and tests/data/readers/order_test.py; and in
# tests/methods/beit_test.py.
SHOWN_BY_CONFIG = {"folder_layouts", "class_names_before_numbers", "exif_orientation", "range_of_16_bits",
                   "more_formats", "computed_order", "beit_start_and_decay"}
NEWEST = {"recipe_version": CURRENT}  # what a recipe has that states none


@pytest.fixture(autouse=True)
def _in_the_record():
    """The record's configs name data by paths relative to it."""
    with contextlib.chdir(RECORD):
        yield


def losses(folder, steps):
    """Returns step → loss of training."""
    found = runs.metrics(folder)
    return [found[str(step)]["train/loss"] for step in steps]


def test_every_change_of_behavior_is_shown_by_a_stored_run():
    assert SHOWN.keys() | SHOWN_BY_CONFIG == BEHAVIORS.keys()
    assert all(1 < row.since <= CURRENT for row in BEHAVIORS.values())
    assert max(row.since for row in BEHAVIORS.values()) == CURRENT


@pytest.mark.slow
@pytest.mark.parametrize("behavior", SHOWN)
def test_a_stored_run_goes_on_as_it_began_whatever_the_recipe_has_now(behavior, tmp_path, caplog):
    method = SHOWN[behavior]
    folder = shutil.copytree(RECORD / "workdirs" / method, tmp_path / "run")
    stored = runs.stored_config(folder)
    assert stored.recipe_version == 1
    assert "recipe_version" not in (folder / "config.json").read_text()
    caplog.set_level(logging.INFO, "mae_jax")
    assert runs.train(runs.changed(stored, NEWEST), folder) == 0
    assert f"recipe_version 1, that of the start of the run; a new run has {CURRENT}" in caplog.text
    wanted = json.loads((RECORD / "runs" / f"{method}.json").read_text())["metrics"]
    steps = range(STOP + 1, TOTAL + 1)
    np.testing.assert_allclose(losses(folder, steps), [wanted[str(step)]["train/loss"] for step in steps], **CLOSE)
    assert json.loads((folder / "config.json").read_text())["config"]["recipe_version"] == 1
    assert runs.stored_config(folder).recipe_version == 1


@pytest.mark.slow
@pytest.mark.parametrize("behavior", SHOWN)
def test_a_new_run_has_what_is_now(behavior, tmp_path):
    method = SHOWN[behavior]
    new = runs.changed(runs.stored_config(RECORD / "workdirs" / method), {**NEWEST, "train.duration": "1 steps"})
    assert not recipe_version.has(runs.changed(new, {"recipe_version": 1}), behavior)
    assert recipe_version.has(new, behavior)
    assert runs.train(new, tmp_path) == 0
    before = json.loads((RECORD / "runs" / f"{method}.json").read_text())["metrics"]["1"]["train/loss"]
    assert abs(losses(tmp_path, [1])[0] - before) > 1e-4
    assert runs.stored_config(tmp_path).recipe_version == CURRENT


def test_a_new_run_that_starts_from_a_stored_encoder_has_what_is_now():
    new = runs.changed(runs.stored_config(RECORD / "workdirs" / "beit"), {**NEWEST, "init_from": "workdirs/beit"})
    assert workdir.continued(epath.Path("nothing_there"), new).recipe_version == CURRENT
    assert tiny_method(new).patch_order().kind == "published_block"
    assert len(runs.warm_start(new, Path("workdirs/beit"))) > 29


@pytest.mark.slow
def test_a_stored_run_is_evaluated_as_it_began_with_the_recipe_of_now(tmp_path):
    from mae_jax.training import loop

    folder = shutil.copytree(RECORD / "workdirs" / "beit", tmp_path / "run")
    assert loop.evaluate(str(folder), runs.changed(runs.stored_config(folder), NEWEST | {"eval.knn_k": 3})) == 0
    wanted = json.loads((RECORD / "runs" / "beit.json").read_text())["evaluated"]
    np.testing.assert_allclose(runs.metrics(folder)[str(STOP)]["eval/loss"], wanted["eval/loss"], **CLOSE)


def test_another_version_than_the_runs_is_refused_where_it_is_stated(tmp_path):
    workdir.record(epath.Path(tmp_path), tiny_config())
    older = tiny_config({"recipe_version": 1})
    assert workdir.continued(epath.Path(tmp_path), older) is older
    with pytest.raises(UserError, match=rf"recipe_version: {CURRENT} -> 1"):
        workdir.changes(epath.Path(tmp_path), older)


@pytest.mark.parametrize(("version", "words"), [(CURRENT + 1, "install the newer mae_jax"), (0, "leave it out")])
def test_a_version_that_is_not_known_names_those_that_are(version, words, tmp_path):
    known = rf"recipe_version={version}; mae_jax {re.escape(__version__)} knows 1 to {CURRENT}: .*{words}"
    with pytest.raises(UserError, match=known):
        tiny_config({"recipe_version": version})
    stored = {**tiny_config().to_dict(), "recipe_version": version}
    (tmp_path / "config.json").write_text(json.dumps({"config": stored}))
    with pytest.raises(UserError, match=rf"config\.json: {known}"):
        workdir.read_config(epath.Path(tmp_path))


def test_a_field_of_a_newer_version_is_refused_in_one_line(tmp_path):
    stored = tiny_config().to_dict()
    stored["model"]["registers"] = 4
    (tmp_path / "config.json").write_text(json.dumps({"config": stored}))
    with pytest.raises(UserError, match=r"config\.json has config fields .* does not know: model\.registers; use the"):
        workdir.read_config(epath.Path(tmp_path))


@pytest.mark.parametrize("name", [
    *(f"workdirs/{method}" for method in METHODS), "workdirs/mae/checkpoints/10", "exports/mae.safetensors",
    "exports/mae_of_hf/model.safetensors", "exports/moce_for_task.safetensors", "clusters/encoder.safetensors"])
def test_every_stored_config_is_read_under_todays_names(name):
    found = workdir.config_of(name)
    config.validate(found)
    assert found.recipe_version == 1
    assert not set(FIELDS) & set(param_tree.flat(found))


def test_values_of_renamed_fields_are_kept():
    assert workdir.config_of("workdirs/mae").data.color == "jitter"
    assert workdir.config_of("workdirs/mae").checkpoint.best_metric == "loss"
    assert workdir.config_of("workdirs/splitmask").method.normalize is False


def test_a_config_with_both_names_of_a_field_is_damaged(tmp_path):
    stored = tiny_config().to_dict()
    stored["data"]["colour"] = "jitter"
    (tmp_path / "config.json").write_text(json.dumps({"config": stored}))
    with pytest.raises(UserError, match=r"config\.json is damaged: it has both data\.colour and data\.color"):
        workdir.read_config(epath.Path(tmp_path))


def test_upgrading_leaves_what_was_given_alone():
    given = {"data": {"colour": "rand", "flip": True}, "seed": 3}
    assert recipe_version.upgrade(given) == {
        "recipe_version": 1, "seed": 3, "data": {"color": "rand", "flip": True}}
    assert given == {"data": {"colour": "rand", "flip": True}, "seed": 3}


def test_a_field_that_one_method_had_under_another_name_is_left_alone_in_others():
    for method, key in (("splitmask", "normalize"), ("of_a_plug_in", "normalise")):
        given = {"method": {"name": method, "normalise": 0.5}}
        assert recipe_version.upgrade(given)["method"] == {"name": method, key: 0.5}


def test_names_that_fields_once_had_are_none_of_today():
    today = {name for own in fields.TABLE.values()
             for name in param_tree.flat(config.ConfigDict({**config.DEFAULTS, "method": own}))}
    assert not FIELDS.keys() & today
    assert {renamed.now for renamed in FIELDS.values()} <= today
    spec = tiny_method(tiny_config(method="segment")).eval_spec()
    assert {renamed.now for renamed in BATCH_FIELDS.values()} <= spec.keys()
    assert not BATCH_FIELDS.keys() & spec.keys()


def test_the_page_of_migration_has_every_row():
    """Its tables of fields, of batch fields and of behaviors are those of the module."""
    page = (Path(__file__).parents[1] / "docs" / "migration.md").read_text()

    def rows(heading):
        part = page.split(f"\n## {heading}\n")[1].split("\n## ")[0]
        return [line for line in part.splitlines() if line.startswith("| ") and "0.1.0 | now" not in line]

    assert rows("Config fields") == [f"| `{old}` | `{renamed.now}` |" for old, renamed in FIELDS.items()]
    assert rows("Batch fields") == [f"| `{old}` | `{renamed.now}` |" for old, renamed in BATCH_FIELDS.items()]
    assert rows("Behaviors") == [f"| {row.since} | {row.before} | {row.now} |" for row in BEHAVIORS.values()]
