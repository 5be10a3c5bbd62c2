"""What `export` does: weights with the names of a layout, in one file."""

import difflib
from typing import Any

from etils import epath

from mae_jax import errors, param_tree
from mae_jax.commands.export import checkpoint_copy
from mae_jax.errors import UserError
from mae_jax.interop import layouts
from mae_jax.interop.timm import folded
from mae_jax.storage import paths, safetensors_file
from mae_jax.storage.checkpoint import load_params
from mae_jax.training import workdir

FILES = (".pth", ".pt", ".ckpt", ".bin", ".th", ".tar", ".pkl", ".npz", ".npy", ".h5", ".msgpack", ".onnx", ".gguf",
         ".zip", ".json")  # endings of what is no folder


def export(source: str, to: str, layout: str, task: Any = None, how: str = "", seed: int = 0,
           clusters: str = "") -> int:
    """Writes the parameters that `source` holds to `to`, with the names of `layout`; or copies a checkpoint.

    Returns the exit code.

    Args:
      source, to, layout: as the flags.
      task, how, seed: config of the task for which a mixture of experts is cut down, and as `extract_expert` takes
        them.
      clusters: the folder of the mixture's clusters; '' where its config says.
    """
    for flag, given in (("config", task is not None), ("clusters", clusters)):
        if given and not how:
            raise UserError(f"--{flag} is of --for-task=vote, probe or random; without it leave it out")
    file, folder = paths.locate(to, "--to"), paths.locate_checkpoints(source, "--from")
    config = workdir.read_config(workdir.of_checkpoint(folder))  # which may name the plug-in that has the layout
    chosen = layouts.get(layout)
    check_destination(file, to, layout, chosen)
    if chosen.file:
        file = file / chosen.file
    elif file.suffix != ".safetensors":
        if layout == layouts.OURS and not how:
            print(checkpoint_copy.copy(folder, file))
            return errors.FINISHED
        raise UserError(f"--to={to}: the file's name must end in .safetensors")
    tree, extras = param_tree.split_eval_params(load_params(folder, ema=True, extras=True))
    if how:
        from mae_jax.commands.export.expert_path import extract_expert  # imports TensorFlow

        if task is None:
            raise UserError("--for-task needs the task's data: --config=folder --config.data.path=...")
        tree, config, report = extract_expert(config, tree, extras, task, how, seed, clusters)
        print("\n".join(report))
    state = in_layout(folded(tree, extras), config, chosen, folder)
    classes = workdir.classes_of(source) if "head" in tree else ()
    replaced = " (replaces the file that was there)" if file.exists() else ""
    safetensors_file.save(file, state, workdir.metadata(config, layout, classes))
    for name, text in chosen.beside(config).items():
        paths.replace_text(file.parent / name, text)
    flat = param_tree.flatten(state)
    print(f"{file}: {len(flat)} arrays, {sum(x.size for x in flat.values()):,} values{replaced}")
    if text := chosen.describe(config, flat):
        print(text)
    return errors.FINISHED


def check_destination(file: epath.Path, to: str, layout: str, chosen: layouts.Layout) -> None:
    """Raises UserError where --to names what is not written: a file of another kind, or a folder for a file."""
    is_file = file.suffix == ".safetensors"
    if not is_file and (difflib.get_close_matches(file.suffix, [".safetensors"]) or file.suffix in FILES):
        raise UserError(f"--to={to}: did you mean .safetensors? Weights are written as that; else --to is a folder, "
                        f"whose name does not end in {file.suffix}")
    if is_file and (file.is_dir() or chosen.file):
        raise UserError(f"--to={to} is the name of a file; " + (
            f"--layout={layout} writes a folder" if chosen.file else "and there is a folder of this name"))
    if chosen.file:
        check_no_run(file)


def check_no_run(folder: Any) -> None:
    """Raises UserError where a folder is a run's, whose config.json that of another library would replace."""
    if any((folder / name).exists() for name in ("checkpoints", "metrics.jsonl", "DONE")):
        raise UserError(f"--to={folder} is the workdir of a run; name another folder")


def in_layout(tree: Any, config: Any, layout: Any, folder: Any) -> Any:
    """Returns parameters with the names and shapes of a `Layout`; raises UserError for what it has not."""
    if why := layout.refuses(config):
        raise UserError(f"{folder} {why}")
    if layout.whole is not None and config.method.name not in layout.whole:
        tree = {"encoder": tree["encoder"]}  # what their heads and decoders predict, no model of others does
        print(f"the encoder alone, without the parts of method.name={config.method.name!r}")
    return layout.to(tree, config)
