"""How plug-ins are found, by entry points and by config.plugins; what is recorded of them, and what is refused."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from etils import epath
from safetensors.numpy import save_file

from mae_jax import errors, methods, plugins
from mae_jax.config import OPTIMIZERS, default, for_platform, resolve, validate
from mae_jax.config.field_values import check_types
from mae_jax.data import ASSUMED, PatchOrder
from mae_jax.data.sources import registry
from mae_jax.data.sources.base import Source
from mae_jax.data.transforms import color
from mae_jax.errors import UserError
from mae_jax.evals.evaluator import EVALUATIONS
from mae_jax.interop import layouts
from mae_jax.methods.mae import MAE
from mae_jax.storage import metric_sinks
from mae_jax.training import loop, train_step, workdir
from mae_jax.training.workdir import config_of, read_config
from tests.helpers.packages import installed, python
from tests.helpers.tiny import open_inputs, tiny_config

HERE = Path(__file__).parents[1]


def test_a_run_without_an_evaluation_that_it_had_does_not_go_on_and_is_evaluated_with_a_warning(tmp_path, caplog):
    config = tiny_config({"data.source": "photo_crops", "data.range": "0,65535"})
    workdir.record(epath.Path(tmp_path), config)
    stored = json.loads((tmp_path / "config.json").read_text())
    stored["plugins"] = {"evaluations.gone": {"package": "handmade", "version": "0.3"}}
    (tmp_path / "config.json").write_text(json.dumps(stored))
    says = r"the evaluation 'gone' came from the package handmade 0\.3, which does not give it here"
    with pytest.raises(UserError, match=says):
        loop.train(config, str(tmp_path))
    with caplog.at_level("WARNING", "mae_jax"), pytest.raises(UserError, match="has no checkpoint"):
        loop.evaluate(str(tmp_path))
    assert re.search(says, caplog.text)


def test_a_file_in_a_layout_that_is_missing_is_refused_naming_its_package(tmp_path, no_plugins):
    said = workdir.metadata(tiny_config()) | {"plugins": json.dumps(
        {"layouts.hand": {"package": "handmade", "version": "0.3"}})}
    save_file({"x": np.zeros(1)}, tmp_path / "x.safetensors", said)
    with pytest.raises(UserError, match=r"x\.safetensors: its layout 'hand' came from the package handmade 0\.3"):
        config_of(str(tmp_path / "x.safetensors"))


def test_what_a_config_names_is_recorded_and_not_what_other_runs_of_the_process_used(site, tmp_path):
    installed(site, "many", {"optimizers": "other = json:dumps", "color_policies": "bright = builtins:abs"})
    for name in ("bright", "none"):
        folder = tmp_path / name
        workdir.record(epath.Path(folder), tiny_config({"data.color": name}))
        stored = json.loads((folder / "config.json").read_text())
        assert list(stored.get("plugins", ())) == ["color_policies.bright"] * (name == "bright")
        read_config(epath.Path(folder))
        assert list(plugins._recorded) == list(stored.get("plugins", ()))


@pytest.mark.parametrize("odd", [[], 3, {"methods.x": "handmade"}, {"methods.x": {"package": "handmade"}}, None])
def test_an_odd_record_of_plug_ins_is_a_damaged_file(tmp_path, odd, no_plugins):
    workdir.record(epath.Path(tmp_path), tiny_config())
    stored = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(stored | {"plugins": odd}))
    save_file({"x": np.zeros(1)}, tmp_path / "x.safetensors", workdir.metadata(tiny_config()) | {
        "plugins": json.dumps(odd)})
    with pytest.raises(UserError, match=r"config\.json is damaged"):
        read_config(epath.Path(tmp_path))
    with pytest.raises(UserError, match=r"x\.safetensors is not a file of weights, or damaged"):
        config_of(str(tmp_path / "x.safetensors"))


@pytest.mark.parametrize("name", [
    "./evil", "/tmp/evil.py", "evil/module", "https://example.org/evil", ".evil", "evil.", "", "evil.py:x", "a b", 3])
def test_only_names_of_modules_are_imported(no_plugins, name, capsys):
    with pytest.raises(UserError, match=re.escape(f"plugins={name!r} of config.plugins")):
        plugins.load((name,))
    assert capsys.readouterr() == ("", "")


def test_the_field_is_a_tuple_and_is_refused_on_the_command_line_too(no_plugins):
    with pytest.raises(UserError, match=r"plugins='\./evil'"):
        plugins.load("./evil")
    done = python(None, "-m", "mae_jax", "train", "--config=quickstart", "--workdir=never",
                  "--config.plugins=('./evil',)", code=errors.MISTAKE)
    assert done.stderr.startswith("error: plugins='./evil' of --config: expected the name of an installed module")


PAYLOAD = "from pathlib import Path\n\nPath('{}').touch()\n"
READ = """
import sys
from mae_jax import errors
from mae_jax.training import loop, train_step, workdir
from mae_jax.training.workdir import config_of

try:
    config_of(sys.argv[1])
except errors.UserError as error:
    print(error)
"""


def reading(place: Path, name: str, cwd: Path, path: str = "") -> str:
    """Stores a config that names a plug-in and returns what reading it in a folder says, which is on Python's path."""
    config = json.dumps({**default().to_dict(), "plugins": (name,)})
    if place.suffix:
        save_file({"x": np.zeros(1)}, place, {"config": config})
    else:
        (place / "config.json").write_text(f'{{"config": {config}}}')
    done = subprocess.run([sys.executable, "-c", READ, place], cwd=cwd, capture_output=True, text=True, timeout=300,
                          env=os.environ | {"PYTHONPATH": os.pathsep.join((path, str(HERE))), "JAX_PLATFORMS": "cpu"})
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("file", ["", "weights.safetensors"])
@pytest.mark.parametrize("package", [False, True])
def test_what_is_stored_makes_nobody_import_out_of_the_current_folder(tmp_path, file, package):
    theirs = tmp_path / "runs" / "theirs"
    theirs.mkdir(parents=True)
    (theirs / "payload.py").write_text(PAYLOAD.format(tmp_path / "done"))
    for folder in (theirs, theirs.parent) if package else ():
        (folder / "__init__.py").write_text(PAYLOAD.format(tmp_path / "done"))
    said = reading(theirs / file, "runs.theirs.payload", tmp_path)
    assert not (tmp_path / "done").exists()
    assert said.startswith(f"{theirs / (file or 'config.json')} names the plug-in runs.theirs.payload, which is not "
                           "imported, since ")
    assert ("lies below the current folder and is of no installed package" if package else
            "runs is a folder without __init__.py") in said
    assert """or name it yourself with --config.plugins='("runs.theirs.payload",)' or in the recipe""" in said
    assert said.count("\n") == 1


@pytest.mark.slow
def test_what_is_stored_may_name_what_is_on_pythonpath_but_nothing_in_its_own_folder(tmp_path):
    for name in ("theirs", "own"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(PAYLOAD.format(tmp_path / name / "done"))
    assert "lies beside what names it" in reading(tmp_path / "theirs", "theirs", tmp_path, str(tmp_path))
    assert not (tmp_path / "theirs" / "done").exists()
    assert reading(tmp_path / "theirs", "own", tmp_path, str(tmp_path)) == ""
    assert (tmp_path / "own" / "done").exists()


def test_what_is_stored_may_name_what_is_installed_as_editable_or_with_the_virtual_environment_below(
        tmp_path, monkeypatch, no_plugins):
    places = [str(tmp_path / ".venv" / "site-packages")]
    monkeypatch.setattr(plugins, "_places", lambda: places)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.syspath_prepend(places[0])
    info = installed(Path(places[0]), "lively", {"layouts": "x = lively:x"}) / "lively-0.3.dist-info"
    (Path(places[0]) / "settled.py").write_text("")
    for name in ("lively", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("")
    plugins.load(("settled",), "x", stored=str(tmp_path / "runs"))
    with pytest.raises(UserError, match="lies below the current folder"):
        plugins.load(("lively",), "x", stored=str(tmp_path / "runs"))
    (info / "direct_url.json").write_text(json.dumps({"url": tmp_path.as_uri(), "dir_info": {"editable": True}}))
    plugins.load(("lively",), "x", stored=str(tmp_path / "runs"))
    with pytest.raises(UserError, match="lies below the current folder"):
        plugins.load(("other",), "x", stored=str(tmp_path / "runs"))
    plugins.load(("other",), "config.plugins")  # named by the user


def test_a_module_that_fails_is_named_with_its_error_and_the_place(site):
    (site / "broken.py").write_text("import json\n\njson.loads('{')\n")
    with pytest.raises(UserError, match=r"the plug-in broken of config\.plugins fails when imported: JSONDecodeError: "
                       r"Expecting property name.*decoder\.py, line \d+\); python -c 'import broken'") as caught:
        default(plugins=("broken",))
    assert isinstance(caught.value.__cause__, json.JSONDecodeError)
    assert errors.explain(caught.value)[1].count("\n") == 0


def test_a_module_that_ends_the_process_is_named(site):
    (site / "script.py").write_text("raise SystemExit(0)\n")
    with pytest.raises(UserError, match=r"the plug-in script of x fails when imported: SystemExit: 0"):
        plugins.load(("script",), "x")


def test_a_module_that_lacks_a_package_is_not_taken_for_a_missing_one(site):
    (site / "wanting.py").write_text("import no_such_package\n")
    with pytest.raises(UserError, match=r"wanting of x fails when imported: ModuleNotFoundError.*no_such_package"):
        plugins.load(("wanting",), "x")
    with pytest.raises(UserError, match=r"absent\.module of x is not installed here: there is no module 'absent'"):
        plugins.load(("absent.module",), "x")


def test_what_is_built_in_keeps_its_name(site):
    (site / "greedy.py").write_text("from mae_jax.plugins import register\nregister('methods', 'mae', object)\n")
    with pytest.raises(UserError, match=r"methods: the plug-in greedy gives 'mae', which is built in"):
        validate(default(plugins=("greedy",)))


def test_an_entry_point_does_not_take_the_place_of_what_is_built_in(site):
    installed(site, "greedy", {"methods": "mae = greedy:MAE"}, "1.0")
    with pytest.raises(UserError, match=r"the package greedy 1\.0 gives 'mae', which is built in"):
        plugins.find("methods", "mae", {"mae": "mae_jax.methods.mae:MAE"}, "method.name")
    assert plugins.find("methods", "other", {"other": 3}, "method.name") == 3  # what nobody asked for breaks nothing


def test_a_name_that_two_packages_give_is_refused_naming_both(site):
    for name in ("one", "two"):
        installed(site, name, {"sources": f"shared = {name}:load"}, "1.0")
    with pytest.raises(UserError, match=r"'shared' is given by the package (one|two) 1\.0 and the package (one|two) 1"):
        plugins.find("sources", "shared", {}, "data.source")


def test_a_name_that_two_modules_register_is_refused_naming_both(site):
    for name in ("first", "second"):
        (site / f"{name}.py").write_text("from mae_jax import plugins\nplugins.register('layouts', 'same', object)\n")
    with pytest.raises(UserError, match=r"second of .*'same' is given by two plug-ins, first and second"):
        plugins.load(("first", "second"))


def test_an_unknown_kind_names_the_nearest(no_plugins):
    with pytest.raises(UserError, match="'method'; did you mean 'methods'"):
        plugins.register("method", "x", object)


def test_an_entry_point_that_names_nothing_is_named(site):
    installed(site, "hollow", {"layouts": "hollow = json:nothing"})
    with pytest.raises(UserError, match=r"the package hollow 0\.3 names json:nothing.*there is no 'nothing'"):
        plugins.find("layouts", "hollow", {}, "--layout")


@pytest.mark.parametrize(("kind", "value", "says"), [
    ("methods", abs, r"of the type builtin_function_or_method; expected a subclass of mae_jax\.methods\.base\.Method"),
    ("methods", dict, "the class dict; expected a subclass of"),
    ("sources", 3, "of the type int; expected a function, or a module with a function load$"),
    ("sources", errors, "of the type module; expected a function"),
    ("optimizers", abs, r"of the type .*; expected an instance of mae_jax\.training\.optim\.Rule"),
    ("evaluations", dict, "the class dict; expected a subclass or an instance of"),
    ("color_policies", 3, "of the type int; expected a function, or an instance of"),
    ("layouts", abs, ".*; expected an instance of"),
    ("metric_sinks", abs, ".*; expected a subclass of"),
])
def test_what_is_nothing_of_its_kind_is_refused_naming_who_gives_it(no_plugins, kind, value, says):
    plugins.register(kind, "odd", value)
    with pytest.raises(UserError, match=rf"{kind}: what the plug-in {__name__} gives as 'odd' is {says}"):
        plugins.find(kind, "odd", {}, "x")


def test_all_that_is_built_in_is_of_its_kind():
    """The classes are known by their names, which this notices to have changed."""
    built_in = {"methods": methods.TABLE, "sources": registry.MODULES, "optimizers": OPTIMIZERS,
                "color_policies": color.COLOR_POLICIES, "layouts": layouts.LAYOUTS, "metric_sinks": metric_sinks.SINKS,
                "evaluations": {each.name: each for each in EVALUATIONS}}
    assert built_in.keys() == plugins.KINDS.keys()
    for kind, known in built_in.items():
        table = plugins.table(kind, known)
        assert all(plugins.fits(kind, table[name]) for name in known), kind


def test_an_entry_point_of_another_kind_is_refused_naming_its_package(site):
    installed(site, "odd", {"layouts": "odd = json:dumps"})
    with pytest.raises(UserError, match=r"layouts: what the package odd 0\.3 gives as 'odd' is of the type function"):
        plugins.find("layouts", "odd", {}, "--layout")


def test_what_is_registered_as_a_string_is_imported_as_an_entry_point_is(site):
    (site / "broken.py").write_text("[][0]\n")
    for value, says in (("broken:X", "fails when imported: IndexError.*broken.py, line 1"),
                        ("no_such:X", "is not installed here: there is no module 'no_such'"),
                        ("json:nothing", "is json:nothing; there is no 'nothing'")):
        plugins.register("sources", value, value)
        with pytest.raises(UserError, match=f"{value!r} of sources, which the plug-in {__name__} gives, {says}"):
            plugins.find("sources", value, {}, "data.source")
    plugins.register("sources", "json", "json")
    assert plugins.find("sources", "json", {}, "data.source") is json


def test_what_a_package_registers_as_a_string_and_names_as_an_entry_point_is_one_thing(site):
    for name in ("both", "other"):
        installed(site, name, {"sources": f"{name} = json:loads"})
    plugins.register("sources", "both", "json:loads")
    plugins.register("sources", "other", "json:dumps")
    assert plugins.find("sources", "both", {}, "data.source") is json.loads
    with pytest.raises(UserError, match=r"'other' is given by the plug-in .* and by the package other 0\.3"):
        plugins.find("sources", "other", {}, "data.source")


def test_a_source_that_opens_nothing_that_can_be_read_is_refused(no_plugins):
    plugins.register("sources", "odd", lambda data, split: [1, 2])
    with pytest.raises(UserError, match=r"data\.source='odd' opened 'train' as list; expected a Source"):
        registry.load(tiny_config({"data.source": "odd"}).data, "train")


def test_a_source_may_be_of_a_class_derived_from_ours(no_plugins):
    class Own(Source):
        pass

    crops = tiny_config({"data.source": "photo_crops"}).data
    plugins.register("sources", "own", lambda data, split: Own(**vars(registry.load(crops, split.name))))
    inputs = open_inputs(tiny_config({"data.source": "own"}))
    assert next(inputs.train(0))["valid"].all()
    assert next(inputs.evaluate())["valid"].all()


def test_the_rows_that_stay_together_are_those_of_the_plug_ins_patch_order(no_plugins):
    class Mixes(MAE):
        def patch_order(self):
            return PatchOrder("random", self.grid.shape, self.num_masked, group=4)

    plugins.register("methods", "mixes", Mixes)
    config = default("mixes")
    config.batch_size = 6
    with pytest.raises(UserError, match=r"batch_size=6\b.*\b4 images that mixes mixes"):
        train_step.build(for_platform(config, "cpu"), ASSUMED)


def test_runlocal_makes_of_a_plug_ins_fields_what_the_plug_in_says(no_plugins):
    class Echo(MAE):
        defaults = {**MAE.defaults, "masked": 0.5, "width": 512}
        small = {"width": 16}

    plugins.register("methods", "echo", Echo)
    config = resolve(default("echo"), "runlocal")
    assert (config.method.masked, config.method.width) == (0.5, 16)


def test_unknown_names_are_answered_with_the_nearest_of_a_plug_in_too(no_plugins):
    plugins.register("color_policies", "negative", abs)
    with pytest.raises(UserError, match=r"unknown data\.color 'negativ'; did you mean 'negative'"):
        tiny_config({"data.color": "negativ"})


def test_a_field_of_a_plug_ins_method_may_be_an_empty_tuple_that_holds_anything(no_plugins):
    class Echo(MAE):
        defaults = {**MAE.defaults, "extra": ()}

    plugins.register("methods", "echo", Echo)
    for value in ((), ("a",), (1, 2.5)):
        config = default("echo").unlock()
        config.method.extra = value
        validate(config)
    with pytest.raises(UserError, match=r"method\.extra='x'; expected values such as \('value',\)"):
        check_types({"method.extra": "x"}, {"method.extra": []})


def test_a_bug_in_a_plug_in_is_not_taken_for_ours(site):
    (site / "buggy.py").write_text("def fails():\n    return [][0]\n")
    plugins.load(("buggy",))
    with pytest.raises(IndexError) as caught:
        sys.modules["buggy"].fails()
    code, text = errors.explain(caught.value)
    assert code == errors.BUG
    assert text.endswith("this is a bug in the plug-in buggy, not in mae_jax")
    assert 'buggy.py", line 2' in text
