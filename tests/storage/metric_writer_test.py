"""Means, metrics.jsonl under kills and full disks, and life without TensorBoard."""

import io
import json
import logging
import math
import os
import subprocess
import sys
import time
from typing import ClassVar

import numpy as np
import pytest
from etils import epath
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

from mae_jax.errors import UserError
from mae_jax.evals.accumulators import Means
from mae_jax.storage import gcs as storage_gcs
from mae_jax.storage import metric_sinks, metric_writer, tail, workdir_lock
from mae_jax.storage.metric_sinks import Sink
from mae_jax.storage.metric_writer import JsonLines, MetricWriter
from tests.helpers.tiny import tiny_config


def rows(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def steps(path) -> list[int]:
    return [row["step"] for row in rows(path)]


@pytest.fixture
def path(tmp_path):
    return epath.Path(tmp_path) / "metrics.jsonl"


def test_means_are_weighted_and_start_anew():
    means = Means()
    means.add({"loss": (6.0, 3.0), "lr": (0.5, 1.0)})
    means.add({"loss": (2.0, 1.0), "empty": (0.0, 0.0)})
    out = means.pop("train/")
    assert out["train/loss"] == 2
    assert out["train/lr"] == 0.5
    assert math.isnan(out["train/empty"])
    assert means.pop() == {}


def test_a_resume_cuts_the_lines_past_the_restored_step(path):
    lines = JsonLines(path, 0)
    for step in (10, 20, 30):
        lines.write(step, {"train/loss": step / 10})
    resumed = JsonLines(path, 20)
    assert steps(path) == [10, 20]
    assert (20, "train/loss") in resumed.seen
    assert (30, "train/loss") not in resumed.seen
    resumed.write(30, {"train/loss": 5.0})
    assert [row["train/loss"] for row in rows(path)] == [1, 2, 5]


@pytest.mark.parametrize("torn", ['{"step": 20, "ti', '{"step": 20, "train/loss": 1.0}', "\0\0\0", "7", '{"time": 1}'])
def test_a_last_line_without_its_end_harms_no_other(path, torn):
    path.write_text('{"step": 10, "train/loss": 2.0}\n' + torn)
    lines = JsonLines(path, 20)
    lines.write(30, {"train/loss": 1.0})
    assert steps(path) in ([10, 30], [10, 20, 30])


def test_a_metric_that_the_file_holds_at_a_step_is_not_written_again(path):
    JsonLines(path, 0).write(10, {"eval/loss": 1.0})
    lines = JsonLines(path, math.inf)
    lines.write(10, {"eval/loss": 1.0, "eval/knn/top1": 0.5})
    lines.write(10, {"eval/loss": 1.0})
    assert [sorted(row.keys() - {"step", "time"}) for row in rows(path)] == [["eval/loss"], ["eval/knn/top1"]]


def test_looking_into_a_run_in_progress_cuts_nothing(path):
    JsonLines(path, 0).write(50, {"train/loss": 1.0})
    JsonLines(path, 20, active=False)
    JsonLines(path, math.inf)
    assert steps(path) == [50]


def full(*_):
    raise OSError(28, "No space left on device")


def test_a_full_disk_keeps_lines_until_there_is_room(path, monkeypatch, caplog):
    lines = JsonLines(path, 0)
    lines.write(10, {"train/loss": 1.0})
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "mae_jax"):
        patch.setattr(metric_writer, "_append", full)
        lines.write(20, {"train/loss": 1.0})
    assert "No space left" in caplog.text
    lines.write(30, {"train/loss": 1.0})
    assert steps(path) == [10, 20, 30]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
def test_a_disk_that_is_full_raises_nothing_while_training(path):
    lines = JsonLines(path, 0)
    os.symlink("/dev/full", path)
    lines.write(10, {"train/loss": 1.0})
    assert len(lines.pending) == 1


def test_a_line_that_fits_only_in_part_leaves_no_half_behind(path):
    path.write_text("old\n")
    real = open

    class Tight:
        def __init__(self, *args, **kwargs):
            self.file = real(*args, **kwargs)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, data):
            return self.file.write(data[:3])

    metric_writer.open = Tight
    try:
        with pytest.raises(OSError, match="no space"):
            metric_writer._append(path, "a new line\n")
    finally:
        del metric_writer.open
    assert path.read_text() == "old\n"


def test_cutting_lines_on_a_full_disk_loses_none_and_says_so(path, monkeypatch):
    JsonLines(path, 0).write(50, {"train/loss": 1.0})
    monkeypatch.setattr(tail, "replace", full)
    with pytest.raises(UserError, match="No space left"):
        JsonLines(path, 20)
    assert steps(path) == [50]


PLACE = "gs://bucket/run/metrics.jsonl"


def in_bucket(gcs) -> list[int]:
    return [json.loads(line)["step"] for line in gcs.store.get("bucket", "run/metrics.jsonl", {}).content.splitlines()]


def writes(gcs) -> int:
    return sum(request.startswith("POST") for request in gcs.requests)


def test_in_a_bucket_the_file_is_rewritten_at_saves_and_every_30_seconds_only(gcs):
    lines = JsonLines(epath.Path(PLACE), 0)
    for step in range(5):
        lines.write(step, {"train/loss": 1.0})
    assert writes(gcs) == 0
    lines.flush()
    assert (writes(gcs), in_bucket(gcs)) == (1, [0, 1, 2, 3, 4])
    lines.written = time.monotonic() - 31
    lines.write(5, {"train/loss": 1.0})
    assert (writes(gcs), in_bucket(gcs)) == (2, [0, 1, 2, 3, 4, 5])
    resumed = JsonLines(epath.Path(PLACE), 3)
    resumed.write(4, {"train/loss": 2.0})
    resumed.flush()
    assert in_bucket(gcs) == [0, 1, 2, 3, 4]


def test_a_bucket_out_of_reach_neither_stops_the_run_nor_loses_or_doubles_lines(gcs, caplog):
    lines = JsonLines(epath.Path(PLACE), -1)
    lines.write(0, {"train/loss": 1.0})
    for fault in ({"status": 503}, {"status": 403}, {"kind": "lost"}):
        gcs.add({"path": "metrics", "method": "POST", "times": -1, **fault})
        lines.flush(0.1)
        gcs.clear()
    assert caplog.text.count("kept, and tried again") == 3
    lines.write(1, {"train/loss": 1.0})
    lines.flush()
    assert in_bucket(gcs) == [0, 1]


def test_in_a_bucket_the_lines_of_an_evaluation_meanwhile_stay(gcs):
    lines = JsonLines(epath.Path(PLACE), -1)
    for step in (1, 2):
        lines.write(step, {"train/loss": 1.0})
        lines.flush()
        evaluation = JsonLines(epath.Path(PLACE), math.inf)
        evaluation.write(step, {"eval/loss": 1.0})
        evaluation.flush()
    assert in_bucket(gcs) == [1, 1, 2, 2]


def test_a_run_that_was_frozen_before_its_request_adds_no_line_to_those_of_the_next(gcs, monkeypatch, caplog):
    lines = JsonLines(epath.Path(PLACE), -1)
    lines.write(1, {"train/loss": 1.0})
    write = storage_gcs.write

    def frozen_before(*args) -> int:  # meanwhile, another run takes the workdir over and writes the step itself
        monkeypatch.setattr(storage_gcs, "write", write)
        write(PLACE, b'{"step": 1, "train/loss": 2.0}\n')
        monkeypatch.setattr(workdir_lock, "why_unwritable", lambda: "another run may have the workdir")
        return write(*args)

    monkeypatch.setattr(storage_gcs, "write", frozen_before)
    lines.flush()
    assert in_bucket(gcs) == [1]
    assert "another run may have the workdir" in caplog.text


def test_a_picture_that_a_bucket_does_not_take_is_a_warning_and_the_next_is_there(gcs, caplog):
    recorder = MetricWriter(epath.Path("gs://bucket/run"), 0, sinks=("pictures",))
    gcs.add({"path": "pictures", "method": "POST", "status": 403})
    for step in (1, 2):
        recorder.write_image(step, "reconstruct", np.zeros((2, 2, 3), np.uint8))
    assert "cannot write gs://bucket/run/pictures/reconstruct_0000001.png" in caplog.text
    pictures = gcs.store.list("bucket", {"prefix": "run/pictures/"})["items"]
    assert [picture["name"] for picture in pictures] == ["run/pictures/reconstruct_0000002.png"]
    assert pictures[0]["contentType"] == "image/png"


def test_a_number_that_is_not_finite_becomes_null(tmp_path):
    recorder = MetricWriter(epath.Path(tmp_path), 0, sinks=("pictures",))
    recorder.write_scalars(1, {"train/loss": float("nan"), "train/lr": np.float32(0.5)})
    assert rows(tmp_path / "metrics.jsonl")[0] | {"time": 0} == {
        "step": 1, "time": 0, "train/loss": None, "train/lr": 0.5}


def test_only_the_first_process_reads_what_was_evaluated_and_writes(tmp_path):
    MetricWriter(epath.Path(tmp_path), 0, sinks=("pictures",)).write_scalars(4, {"eval/loss": 1.0})
    other = MetricWriter(epath.Path(tmp_path), 4, sinks=("pictures", "tensorboard"), active=False)
    assert not other.has(4, "eval/loss")
    other.write_scalars(5, {"eval/loss": 1.0})
    other.write_image(5, "reconstruct", np.zeros((2, 2, 3), np.uint8))
    other.close()
    assert steps(tmp_path / "metrics.jsonl") == [4]
    assert not (tmp_path / "pictures").exists()


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


def test_a_long_file_is_read_from_its_end_and_what_is_before_stays(path):
    lines = [json.dumps({"step": step, "time": 1.0, "train/loss": 0.5, "pad": "x" * 900}) for step in range(1, 20_001)]
    text = "\n".join(lines) + "\n"
    path.write_text(text)
    began, (start, end) = time.monotonic(), (0, b"")
    with path.open("rb") as file:
        start, end = tail.read(file, 19_990)
    assert len(end) < 2 * tail.BLOCK < len(text) / 5
    assert start + len(end) == len(text)
    resumed = JsonLines(path, 19_990, since=19_990)
    assert time.monotonic() - began < 2
    assert path.read_text() == "\n".join(lines[:19_990]) + "\n"
    assert (19_990, "train/loss") in resumed.seen
    resumed.write(19_990, {"train/loss": 1.0, "eval/loss": 1.0})
    assert path.read_text().count("\n") == 19_991


@pytest.mark.parametrize("block", [1, 7, 64, 300, 10_000])
def test_where_blocks_end_makes_no_difference(path, monkeypatch, block):
    monkeypatch.setattr(tail, "BLOCK", block)
    steps_written = [*range(60), 12, *range(60, 70), 60]  # 12 and 60: evaluations of older checkpoints
    path.write_text("".join(json.dumps({"step": step, "n": place}) + "\n" for place, step in enumerate(steps_written)))
    whole = path.read_text()
    seen = JsonLines(path, 60, since=60).seen
    assert path.read_text() == "".join(line + "\n" for line in whole.splitlines() if json.loads(line)["step"] <= 60)
    assert {step for step, _ in seen} >= {60}


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
