"""What is read as JSON, as names of parameters and as a file of ours may be anything: one line each, and no bug."""

import json
import struct

import numpy as np
import pytest
import safetensors.numpy
from etils import epath

from mae_jax import config as configs
from mae_jax import durations, param_tree
from mae_jax.data import cluster_ids
from mae_jax.data.readers import cached_batches
from mae_jax.errors import MISTAKE, UserError, explain
from mae_jax.runtime import bounded_json
from mae_jax.storage import checksum, file_kinds, metric_writer, safetensors_file, step_dirs
from mae_jax.storage.checkpoint import load_params
from mae_jax.storage.metric_writer import JsonLines
from mae_jax.training import ending, workdir
from mae_jax.training.evaluation import BestCheckpoint
from tests.helpers.tiny import tiny_config

DEEP = '{"a":' * 100_000 + "1" + "}" * 100_000
HOSTILE = {  # what a file of JSON may hold → what the line says
    "deep": (DEEP, "deep"), "deep, and not ended": ("[" * 90_000, "deep"),
    "a little too deep": ('{"config": ' + "[" * 70 + "]" * 70 + "}", "deep"),
    "number": (f'{{"config": {"9" * 5000}}}', "5000 digits"),
    "large number": ('{"config": 1' + "0" * 30 + "}", "31 digits"),
    "list": ("[]", "list"), "text": ('"a"', "str"), "null": ("null", "NoneType"), "empty": ("", "empty"),
    "zeros": ("\0" * 900, "zeros"), "html": ("<!DOCTYPE html>\n<html><body>404</body></html>", "HTML"),
    "lfs": ("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "git lfs pull"),
    "xml": ("<?xml version='1.0'?><Error><Code>NoSuchKey</Code></Error>", "XML"),
    "gzip": (b"\x1f\x8b\x08\0" + b"\xff" * 100, "gzip"), "latin-1": ('{"config": "é"}'.encode("latin-1"), "UTF-8"),
}


@pytest.fixture(params=HOSTILE)
def hostile(request):
    content, line = HOSTILE[request.param]
    return content if isinstance(content, bytes) else content.encode(), line


def refused(call, line):
    """Runs what must raise UserError, in one line that has `line` in it."""
    with pytest.raises(UserError, match=line) as found:
        call()
    assert "\n" not in str(found.value)
    assert len(str(found.value)) < 600


def test_a_hostile_config_json_is_one_line(tmp_path, hostile):
    (tmp_path / "config.json").write_bytes(hostile[0])
    refused(lambda: workdir.read_config(epath.Path(tmp_path)), hostile[1])
    refused(lambda: workdir.changes(epath.Path(tmp_path), tiny_config()), hostile[1])


def test_a_hostile_score_meta_json_of_batches_and_of_clusters_are_one_line(tmp_path, hostile):
    for name in ("best/score.json", "meta.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(hostile[0])
    np.savez(tmp_path / "clusters.npz", **dict.fromkeys(cluster_ids.NAMES, np.zeros((2, 3), np.float32)))
    refused(lambda: BestCheckpoint(epath.Path(tmp_path), "loss"), hostile[1])
    refused(lambda: cached_batches.read_meta(str(tmp_path)), hostile[1])
    refused(lambda: cluster_ids.Clusters.read(str(tmp_path)), hostile[1])


@pytest.mark.parametrize("change", [
    {"num_train": "7"}, {"num_train": -1}, {"classes": {"a": 1}}, {"classes": [1]}, {"classes": None}])
def test_a_meta_json_of_batches_with_odd_values_is_one_line(tmp_path, change):
    (tmp_path / "meta.json").write_text(json.dumps({"num_train": 7, "classes": []} | change))
    refused(lambda: cached_batches.read_meta(str(tmp_path)), "num_train")


@pytest.mark.parametrize(("meta", "arrays", "line"), [
    ({}, {}, "which data"), ({"data": 3}, {}, "which data"), ({"data": {"source": "folder"}}, {}, "which data"),
    ({"examples": []}, {}, "examples"), (None, {}, "meta.json"), ({}, {"mean": None}, "centroids, prices"),
    ({}, {"more": np.zeros(2)}, "more"), ({}, {"centroids": np.zeros(2)}, r"\[2\]"),
    ({}, {"assigned/train": np.zeros(2)}, "number of a cluster")])
def test_a_folder_of_odd_clusters_is_one_line(tmp_path, meta, arrays, line):
    whole = dict.fromkeys(cluster_ids.NAMES, np.zeros((2, 3), np.float32)) | arrays
    np.savez(tmp_path / "clusters.npz", **{name: array for name, array in whole.items() if array is not None})
    if meta is not None:
        said = meta if line == "which data" else {"data": {"source": "", "name": "", "classes": ""}} | meta
        (tmp_path / "meta.json").write_text(json.dumps(said))
    refused(lambda: cluster_ids.Clusters.read(str(tmp_path)), line)


def safetensors_of(said, arrays='"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'):
    header = f'{{"__metadata__":{said},{arrays}}}'.encode()
    return struct.pack("<Q", len(header)) + header + bytes(4)


@pytest.mark.parametrize(("content", "line"), [
    (safetensors_of(DEEP), "deep"), (safetensors_of("[]"), "texts"), (safetensors_of('{"config": 3}'), "texts"),
    (safetensors_of(f'{{"config": {json.dumps(DEEP)}}}'), "deep"), (safetensors_of('{"config": "[]"}'), "object"),
    (safetensors_of(f'{{"plugins": {json.dumps(DEEP)}, "config": "{{}}"}}'), "deep"),
    (safetensors_of(f'{{"checksums": {json.dumps(DEEP)}}}'), "deep"),
    (safetensors_of("{}")[:30], "cut short"), (struct.pack("<Q", 2**63) + b"{}", "cut short"), (b"{}", "header"),
    (safetensors_of("{}")[:-4], "not fully covered"),
    *((content if isinstance(content, bytes) else content.encode(), line) for name, (content, line) in HOSTILE.items()
      if name in ("empty", "html", "lfs", "xml", "gzip", "zeros")),
    (b"PK\x03\x04" + bytes(100), "torch.save"), (b"\x80\x02\x8a\nl\xfc" + bytes(100), "torch.save")],
    ids=lambda value: value if isinstance(value, str) else "")
def test_a_hostile_safetensors_file_is_one_line(tmp_path, content, line):
    file = tmp_path / "a.safetensors"
    file.write_bytes(content)
    if line == "torch.save":  # whatever its name, it is read as what it begins as
        refused(lambda: load_params(file), line)
        return
    if (line == "deep" and b"checksums" in content) or line == "not fully covered":
        assert workdir.config_of(str(file)) is None
    else:
        refused(lambda: workdir.config_of(str(file)), line)
    if b'"config"' not in content:
        refused(lambda: safetensors_file.load(epath.Path(file)), line)


NAMES = {"below a leaf": ["a", "a/b"], "above a leaf": ["a/b/c", "a/b"], "far below": ["a", "a/b/c/d"],
         "deep": ["/".join("a" * 3000)], "deeper than ours": ["/".join("a" * 65)]}


@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
@pytest.mark.parametrize("backwards", [False, True])
def test_names_that_no_tree_of_parameters_has_are_one_line(tmp_path, names, backwards):
    names = names[::-1] if backwards else names
    refused(lambda: param_tree.nest(dict.fromkeys(names, 1)), "parameter")
    file = tmp_path / "odd.safetensors"
    safetensors.numpy.save_file({name: np.zeros(1, np.float32) for name in names}, file)
    refused(lambda: load_params(file), r"odd\.safetensors: .*parameter")


def test_names_that_share_their_beginning_make_a_tree():
    assert param_tree.nest({"a/b": 1, "ab": 2, "a/c/d": 3}) == {"a": {"b": 1, "c": {"d": 3}}, "ab": 2}
    assert param_tree.nest({"/".join("a" * 64): 1})


@pytest.mark.parametrize(("text", "line"), [
    (b"9" * 5000, "5000 digits"), (b"1" + b"0" * 18, "19 digits"), (b"9" * 18, ""), ("²".encode(), ""), (b"-3", "")],
    ids=lambda value: value[:9])
def test_a_number_in_done_that_is_no_step_is_one_line(tmp_path, text, line):
    (tmp_path / "DONE").write_bytes(text)
    if line:
        refused(lambda: ending.finished(epath.Path(tmp_path)), line)
    else:
        assert ending.finished(epath.Path(tmp_path)) == (int(text) if text.isdigit() else 0)


def test_a_folder_whose_name_is_too_large_for_a_step_is_no_checkpoint(tmp_path):
    for name in ("12", "9" * 200, "1" + "0" * 18):
        (tmp_path / name).mkdir()
    assert step_dirs.committed(epath.Path(tmp_path)) == [12]


@pytest.mark.parametrize(("field", "value"), [
    ("batch_size", 10**30), ("batch_size", 2**31), ("batch_size", 10**5000), ("data.image_size", (2**31, 8)),
    ("eval.max_examples", 2**40), ("model.width", 10**30), ("seed", 2**63), ("seed", -10**30)],
    ids=lambda value: value if isinstance(value, str) else "")
def test_whole_numbers_that_no_array_has_are_refused_with_their_field(field, value):
    with pytest.raises(UserError, match=rf"{field} .*at most"):
        configs.validate(tiny_config({field: value}))
    configs.validate(tiny_config({"seed": 2**63 - 1}))


@pytest.mark.parametrize("text", ["1e99 steps", "9" * 5000 + " steps", "2147483648 steps", "1e12 epochs"],
                         ids=lambda text: text[:12])
def test_a_run_of_more_steps_than_are_counted_is_refused(text):
    with pytest.raises(UserError, match=r"duration"):
        durations.Timeline.of(tiny_config({"train.duration": text}), 1000)


BAD = [DEEP, "[" * 9000, '{"step": 20, "tr', "text", "[1]", "{}", '{"step": null}', '{"step": "20"}', '{"step": NaN}',
       '{"step": 1e999}', f'{{"step": {"9" * 5000}}}', '{"step": -9999999999999999999}', '{"step": true}',
       '{"step": 1' + "0" * 40 + "}", "\0\0\0", "\udcff\x1b[31m"]


@pytest.mark.parametrize("since", [0, 20])
@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad[:12])
def test_a_bad_line_of_metrics_is_set_aside_and_told_once(tmp_path, bad, since, caplog):
    path, content = epath.Path(tmp_path) / "metrics.jsonl", bad.encode(errors="surrogateescape")
    path.write_bytes(b'{"step": 10, "train/loss": 2.0}\n' + content + b'\n{"step": 20, "train/loss": 1.0}\n')
    JsonLines(path, 20, active=False)  # one that only looks changes nothing
    assert not (path.parent / metric_writer.ASIDE).exists()
    lines = JsonLines(path, 20, since=since)
    assert {(10, "train/loss"), (20, "train/loss")} <= lines.seen
    lines.write(30, {"train/loss": 0.5})
    again = JsonLines(path, 30)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [10, 20, 30]
    assert {step for step, _ in again.seen} == {10, 20, 30}
    kept = (path.parent / metric_writer.ASIDE).read_bytes()
    assert kept == content.decode(errors="replace").encode() + b"\n"
    assert caplog.text.count(metric_writer.ASIDE) == 1


def test_bad_lines_of_later_starts_join_those_that_were_set_aside(tmp_path):
    path = epath.Path(tmp_path) / "metrics.jsonl"
    for bad in ("one", "two"):
        with open(path, "a") as file:
            file.write(f'{bad}\n{{"step": 1, "{bad}": 1}}\n')
        JsonLines(path, 5)
    assert (path.parent / metric_writer.ASIDE).read_text() == "one\ntwo\n"
    assert path.read_text().count("\n") == 2


def test_values_within_the_bounds_come_back_as_they_were():
    value = {"a": [1, -1, 2**64 - 1, 1.5, 1e300, None, True, "text"], "deep": 3}
    for _ in range(bounded_json.MAX_DEPTH - 3):
        value = {"b": value}
    assert bounded_json.parse(json.dumps(value)) == value
    assert bounded_json.parse(b"\xef\xbb\xbf{}") == {}
    assert bounded_json.as_read({"a": (1, 2)}) == {"a": [1, 2]}


def test_a_text_of_more_bytes_than_are_read_is_refused(monkeypatch):
    monkeypatch.setattr(bounded_json, "MAX_BYTES", 10)
    assert bounded_json.parse(b'"12345678"') == "12345678"
    with pytest.raises(ValueError, match="11 bytes"):
        bounded_json.parse(b'"123456789"')


@pytest.mark.parametrize("content", [b"text", b"{}", b'{"a": 1}', bytes([3, 0, 0, 0]) + b"abc"])
def test_what_has_no_known_kind_is_not_given_one(content):
    assert file_kinds.kind(content) == ""


def test_a_directory_or_a_forbidden_file_in_place_of_config_json_is_a_mistake_of_one_line(tmp_path):
    (tmp_path / "config.json").mkdir()
    with pytest.raises(IsADirectoryError) as found:
        workdir.read_config(epath.Path(tmp_path))
    code, line = explain(found.value)
    assert code == MISTAKE
    assert "config.json" in line
    assert "\n" not in line


@pytest.mark.parametrize(("error", "damaged"), [
    (PermissionError(13, "Permission denied"), False), (MemoryError("short"), False),
    (ValueError("PERMISSION_DENIED: gs://a"), False), (OSError(24, "Too many open files"), False),
    (ValueError("DATA_LOSS: a"), True), (KeyError("a"), True), (OSError(5, "Input/output error"), True)])
def test_a_step_that_may_not_be_read_is_not_taken_for_a_damaged_one(error, damaged):
    if damaged:
        assert isinstance(checksum.damage("state", error), checksum.Damaged)
    else:
        refused(lambda: checksum.damage("state", error), "cannot read state, which may be good")
