"""TFRecords and TensorBoard events in a bucket go through TensorFlow's own client, here to the test server."""

import os
import subprocess
import sys
import textwrap

import pytest
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader

from tests.gcs import proxy

pytestmark = pytest.mark.bucket

SCRIPT = textwrap.dedent("""
    import io, sys
    import numpy as np
    import tensorflow as tf
    from PIL import Image
    from mae_jax.commands import cli
    from mae_jax.training import loop
    from tests.helpers.tiny import tiny_config

    def example(number):
        file = io.BytesIO()
        Image.fromarray(np.full((20, 20, 3), 10 * number, np.uint8)).save(file, "JPEG")
        feature = {"image": tf.train.Feature(bytes_list=tf.train.BytesList(value=[file.getvalue()])),
                   "label": tf.train.Feature(int64_list=tf.train.Int64List(value=[number % 3]))}
        return tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString()

    for part in range(2):
        with tf.io.TFRecordWriter(f"gs://bucket/data/train-{part}.tfrecord") as file:
            for number in range(12):
                file.write(example(12 * part + number))
    config = tiny_config({"data.source": "tfrecord", "data.path": "gs://bucket/data/{split}-*.tfrecord",
                          "data.eval_split": "", "data.readers": 4, "log.tensorboard": True, "eval.every": ""})
    sys.exit(cli.guarded(lambda: loop.train(config, "gs://bucket/tensorflow")))
""")


def test_a_run_reads_tfrecords_and_writes_tensorboard_events_in_a_bucket(gcs, tmp_path):
    gcs.add({"path": "train-1.tfrecord", "method": "GET"})
    gcs.add({"path": "upload.*events", "method": "POST|PUT"})
    with proxy.in_front_of(gcs, tmp_path) as variables:
        done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=200,
                              env=os.environ | variables | {"PYTHONPATH": os.getcwd(), "JAX_PLATFORMS": "cpu"})
    assert done.returncode == 0, done.stderr
    assert "counted 24 records in 2 files" in done.stderr
    assert "no TensorBoard events" not in done.stderr
    assert all(fault.done for fault in gcs.faults)
    found = gcs.store.list("bucket", {"prefix": "tensorflow/tensorboard/events"})["items"]
    (tmp_path / "events").write_bytes(gcs.store.get("bucket", found[0]["name"], {}).content)
    assert sum(b"train/loss" in event for event in RawEventFileLoader(str(tmp_path / "events")).Load()) == 6
