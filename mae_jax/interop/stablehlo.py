"""Export of the encoder as a StableHLO program by `jax.export`, for any batch size, on CPUs, GPUs and TPUs.

The program's arguments are the arrays of the export by name, and images. It needs only JAX, not mae_jax or Flax.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from mae_jax.interop.forward import forward
from mae_jax.interop.layouts import Exported, Layout, Program, mixture
from mae_jax.param_tree import flatten, nest

PLATFORMS = ("cpu", "cuda", "tpu")
USED = ("encoder", "fc_norm", "head")
FILE = "encoder.stablehlo"


def used(params: Any) -> dict[str, Any]:
    """Returns the parameters of features and logits, without a decoder and mask token."""
    kept = {name: params[name] for name in USED if name in params}
    return {**kept, "encoder": {name: leaf for name, leaf in kept["encoder"].items() if name != "mask_token"}}


def make(exported: Exported) -> bytes:
    """Returns the serialized program (name → float32 array, images uint8 [b, height, width, 3]) → outputs of `forward`.
    """
    compute = forward(exported.config)

    def program(params: Mapping[str, jax.Array], images: jax.Array) -> dict[str, jax.Array]:
        return compute(nest(params), images)

    (batch,) = jax.export.symbolic_shape("b")
    images = jax.ShapeDtypeStruct((batch, *exported.config.data.image_size, 3), jnp.uint8)
    arrays = {name: jax.ShapeDtypeStruct(np.shape(leaf), jnp.float32)
              for name, leaf in flatten(used(exported.params)).items()}
    return bytes(jax.export.export(jax.jit(program), platforms=PLATFORMS)(arrays, images).serialize())


def run(content: bytes, arrays: Mapping[str, np.ndarray], images: np.ndarray) -> Mapping[str, Any]:
    """Returns the outputs of a serialized program for images uint8 [B, height, width, 3]."""
    return jax.export.deserialize(bytearray(content)).call(dict(arrays), images)


def _loading(exported: Exported) -> str:
    return f"""import jax.export, safetensors.numpy

encoder = jax.export.deserialize(bytearray(open("FOLDER/{FILE}", "rb").read()))
arrays = safetensors.numpy.load_file("FOLDER/model.safetensors")
outputs = encoder.call(arrays, images)  # uint8 [b, {exported.config.data.image_size[0]}, \
{exported.config.data.image_size[1]}, 3], RGB → float32: outputs["features"]{
    ', outputs["logits"]' if exported.outputs else ''}"""


LAYOUT = Layout(
    to=lambda params, config: used(params),
    refuses=mixture,
    whole=lambda config: config.method.name == "supervised",
    files=(),
    loading=_loading,
    program=Program(FILE, make, run, 1e-5),
)
