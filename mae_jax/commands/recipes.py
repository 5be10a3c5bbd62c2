"""Recipes by name or path, and their fields with the comments in the table of defaults. Imports no JAX."""

import ast
import difflib
import io
import re
import tokenize
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

import mae_jax
from mae_jax.config import choices
from mae_jax.errors import UserError, did_you_mean

MAX_LISTED_RECIPES = 8  # in a message
VALUE_WIDTH = 36  # columns of --help before the comments


def folder() -> Path:
    """Returns the folder of the recipes: inside an installed package, beside the package in a checkout."""
    package = Path(mae_jax.__file__).parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def names() -> list[str]:
    """Returns the names of the recipes in the package."""
    return sorted(file.stem for file in folder().glob("*.py") if file.stem != "__init__")


def locate(recipe: str) -> str:
    """Returns 'path[:argument]' for a recipe 'name[:argument]'; a path (with '/', or ending in .py) is unchanged.

    Raises:
      UserError: no recipe has the name.
    """
    name, colon, arg = recipe.partition(":")
    if "/" in name or name.endswith(".py"):
        return recipe
    if name not in names():
        raise UserError(f"unknown recipe {name!r}; {alike(name, names())}; a file of your own is given as a path, "
                        f"./{name or 'recipe'}.py")
    return f"{folder() / name}.py{colon}{arg}"


def alike(name: str, known: list[str]) -> str:
    """Returns the end of an error line: the most similar known names, and the number of the others."""
    close = difflib.get_close_matches(name, known, n=MAX_LISTED_RECIPES, cutoff=0)
    more = f" and {len(known) - MAX_LISTED_RECIPES} more" if len(known) > MAX_LISTED_RECIPES else ""
    return did_you_mean(name, close) + more


def with_paths(argv: list[str]) -> list[str]:
    """Replaces the name of a recipe in --config by its path, by which ml_collections loads it.

    Raises:
      UserError: no recipe has the name.
    """
    out = list(argv)
    for at, arg in enumerate(argv):
        flag, equals, value = arg.partition("=")
        if flag not in ("--config", "-config"):
            continue
        if equals:
            out[at] = f"{flag}={locate(value)}"
        elif at + 1 < len(argv):
            out[at + 1] = locate(argv[at + 1])
    return out


def overridden(argv: list[str]) -> set[str]:
    """Returns the dotted names of the config fields that a command line sets."""
    found = (re.match(r"--?config\.([\w.]+)", arg) for arg in argv[1:])
    return {match[1] for match in found if match}


def fields(config: ConfigDict) -> str:
    """Returns the fields of a config, one per line: name, value, and the comment of its default."""
    said, allowed = comments("config/__init__.py", "DEFAULTS") | own_comments(config.method.name), choices()
    lines = [(f"  {name}={value!r}", with_choices(said.get(name, ""), allowed.get(name, ())))
             for name, value in leaves(config.to_dict())]
    return "\n".join(f"{line:<{VALUE_WIDTH}}  # {text}" if text else line for line, text in lines)


def with_choices(text: str, allowed: Collection[str]) -> str:
    """Returns the description of a field, with its allowed values unless the text names them all."""
    missing = any(choice not in text for choice in allowed)
    return "; ".join(filter(None, (text, f"one of {', '.join(allowed)}"))) if missing else text


def leaves(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (dotted name, value) of nested fields."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def own_comments(method: str) -> dict[str, str]:
    """Returns {'method.field': comment} for a method; {} for a method of a plug-in."""
    table = _assigned(ast.parse(_source("methods/fields.py")), "TABLE")
    rows = {ast.literal_eval(key): ast.unparse(value) for key, value in zip(table.keys, table.values, strict=True)
            if key is not None}
    found = comments("methods/fields.py", rows[method]) if method in rows else {}
    return {f"method.{name}": text for name, text in found.items()}


def comments(file: str, name: str) -> dict[str, str]:
    """Returns {'data.path': comment} for the dict that a module of the package assigns to a name.

    The comment of a field is at the end of the line of its value, or on the lines before it. A line with such a comment
    holds one field only.
    """
    source = _source(file)
    tree, said, alone = ast.parse(source), {}, set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            said[token.start[0]] = token.string.lstrip("# ")
            if not token.line[:token.start[1]].strip():
                alone.add(token.start[0])

    def before(line: int) -> str:
        lines: list[str] = []
        while (line := line - 1) in alone:
            lines.insert(0, said[line])
        return " ".join(lines)

    def walk(table: ast.Dict, prefix: str) -> Iterator[tuple[str, str]]:
        for key, value in zip(table.keys, table.values, strict=True):
            if key is None:
                if isinstance(value, ast.Name):  # **OTHER
                    yield from walk(_assigned(tree, value.id), prefix)
            elif isinstance(value, ast.Dict):
                yield from walk(value, f"{prefix}{ast.literal_eval(key)}.")
            elif text := said.get(value.end_lineno or 0) or before(key.lineno):
                yield f"{prefix}{ast.literal_eval(key)}", text

    return dict(walk(_assigned(tree, name), ""))


def _assigned(tree: ast.Module, name: str) -> ast.Dict:
    """Returns the dict that a module assigns to a name."""
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Dict) and ast.unparse(node.target) == name:
            return node.value
    raise LookupError(f"no table {name} in {tree}")


def _source(file: str) -> str:
    return (Path(mae_jax.__file__).parent / file).read_text()
