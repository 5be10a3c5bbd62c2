"""The config.json of a workdir: writing, reading, and the check of a resumed config and its data."""

import contextlib
import fnmatch
import importlib.metadata
import json
import logging
import subprocess
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from mae_jax import __version__, param_tree, plugins, recipe_version
from mae_jax import config as configs
from mae_jax.errors import UserError, printable
from mae_jax.interop import layouts
from mae_jax.runtime import bounded_json
from mae_jax.storage import file_kinds, metric_sinks, safetensors_file, weight_files, workdir_lock
from mae_jax.storage.file_kinds import unreadable
from mae_jax.storage.paths import locate, make_folder, read_bytes, replace_text

logger = logging.getLogger(__name__)

# Fields that a resumed run may change: they affect monitoring, placement and the end of a run, not past training.
MAY_CHANGE = ("train.duration", "train.patience", "mesh.*", "eval.*", "checkpoint.*", "log.*", "guard.max_*",
              "guard.stall_seconds", "data.threads", "data.workers", "data.prefetch", "train.compilation_cache",
              "model.scan", "model.remat", "plugins", "method.clusters")  # its content is compared
# Fields that it may also change if the data are the same, by the names of examples and samples of their content.
MAY_MOVE = ("data.path", "data.layout", "data.mask_key", "data.tokens")
MAX_LISTED_CLASSES = 10  # maximum number of names in a message
ARCHIVED = "$Format:%H$"  # `git archive` inserts the commit here, by .gitattributes
DAMAGED = (ValueError, KeyError, AttributeError, TypeError)  # errors from the content of a damaged file
PACKAGES = ("mae_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorflow", "numpy", "pillow")
OTHER_NAMES = {  # other distributions of the same package
    "tensorflow": ("tensorflow-cpu", "tensorflow-intel", "tensorflow-macos", "tensorflow-rocm", "tf-nightly",
                   "tf-nightly-cpu"),
    "pillow": ("pillow-simd",),
}


def changes(workdir: epath.Path, config: ConfigDict, inputs: Any = None, origin: epath.Path | None = None) -> list[str]:
    """Returns the changes of a resumed run as text; raises UserError if a field has changed that must not.

    Args:
      workdir: the workdir.
      config: the config of the resumed run.
      inputs: data.Inputs; None: the paths of the data must not change, unless `origin` is given.
      origin: another workdir with the data of `config`, which are compared instead of `inputs`.
    """
    def why_other_data() -> str:
        after = _data_of(inputs) if inputs else recorded_data(origin) if origin else {}
        return _why_other_data(recorded_data(workdir), after)

    stored = _stored_config(workdir)
    return compare(stored, config, why_other_data) if stored else []


def continued(workdir: epath.Path, config: ConfigDict) -> ConfigDict:
    """Returns the config of a resumed run, with the stored values of the fields that the first start has resolved.

    These are data.range=auto, the fields of model.auto, and recipe_version if it is the current one, which is the
    default of recipes; any other recipe_version is kept, and must be that of the run. A new run's config is unchanged.
    """
    stored = _stored_config(workdir)
    newest = recipe_version.CURRENT
    if stored is not None and config.data.range == "auto" != stored.data.range:
        config = config.copy_and_resolve_references()
        config.data.range = stored.data.range
    if stored is not None and config.model.auto:
        config = config.copy_and_resolve_references()
        config.model.update({field: stored.model[field] for field in config.model.auto}, auto=())
    if stored is None or config.recipe_version != newest or stored.recipe_version == newest:
        return config
    config = config.copy_and_resolve_references()
    config.recipe_version = stored.recipe_version
    logger.info("recipe_version %d, that of the start of the run; a new run has %d", stored.recipe_version, newest)
    return config


def data_changes(workdir: epath.Path, inputs: Any, has_class_head: bool) -> list[str]:
    """Returns the differences of the data from those recorded in the workdir, as text.

    Args:
      workdir: the workdir.
      inputs: data.Inputs.
      has_class_head: whether the classes must be the same.

    Raises:
      UserError: the classes differ, and `has_class_head` is True.
    """
    before = recorded_data(workdir)
    if not before:
        return []
    after, texts = _data_of(inputs, bool(before.get("identity"))), []
    if before.get("pictures") != after["pictures"]:
        texts.append(f"images to train on: {before.get('pictures')} -> {after['pictures']}")
    if text := other_classes(before.get("classes") or (), after["classes"]):
        texts.append(text)
        if has_class_head:
            raise UserError(f"the workdir belongs to other data; {texts[-1]}. Use another --workdir, or the data it "
                            "was made with")
    if before.get("identity") and not texts:
        texts = [f"images of {split}: other ones, by their names or the content of samples"
                 for split in _other_splits(before, after)]
    return texts


def other_classes(before: Sequence[str], after: Sequence[str]) -> str:
    """Returns the differences of two lists of class names as text; '' for the same names in the same order."""
    before, after = ([unicodedata.normalize("NFC", name) for name in names] for names in (before, after))
    if before == after:
        return ""
    old, new = set(before), set(after)
    names = [f"-{name}" for name in sorted(old - new)] + [f"+{name}" for name in sorted(new - old)]
    which = printable(", ".join(names[:MAX_LISTED_CLASSES])) or "in another order"
    return f"classes: {len(old)} -> {len(new)} ({which})"


def recorded_data(workdir: epath.Path) -> dict[str, Any]:
    """Returns the properties of the data in config.json; {} for runs of old versions, which lack them."""
    content = read_bytes(workdir / "config.json")
    found = bounded_json.parse_object(content).get("data") if content else None
    if not isinstance(found, dict):
        return {}
    return {**found, "classes": _texts(found.get("classes")),
            "identity": identity if isinstance(identity := found.get("identity"), dict) else {}}


def _texts(found: Any) -> list[str]:
    """Returns a list of strings as it is, and [] for anything else."""
    return found if isinstance(found, list) and all(isinstance(text, str) for text in found) else []


def _data_of(inputs: Any, identified: bool = True) -> dict[str, Any]:
    """Returns the properties of the data for config.json; with `identified`, their identity, which reads samples."""
    return {"pictures": inputs.num_train, "classes": list(inputs.classes),
            "identity": inputs.identity() if identified else {}}


def _other_splits(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Returns the splits whose identity differs between two results of `_data_of`."""
    old, new = before["identity"], after["identity"]
    return [split for split in sorted({*old, *new}) if old.get(split) != new.get(split)]


def _why_other_data(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Returns why data at another path may differ from the recorded ones; '' if they are the same."""
    if not before.get("identity") or not after.get("identity"):
        return "it is not on record by what the data are known: the run needs them where they were, or a link there"
    if text := other_classes(before.get("classes") or (), after.get("classes") or ()):
        return text
    splits = ", ".join(_other_splits(before, after))
    return f"other images are there, by their names or the content of samples, for {splits}" if splits else ""


def keep(workdir: epath.Path, config: ConfigDict, inputs: Any, evaluations: Iterable[str] = ()) -> None:
    """Writes config.json again if it was deleted: without it, no command can read the checkpoints."""
    try:
        # If another run holds the workdir, that run writes it.
        if str(workdir).startswith("gs://") or workdir_lock.why_unwritable():
            return
        if not (workdir / "config.json").exists():
            record(workdir, config, inputs, evaluations)
    except (OSError, UserError) as error:
        logger.warning("cannot write %s again: %s", workdir / "config.json", error)


def record(workdir: epath.Path, config: ConfigDict, inputs: Any = None, evaluations: Iterable[str] = ()) -> None:
    """Creates the workdir and writes config.json, with the data properties that `data_changes` compares.

    Args:
      workdir: the workdir.
      config: the config of the run.
      inputs: data.Inputs.
      evaluations: names of the run's evaluations.

    Raises:
      UserError: it cannot be written, or another run has meanwhile written a different config.
    """
    file = workdir / "config.json"
    content = {"config": config.to_dict(), "git_commit": git_commit(), "versions": versions(),
               "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}"}
    if used := _used(config, evaluations=evaluations):
        content["plugins"] = used
    if inputs:
        content["data"] = _data_of(inputs)
    try:
        make_folder(workdir)
        if jax.process_index() == 0:
            changes(workdir, config, inputs)
            replace_text(file, json.dumps(content, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"cannot write the workdir {workdir}: {error.strerror or error}") from None


def _used(config: ConfigDict, **others: Iterable[str]) -> dict[str, dict[str, str]]:
    """Returns `plugins.used` for the names in a config and for `others`, kind → names."""
    return plugins.used({"methods": [config.method.name], "sources": [config.data.source],
                         "optimizers": [config.optim.name], "color_policies": [config.data.color],
                         "metric_sinks": metric_sinks.names(config.log), **others})


def read_config(workdir: epath.Path) -> ConfigDict:
    """Returns the stored config of a workdir; raises UserError without one."""
    stored = _stored_config(workdir)
    if stored is None:
        raise UserError(f"{workdir} has no config.json: it is not a workdir of mae_jax")
    return stored


def _stored_config(workdir: epath.Path) -> ConfigDict | None:
    file = workdir / "config.json"
    content = read_bytes(file)
    if content is None:
        plugins.expect({})
        return None
    try:
        stored = bounded_json.parse_object(content)
        if "config" not in stored:
            raise ValueError(f"it has no 'config', but {', '.join(sorted(stored)[:MAX_LISTED_CLASSES]) or 'nothing'}; "
                             "perhaps it is another program's")
        return _completed(stored["config"], file, workdir, stored.get("plugins", {}))
    except DAMAGED as error:
        raise UserError(unreadable(file, content, error)) from None


def _completed(values: dict[str, Any], where: Any, folder: epath.Path, recorded: dict[str, dict[str, str]]
               ) -> ConfigDict:
    """Builds a config from stored values; a missing field is newer than they are, and gets its default.

    Args:
      values: the stored config.
      where: its file or source, for messages.
      folder: its folder, from which no plug-in is imported.
      recorded: the stored result of `plugins.used`.

    Raises:
      UserError: the recipe_version or a field is unknown, since a newer version wrote it; or a plug-in is missing.
    """
    try:
        stored = configs.from_dict(recipe_version.upgrade(values))
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    plugins.expect(recorded)
    plugins.load(stored.get("plugins", ()), str(where), stored=str(folder))
    config = configs.default(stored.method.name).unlock()
    unknown = sorted(param_tree.flat(stored).keys() - param_tree.flat(config).keys())
    if unknown:
        raise UserError(f"{where} has config fields that mae_jax {__version__} does not know: "
                        f"{', '.join(unknown[:MAX_LISTED_CLASSES])}; use the newer mae_jax that wrote it")
    config.update(stored)
    return config.lock()


def of_checkpoint(path: epath.Path) -> epath.Path:
    """Returns the workdir of a path, which is a workdir, the folder of a step, or that of the best checkpoint."""
    folder = path.parent.parent if path.parent.name == "checkpoints" else path
    return folder.parent if folder.name == "best" and not (folder / "config.json").exists() else folder


def config_of(source: str) -> ConfigDict | None:
    """Returns the config stored with parameters, of a workdir, a step's folder or an exported file; None without one.

    Raises:
      UserError: the file cannot be read or is damaged, or a plug-in is missing.
    """
    path = locate(source)
    file = weight_files.file_of(path)
    if file is None:
        return _stored_config(of_checkpoint(path))
    try:
        said = _said(file)
        recorded = bounded_json.parse(said.get("plugins", "{}"))
        if not said.get("config"):
            return None
        config = _completed(bounded_json.parse_object(said["config"]), source, path.parent, recorded)
    except DAMAGED as error:
        raise UserError(f"{source} is not a file of weights, or damaged: {error}") from None
    except OSError as error:
        raise UserError(f"cannot read {source}: {error.strerror or error}") from None
    for text in plugins.missing("layouts", layouts.layouts()):
        raise UserError(f"{source}: its layout {text}")
    return config


def _said(file: epath.Path) -> dict[str, str]:
    """Returns the metadata of a safetensors file, {} for other files; raises one of DAMAGED for a damaged file."""
    if not weight_files.is_safetensors(file):
        return {}
    with file.open("rb") as opened:
        begin = opened.read(8)
        begin += opened.read(max(file_kinds.ENOUGH, min(int.from_bytes(begin, "little"), bounded_json.MAX_BYTES)))
    return safetensors_file.metadata(str(file), begin, file.stat().length)


def classes_of(source: str) -> tuple[str, ...]:
    """Returns the class names stored with parameters, for the sources of `config_of`; () without names."""
    path = locate(source)
    file = weight_files.file_of(path)
    if file is None:
        return tuple(recorded_data(of_checkpoint(path)).get("classes") or ())
    if named := described(source).get("id2label"):
        return tuple(map(str, dict(sorted(named.items(), key=lambda item: int(item[0]))).values()))
    try:
        return tuple(_texts(bounded_json.parse(_said(file).get("classes", "[]"))))
    except DAMAGED as error:
        raise UserError(f"{source} is not a file of weights, or damaged: {error}") from None


def described(source: str) -> dict[str, Any]:
    """Returns the content of transformers' config.json beside the weights of another library; {} without one."""
    path = locate(source)
    file = weight_files.file_of(path)
    content = read_bytes(path / "config.json") if file is not None and file != path else None
    try:
        said = bounded_json.parse_object(content) if content else {}
    except ValueError as error:
        raise UserError(f"{unreadable(path / 'config.json', content or b'', error)}") from None
    if isinstance(named := said.get("id2label", {}), dict) and all(str(key).isdecimal() for key in named):
        return said
    return {key: value for key, value in said.items() if key != "id2label"}


def metadata(config: ConfigDict, layout: str = layouts.OURS, classes: Sequence[str] = ()) -> dict[str, str]:
    """Returns the metadata of an exported file: the config, for `config_of`, and the class names of its head."""
    used = _used(config, layouts=[layout])
    more = {"plugins": used, "classes": classes}
    return {"format": "pt", "config": json.dumps(config.to_dict()),
            **{name: json.dumps(value) for name, value in more.items() if value}}


def compare(old: ConfigDict, new: ConfigDict, why_other_data: Callable[[], str] = str) -> list[str]:
    """Returns the allowed changes as text; raises UserError with a list of the other changes.

    Args:
      old, new: the stored and the new config.
      why_other_data: returns why data at another path are not those of the run; '', the default, if they are.
    """
    before, after = param_tree.flat(old), param_tree.flat(new)
    if before.get("data.range") == "auto":  # stored by a version that did not resolve it
        before["data.range"] = after.get("data.range")
    changed = [key for key in sorted({*before, *after}) if before.get(key) != after.get(key)]
    texts = {key: f"{key}: {before.get(key)!r} -> {after.get(key)!r}" for key in changed}
    refused = [texts[key] for key in changed
               if key not in MAY_MOVE and not any(fnmatch.fnmatch(key, pattern) for pattern in MAY_CHANGE)]
    moved = [key for key in changed if key in MAY_MOVE]
    if moved and not refused:
        how = why_other_data()
        texts |= {key: f"{texts[key]} ({how or 'the same data, by their names and samples of their content'})"
                  for key in moved}
        refused = [texts[key] for key in moved if how]
    if "method.name" in changed:  # nearly all fields differ, or are there no more
        refused = [texts["method.name"], f"and {len(refused) - 1} more fields"]
    if refused:
        raise UserError(f"the workdir belongs to another config; {'; '.join(refused)}. "
                        "Use another --workdir, or the config it was made with")
    return list(texts.values())


def git_commit() -> str:
    """Returns the commit of the source code; '' if it is neither a git archive nor a checkout.

    In a checkout it is the last commit of the package's folder: '' for a copy installed inside another repository.
    """
    if not ARCHIVED.startswith("$"):
        return ARCHIVED
    try:
        out = subprocess.run(["git", "log", "-1", "--format=%H", "--", "."], cwd=Path(__file__).parents[1],
                             capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return out.stdout.strip()


def versions() -> dict[str, Any]:
    """Returns package → version, None for packages that are not installed."""
    found: dict[str, Any] = dict.fromkeys(PACKAGES)
    for package in PACKAGES:
        for name in (package, *OTHER_NAMES.get(package, ())):
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                found[package] = importlib.metadata.version(name)
                break
    return found
