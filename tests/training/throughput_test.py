"""Speed: images per second, waiting and MFU of a stretch of steps, and the line that tells them."""

import numpy as np
import pytest

from mae_jax.runtime.console import clock
from mae_jax.training import throughput
from mae_jax.training.throughput import Speed, progress_line


def test_speed_counts_steps_and_waiting_of_its_stretch(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(throughput.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(throughput.jax, "device_count", lambda: 2)
    speed = Speed(batch_size=8, flops_per_image=10, peak=100.0)
    assert all(np.isnan(value) for value in speed.take().values())  # no step was timed, as in a run of one

    def produce():
        now[0] += 0.5
        return "batch"

    for _ in range(4):
        assert speed.waiting(produce) == "batch"
        now[0] += 1.5
    out = speed.take()
    assert out == {"train/images_per_sec": 4.0, "train/data_wait": 0.25, "train/mfu": 4 * 10 / 200}
    assert speed.take() == out  # no step since: the figures of the stretch before
    now[0] += 100
    speed.start()
    speed.waiting(produce)
    assert speed.take()["train/images_per_sec"] == 16


@pytest.mark.parametrize(("seconds", "text"), [(12.7, "12s"), (190, "3m10s"), (3720, "1h02m"), (0, "0s")])
def test_clock(seconds, text):
    assert clock(seconds) == text


def test_the_progress_line_says_what_is_left_and_mfu_only_where_it_is_known():
    values = {"train/images_per_sec": 100.0, "train/data_wait": 0.125, "train/loss": 0.5, "train/lr": 1e-3}
    line = progress_line(10, 40, values, batch_size=50)
    assert line == "step 10/40 (25%)  loss 0.5000  lr 1.00e-03  100 images/s  data wait 12%  15s left"
    assert "mfu 45.6%" in progress_line(10, 40, values | {"train/mfu": 0.4561}, batch_size=50)
    untimed = values | {"train/images_per_sec": float("nan"), "train/data_wait": float("nan")}
    assert progress_line(1, 1, untimed, batch_size=50) == "step 1/1 (100%)  loss 0.5000  lr 1.00e-03"
