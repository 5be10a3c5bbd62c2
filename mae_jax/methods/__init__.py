"""The table of methods, by name."""

from mae_jax.errors import UserError, nearest
from mae_jax.methods.base import Method
from mae_jax.methods.beit import BEiT
from mae_jax.methods.dino import DINO
from mae_jax.methods.mae import MAE
from mae_jax.methods.mixedae import MixedAE
from mae_jax.methods.moce import MoCE
from mae_jax.methods.segmentation import Segment
from mae_jax.methods.splitmask import SplitMask
from mae_jax.methods.supervised import Supervised

TABLE: dict[str, type[Method]] = {
    "beit": BEiT, "dino": DINO, "mae": MAE, "mixedae": MixedAE, "moce": MoCE, "segment": Segment,
    "splitmask": SplitMask, "supervised": Supervised}


def get(name: str) -> type[Method]:
    """Returns the method's class; raises UserError with the nearest name."""
    if name not in TABLE:
        raise UserError(f"unknown method.name {name!r}; {nearest(name, TABLE)}")
    return TABLE[name]
