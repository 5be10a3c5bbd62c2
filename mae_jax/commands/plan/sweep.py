"""Compares combinations of config values by the compiler's estimates, and recommends one."""

import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from ml_collections import ConfigDict

from mae_jax import config as configs
from mae_jax import param_tree
from mae_jax.commands.plan import cost
from mae_jax.commands.plan.page import digits, money, verdict
from mae_jax.errors import UserError, did_you_mean
from mae_jax.recipe_version import former

Cell = dict[str, Any]


def parse(text: str, config: ConfigDict) -> list[Cell]:
    """Returns all combinations of 'batch_size=2048,4096;model.remat=none,full', as field → value; raises UserError."""
    fields: dict[str, list[Any]] = {}
    known = param_tree.flat(config)
    for part in filter(None, (part.strip() for part in text.split(";"))):
        name, equals, values = part.partition("=")
        if not equals or not values:
            raise UserError(f"--sweep: cannot read {part!r}; write 'batch_size=2048,4096;model.remat=none,full'")
        if name not in known:
            raise UserError(f"--sweep: unknown config field {name!r}; {former(name) or did_you_mean(name, known)}")
        if name in fields:
            raise UserError(f"--sweep: {name} is given twice")
        fields[name] = [_value(name, known[name], value.strip()) for value in values.split(",")]
    if not fields:
        raise UserError("--sweep is empty; write 'batch_size=2048,4096;model.remat=none,full'")
    return [dict(zip(fields, values, strict=True)) for values in itertools.product(*fields.values())]


def _value(name: str, old: Any, text: str) -> Any:
    """Parses a text as a value of the type of `old`; raises UserError."""
    try:
        if isinstance(old, bool):
            return {"true": True, "false": False}[text.lower()]
        if isinstance(old, int | float | str):
            return type(old)(text)
    except (KeyError, ValueError):
        pass
    raise UserError(f"--sweep: {name}={text}: expected a value such as {old!r}")


def changed(config: ConfigDict, cell: Cell) -> ConfigDict:
    """Returns a copy of the config with the cell's values; raises UserError for invalid ones."""
    copy = configs.from_dict(config.to_dict()).unlock()
    copy.update_from_flattened_dict(cell)
    configs.validate(copy)
    return copy.lock()


def run(config: ConfigDict, target: cost.Target, cells: list[Cell], best: int, examples: int, cache: str,
        progress: Callable[[str], AbstractContextManager[Any]]) -> dict[str, Any]:
    """Measures the cells; if there are more than `best`, all with the layers in a loop, then the best ones unrolled.

    Returns:
      'cells', each {'values', 'figures' or 'error'}, and 'recommended', the values of one of them, or None.
    """
    def measured(cell: Cell, **values: Any) -> dict[str, Any]:
        try:
            variant = changed(config, cell | values)
            return cost.figures(variant, target, cost.measure(variant, target, examples, cache, progress), examples)
        except UserError as error:
            return {"error": str(error)}

    in_loops = len(cells) > best or not target.chip
    rows = [{"values": cell, **measured(cell, **({"model.scan": True} if in_loops else {}))} for cell in cells]
    if in_loops and target.chip:
        ranked = sorted((row for row in rows if row.get("fits")), key=lambda row: _moved(config, row))
        for row in ranked[:best]:
            row["in_a_loop"] = {key: row[key] for key in ("hbm_gib_per_core", "bytes_per_core")}
            row.update(measured(row["values"]))
    return {"cells": rows, "recommended": _recommended(config, rows)}


def _moved(config: ConfigDict, row: dict[str, Any]) -> tuple[float, float]:
    """Returns the cost of a cell, for ranking: bytes moved per image, then GiB held."""
    images = row["values"].get("batch_size", config.batch_size) / row["devices"]
    return row["bytes_per_core"] / images, row["hbm_gib_per_core"]


def _recommended(config: ConfigDict, rows: list[dict[str, Any]]) -> Cell | None:
    """Returns the values of the fastest cell that fits; if no cell has a time, of the one that moves least."""
    timed = [row for row in rows if row.get("fits") and row["images_per_sec"]]
    if timed:
        return max(timed, key=lambda row: row["images_per_sec"])["values"]
    fitting = [row for row in rows if row.get("fits") or row.get("fits", False) is None]
    return min(fitting, key=lambda row: _moved(config, row))["values"] if fitting else None


def table(result: dict[str, Any], price: float | None = None) -> str:
    """Returns the recommended cell with its verdict, and a table of all; `price` per device-hour adds their cost."""
    rows = [("values", "GiB", "fits", "GB moved", "step s", "images/s", "MFU", "hours", "cost")]
    for row in result["cells"]:
        values = " ".join(f"{name}={value}" for name, value in row["values"].items())
        if "error" in row:
            rows.append((values, f"impossible: {row['error']}"))
            continue
        step = row["estimated_step_seconds"]
        rows.append((values, _text(row["hbm_gib_per_core"]), {True: "yes", False: "no", None: "?"}[row["fits"]],
                     _text(row["bytes_per_core"] and row["bytes_per_core"] / 1e9) + ("" if step else "*"),
                     _text(step), _text(row["images_per_sec"]), _text(row["mfu"], lambda mfu: f"{mfu:.1%}"),
                     _text(row["hours"]), _text(row["core_hours"] and row["core_hours"] * (price or 0), money)))
    shown = slice(1, None if price is not None else -1)
    width = max(len(row[0]) for row in rows)
    lines = [f"{row[0]:<{width}}  " + (row[1] if len(row) == 2 else "".join(f"{text:>10}" for text in row[shown]))
             for row in rows]
    best = next((row for row in result["cells"] if row["values"] == result["recommended"]), None)
    if any(not row.get("estimated_step_seconds") for row in result["cells"]):
        lines.append("* layers in a loop are counted once: it ranks cells of equal depth only")
    if not best:
        return "\n".join(["none: nothing fits", "", *lines])
    take = " ".join(f"--config.{name}={value}" for name, value in best["values"].items())
    return "\n".join([f"recommended: {take}", verdict(best, price), "", *lines])


def _text(value: float | None, form: Callable[[float], str] = digits) -> str:
    return "-" if value is None else form(value)
