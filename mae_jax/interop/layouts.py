"""The table of layouts: names and shapes of weights in other libraries, for exports and warm starts.

The module does not import JAX.
"""

import difflib
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from mae_jax import plugins
from mae_jax.errors import printable

logger = logging.getLogger(__name__)

# Prefixes of all names of a model, from PyTorch's wrappers and compiler, and from common attribute names.
PREFIXES = ("module.", "_orig_mod.", "teacher.", "student.", "model.", "backbone.", "base_encoder.", "encoder.", "net.",
            "deit.")
# Heads of pre-training in files of ViTs: of MoCo v3, DINO and BEiT, and transformers' pooler.
NO_PART = re.compile(r"head\.(\d+|mlp|last_layer)\.|lm_head\.|(vit\.)?pooler\.")
EXAMPLES = ("cls_token", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "vit.embeddings.cls_token",
            "vit.embeddings.patch_embeddings.projection.weight", "vit.encoder.layer.0.attention.attention.query.weight",
            "vit.layers.0.attention.q_proj.weight", "encoder/patch_embed/kernel", "encoder/block_00/attn/qkv/kernel")
Params = Any  # nested dict of arrays
State = Mapping[str, Any]  # name → array
OURS = "mae_jax"  # the only layout that can copy whole checkpoints too
FILE = "model.safetensors"  # name of the file of arrays in a folder, as in transformers and timm
LAYOUTS = {  # name → module:attribute
    "mae_jax": "mae_jax.interop.ours:LAYOUT",
    "mae": "mae_jax.interop.mae:LAYOUT",
    "timm": "mae_jax.interop.timm:LAYOUT",
    "upernet": "mae_jax.interop.upernet:LAYOUT",
    "hf": "mae_jax.interop.hf:LAYOUT",
    "stablehlo": "mae_jax.interop.stablehlo:LAYOUT",
    "detectron2": "mae_jax.interop.detectron2:LAYOUT",
    "onnx": "mae_jax.interop.onnx:LAYOUT",
}


class Exported(NamedTuple):
    """The part of a run that a layout writes.

    Attributes:
      params: mae_jax's parameters: all, or those of the encoder only (`Layout.whole`).
      config: of the run.
      classes: names of the head's classes; () if unknown.
    """

    params: Params
    config: ConfigDict
    classes: tuple[str, ...] = ()

    @property
    def outputs(self) -> int:
        """Number of outputs of the classifier's head; 0 without one."""
        return len(self.params.get("head", {}).get("bias", ()))


class Program(NamedTuple):
    """A file with a program that computes the encoder, with or without separate arrays.

    Attributes:
      file: its name in the folder.
      make: returns its content.
      run: (content, arrays in the folder, images uint8 [B, height, width, 3]) → outputs as those of `forward.forward`.
      tolerance: largest allowed error of the outputs, relative to the largest output.
    """

    file: str
    make: Callable[[Exported], bytes]
    run: Callable[[bytes, State, np.ndarray], Mapping[str, Any]]
    tolerance: float


class Layout(NamedTuple):
    """A layout of weights.

    Attributes:
      to: (mae_jax's parameters, their config) → name → float32 array, or a nested dict of arrays; raises UserError for
        a parameter that the layout does not have. None: the `program` holds the arrays.
      from_: (name → array, the config of the run that made them or None) → mae_jax's parameters; raises UserError.
        None: the layout cannot be read, or another layout reads it.
      recognizes: (names in a file, up to the first '/') → whether `from_` reads the file.
      refuses: config → why the method cannot be written, as the end of a sentence about the run; '': it can.
      whole: config → whether all parameters are written; otherwise only the encoder's are.
      part: (mae_jax's parameters, config) → the parameters to write, without those that do not change the output.
      describe: (config, result of `to`) → a line to print, such as the arguments of the library's model.
      files: endings of --to for a single file of weights; any other --to is a folder with FILE and further files.
      beside: returns the name → text of further files in the folder.
      loading: lines of Python that load the folder, named FOLDER, for its README.md.
      library: the Hugging Face Hub's name of the library that loads the folder; '' for none.
      program: a program to write to the folder; None: none.
    """

    to: Callable[[Params, ConfigDict], Any] | None = None
    from_: Callable[[State, ConfigDict | None], Params] | None = None
    recognizes: Callable[[Iterable[str]], bool] = lambda names: False
    refuses: Callable[[ConfigDict], str] = lambda config: ""
    whole: Callable[[ConfigDict], bool] = lambda config: True
    part: Callable[[Params, ConfigDict], Params] = lambda params, config: params
    describe: Callable[[ConfigDict, Mapping[str, np.ndarray]], str] = lambda config, state: ""
    files: tuple[str, ...] = (".safetensors",)
    beside: Callable[[Exported], dict[str, str]] = lambda exported: {}
    loading: Callable[[Exported], str] = lambda exported: ""
    library: str = ""
    program: Program | None = None


def layouts() -> Mapping[str, Layout]:
    """Returns the layouts by name, including those of plug-ins; each is imported when it is looked up."""
    return plugins.table("layouts", LAYOUTS)


def get(name: str) -> Layout:
    """Returns a layout by name; raises UserError, with the nearest name, if there is none."""
    return plugins.find("layouts", name, LAYOUTS, "--layout")


def read(state: State, config: ConfigDict | None) -> Params:
    """Converts the content of a file to mae_jax's parameters; returns it unchanged if no layout recognizes it.

    Common prefixes of the model's names are removed, such as 'module.' of PyTorch's wrappers or 'backbone.' of DINO's
    code. Arrays without such a prefix and heads of pre-training are left out, which is logged.

    Args:
      state: name → array, or a nested dict of arrays.
      config: of the run that made the file, if known.

    Raises:
      UserError: a name is unknown to the layout, or a required one is missing.
    """
    table, inside, begin = layouts(), dict(state), ""
    while inside:
        for name in table:
            layout = table[name]
            if layout.from_ and layout.recognizes(inside):
                inside = {key: value for key, value in inside.items() if not NO_PART.match(key)}
                _tell(state, inside, begin)
                return layout.from_(inside, config)
        prefix = next((prefix for prefix in PREFIXES if any(name.startswith(prefix) for name in inside)), "")
        if not prefix:
            break
        begin += prefix
        inside = {name.removeprefix(prefix): value for name, value in inside.items() if name.startswith(prefix)}
    return state


def _tell(state: State, inside: State, begin: str) -> None:
    if len(inside) < len(state):
        beside = sorted(name for name in state if not name.startswith(begin) or name.removeprefix(begin) not in inside)
        logger.info("read %d of %d arrays%s; left over are %s%s", len(inside), len(state),
                    f", those that begin with {begin!r}" if begin else "", ", ".join(map(printable, beside[:3])),
                    " ..." if len(beside) > 3 else "")


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns the end of an error message: the known name that is most similar to a name in a file."""
    return f"the nearest one expected is {difflib.get_close_matches(name, known, n=1, cutoff=0)[0]}"


def strange(names: Iterable[str]) -> str:
    """Returns why a file with these names is refused, as the end of a sentence: no layout recognizes them."""
    first = min(names, key=len, default="")
    if not first:
        return "it holds no arrays"
    return f"it holds no known ViT; it has a name {printable(first)}, and {nearest(first, EXAMPLES)}"


def mixture(config: ConfigDict) -> str:
    """Returns why a layout for a single encoder refuses a mixture of experts; '' for other methods."""
    if config.method.name != "moce":
        return ""
    return "is a mixture of experts, which other libraries' layouts do not have: extract one encoder with --for-task"
