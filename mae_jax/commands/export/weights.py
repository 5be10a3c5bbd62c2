"""The work of `export`: writes weights in a layout to a folder or a single file, or copies a checkpoint."""

import difflib
from collections.abc import Sequence
from typing import Any

from etils import epath

from mae_jax import errors, param_tree
from mae_jax.commands.export import card, checkpoint_copy, publishing
from mae_jax.errors import UserError, printable
from mae_jax.interop import layouts
from mae_jax.interop.timm import folded
from mae_jax.models.map_norms import MOMENTS
from mae_jax.storage import paths, step_dirs
from mae_jax.storage.checkpoint import load_params
from mae_jax.training import workdir

FILES = (".safetensors", ".pth", ".pt", ".ckpt", ".bin", ".th", ".tar", ".pkl", ".npz", ".npy", ".h5", ".msgpack",
         ".onnx", ".gguf", ".zip", ".json")  # suffixes that no folder has


def export(source: str, to: str, layout: str, task: Any = None, how: str = "", seed: int = 0,
           clusters: str = "") -> int:
    """Writes the parameters of `source` to `to` in `layout`, or copies a checkpoint. Returns the exit code.

    Args:
      source, to, layout: the flags of the same names (--from, --to, --layout).
      task, how, seed, clusters: see `extract_expert`; how='': no expert is extracted.

    Raises:
      UserError: flags that do not fit each other, an unusable target, or a run that the layout cannot hold.
    """
    for flag, given in (("config", task is not None), ("clusters", clusters)):
        if given and not how:
            raise UserError(f"--{flag} is read with --for-task only; leave it out")
    target, folder = paths.locate(to, "--to"), paths.locate_checkpoints(source, "--from")
    origin = workdir.of_checkpoint(folder)
    config = workdir.read_config(origin)  # its plug-ins may add layouts
    chosen = layouts.get(layout)
    alone = check_destination(target, to, layout, chosen)
    if layout == layouts.OURS and not how and not alone:
        print(checkpoint_copy.copy(folder, target))
        step, tree, _ = read_step(target)  # the copy, as `init_from` reads it
        paths.replace_text(target / "README.md", card.text(layouts.Exported(tree, config), layout, origin, step))
        return errors.FINISHED
    if not alone:
        check_no_run(target)
    step, tree, extras = read_step(folder)
    if how:
        from mae_jax.commands.export.expert_path import extract_expert  # imports TensorFlow

        if task is None:
            raise UserError("--for-task needs the task's data: --config=folder --config.data.path=...")
        tree, config, report = extract_expert(config, tree, extras, task, how, seed, clusters)
        print("\n".join(report))
    tree = folded(tree, extras)
    if MOMENTS in extras:  # the running statistics of batch norms
        tree = {**tree, "extras": {MOMENTS: extras[MOMENTS]}}
    exported = of_layout(tree, config, layout, folder, workdir.classes_of(source))
    metadata = workdir.metadata(config, layout, exported.classes if exported.outputs else ())
    files = {} if alone else chosen.beside(exported) | {"README.md": card.text(exported, layout, origin, step)}
    print(publishing.publish(exported, layout, target, files, metadata, alone))
    if chosen.to and (text := chosen.describe(config, param_tree.flatten(chosen.to(exported.params, config)))):
        print(text)
    return errors.FINISHED


def check_destination(target: epath.Path, to: str, layout: str, chosen: layouts.Layout) -> bool:
    """Returns whether --to is a file of weights, not a folder; raises UserError for a file that no layout writes."""
    if target.suffix in chosen.files:
        if target.is_dir():
            raise UserError(f"--to={to} names a file, but a folder has this name")
        return True
    near = difflib.get_close_matches(target.suffix, [".safetensors"])
    if target.suffix in FILES or near:
        wanted = f"did you mean {chosen.files[0]}? " if chosen.files and target.suffix != ".safetensors" else ""
        written = f"writes {' or '.join(chosen.files)}, or a folder" if chosen.files else "writes a folder"
        raise UserError(f"--to={to}: {wanted}--layout={layout} {written}, whose name does not end in {target.suffix}")
    if target.exists() and not target.is_dir():
        raise UserError(f"--to={to} is a file; name a folder, or another file that ends in "
                        f"{' or '.join(chosen.files or FILES[:1])}")
    return False


def check_no_run(folder: Any) -> None:
    """Raises UserError if a folder is a workdir, whose config.json another library's would overwrite."""
    if any((folder / name).exists() for name in ("checkpoints", "metrics.jsonl", "DONE")):
        raise UserError(f"--to={folder} is the workdir of a run; name another folder")


def read_step(folder: epath.Path) -> tuple[int, Any, Any]:
    """Returns the newest good step (-1: not known), its parameters for evaluation, and its extras; raises UserError."""
    offered = step_dirs.offered(step_dirs.absolute(folder)) or [folder]
    for one in offered:
        try:
            tree, extras = param_tree.split_eval_params(load_params(one, ema=True, extras=True))
            return int(one.name) if one.name.isdecimal() else -1, tree, extras
        except UserError:
            if one == offered[-1]:
                raise
    raise AssertionError("unreachable")


def of_layout(tree: Any, config: Any, layout: str, folder: Any, classes: Sequence[str]) -> layouts.Exported:
    """Returns the parameters that a layout holds; raises UserError if it cannot hold the run."""
    chosen = layouts.get(layout)
    if why := chosen.refuses(config):
        raise UserError(f"{folder} {why}")
    blocks = sum(name.startswith("block_") for name in tree["encoder"])
    if layout != layouts.OURS and blocks != config.model.depth:
        raise UserError(f"{folder} has {blocks} of the {config.model.depth} blocks of its encoder: method.block needs "
                        "no later one. Export the run that it starts from")
    if not chosen.whole(config):
        tree = {"encoder": tree["encoder"]}  # no model of other libraries has these heads and decoders
        print(f"the encoder alone, without the parts of method.name={config.method.name!r}")
    exported = layouts.Exported(chosen.part(tree, config), config)
    if exported.outputs != len(classes):
        classes = ()
    return exported._replace(classes=tuple(map(printable, classes)))
