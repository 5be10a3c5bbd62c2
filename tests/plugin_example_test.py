"""The package of docs/plugins.md, a plug-in of each kind: trained with, evaluated, exported, and missed."""

import json
import re
import runpy
import tomllib
from pathlib import Path

import pytest
from etils import epath
from safetensors.numpy import load_file

from mae_jax import plugins
from mae_jax.errors import UserError
from mae_jax.training.workdir import config_of, read_config
from tests.helpers.packages import installed, python
from tests.helpers.tiers import all_slow_but

HERE = Path(__file__).parents[1]
PAGE = (HERE / "docs" / "plugins.md").read_text()  # whose examples these tests install
ENTRY_POINTS = {kind.removeprefix("mae_jax."): f"{name} = {target}" for kind, points in tomllib.loads(
    "".join(re.findall("```toml\n(.+?)```", PAGE, re.DOTALL)))["project"]["entry-points"].items()
    for name, target in points.items()}
MODULES = dict(re.findall(r'```python\n"""(handmade/\w+\.py)"""\n(.+?)```', PAGE, re.DOTALL))
SAYS = "import sys\n\nprint('handmade is being imported', file=sys.stderr)\n"
WAYS = ("entry points", "config.plugins")
RECIPE = """
from mae_jax.config import default, resolve

def get_config(arg=""):
    config = default("echo", plugins={plugins})
    config.batch_size = 16
    config.data.update(source="dark", image_size=(16, 16), color="negative")
    config.model.update(width=16, depth=1, heads=2, patch=(4, 4))
    config.method.update(decoder_width=16, decoder_depth=1, decoder_heads=2)
    config.optim.update(name="signs", warmup="0 steps")
    config.train.duration = "2 steps"
    config.checkpoint.every = config.eval.every = "2 steps"
    config.log.update(every="1 steps", tensorboard=False, sinks=("lines",))
    return resolve(config, arg)
"""


@pytest.fixture(scope="module", params=all_slow_but((), WAYS))
def run(request, tmp_path_factory):
    """The folder of packages, the recipe, the workdir and the output of a run that plug-ins have made."""
    folder = tmp_path_factory.mktemp("plugins")
    by_entry_points = request.param == WAYS[0]
    site = installed(folder / "site", "handmade", ENTRY_POINTS if by_entry_points else {})
    (site / "handmade").mkdir()
    for name, text in {**MODULES, "handmade/__init__.py": SAYS}.items():
        (site / name).write_text(text)
    recipe = folder / "recipe.py"
    recipe.write_text(RECIPE.format(plugins=() if by_entry_points else ("handmade.registered",)))
    done = python(site, "-m", "mae_jax", "train", f"--config={recipe}", f"--workdir={folder / 'run'}")
    return site, recipe, folder / "run", done, request.param


def metrics(workdir: Path) -> dict[str, float]:
    """Returns the last value of each metric of a run."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return {name: value for line in lines for name, value in json.loads(line).items()}


def test_the_page_has_an_example_of_each_kind():
    assert ENTRY_POINTS.keys() == set(plugins.KINDS)
    registered = re.findall(r'register\("(\w+)", "(\w+)", (\S+)\)', MODULES["handmade/registered.py"])
    assert {kind: f"{name} = handmade.{thing.replace('.', ':')}" for kind, name, thing in registered} == ENTRY_POINTS


def test_a_run_trains_with_method_source_optimizer_and_color_policy_of_a_plug_in(run):
    found = metrics(run[2])
    assert 235 < found["train/brightness"] < 245  # made negative
    assert found["eval/brightness"] == pytest.approx(15)  # as they are


def test_an_evaluation_of_a_plug_in_is_measured_and_a_sink_has_all_scalars(run):
    assert metrics(run[2])["eval/feature_scale"] > 0
    written = {(int(step), name): None if value == "nan" else float(value) for step, name, value in
               (line.split(" ") for line in (run[2] / "lines.txt").read_text().splitlines())}
    lines = [json.loads(line) for line in (run[2] / "metrics.jsonl").read_text().splitlines()]
    assert written == {(line["step"], name): pytest.approx(value) for line in lines
                       for name, value in line.items() if name not in ("step", "time")}


def test_a_plug_in_is_printed_before_it_is_imported(run):
    printed = run[3].stderr
    asked = {WAYS[0]: "plug-in: importing handmade.things of the package handmade 0.3, for 'echo' of methods",
             WAYS[1]: "plug-in: importing handmade.registered, which config.plugins names"}[run[4]]
    assert 0 <= printed.index(asked) < printed.index("handmade is being imported")
    assert printed.count("handmade is being imported") == 1


def test_config_json_says_what_the_run_was_made_with(run):
    stored = json.loads((run[2] / "config.json").read_text())
    if run[4] == WAYS[0]:
        assert stored["plugins"] == {f"{kind}.{line.split(' ')[0]}": {"package": "handmade", "version": "0.3"}
                                     for kind, line in ENTRY_POINTS.items() if kind != "layouts"}
        assert stored["config"]["plugins"] == []
    else:
        assert stored["config"]["plugins"] == ["handmade.registered"]


LATER = """
import sys
from mae_jax.commands import cli
from mae_jax.commands.export import weights
from mae_jax.training import loop

workdir, recipe, file, warm = sys.argv[1:]
cli.quiet_logs()
weights.export(workdir, file, "hand")
loop.evaluate(workdir)
sys.path.insert(0, recipe)
from recipe import get_config
config = get_config().unlock()
config.init_from, config.train.duration = file, "1 steps"
loop.train(config, warm)
"""


@pytest.fixture(scope="module")
def later(run):
    """What a process that knows no more than the workdir makes of it: an export, an evaluation and a warm start."""
    site, recipe, workdir, *_ = run
    (workdir / "metrics.jsonl").rename(workdir / "of_training.jsonl")
    file = recipe.parent / "hand.safetensors"
    return file, python(site, "-c", LATER, workdir, recipe.parent, file, recipe.parent / "warm")


@pytest.mark.slow
def test_a_stored_run_is_evaluated(run, later):
    assert metrics(run[2]).keys() == {
        "step", "time", "eval/loss", "eval/brightness", "eval/rankme", "eval/feature_scale"}


@pytest.mark.slow
def test_a_layout_of_a_plug_in_is_written_and_read_where_training_starts_from_it(run, later):
    file, done = later
    assert "made by hand of echo" in done.stdout
    names = load_file(file)
    assert "hand.encoder.block_00.attn.qkv.kernel" in names
    assert all(name.startswith("hand.") for name in names)
    report = next(line for line in done.stderr.splitlines() if line.startswith("init_from "))
    assert re.fullmatch(f"init_from {file}: taken: {len(names)}.*; new: none; left over: none", report)


@pytest.mark.slow
def test_what_is_not_installed_is_named_with_where_it_was_asked_for(run, later, no_plugins):
    """Evaluations and exports of workdirs, warm starts from files, and recipes."""
    workdir, file = run[2], later[0]
    missing = {WAYS[0]: r"method\.name='echo' came from the package handmade 0\.3, which is not installed here",
               WAYS[1]: r"the plug-in handmade\.registered of {} is not installed here"}[run[4]]
    with pytest.raises(UserError, match=missing.format(re.escape(str(workdir / "config.json")))):
        read_config(epath.Path(workdir))
    with pytest.raises(UserError, match=missing.format(re.escape(str(file)))):
        config_of(str(file))
    recipe = runpy.run_path(str(run[1]))["get_config"]
    with pytest.raises(UserError, match=missing.format(r"config\.plugins")):
        recipe()


@pytest.mark.slow
def test_help_shows_the_fields_of_a_plug_ins_method_and_its_layout(run):
    site, recipe, *_ = run
    shown = python(site, "-m", "mae_jax", "export", f"--config={recipe}", "--help").stdout
    assert "  method.weight=2.0" in shown
    layouts = "mae_jax, mae, timm, upernet, hf, stablehlo, detectron2, onnx, hand"
    assert layouts in " ".join(shown.split()) or run[4] == WAYS[1]
