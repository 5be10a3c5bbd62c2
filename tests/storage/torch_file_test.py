"""Files of torch.save: what is in them is read without torch, and what they ask for is not done."""

import io
import pickle
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest
from etils import epath

from mae_jax.errors import UserError
from mae_jax.storage import torch_file
from tests.helpers.torch_files import Global, View, legacy, zipped

RNG = np.random.default_rng(0)
STATE = {"cls_token": RNG.normal(size=(1, 1, 4)).astype(np.float32),
         "blocks.0.attn.qkv.weight": RNG.normal(size=(12, 4)).astype(np.float32),
         "scalar": np.array(3, np.int64), "empty": np.zeros((0, 4), np.float32)}
WAYS = [zipped, legacy]


def read(tmp_path, content: bytes):
    file = epath.Path(tmp_path / "weights.pth")
    file.write_bytes(content)
    return torch_file.state_of(torch_file.load(file), file)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("key", ["", "model", "state_dict", "teacher"])
def test_a_state_dict_is_found_in_the_file_or_under_its_usual_names(tmp_path, way, key):
    args = Global("argparse", "Namespace", ())
    more = {"optimizer": {"state": {0: {"exp_avg": STATE["cls_token"]}}}, "epoch": 3, "args": args, "lr": 1e-3,
            "scale": Global("numpy.core.multiarray", "scalar", (Global("numpy", "dtype", ("f8", False, True)), "x")),
            "where": Global("pathlib", "PosixPath", ("a", "b"))}
    found, where = read(tmp_path, way({key: STATE, **more} if key else STATE))
    assert where == key
    assert found.keys() == STATE.keys()
    for name, array in STATE.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype


@pytest.mark.parametrize("dtype", ["float16", "float64", ml_dtypes.bfloat16])
def test_numbers_of_all_sizes_are_read(tmp_path, dtype):
    array = RNG.normal(size=(3, 5)).astype(dtype)
    found, _ = read(tmp_path, zipped({"a": array}))
    assert found["a"].dtype == np.dtype(dtype)
    np.testing.assert_array_equal(found["a"], array)


def test_views_are_cut_out_of_their_storage(tmp_path):
    numbers = np.arange(24, dtype=np.float32)
    views = {"t": View("0", "FloatStorage", 24, 4, (3, 2), (1, 3)), "whole": numbers}
    found, _ = read(tmp_path, zipped(views))
    np.testing.assert_array_equal(found["t"], numbers[4:10].reshape(2, 3).T)


def test_the_teacher_of_dino_is_taken_and_a_parameter_is_its_tensor(tmp_path):
    wrapped = {"a": Global("torch._utils", "_rebuild_parameter", (STATE["cls_token"], True, None))}
    found, where = read(tmp_path, zipped({"student": {"a": np.zeros(2, np.float32)}, "teacher": wrapped}))
    assert where == "teacher"
    np.testing.assert_array_equal(found["a"], STATE["cls_token"])


class Marker:
    """Leaves a mark where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("wanted", [
    Global("os", "system", ("true",)), Global("posix", "system", ("true",)), Global("builtins", "eval", ("1",)),
    Global("builtins", "getattr", ("a", "upper")), Global("torch", "load", ("x",)), Global("torch.hub", "load", ("x",)),
    Global("mae_jax.storage.torch_file", "load", ("x",)), Global("os", "system"), Global("numpy", "load", ("x",)),
    Global("numpy.testing._private.utils", "runstring", ("1", {})),
])
@pytest.mark.parametrize("way", WAYS)
def test_a_program_is_refused_by_name(tmp_path, way, wanted):
    with pytest.raises(UserError, match=rf"weights\.pth is not read: .*{wanted.module}\.{wanted.name}"):
        read(tmp_path, way({"model": STATE, "x": wanted}))


@pytest.mark.parametrize("whole", [True, False])
def test_nothing_that_a_file_says_is_executed(tmp_path, whole):
    mark = tmp_path / "mark"
    program = pickle.dumps({"model": Marker(mark)}, protocol=2)
    content = program if whole else zipped(STATE)
    if not whole:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("archive/data.pkl", program)
        content = buffer.getvalue()
    with pytest.raises(UserError, match=r"weights\.pth is not read: .*open"):
        read(tmp_path, content)
    assert not mark.exists()


def test_what_nobody_needs_is_not_called_though_it_is_taken(tmp_path):
    pickled = Global("numpy", "fromfile", ("/etc/hostname",))
    found, _ = read(tmp_path, zipped({"model": STATE, "x": pickled}))
    assert found.keys() == STATE.keys()


@pytest.mark.parametrize(("value", "says"), [
    ({"a": View("0", "FloatStorage", 4, 0, (10**9, 10**9), (0, 0)), "b": np.zeros(4, np.float32)}, "larger"),
    ({"a": View("0", "FloatStorage", 4, 0, (5,), (1,)), "b": np.zeros(4, np.float32)}, "larger"),
    ({"a": View("0", "FloatStorage", 4, 2, (3,), (1,)), "b": np.zeros(4, np.float32)}, "larger"),
    ({"a": View("0", "FloatStorage", 4, 0, (2, 2), (-1, 1)), "b": np.zeros(4, np.float32)}, "as torch.save does not"),
    ({"a": View("0", "FloatStorage", 5, 0, (4,), (1,)), "b": np.zeros(4, np.float32)}, "16 bytes"),
    ({"a": View("9", "FloatStorage", 4, 0, (4,), (1,))}, "data/9"),
    ({"a": View("../version", "FloatStorage", 4, 0, (4,), (1,))}, "version"),
    ({"a": Global("torch._utils", "_rebuild_tensor_v2", (1, 2, 3, 4))}, "as torch.save does not"),
    ({"a": Global("torch._utils", "_rebuild_tensor_v2", ())}, "damaged"),
    ({"epoch": 3, "args": {}}, "no state dict.*epoch, args"),
    ([1, 2], "list"),
])
def test_tensors_that_are_none_are_refused(tmp_path, value, says):
    with pytest.raises(UserError, match=rf"weights\.pth .*{says}"):
        read(tmp_path, zipped(value))


def cut(content: bytes) -> bytes:
    return content[:2 * len(content) // 3]


def flipped(content: bytes) -> bytes:
    at = content.index(STATE["blocks.0.attn.qkv.weight"].tobytes()) + 7
    return content[:at] + bytes([content[at] ^ 8]) + content[at + 1:]


@pytest.mark.parametrize(("content", "says"), [
    (cut(zipped(STATE)), "damaged"), (cut(legacy(STATE)), "cut short|damaged"), (b"", "empty"),
    (flipped(zipped({"a": STATE["blocks.0.attn.qkv.weight"]})), "damaged: Bad CRC"),
    (b"\x80\x02}.", "not of torch.save|damaged"), (b"PK\x03\x04" + bytes(100), "damaged"), (b"<html>", "HTML"),
    (zipped(STATE, method=zipfile.ZIP_DEFLATED), "compressed"),
    (zipped(STATE, more={"constants.pkl": b""}), "TorchScript"),
    (b"\x80\x02" + b"r\xff\xff\xff\x7f" + b".", "memo index|damaged"),
    (b"\x80\x04\x8e" + (2**60).to_bytes(8, "little") + b"x.", "damaged"),
    (b"\x80\x02" + b"(" * 100_000, "nests"), (b"\x80\x02}(" + b")" + b"\x85" * 3_000_000 + b"K\x01u.", "nests"),
    (b"\x80\x02" + b"]" * 1000 + b"a" * 999 + b".", "damaged|not of torch"),
])
def test_damage_is_told_in_one_line(tmp_path, content, says):
    with pytest.raises(UserError, match=rf"weights\.pth (is|holds) .*({says})") as told:
        read(tmp_path, content)
    assert "\n" not in str(told.value)


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(UserError, match=r"no such file: .*none\.pth"):
        torch_file.load(epath.Path(tmp_path / "none.pth"))


def test_attributes_of_a_state_dict_count_for_nothing(tmp_path):
    content = zipped({"model": STATE})
    program = zipfile.ZipFile(io.BytesIO(content)).read("archive/data.pkl")
    items = program[3:program.rindex(b"u") + 1]
    ordered = b"\x80\x02ccollections\nOrderedDict\n)R" + items + b"}X\x03\x00\x00\x00getK\x01sb."
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            new.writestr(name, ordered if name.endswith("data.pkl") else old.read(name))
    assert read(tmp_path, buffer.getvalue())[0].keys() == STATE.keys()


def test_views_of_one_storage_read_it_once_and_do_not_keep_it(tmp_path):
    views = {str(i): View("0", "FloatStorage", 1000, 10 * i, (10,), (1,)) for i in range(90)}
    found, _ = read(tmp_path, zipped({**views, "whole": np.arange(1000, dtype=np.float32)}))
    np.testing.assert_array_equal(found["7"], np.arange(70, 80))
    assert found["7"].base is None


@pytest.mark.parametrize("name", ["torch BFloat16Storage", "torch float32", "torch._utils _rebuild_tensor_v2",
                                  "torch._utils _rebuild_parameter", "numpy.core.multiarray _reconstruct",
                                  "_codecs encode", "numpy ndarray", "numpy dtype", "collections OrderedDict"])
@pytest.mark.parametrize("state", [(3, "<", None, None, None, 1000, 1, 0), (None, {"__defaults__": ("evil",)}),
                                   {"evil": 1}])
def test_what_a_pickle_names_cannot_be_changed_by_it(tmp_path, name, state):
    """BUILD gives an object a state: here what was only named, and serves the whole process."""
    before = np.dtype(ml_dtypes.bfloat16).itemsize, np.dtype("f4").itemsize
    kept = {id(each): dict(vars(each)) for each in torch_file.KNOWN.values() if hasattr(each, "__dict__")}
    module, attribute = name.split()
    state = pickle.dumps(state, protocol=2)[2:-1]
    program = b"\x80\x02" + f"c{module}\n{attribute}\n".encode() + state + b"b."
    with pytest.raises(UserError, match=r"weights\.pth"):
        read(tmp_path, program)
    assert (np.dtype(ml_dtypes.bfloat16).itemsize, np.dtype("f4").itemsize) == before
    assert kept == {id(each): dict(vars(each)) for each in torch_file.KNOWN.values() if hasattr(each, "__dict__")}
    assert torch_file._tensor.__defaults__ is None
    assert torch_file.pickled_arrays.from_buffer.__defaults__ != ("evil",)


def test_one_long_text_that_is_encoded_many_times_takes_little_memory(tmp_path):
    text = b"X" + (10**6).to_bytes(4, "little") + b"a" * 10**6
    program = (b"\x80\x02c_codecs\nencode\nq\x00" + b"(" + text + b"X\x06\x00\x00\x00latin1tq\x010"
               + b"(" + b"h\x00h\x01R" * 500 + b"l.")
    tracemalloc.start()
    with pytest.raises(UserError, match=r"weights\.pth"):
        read(tmp_path, program)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6
