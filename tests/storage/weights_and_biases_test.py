"""The sink of Weights & Biases against a stand-in; `check_wandb.py` beside it is the same against the package."""

import secrets
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from etils import epath

from mae_jax.storage import weights_and_biases
from mae_jax.storage.metric_writer import MetricWriter
from mae_jax.storage.weights_and_biases import OFFLINE
from tests.helpers.tiny import tiny_config


class FakeRun:
    """A run that records what it is told."""

    def __init__(self, **how):
        self.how, self.logged, self.fields, self.finished = how, [], {}, False
        self.config = SimpleNamespace(update=lambda fields, allow_val_change: self.fields.update(fields))
        self.define_metric = lambda name, step_metric: self.logged.append((name, step_metric))

    def log(self, values):
        self.logged.append(values)

    def finish(self):
        self.finished = True


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for the package; `made` are the runs."""
    made = []

    def init(**how):
        made.append(FakeRun(**how))
        return made[-1]

    fake = SimpleNamespace(
        made=made, init=init, login=lambda prompt: prompt, Settings=lambda **how: how,
        Image=lambda image, caption: (image.shape, caption))
    monkeypatch.setattr(secrets, "token_hex", lambda _: f"id{len(made)}")
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setenv("WANDB_MODE", "offline")
    return fake


def opened(tmp_path, step=0):
    return MetricWriter(epath.Path(tmp_path) / "run", step, ("wandb",))


def test_a_run_has_one_id_over_its_restarts_and_gets_config_figures_and_images(tmp_path, wandb):
    (tmp_path / "run").mkdir()
    for step in (0, 10):
        writer = opened(tmp_path, step)
        writer.write_config(tiny_config())
        writer.write_scalars(step + 5, {"train/loss": 0.5})
        writer.write_image(step + 5, "reconstruct", np.zeros((4, 6, 3), np.uint8))
        writer.close()
    first, second = wandb.made
    assert first.how["id"] == second.how["id"] == "id0"
    assert (first.how["resume"], first.how["name"]) == ("allow", "run")
    assert first.fields["optim.lr"] == 0.05
    assert first.fields["data.image_size"] == "(16, 16)"
    assert first.logged == [("*", "step"), {"step": 5, "train/loss": 0.5},
                            {"step": 5, "figures/reconstruct": ((4, 6, 3), "reconstruct, step 5")}]
    assert second.finished


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"id": 3}'])
def test_a_damaged_id_is_made_anew(tmp_path, wandb, text):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "wandb.json").write_bytes(text)
    opened(tmp_path)
    assert wandb.made[0].how["id"] == "id0"
    assert (tmp_path / "run" / "wandb.json").read_text() == '{"id": "id0"}\n'


def test_without_the_package_or_a_key_one_line_says_what_to_do(tmp_path, wandb, monkeypatch, caplog):
    monkeypatch.delenv("WANDB_MODE")
    assert not opened(tmp_path).sinks
    assert "no Weights & Biases from here on: there is no API key: run 'wandb login'" in caplog.text
    monkeypatch.setitem(sys.modules, "wandb", None)
    caplog.clear()
    assert not opened(tmp_path).sinks
    assert len(caplog.records) == 1
    assert "pip install 'mae_jax[wandb]'" in caplog.text
    assert "online" not in OFFLINE


@pytest.mark.parametrize("error", [RuntimeError("the service is gone\nmore"), SystemExit(1), BrokenPipeError()])
def test_a_crash_of_it_is_one_line_and_the_run_goes_on(tmp_path, wandb, caplog, error):
    (tmp_path / "run").mkdir()
    writer = opened(tmp_path)

    def crash(_):
        raise error

    wandb.made[0].log = crash
    writer.write_scalars(1, {"train/loss": 1.0})
    writer.write_scalars(2, {"train/loss": 1.0})
    writer.close()
    assert len(caplog.records) == 1
    assert "no Weights & Biases from here on" in caplog.text
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count("\n") == 2


def test_an_end_that_does_not_come_is_not_waited_for(tmp_path, wandb, monkeypatch, caplog):
    (tmp_path / "run").mkdir()
    monkeypatch.setattr(weights_and_biases, "CLOSE_SECONDS", 0.01)
    writer = opened(tmp_path)
    wandb.made[0].finish = lambda: time.sleep(0.2)
    writer.close()
    assert "not everything was sent in 0.01 s" in caplog.text
