"""Parameter trees by path: conversion to flat dicts, and merging for warm starts."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from mae_jax.errors import UserError

MAX_PARTS = 64  # most parts of a parameter's path; this package's have 6


def path(keys: tuple[Any, ...]) -> str:
    """Returns 'encoder/block_00/attn/qkv/kernel' for a JAX key path."""
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def flatten(tree: Any) -> dict[str, Any]:
    """Flattens a tree to path → leaf, with paths as from `path`."""
    return {path(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Converts path → leaf, with parts joined by '/', to nested dicts.

    Raises:
      UserError: a path is the prefix of another one, such as 'a' and 'a/b', or has more than MAX_PARTS parts.
    """
    tree: dict[str, Any] = {}
    for name, leaf in flat.items():
        *parents, last = name.split("/")
        if len(parents) >= MAX_PARTS:
            raise UserError(f"a parameter's name has {len(parents) + 1} parts; at most {MAX_PARTS}: {name[:60]!r}...")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {}) if isinstance(node, dict) else node
        if not isinstance(node, dict) or last in node:
            raise UserError(f"{name!r} names both a parameter and a subtree")
        node[last] = leaf
    return tree


def common(params: Any, loaded: Any) -> list[str]:
    """Returns the paths that both trees have.

    Raises:
      UserError: the shapes at a common path differ, or there is no common path.
    """
    ours, theirs = flatten(params), flatten(loaded)
    taken = sorted(ours.keys() & theirs.keys())
    for name in taken:
        if ours[name].shape != theirs[name].shape:
            raise UserError(f"init_from: {name} has shape {tuple(theirs[name].shape)}, "
                            f"but this model needs {tuple(ours[name].shape)}")
    if not taken:
        raise UserError(f"init_from: no parameter matches; it holds {', '.join(sorted(theirs)[:3])}, ...")
    return taken


def merge(params: Any, loaded: Any) -> tuple[Any, str]:
    """Replaces parameters by the loaded ones with the same path.

    Returns:
      The merged tree, with the dtypes and shardings of `params`, and a report of the paths that were taken from
      `loaded`, are new in `params`, or were left over in `loaded`.

    Raises:
      UserError: see `common`.
    """
    ours, theirs, taken = flatten(params), flatten(loaded), common(params, loaded)

    def pick(keys: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        name = path(keys)
        return _placed(theirs[name], leaf) if name in theirs else leaf

    report = f"taken: {_summary(taken)}; new: {_summary(ours.keys() - theirs.keys())}; " \
             f"left over: {_summary(theirs.keys() - ours.keys())}"
    return jax.tree_util.tree_map_with_path(pick, params), report


def split_eval_params(loaded: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits the contents of a checkpoint into parameters and extras.

    If the extras hold a teacher, its parameters replace the student's, as in evaluations (`Method.eval_params`).
    """
    extras = loaded.get("extras", {})
    parameters = {name: part for name, part in loaded.items() if name != "extras"}
    return parameters | extras.get("teacher", {}), extras


def place(values: Any, like: Any) -> Any:
    """Puts a tree of host arrays on the devices, with the dtypes and shardings of the leaves of `like`.

    Leaves that are JAX arrays are copied as they are.
    """
    return jax.tree.map(lambda value, like: value.copy() if isinstance(value, jax.Array) else _placed(value, like),
                        values, like)


def _placed(value: Any, like: jax.Array) -> jax.Array:
    value = np.asarray(value, like.dtype)
    return jax.make_array_from_callback(value.shape, like.sharding, lambda index: value[index])


def _summary(names: Any) -> str:
    """Returns the number of paths and their prefixes of two parts: '126 (decoder/embed, encoder/block_*)'."""
    names = list(names)
    prefixes = sorted({re.sub(r"block_\d+", "block_*", "/".join(name.split("/")[:2])) for name in names})
    return f"{len(names)} ({', '.join(prefixes)})" if names else "none"


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens a config to {'data.path': value, ...}; tuples become lists, as in JSON."""
    out = {}
    for key, value in config.items():
        if isinstance(value, Mapping | ConfigDict):
            out.update(flat(value, f"{prefix}{key}."))
        else:
            out[prefix + key] = list(value) if isinstance(value, tuple) else value
    return out
