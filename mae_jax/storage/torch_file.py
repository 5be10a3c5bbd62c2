"""Reading of tensors in files of torch.save, without torch and without executing code of the file.

A file holds a pickle, which is a program. This reader lets it create tensors and plain containers only. A few other
types that are common in checkpoints (arguments of a script, paths, NumPy scalars) are replaced by empty objects. Any
other name is refused. There are two layouts: a zip archive (since PyTorch 1.6), and before that a sequence of pickles
followed by the tensors' contents. A third layout is not of torch.save: a single pickle of NumPy arrays by name.
"""

import functools
import io
import math
import pickle
import pickletools
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from etils import epath

from mae_jax.errors import UserError, printable, root_cause
from mae_jax.storage import file_kinds, paths, pickled_arrays

MAX_NESTED = 64  # most consecutive opcodes of NESTING; files of weights have a few
MAX_OPERATIONS = 20_000_000  # most opcodes of a pickle; a checkpoint with its optimizer has some ten thousand
NESTING = ("MARK", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "LIST", "DICT", "FROZENSET")
MAGIC = 0x1950A86A20F9469CFC6C  # value of the first pickle in the layout before PyTorch 1.6
LEGACY_PROTOCOL = 1001
STORAGES = {  # torch's name of a typed storage → dtype
    "DoubleStorage": "<f8", "FloatStorage": "<f4", "HalfStorage": "<f2", "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": "<i8", "IntStorage": "<i4", "ShortStorage": "<i2", "CharStorage": "i1", "ByteStorage": "u1",
    "BoolStorage": "?", "UntypedStorage": "u1",
}
DTYPES = {"float64": "<f8", "float32": "<f4", "float16": "<f2", "bfloat16": ml_dtypes.bfloat16, "int64": "<i8",
          "int32": "<i4", "int16": "<i2", "int8": "i1", "uint8": "u1", "bool": "?"}
# Names in checkpoints that become empty objects. A name that ends in '.' is a prefix.
NEEDLESS = ("argparse.Namespace", "pathlib.", "numpy.", "omegaconf.", "yacs.config.CfgNode", "torch.device",
            "torch.Size", "typing.Any", "builtins.set", "builtins.slice", "builtins.complex", "__builtin__.set",
            "collections.defaultdict", "collections.Counter", "easydict.EasyDict", "ml_collections.",
            "collections.deque", "datetime.")
NOT_NEEDLESS = ("numpy.testing", "numpy.distutils", "numpy.f2py", "numpy.load", "numpy.core._internal", "numpy.lib")


class Tensor(NamedTuple):
    """An array in the file, which is read by calling `read`."""

    read: Callable[[], np.ndarray]
    shape: tuple[int, ...]


class _Dtype:
    """A dtype that a pickle names. NumPy's dtype objects are shared by the process, and a pickle could change them."""

    __slots__ = ("known",)

    def __init__(self, known: Any):
        self.known = np.dtype(known)

    def __setstate__(self, state: Any) -> None:
        raise _Refused("it changes a dtype")


class _Storage(NamedTuple):
    """A storage in the file, of which tensors are views."""

    dtype: np.dtype
    size: int  # number of elements
    content: Callable[[], bytes]


class _Needless:
    """Substitute for objects that are not needed; it accepts and ignores all operations of a pickle."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "_Needless":
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def take(self, *args: Any) -> None:
        pass

    __setstate__ = __setitem__ = append = extend = add = take


class _Ordered(dict[Any, Any]):
    """Substitute for OrderedDict, without attributes."""

    def __setstate__(self, state: Any) -> None:
        pass


class _Refused(Exception):
    """The file holds something that is not supported or not allowed; the text says what."""


def load(path: epath.Path) -> dict[str, Any]:
    """Returns the content of a file: nested dicts and lists of Tensor, numbers and texts.

    Raises:
      UserError: the file does not exist, cannot be read, is damaged, or names anything that is not allowed.
    """
    content = paths.read_there(path)
    try:
        found = _zipped(content) if content[:2] == b"PK" else _in_a_row(content)
    except _Refused as refused:
        raise UserError(f"{path} is not read: {refused}") from None
    except MemoryError:
        raise
    except Exception as error:  # pickle and zipfile raise many exceptions for damaged files
        kind = "" if content[:2] in (b"PK", b"\x80\x02") else file_kinds.kind(content)
        what = f"is {kind}" if kind else f"is not a file of torch.save, or damaged: {root_cause(error)}"
        raise UserError(f"{path} {what}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} holds a {type(found).__name__}; expected a state dict: names and tensors")
    return found


def state_of(found: Mapping[str, Any], path: object) -> tuple[dict[str, np.ndarray], str]:
    """Returns the arrays of a state dict by name, and the key of the file that holds the state dict, '' for none.

    Of DINO's student and teacher, it returns the teacher, which DINO evaluates.

    Args:
      found: the result of `load`.
      path: of the file, for messages.

    Raises:
      UserError: the file has no state dict, or an array is damaged.
    """
    def tensors(value: Any) -> int:
        return sum(isinstance(each, ARRAYS) for each in value.values()) if isinstance(value, Mapping) else 0

    # A checkpoint may have a tensor beside its state dict, such as a random state.
    key = next((name for name in ("model", "state_dict", "teacher", "module", "model_state_dict", "net", "student")
                if tensors(found.get(name)) > tensors(found)), "")
    if not key and not tensors(found):
        raise UserError(f"{path} has no state dict; expected tensors by name, in the file or under 'model', "
                        f"'state_dict', 'teacher' ...; it has {', '.join(map(_shown, [*found][:8])) or 'nothing'}")
    state = found[key] if key else found
    try:
        return {str(name): value.read() for name, value in state.items() if isinstance(value, ARRAYS)}, key
    except (_Refused, zipfile.BadZipFile, ValueError, TypeError, KeyError, OSError, EOFError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}") from None


def _shown(name: Any) -> str:
    return printable(str(name))[:60]


def _zipped(content: bytes) -> Any:
    archive = zipfile.ZipFile(io.BytesIO(content))
    names = archive.namelist()
    program = next((name for name in names if name.endswith("/data.pkl") or name == "data.pkl"), "")
    if not program:
        raise _Refused("it is a zip archive, but not of torch.save: there is no data.pkl in it")
    folder = program.removesuffix("data.pkl")
    if f"{folder}byteorder" in names and _part(archive, f"{folder}byteorder") != b"little":
        raise _Refused("its numbers are big-endian; save it again on a little-endian machine")
    if f"{folder}constants.pkl" in names:
        raise _Refused("it is a TorchScript archive, a program; save its state_dict() instead")

    wanted: dict[str, _Storage] = {}

    def storage(key: str, dtype: np.dtype, size: int) -> _Storage:
        name = f"{folder}data/{key}"
        entry = archive.getinfo(name)
        if entry.file_size != size * dtype.itemsize:
            raise _Refused(f"{name} has {entry.file_size} bytes; expected {size} numbers of {dtype}")
        return wanted.setdefault(key, _Storage(dtype, size, functools.cache(lambda: _part(archive, name))))

    return _run(_part(archive, program), storage)[0]


def _part(archive: zipfile.ZipFile, name: str) -> bytes:
    """Returns an uncompressed member. Torch writes no compressed ones, which might decompress to any size."""
    if archive.getinfo(name).compress_type != zipfile.ZIP_STORED:
        raise _Refused(f"its member {name} is compressed, unlike those of torch.save")
    return archive.read(name)


def _in_a_row(content: bytes) -> Any:
    """Reads the layout before PyTorch 1.6: magic number, protocol, machine, state dict, keys, and the storages."""
    place, said = 0, []
    for number in range(3):
        value, length = _run(content[place:], _no_storage)
        if not number and isinstance(value, dict) and any(
                isinstance(leaf, ARRAYS) for part in (value, *value.values()) if isinstance(part, dict)
                for leaf in part.values()):
            return value  # Detectron2's model zoo
        said.append(value)
        place += length
    if said[:2] != [MAGIC, LEGACY_PROTOCOL]:
        raise _Refused("it is a pickle, but not of torch.save")
    if not isinstance(said[2], dict) or said[2].get("little_endian") is not True:
        raise _Refused("its numbers are big-endian; save it again on a little-endian machine")
    wanted: dict[str, _Storage] = {}
    places: dict[str, int] = {}

    def storage(key: str, dtype: np.dtype, size: int) -> _Storage:
        def read() -> bytes:
            start = places[key] + 8
            end = start + size * dtype.itemsize
            if int.from_bytes(content[start - 8:start], "little") != size or len(content) < end:
                raise ValueError(f"the storage {key} is cut short")
            return content[start:end]

        return wanted.setdefault(key, _Storage(dtype, size, read))

    found, length = _run(content[place:], storage)
    place += length
    keys, length = _run(content[place:], _no_storage)
    place += length
    for key in keys if isinstance(keys, list) else ():
        if key not in wanted:
            raise _Refused(f"the storage {_shown(key)} belongs to no tensor")
        places[key] = place
        place += 8 + wanted[key].size * wanted[key].dtype.itemsize
    if places.keys() != wanted.keys() or place > len(content):
        raise _Refused("it is cut short: the numbers of some tensors are missing")
    return found


def _no_storage(key: str, dtype: np.dtype, size: int) -> _Storage:
    raise _Refused("it names tensors outside its state dict")


def _run(program: bytes, storage: Callable[[str, np.dtype, int], _Storage]) -> tuple[Any, int]:
    """Runs the pickle at the beginning of `program`; returns its result and its length in bytes."""
    length = _checked(program)
    return _Reader(program[:length], storage).load(), length


def _checked(program: bytes) -> int:
    """Returns the length of a pickle; raises _Refused for opcodes that would waste memory or stack."""
    nested = 0
    for number, (operation, argument, place) in enumerate(pickletools.genops(io.BytesIO(program))):
        if number > MAX_OPERATIONS:
            raise _Refused(f"its pickle has more than {MAX_OPERATIONS:,} operations")
        if operation.name in ("PUT", "BINPUT", "LONG_BINPUT") and (argument or 0) > number:  # index of the memo table
            raise _Refused("its pickle has a memo index beyond its number of operations")
        nested = nested + 1 if operation.name in NESTING else nested if "PUT" in operation.name or (
            operation.name == "MEMOIZE") else 0
        if nested > MAX_NESTED:
            raise _Refused(f"its pickle nests more than {MAX_NESTED} containers in each other")
        if operation.name == "STOP":
            return (place or 0) + 1
    raise ValueError("the pickle has no end")


class _Reader(pickle.Unpickler):
    """Runs a pickle that can create tensors, plain containers and empty objects only."""

    def __init__(self, program: bytes, storage: Callable[[str, np.dtype, int], _Storage]):
        super().__init__(io.BytesIO(program), encoding="latin1")
        self._storage = storage

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full in KNOWN:
            return KNOWN[full]
        if module in ("torch", "torch.storage") and name in STORAGES:
            return _Dtype(STORAGES[name])
        if module == "torch" and name in DTYPES:
            return _Dtype(DTYPES[name])
        if any(full == each or (each.endswith(".") and full.startswith(each)) for each in NEEDLESS) and not any(
                full.startswith(each) for each in NOT_NEEDLESS):
            return _Needless
        raise _Refused(f"its pickle names {_shown(full)}, which files of weights do not need; if you trust it, load it "
                       "with torch and save its state_dict()")

    def persistent_load(self, pid: Any) -> _Storage:
        if not isinstance(pid, tuple) or len(pid) not in (5, 6) or pid[0] != "storage":
            raise _Refused("it names its tensors as torch.save does not")
        _, dtype, key, _, size = pid[:5]
        if not (isinstance(dtype, _Dtype) and isinstance(key, str) and _is_size(size)):
            raise _Refused("it describes its tensors as torch.save does not")
        if len(pid) == 6 and pid[5] is not None:
            raise _Refused("its tensors are views of each other, as PyTorch before 0.4 wrote them; save it again")
        return self._storage(key, dtype.known, size)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**48


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *further: Any) -> Tensor:
    """Returns a view of a storage, as torch's _rebuild_tensor_v2 and v3 (whose 6th argument is the dtype) do."""
    dtype = next((each.known for each in further if isinstance(each, _Dtype)), None)
    plain = isinstance(storage, _Storage) and isinstance(shape, tuple) and isinstance(strides, tuple)
    if not plain or len(shape) != len(strides) or not all(map(_is_size, (offset, *shape, *strides))):
        raise _Refused("it describes a tensor as torch.save does not")
    dtype = dtype or storage.dtype
    numbers = storage.size * storage.dtype.itemsize // dtype.itemsize
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    count = math.prod(shape)
    if len(shape) > 32 or count > numbers or (count and last >= numbers):
        raise _Refused(f"a tensor of shape {list(shape)} is larger than its storage of {numbers} numbers")

    def read() -> np.ndarray:
        if not count:
            return np.zeros(shape, dtype)
        steps = tuple(stride * dtype.itemsize for stride in strides)
        view = np.ndarray(shape, dtype, storage.content(), offset * dtype.itemsize, steps)
        return view if count == numbers else view.copy()  # a view would keep the whole storage in memory

    return Tensor(read, shape)


def _parameter(data: Any, *further: Any) -> Any:
    return data


ARRAYS = (Tensor, pickled_arrays.Array)
KNOWN: dict[str, Any] = {
    **pickled_arrays.KNOWN,
    "collections.OrderedDict": _Ordered,
    "torch._utils._rebuild_tensor_v2": pickled_arrays.Call(_tensor),
    "torch._utils._rebuild_tensor_v3": pickled_arrays.Call(_tensor),
    "torch._utils._rebuild_parameter": pickled_arrays.Call(_parameter),
    "torch.nn.parameter.Parameter": pickled_arrays.Call(_parameter),
}
