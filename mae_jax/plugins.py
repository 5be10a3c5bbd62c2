"""Plug-ins: additions of other packages to the tables of methods, sources, optimizers and so on. Imports no JAX.

There are two ways to add a plug-in. A package declares an entry point of the group `mae_jax.KIND`
(name = module:object), which is imported when its name is looked up. Or the config names installed modules
(`plugins=("package.module",)`), which are printed and imported, and call `register` during their import.
"""

import functools
import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import json
import os
import site
import sys
import sysconfig
import traceback
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mae_jax.errors import PLUG_INS, UserError, did_you_mean, printable

KINDS = {  # kind → the required type: relation, and the base class by name, since importing it would import JAX
    "methods": ("a subclass of", "mae_jax.methods.base.Method"),
    "sources": ("a function, or a module with a function load", ""),
    "optimizers": ("an instance of", "mae_jax.training.optim.Rule"),  # made by `reads`
    "evaluations": ("a subclass or an instance of", "mae_jax.evals.base.Evaluation"),
    "color_policies": ("a function, or an instance of", "mae_jax.data.transforms.color.Moving"),
    "layouts": ("an instance of", "mae_jax.interop.layouts.Layout"),
    "metric_sinks": ("a subclass of", "mae_jax.storage.metric_sinks.Sink"),
}

# kind → name → the object, and the module that registered it
_registered: dict[str, dict[str, tuple[Any, str]]] = {kind: {} for kind in KINDS}
_loaded: set[str] = set()  # modules of config.plugins that were imported
_printed: set[str] = set()  # entry points whose import was printed, such as 'methods.ijepa'
_recorded: dict[str, dict[str, str]] = {}  # the result of `used` in the run whose config.json was read last
PACKAGE = ("package", "version")


def register(kind: str, name: str, value: Any) -> None:
    """Adds an object to the table of a kind; plug-ins call this during their import.

    Raises:
      UserError: there is no such kind, or another module has registered the name.
    """
    caller = sys._getframe(1).f_globals.get("__name__", "?")
    if kind not in KINDS:
        raise UserError(f"the plug-in {caller} registers {name!r} as {kind!r}; {did_you_mean(kind, KINDS)}")
    known = _registered[kind].setdefault(name, (value, caller))
    if known[1] != caller:
        raise UserError(f"{kind}: {name!r} is given by two plug-ins, {known[1]} and {caller}")
    _registered[kind][name] = (value, caller)


def load(modules: Iterable[str], where: str = "config.plugins", stored: str = "") -> None:
    """Imports the modules that a config names, and prints each on stderr before its import; loaded ones are skipped.

    Args:
      modules: names such as 'package.module'.
      where: what names them, for messages.
      stored: folder of the stored config that names them, which may name only installed modules; '' if the user names
        them, in a recipe or by a flag.

    Raises:
      UserError: a name is invalid, or a module is not installed or fails when imported.
    """
    for name in [modules] if isinstance(modules, str) else modules:
        if not isinstance(name, str) or not all(part.isidentifier() for part in name.split(".")):
            raise UserError(f"plugins={name!r} of {where}: expected the name of an installed module, such as "
                            "'package.module'; paths are not imported")
        if name not in _loaded:
            if stored:
                _check_installed(name, where, stored)
            print(f"plug-in: importing {name}, which {where} names", file=sys.stderr, flush=True)
            _imported(name, f"the plug-in {name} of {where}")
            _loaded.add(name)


def table(kind: str, built_in: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the table of a kind, name → object: built-in objects and those of plug-ins.

    A string value, 'module:attribute' or 'module', stands for an object that is imported when its name is looked up.

    Raises:
      UserError: a registered plug-in has a built-in name. For an entry point, the look-up of its name raises this.
    """
    for name, (_, module) in _registered[kind].items():
        if name in built_in:
            raise UserError(f"{kind}: the plug-in {module} gives {name!r}, which is built in; choose another")
    return _Table(kind, built_in)


def find(kind: str, name: str, built_in: Mapping[str, Any], field: str, others: Iterable[str] = ()) -> Any:
    """Looks up a name in the table of a kind.

    Args:
      kind, built_in: as in `table`.
      name: the name to look up.
      field: the config field that holds it, such as 'method.name', for messages.
      others: further valid values of the field, for messages.

    Raises:
      UserError: the name is unknown (the message has the nearest known one), or two plug-ins have it.
    """
    check(kind, name, built_in, field, others)
    return table(kind, built_in)[name]


def check(kind: str, name: str, built_in: Mapping[str, Any], field: str, others: Iterable[str] = ()) -> None:
    """Raises UserError for an unknown name, as `find` does, but imports nothing."""
    known = table(kind, built_in)
    if name in known:
        return
    if before := _recorded.get(f"{kind}.{name}"):
        raise UserError(f"{field}={name!r} came from the package {_said(before)}, which is not installed here")
    raise UserError(f"unknown {field} {name!r}; {did_you_mean(str(name), [*known, *others])}")


def used(named: Mapping[str, Iterable[str]]) -> dict[str, dict[str, str]]:
    """Returns the packages whose entry points provide the given names of each kind: 'KIND.NAME' → package, version."""
    return {f"{kind}.{name}": {"package": point.dist.name, "version": point.dist.version}
            for kind, names in named.items() for name in names for point in _entry_points(kind).get(name, ())
            if point.dist}


def expect(recorded: Mapping[str, dict[str, str]]) -> None:
    """Stores the result of `used` from a run's config.json, so that messages can name missing packages.

    It replaces the result of a run that was read before.

    Raises:
      ValueError: `recorded` is not a result of `used`.
    """
    _recorded.clear()
    for key, package in recorded.items():
        if not (isinstance(package, dict) and all(isinstance(package.get(what), str) for what in PACKAGE)):
            raise ValueError(f"plugins: {key!r} has no package and version, but {package!r}")
    _recorded.update(recorded)


def missing(kind: str, known: Iterable[str]) -> list[str]:
    """Returns a message for each name of a kind that `expect` stored and `known` lacks: which package provided it."""
    return [f"{printable(repr(name))} came from the package {_said(package)}, which does not give it here"
            for key, package in _recorded.items() for of, _, name in [key.partition(".")]
            if of == kind and name not in known]


class _Table(Mapping[str, Any]):
    """See `table`."""

    def __init__(self, kind: str, built_in: Mapping[str, Any]) -> None:
        self.kind, self.built_in = kind, built_in

    def __iter__(self) -> Iterator[str]:
        return iter({**self.built_in, **_registered[self.kind], **_entry_points(self.kind)})

    def __len__(self) -> int:
        return len(set(self))

    def __contains__(self, name: object) -> bool:
        return name in self.built_in or name in _registered[self.kind] or name in _entry_points(self.kind)

    def __getitem__(self, name: str) -> Any:
        points = _entry_points(self.kind).get(name, ())
        givers = [f"the package {_package(point)}" for point in points]
        if name in self.built_in:
            if points:
                raise UserError(f"{self.kind}: {givers[0]} gives {name!r}, which is built in; it must choose another "
                                "name")
            return _resolved(self.built_in[name])
        if len(points) > 1:
            raise UserError(f"{self.kind}: {name!r} is given by {' and '.join(givers)}; uninstall one of them")
        value, module = _registered[self.kind].get(name, (None, ""))
        if points:
            found = _of_entry_point(self.kind, points[0])
            if module and found is not _resolved(value, f"{name!r} of {self.kind}, which the plug-in {module} gives,"):
                raise UserError(f"{self.kind}: {name!r} is given by the plug-in {module} and by {givers[0]}")
            return _checked(self.kind, name, found, givers[0])
        if module:
            giver = f"the plug-in {module}"
            return _checked(self.kind, name, _resolved(value, f"{name!r} of {self.kind}, which {giver} gives,"), giver)
        raise KeyError(name)


def _checked(kind: str, name: str, found: Any, giver: str) -> Any:
    """Returns the object of a plug-in; raises UserError if its type does not fit the kind."""
    if fits(kind, found):
        return found
    what = f"the class {found.__qualname__}" if isinstance(found, type) else f"of the type {type(found).__name__}"
    raise UserError(f"{kind}: what {giver} gives as {name!r} is {what}; expected {' '.join(KINDS[kind]).strip()}")


def fits(kind: str, found: Any) -> bool:
    """Returns whether an object has the type that a kind requires; base classes are compared by name, not imported."""
    words, base = KINDS[kind]

    def derived(of: type) -> bool:
        return any(f"{each.__module__}.{each.__qualname__}" == base for each in of.__mro__)

    if kind == "sources":
        return callable(getattr(found, "load", found))
    if "function" in words and callable(found) and not isinstance(found, type):
        return True
    if isinstance(found, type):
        return "subclass" in words and derived(found)
    return "instance" in words and derived(type(found))


@functools.cache
def _entry_points(kind: str) -> dict[str, tuple[importlib.metadata.EntryPoint, ...]]:
    found: dict[str, tuple[importlib.metadata.EntryPoint, ...]] = {}
    for point in importlib.metadata.entry_points(group=f"mae_jax.{kind}"):
        found[point.name] = (*found.get(point.name, ()), point)
    return found


def _of_entry_point(kind: str, point: importlib.metadata.EntryPoint) -> Any:
    """Imports the object of an entry point, and prints this on stderr before."""
    package = f"the package {_package(point)}"
    if f"{kind}.{point.name}" not in _printed:
        print(f"plug-in: importing {point.module} of {package}, for {point.name!r} of {kind}", file=sys.stderr,
              flush=True)
        _printed.add(f"{kind}.{point.name}")
    return _attribute(_imported(point.module, f"the plug-in {point.module} of {package}"), point.attr,
                      f"{package} names {point.value} as {point.name!r} of mae_jax.{kind}")


def _said(package: Mapping[str, str]) -> str:
    return printable(" ".join(package[what] for what in PACKAGE))


def _package(point: importlib.metadata.EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else point.value


def _imported(module: str, what: str) -> Any:
    """Imports a module of a plug-in; any error becomes the cause of a UserError that names the module."""
    PLUG_INS.add(module.split(".")[0])
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and (module + ".").startswith(error.name + "."):
            raise UserError(f"{what} is not installed here: there is no module {error.name!r}") from error
        raise UserError(_failed(module, what, error)) from error
    except UserError as error:
        raise UserError(f"{what} cannot be used: {error}") from error
    except (Exception, SystemExit) as error:  # SystemExit: a script instead of a module
        raise UserError(_failed(module, what, error)) from error


def _check_installed(name: str, where: str, stored: str) -> None:
    """Raises UserError unless a module belongs to an installed package; imports nothing.

    This keeps a stranger's workdir from running its own code: `python -m` also imports from the current folder, where
    `runs.theirs.payload` would be found even without any __init__.py.
    """
    spec, parts = None, name.split(".")
    for count, part in enumerate(parts):
        module = ".".join(parts[: count + 1])
        try:
            spec = (importlib.machinery.PathFinder.find_spec(module, spec.submodule_search_locations or ()) if spec
                    else importlib.util.find_spec(part))
        except ValueError:  # the module has no spec, such as __main__
            spec = None
        if spec is None:
            raise UserError(f"the plug-in {name} of {where} is not installed here: there is no module {module!r}")
        if not spec.has_location and spec.origin in ("built-in", "frozen"):
            continue
        if not spec.origin or not spec.has_location:
            why = f"{module} is a folder without __init__.py"
        else:
            depth = count + (spec.submodule_search_locations is not None)
            why = _not_installed(parts[0], Path(spec.origin), depth, stored)
        if why:
            raise UserError(f"{where} names the plug-in {name}, which is not imported, since {why}; install its "
                            f"package, or name it yourself with --config.plugins='(\"{name}\",)' or in the recipe")


def _not_installed(top: str, file: Path, depth: int, stored: str) -> str:
    """Returns why a module's file does not belong to an installed package; '' if it does.

    Args:
      top: the first part of the module's name.
      file: of the module.
      depth: number of package folders that contain it.
      stored: as in `load`.
    """
    base = file.parents[depth]  # the folder in Python's search path
    if _below(file, stored) and (_same(base, stored) or not _below(base, stored)):
        return f"{file} lies beside what names it"
    given = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]  # the user trusts these
    if any(_below(base, place) for place in _places()) or any(_same(base, path) for path in given):
        return ""
    if _below(file, os.getcwd()) and not _editable(top, file):
        return f"{file} lies below the current folder and is of no installed package"
    return ""


def _places() -> list[str]:
    """Returns the folders of the standard library and of installed packages."""
    paths = sysconfig.get_paths()
    user = [site.getusersitepackages()] if site.ENABLE_USER_SITE else []
    return [*(paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")), *site.getsitepackages(), *user]


def _editable(top: str, file: Path) -> bool:
    """Returns whether an editable installation (PEP 610) has a top-level module of this name, and contains the file."""
    for package in importlib.metadata.distributions(path=_places()):
        direct = json.loads(package.read_text("direct_url.json") or "{}")
        if not direct.get("dir_info", {}).get("editable"):
            continue
        names = {package.name.replace("-", "_").lower(), *(package.read_text("top_level.txt") or "").split(),
                 *(point.module.split(".")[0] for point in package.entry_points)}
        if top in names and _below(file, urllib.request.url2pathname(urllib.parse.urlparse(direct["url"]).path)):
            return True
    return False


def _below(path: str | Path, folder: str | Path) -> bool:
    """Returns whether a path is a folder or inside it, with or without resolving symbolic links in either."""
    return any(Path(real(path)).is_relative_to(other(folder)) for real in (os.path.abspath, os.path.realpath)
               for other in (os.path.abspath, os.path.realpath))


def _same(one: str | Path, other: str | Path) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)


def _failed(module: str, what: str, error: BaseException) -> str:
    """Returns the message of a failed import, with the plug-in's file and line."""
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [frame for frame in frames if "importlib" not in frame.filename and frame.filename != __file__]
    at = f" ({theirs[-1].filename}, line {theirs[-1].lineno})" if theirs else ""
    text = " ".join(str(error).split())
    return f"{what} fails when imported: {type(error).__name__}: {text}{at}; python -c 'import {module}' shows all"


def _attribute(module: Any, names: str | None, what: str) -> Any:
    """Returns a module's attribute, such as 'object' or 'object.part', or the module itself for '' or None.

    Raises:
      UserError: there is no such attribute; the message begins with `what`.
    """
    found = module
    for attribute in names.split(".") if names else ():
        if not hasattr(found, attribute):
            raise UserError(f"{what}; there is no {attribute!r}")
        found = getattr(found, attribute)
    return found


def _resolved(value: Any, what: str = "") -> Any:
    """Imports the object of a string 'module:attribute' or 'module'; returns other values unchanged.

    Args:
      value: from a table.
      what: description for messages, if a plug-in registered the value.
    """
    if not isinstance(value, str):
        return value
    module, _, names = value.partition(":")
    return _attribute(_imported(module, what) if what else importlib.import_module(module), names, f"{what} is {value}")
