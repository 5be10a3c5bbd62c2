"""Sinks of metrics: TensorBoard, those that a config names, and a run without or with a failing one."""

import errno
import io
import json
import logging
import math
import os
import subprocess
import sys
from typing import ClassVar

import numpy as np
import pytest
from etils import epath
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

from mae_jax.errors import UserError
from mae_jax.storage import metric_sinks
from mae_jax.storage.metric_sinks import Sink
from mae_jax.storage.metric_writer import MetricWriter
from tests.helpers.tiny import tiny_config


def steps(path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_without_tensorboard_one_warning_and_metrics_jsonl_remain(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto", None)
    monkeypatch.delitem(sys.modules, "tensorflow", raising=False)
    with caplog.at_level(logging.WARNING, "mae_jax"):
        recorder = MetricWriter(epath.Path(tmp_path), 0, sinks=("pictures", "tensorboard"))
        recorder.write_scalars(1, {"train/loss": 1.0})
        recorder.write_image(1, "reconstruct", np.full((2, 3, 3), 7, np.uint8))
        recorder.close()
    assert [record.message.split(":")[0] for record in caplog.records] == ["no TensorBoard events from here on"]
    assert steps(tmp_path / "metrics.jsonl") == [1]
    with Image.open(tmp_path / "pictures" / "reconstruct_0000001.png") as picture:
        np.testing.assert_array_equal(np.asarray(picture), np.full((2, 3, 3), 7))


@pytest.mark.parametrize("tensorflow", [False, True])
def test_tensorboard_reads_scalars_and_images_back_with_and_without_tensorflow(tmp_path, tensorflow):
    code = f"""
import sys
if {tensorflow}:
    import mae_jax.data.tensorflow_cpu
else:
    sys.modules["tensorflow"] = sys.modules["clu"] = None
import numpy as np
from etils import epath
from mae_jax.storage.tensorboard import TensorBoard
sink = TensorBoard()
sink.open(epath.Path({str(tmp_path)!r}), 0)
sink.write_scalars(3, {{"train/loss": 0.5, "train/lr": float("nan")}})
sink.write_image(4, "attention", np.full((5, 7, 3), 9, np.uint8))
sink.flush()
sink.write_scalars(5, {{"train/loss": 0.25}})
sink.close()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    found = EventAccumulator(str(tmp_path / "tensorboard"), {"tensors": 0, "scalars": 0, "images": 0})
    found.Reload()
    tags = found.Tags()
    if tensorflow:
        losses = [(each.step, float(make_ndarray(each.tensor_proto))) for each in found.Tensors("train/loss")]
        image = make_ndarray(found.Tensors("attention")[0].tensor_proto)[2]
    else:
        losses = [(each.step, each.value) for each in found.Scalars("train/loss")]
        assert found.Images("attention")[0].step == 4
        image = found.Images("attention")[0].encoded_image_string
    assert losses == [(3, 0.5), (5, 0.25)]
    assert {"train/loss", "train/lr"} <= {*tags["scalars"], *tags["tensors"]}
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(image))), np.full((5, 7, 3), 9))


def test_tensorboard_on_a_full_disk_is_one_warning_and_the_rest_goes_on(tmp_path, caplog):
    recorder = MetricWriter(epath.Path(tmp_path), 0, sinks=("pictures", "tensorboard"))

    class Full:
        def __getattr__(self, name):
            return full

    recorder.sinks["tensorboard"].writer.close()
    recorder.sinks["tensorboard"].writer = Full()
    with caplog.at_level(logging.WARNING, "mae_jax"):
        for step in (1, 2):
            recorder.write_scalars(step, {"train/loss": 1.0})
            recorder.write_image(step, "reconstruct", np.zeros((2, 2, 3), np.uint8))
        recorder.close()
    assert [record.message for record in caplog.records] == [
        "no TensorBoard events from here on: [Errno 28] No space left on device"]
    assert steps(tmp_path / "metrics.jsonl") == [1, 2]


class Listing(Sink):
    """A sink as somebody would add it; what it was told is kept in `told`."""

    what = "listings"
    told: ClassVar[list[tuple]] = []
    failing = ""

    def __getattribute__(self, method):
        if method not in ("open", "write_scalars", "write_image", "flush", "close"):
            return super().__getattribute__(method)

        def call(*args):
            if method == self.failing:
                raise ConnectionError("the server is\nout of reach")
            self.told.append((method, *args))

        return call


@pytest.fixture
def listing(monkeypatch):
    monkeypatch.setitem(metric_sinks.SINKS, "listing", f"{__name__}:Listing")
    monkeypatch.setattr(Listing, "told", [])
    return Listing


def test_a_sink_that_the_config_names_is_told_everything_and_closed(tmp_path, listing):
    config = tiny_config({"log.sinks": ("listing",)})
    recorder = MetricWriter(epath.Path(tmp_path), 3, metric_sinks.names(config.log))
    image = np.zeros((2, 2, 3), np.uint8)
    recorder.write_scalars(4, {"train/loss": math.nan})
    recorder.write_image(4, "reconstruct", image)
    recorder.flush()
    recorder.close()
    assert listing.told == [("open", epath.Path(tmp_path), 3), ("write_scalars", 4, {"train/loss": pytest.approx(
        math.nan, nan_ok=True)}), ("write_image", 4, "reconstruct", image), ("flush",), ("close",)]
    assert (tmp_path / "pictures" / "reconstruct_0000004.png").exists()
    other = MetricWriter(epath.Path(tmp_path), 3, metric_sinks.names(config.log), active=False)
    other.write_scalars(5, {"train/loss": 1.0})
    assert len(listing.told) == 5


@pytest.mark.parametrize("failing", ["open", "write_scalars", "write_image", "flush", "close"])
def test_a_sink_that_fails_is_one_warning_and_the_others_go_on(tmp_path, monkeypatch, caplog, listing, failing):
    monkeypatch.setattr(listing, "failing", failing)
    with caplog.at_level(logging.WARNING, "mae_jax"):
        recorder = MetricWriter(epath.Path(tmp_path), 0, ("listing", "pictures"))
        for step in (1, 2):
            recorder.write_scalars(step, {"train/loss": 1.0})
            recorder.write_image(step, "reconstruct", np.zeros((2, 2, 3), np.uint8))
            recorder.flush()
        recorder.close()
    assert [record.message for record in caplog.records] == ["no listings from here on: the server is"]
    assert "listing" not in recorder.sinks
    assert steps(tmp_path / "metrics.jsonl") == [1, 2]
    assert len(list((tmp_path / "pictures").iterdir())) == 2


def test_a_sink_that_cannot_be_made_is_one_warning_and_the_others_go_on(tmp_path, monkeypatch, caplog, listing):
    def refuses(self):
        raise RuntimeError("no account of yours\nat all")

    monkeypatch.setattr(listing, "__init__", refuses)
    with caplog.at_level(logging.WARNING, "mae_jax"):
        recorder = MetricWriter(epath.Path(tmp_path), 0, ("listing", "pictures"))
    assert [record.message for record in caplog.records] == ["no listings from here on: no account of yours"]
    assert list(recorder.sinks) == ["pictures"]


def test_the_sinks_of_a_config_are_the_pictures_tensorboard_and_those_that_it_names(listing):
    assert metric_sinks.names(tiny_config({"log.tensorboard": True}).log) == ("pictures", "tensorboard")
    assert metric_sinks.names(tiny_config({"log.sinks": ("listing", "pictures")}).log) == ("pictures", "listing")
    with pytest.raises(UserError, match=r"log\.sinks 'listng'; did you mean 'listing'"):
        tiny_config({"log.sinks": ("listng",)})


def test_tensorboard_shows_a_runs_fields_and_metrics_in_its_tab_of_hyper_parameters(tmp_path):
    from tensorboard.backend.event_processing import data_provider, plugin_event_multiplexer
    from tensorboard.context import RequestContext
    from tensorboard.plugins import base_plugin
    from tensorboard.plugins.hparams import api_pb2, backend_context, list_session_groups

    for name, rate, loss in (("one", 0.05, 0.5), ("two", 0.5, 0.25)):
        writer = MetricWriter(epath.Path(tmp_path) / name, 0, ("tensorboard",))
        writer.write_config(tiny_config({"optim.lr": rate}))
        writer.write_scalars(3, {"eval/loss": loss})
        writer.close()
    files = plugin_event_multiplexer.EventMultiplexer().AddRunsFromDirectory(str(tmp_path))
    files.Reload()
    about = base_plugin.TBContext(logdir=str(tmp_path), multiplexer=files,
                                  data_provider=data_provider.MultiplexerDataProvider(files, str(tmp_path)))
    context, request = backend_context.Context(about), RequestContext()
    found = context.hparams_metadata(request, "")
    experiment = context.experiment_from_metadata(request, "", True, found, [])
    fields = {info.name: info for info in experiment.hparam_infos}
    assert fields["optim.lr"].differs
    assert not fields["seed"].differs
    assert fields["method.name"].domain_discrete.values[0].string_value == "mae"
    assert [info.name.tag for info in experiment.metric_infos] == ["eval/loss"]
    asked = api_pb2.ListSessionGroupsRequest(start_index=0, slice_size=9, allowed_statuses=[
        api_pb2.STATUS_UNKNOWN, api_pb2.STATUS_RUNNING], include_metrics=True)
    groups = list_session_groups.Handler(request, context, "", asked).run().session_groups
    shown = {group.hparams["optim.lr"].number_value: group.metric_values[0].value for group in groups}
    assert shown == {0.05: 0.5, 0.5: 0.25}
