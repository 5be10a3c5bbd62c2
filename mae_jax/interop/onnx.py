"""Export of the encoder as an ONNX model for any batch size, by jax2onnx (extra `onnx`).

jax2onnx does not support `jax.lax.platform_dependent`, which the linear layers use; it gets the branch of CPUs and
GPUs.
"""

import contextlib
import logging
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any
from unittest import mock

import jax
import numpy as np
from ml_collections import ConfigDict

from mae_jax.errors import UserError
from mae_jax.interop.forward import forward
from mae_jax.interop.layouts import Exported, Layout, Program, mixture

FILE = "model.onnx"
PACKAGES = ("jax2onnx", "onnx", "onnxruntime")
MAX_BYTES = 2**31 - 2**20  # most bytes of weights: the limit of a protocol buffer, minus 1 MiB for the graph
INPUT = "images"


def make(exported: Exported) -> bytes:
    """Returns the serialized ONNX model: 'images' uint8 [B, height, width, 3] → outputs of `forward.forward`.

    Raises:
      UserError: the model would exceed the size limit of ONNX files.
    """
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(exported.params))
    if size > MAX_BYTES:
        raise UserError(f"--layout=onnx: an ONNX file has at most 2 GB, and the weights are {size / 1e9:.1f} GB; use "
                        "--layout=stablehlo")
    compute = forward(exported.config)
    names = ["features"] + ["logits"] * bool(exported.outputs)

    def model(images: jax.Array) -> tuple[jax.Array, ...]:
        found = compute(exported.params, images)
        return tuple(found[name] for name in names)

    images = jax.ShapeDtypeStruct(("B", *exported.config.data.image_size, 3), np.dtype(np.uint8))
    with _quiet("jax2onnx", "onnx_ir"):
        import jax2onnx

        with mock.patch.object(jax.lax, "platform_dependent", lambda *values, default, **others: default(*values)):
            made = jax2onnx.to_onnx(model, inputs=[images], model_name="encoder", input_names=[INPUT],
                                    output_names=names)
    return made.SerializeToString()


@contextlib.contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """Context without warnings of these loggers: tracebacks of plug-ins that are not used, and lines about shapes."""
    loggers = [logging.getLogger(name) for name in names]
    before = [each.level for each in loggers]
    for each in loggers:
        each.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for each, level in zip(loggers, before, strict=True):
            each.setLevel(level)


def run(content: bytes, arrays: Mapping[str, np.ndarray], images: np.ndarray) -> Mapping[str, Any]:
    """Returns the outputs of an ONNX model for images uint8 [B, height, width, 3], by onnxruntime on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {INPUT: images}), strict=True))


def _refuses(config: ConfigDict) -> str:
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise UserError(f"--layout=onnx needs {' and '.join(missing)}; run: pip install 'mae_jax[onnx]'")
    return mixture(config)


def _loading(exported: Exported) -> str:
    height, width = exported.config.data.image_size
    names = "features, logits" if exported.outputs else "features,"
    return f"""import onnxruntime

session = onnxruntime.InferenceSession("FOLDER/{FILE}")
{names} = session.run(None, {{"{INPUT}": images}})  # uint8 [B, {height}, {width}, 3], RGB → float32"""


LAYOUT = Layout(
    refuses=_refuses,
    whole=lambda config: config.method.name == "supervised",
    files=(),
    loading=_loading,
    program=Program(FILE, make, run, 1e-4),
)
