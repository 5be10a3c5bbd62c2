"""The last lines of a run: each command that they name is one that the command line takes, and that works."""

import json
import shlex
import subprocess
import sys
from types import SimpleNamespace

import pytest
from etils import epath

from mae_jax.training import loop, next_steps
from tests.helpers.stored import store_images
from tests.helpers.tiny import tiny_config, tiny_method, tiny_segment, tiny_supervised

# Parses each command line as the program would, up to where it would begin, in a process of its own.
PARSER = """
import json, os, sys
from absl import flags
from mae_jax import __main__, config
from mae_jax.commands import cli

def begun(command):
    if "config" in flags.FLAGS and flags.FLAGS.config is not None:
        config.validate(flags.FLAGS.config)
    return 0

cli.guarded = begun
for words in json.load(sys.stdin):
    child = os.fork()
    if not child:
        sys.argv = words
        __main__.main()
        os._exit(9)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(code, flush=True)
"""


def run_of(config, workdir="/runs/a run's", classes=("a", "b", "c"), method=None):
    return SimpleNamespace(config=config, workdir=epath.Path(workdir), inputs=SimpleNamespace(classes=classes),
                           program=SimpleNamespace(method=method or tiny_method(config)))


RUNS = {
    "pretraining": run_of(tiny_config()),
    "folder": run_of(tiny_config({"data.source": "folder", "data.path": "/my images", "data.layout": "classes"})),
    "tfds": run_of(tiny_config({"data.source": "tfds", "data.name": "mnist:3.*.*", "data.exif": "ignore"})),
    "table": run_of(tiny_config({"data.source": "table", "data.path": "/a.csv", "data.label_key": "kind"})),
    "unlabeled": run_of(tiny_config(), classes=()),
    "mixture": run_of(tiny_config(), method=SimpleNamespace(task="pretraining", extra_encode_fields=("cluster",))),
    "batches": run_of(tiny_config({"data.source": "batches", "data.path": "/cached"})),
    "classification": run_of(tiny_supervised()),
    "segmentation": run_of(tiny_segment()),
    "detection": run_of(tiny_config(method="detection")),
}
VERBS = {
    "pretraining": ["report", "embed", "train"], "folder": ["report", "embed", "train"],
    "tfds": ["report", "embed", "train"], "table": ["report", "embed", "train"], "unlabeled": ["report", "embed"],
    "mixture": ["report", "export"], "batches": ["report"], "classification": ["report", "predict", "export"],
    "segmentation": ["report", "predict"], "detection": ["report", "predict"],
}


def test_every_command_parses_as_it_is_pasted():
    lines = {name: next_steps.commands(run, best=True) for name, run in RUNS.items()}
    words = [shlex.split(line) for line in sorted({line for each in lines.values() for line in each})]
    assert all(each[0] == "mae_jax" for each in words)
    mistakes = [["mae_jax", "embed", "--from=a", "--two=b"], ["mae_jax", "train", "--config=nowhere", "--workdir=a"]]
    done = subprocess.run([sys.executable, "-c", PARSER], input=json.dumps(words + mistakes), capture_output=True,
                          text=True, timeout=120)
    codes = done.stdout.split()
    assert codes == ["0"] * len(words) + ["2", "2"], done.stderr
    assert {name: [shlex.split(line)[1] for line in each] for name, each in lines.items()} == VERBS


def test_the_best_checkpoint_is_the_one_that_is_used_and_the_same_images_are_named():
    best = next_steps.commands(RUNS["folder"], best=True)
    assert "--from='/runs/a run'\"'\"'s/best'" in best[1]
    assert "--from='/runs/a run'\"'\"'s' " in best[0]  # the report is of the run
    flags = shlex.split(best[2])[2:]
    assert flags == ["--config=folder_finetune", "--config.data.path=/my images", "--config.data.layout=classes",
                     "--config.data.image_size=(16, 16)", "--config.init_from=/runs/a run's/best",
                     "--workdir=/runs/a run's_finetuned"]
    voted = shlex.split(next_steps.commands(RUNS["mixture"], best=True)[1])
    assert "--config=folder" in voted  # --for-task needs images
    said = next_steps.lines(RUNS["folder"], 1200, best_step=900)
    assert said[0].endswith("checkpoints, the last of step 1,200, the best of step 900 in /runs/a run's/best")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_what_a_run_says_at_its_end_can_be_pasted_and_works(tmp_path, capsys):
    store_images(tmp_path / "data", count=12)
    workdir = tmp_path / "a run"
    config = tiny_config({"data.source": "folder", "data.path": str(tmp_path / "data"), "train.duration": "2 steps",
                          "eval.every": "1 steps"})
    assert loop.train(config, str(workdir)) == 0
    said = capsys.readouterr().out.splitlines()
    assert sum("labels, names the class of" in line for line in said[said.index("next:") - 3:]) == 1
    small = " --config.train.duration='2 steps' --config.batch_size=8 --config.optim.warmup='1 steps'"
    tuned = pasted(said, ["report", "embed", "train"], small)
    assert (workdir / "report.html").is_file()
    assert (workdir / "features.parquet").is_file()
    assert (workdir / "pictures" / "curves_0000002.png").is_file()
    assert (workdir / "parameters.txt").read_text().splitlines()[-1].endswith(" parameters")
    pasted(tuned.splitlines(), ["report", "predict", "export"])
    tuned = tmp_path / "a run_finetuned"
    assert (tuned / "DONE").is_file()
    assert list((tuned / "pictures").glob("confusion_*.png"))
    assert (tuned / "predictions.csv").is_file()
    assert (tmp_path / "a run_finetuned_export" / "model.safetensors").is_file()


def pasted(said, verbs, small=""):
    """Runs the commands at the end of what a run said; returns what the last one says. `small`: added to `train`."""
    commands = [line.strip() for line in said[said.index("next:") + 1:]]
    assert [line.split()[1] for line in commands] == verbs
    for line in commands:
        line = f"{shlex.quote(sys.executable)} -m {line}" + small * (" train " in line)
        done = subprocess.run(line, shell=True, capture_output=True, text=True, timeout=250)
        assert done.returncode == 0, done.stderr
    return done.stdout
