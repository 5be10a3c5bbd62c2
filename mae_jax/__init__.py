"""Self-supervised pre-training of Vision Transformers in JAX.

The Python API is `mae_jax.load`, `embed`, `predict`, `recipe` and `train` (module `mae_jax.api`). It is imported, and
JAX with it, when one of these attributes is first read.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mae_jax.api import Embedded as Embedded
    from mae_jax.api import Encoder as Encoder
    from mae_jax.api import GuardError as GuardError
    from mae_jax.api import Prediction as Prediction
    from mae_jax.api import UserError as UserError
    from mae_jax.api import embed as embed
    from mae_jax.api import load as load
    from mae_jax.api import predict as predict
    from mae_jax.api import recipe as recipe
    from mae_jax.api import train as train

__version__ = "0.2.0"

_OF_API = ("Embedded", "Encoder", "GuardError", "Prediction", "UserError", "embed", "load", "predict", "recipe",
           "train")


def __getattr__(name: str) -> Any:
    if name not in _OF_API:
        raise AttributeError(f"module 'mae_jax' has no attribute {name!r}")
    return getattr(importlib.import_module("mae_jax.api"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_OF_API])
