"""Means, metrics.jsonl under kills and full disks, and life without TensorBoard."""

import json
import logging
import math
import os
import time

import numpy as np
import pytest
from etils import epath

from mae_jax.errors import UserError
from mae_jax.evals.accumulators import Means
from mae_jax.storage import gcs as storage_gcs
from mae_jax.storage import metric_writer, tail, workdir_lock
from mae_jax.storage.metric_writer import JsonLines, MetricWriter


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
