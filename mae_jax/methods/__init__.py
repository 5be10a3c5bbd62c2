"""The table of methods, by name. Modules of methods, and with them JAX, are imported on first use."""

from typing import TYPE_CHECKING, Any

from mae_jax import plugins
from mae_jax.errors import UserError
from mae_jax.methods import fields

if TYPE_CHECKING:
    from ml_collections import ConfigDict

    from mae_jax.data import DataInfo, OpenedData
    from mae_jax.methods.base import Method

TABLE = {  # name → module:class
    "beit": "mae_jax.methods.beit:BEiT",
    "detection": "mae_jax.methods.detection:Detection",
    "dino": "mae_jax.methods.dino:DINO",
    "mae": "mae_jax.methods.mae:MAE",
    "mixedae": "mae_jax.methods.mixedae:MixedAE",
    "moce": "mae_jax.methods.moce:MoCE",
    "segment": "mae_jax.methods.segmentation:Segment",
    "splitmask": "mae_jax.methods.splitmask:SplitMask",
    "supervised": "mae_jax.methods.supervised:Supervised",
}


def get(name: str) -> "type[Method]":
    """Returns the class of a method of the table or of a plug-in; raises UserError for an unknown name."""
    return plugins.find("methods", name, TABLE, "method.name")


def build(config: "ConfigDict", data: "DataInfo") -> "Method":
    """Builds the method of a resolved config (without 'auto') for data with this info; raises UserError."""
    return get(config.method.name)(config, data)


def with_data(config: "ConfigDict") -> "tuple[Method, OpenedData]":
    """Opens the data of a resolved config (without 'auto') and builds its method for them; raises UserError."""
    from mae_jax.data import OpenedData

    opened = OpenedData(config, get(config.method.name).data_needs(config))
    return build(config, opened.info), opened


def defaults(name: str) -> dict[str, Any]:
    """Returns the method's own config fields; imports JAX only for a method of a plug-in."""
    return fields.TABLE[name] if name in fields.TABLE else get(name).defaults


def own_defaults(method: "ConfigDict") -> dict[str, Any]:
    """Returns `defaults` for a config group `method`; raises UserError if it has fields of another method."""
    own = defaults(method.name)
    if other := sorted(set(method) ^ {"name", *own}):
        raise UserError(f"method.name={method.name!r} with the fields of another method: method.{other[0]} is of only "
                        "one of the two; use a recipe of that method")
    return own


def small(name: str) -> dict[str, Any]:
    """Returns the values of the method's own fields in `runlocal` configs."""
    return {key: fields.SMALL[key] for key in fields.SMALL.keys() & fields.TABLE[name]} if name in fields.TABLE \
        else get(name).small
