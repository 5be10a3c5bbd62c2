"""The table of layouts: with what names and shapes weights are written, and recognized where training starts from them.

Importing this imports no JAX.
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

# How the names of a whole model may begin: of PyTorch's wrappers and compiler, and of what people's code holds it in.
PREFIXES = ("module.", "_orig_mod.", "teacher.", "student.", "model.", "backbone.", "base_encoder.", "encoder.", "net.",
            "deit.")
# Heads that pre-training leaves behind a ViT: of MoCo v3, DINO and BEiT, and transformers' pooler.
NO_PART = re.compile(r"head\.(\d+|mlp|last_layer)\.|lm_head\.|(vit\.)?pooler\.")
EXAMPLES = ("cls_token", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "vit.embeddings.cls_token",
            "vit.embeddings.patch_embeddings.projection.weight", "vit.encoder.layer.0.attention.attention.query.weight",
            "vit.layers.0.attention.q_proj.weight", "encoder/patch_embed/kernel", "encoder/block_00/attn/qkv/kernel")
Params = Any  # nested dict of arrays
State = Mapping[str, Any]  # name → array
OURS = "mae_jax"  # the only one that copies whole checkpoints too
FILE = "model.safetensors"  # the arrays in a folder, as transformers and timm call them
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
    """What a layout writes of a run."""

    params: Params  # ours: all of them, or the encoder alone (`Layout.whole`)
    config: ConfigDict
    classes: tuple[str, ...] = ()  # names of what the head has rows for; () where they are not known

    @property
    def outputs(self) -> int:
        """Rows of the classifier's head, 0 without one."""
        return len(self.params.get("head", {}).get("bias", ()))


class Program(NamedTuple):
    """A file that computes what the encoder does, in place of a list of arrays or beside it.

    Attributes:
      file: its name in the folder.
      make: returns its content.
      run: (that content, the arrays beside it, images uint8 [B, height, width, 3]) → name → float32 array, as
        `forward.forward` gives them.
      tolerance: how far results may be from ours, of the largest.
    """

    file: str
    make: Callable[[Exported], bytes]
    run: Callable[[bytes, State, np.ndarray], Mapping[str, Any]]
    tolerance: float


class Layout(NamedTuple):
    """Weights as another library has them.

    Attributes:
      to: (our parameters, their config) → what is written: name → float32 array, or a nested dict of such. Raises
        UserError for a parameter that has no place there. None: no arrays, the `program` holds them.
      from_: (what was read, the config of the run that made it, or None) → our parameters; None: it is not read, or
        another layout reads it. Raises UserError.
      recognizes: (the names that a file has, up to the first '/') → whether `from_` reads it.
      refuses: config → why nothing of its method can be written, as the end of a sentence about the run; '': it can.
      whole: config → whether all parameters are written; else the encoder alone is.
      part: (our parameters, config) → those of them that are written, where others change nothing of what it computes.
      describe: (config, what is written) → a line to print, such as the arguments of the library's model.
      files: endings of a --to that is one file of weights; else it is a folder, with FILE and what lies beside it.
      beside: name → text of further files in the folder.
      loading: lines of Python that load the folder, which they call FOLDER, for its README.md.
      library: the hub's name of the library that loads the folder; '' for none.
      program: what is written in the folder besides.
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
    """Returns the layouts by name, those of plug-ins too; a layout is imported when it is asked for."""
    return plugins.table("layouts", LAYOUTS)


def get(name: str) -> Layout:
    """Returns a layout; raises UserError with the nearest name."""
    return plugins.find("layouts", name, LAYOUTS, "--layout")


def read(state: State, config: ConfigDict | None) -> Params:
    """Returns our parameters of what a file holds; as they are, where no layout recognizes it.

    Args:
      state: name → array, or a nested dict of such. Where all names of the model begin alike, as with 'module.' of
        PyTorch's wrappers or 'backbone.' of DINO's code, that beginning does not count. What lies beside the model, and
        heads of pre-training, are left over, and told.
      config: of the run that made it, where that is known.

    Raises:
      UserError: a name that the layout does not know, or one that it misses.
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
        logger.info("%d arrays of %d%s are read; left over are %s%s", len(inside), len(state),
                    f" begin with {begin!r} and" if begin else "", ", ".join(map(printable, beside[:3])),
                    " ..." if len(beside) > 3 else "")


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns the end of a refusal: the known name that is the most like one that a file has."""
    return f"the nearest one expected is {difflib.get_close_matches(name, known, n=1, cutoff=0)[0]}"


def strange(names: Iterable[str]) -> str:
    """Returns why a file of these names is refused, as the end of a sentence: no layout knows them."""
    first = min(names, key=len, default="")
    if not first:
        return "it holds no arrays"
    return f"it holds no ViT that is known here; of its names one is {printable(first)}, and {nearest(first, EXAMPLES)}"


def mixture(config: ConfigDict) -> str:
    """Returns why a layout of one encoder refuses a mixture of experts; '' for other methods."""
    if config.method.name != "moce":
        return ""
    return "is a mixture of experts, which no layout of others has: cut one encoder out of it with --for-task"
