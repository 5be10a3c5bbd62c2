r"""Writes the parameters of a run as safetensors, which `init_from` and other libraries read, or copies a checkpoint.

  mae_jax export --from=runs/quickstart --to=quickstart.safetensors
  mae_jax export --from=runs/quickstart/checkpoints/1250 --to=quickstart.safetensors
  mae_jax export --from=runs/quickstart --layout=hf --to=FOLDER
  mae_jax export --from=runs/finetune --layout=timm --to=finetune.safetensors

--layout=hf writes a folder that transformers' ViTMAEForPreTraining.from_pretrained reads; --layout=mae the names of the
published MAE code; --layout=timm the encoder and its classifier with timm's names, and prints the arguments of
timm.models.VisionTransformer. The batch norm of a probe is folded into its head.

  mae_jax export --from=runs/quickstart --to=gs://BUCKET/quickstart/

A --to that does not end in .safetensors is a folder, local or gs://: the newest good checkpoint is copied there with
its config.json, all of it, and verified by reading it back. `init_from`, --mode=eval and training go on from there.

  mae_jax export --from=runs/moce --for-task=vote --config=folder --to=pets.safetensors \
      --config.data.path=/path/to/pets

--for-task cuts one ordinary encoder out of a mixture of experts (method.name=moce), for the training pictures of the
config: the path of experts of most votes (vote), the best one by a linear probe on a tenth of them (probe), or another
one as a control (random, --seed). It is written, fine-tuned and exported as any masked autoencoder is.
"""

import difflib
import json
from typing import Any

from absl import flags

from mae_jax import errors
from mae_jax.commands import cli

REQUIRED = ("from", "to")
FROM = flags.DEFINE_string("from", "", "workdir, or one step's folder in it")
TO = flags.DEFINE_string("to", "", "the file to write, *.safetensors; with --layout=hf, or for a "
                         "whole checkpoint, a folder")
CONFIG = cli.define_config()
FOR_TASK = flags.DEFINE_enum("for-task", "", ["", "vote", "probe", "random"], "which path of a mixture of experts")
SEED = flags.DEFINE_integer("seed", 0, "of --for-task=random", lower_bound=0)
CLUSTERS = flags.DEFINE_string("clusters", "", "of --for-task: the folder of clusters, where it was moved")
LAYOUT = flags.DEFINE_enum("layout", "mae_jax", ["mae_jax", "mae", "timm", "hf"], "whose names the arrays have")


def main() -> int:
    return export(FROM.value, TO.value, LAYOUT.value, CONFIG.value, FOR_TASK.value, SEED.value, CLUSTERS.value)


def export(source: str, to: str, layout: str, task: Any = None, how: str = "", seed: int = 0,
           clusters: str = "") -> int:
    """Writes the parameters that `source` holds to `to`, with the names of `layout`; or copies a checkpoint.

    Returns the exit code.

    Args:
      source, to, layout: as the flags.
      task, how, seed: config of the task for which a mixture of experts is cut down, and as `customise` takes them.
      clusters: the folder of the mixture's clusters; '' where its config says.
    """
    from mae_jax import param_tree
    from mae_jax.commands.export import checkpoint_copy
    from mae_jax.errors import UserError
    from mae_jax.interop.hf import hf_config
    from mae_jax.interop.timm import folded, timm_arguments
    from mae_jax.storage import paths, safetensors_file
    from mae_jax.storage.checkpoint import load_params
    from mae_jax.training import workdir

    for flag, given in (("config", task is not None), ("clusters", clusters)):
        if given and not how:
            raise UserError(f"--{flag} is of --for-task=vote, probe or random; without it leave it out")
    file, folder = paths.locate(to), paths.locate(source)
    if layout == "hf":
        file = file / "model.safetensors"
    elif file.suffix != ".safetensors":
        if difflib.get_close_matches(file.suffix, [".safetensors"]):
            raise UserError(f"--to={to}: did you mean .safetensors? Else it is a folder for a checkpoint")
        if layout == "mae_jax" and not how:
            print(checkpoint_copy.copy(folder, file))
            return errors.FINISHED
        raise UserError(f"--to={to}: the file's name must end in .safetensors")
    config = workdir.read_config(workdir.of_checkpoint(folder))
    tree, extras = param_tree.judged(load_params(folder, ema=True, extras=True))
    if how:
        tree, config, report = for_task(config, tree, extras, task, how, seed, clusters)
        print("\n".join(report))
    tree = folded(tree, extras)
    if layout != "mae_jax":
        tree = in_layout(tree, config, layout, folder)
    safetensors_file.save(file, tree, workdir.metadata(config))
    if layout == "hf":
        described = {"model_type": "vit_mae", "architectures": ["ViTMAEForPreTraining"], **hf_config(config)}
        paths.replace_text(file.parent / "config.json", json.dumps(described, indent=2) + "\n")
    flat = param_tree.flatten(tree)
    print(f"{file}: {len(flat)} arrays, {sum(x.size for x in flat.values()):,} values")
    if layout == "timm":
        arguments = timm_arguments(config, len(flat.get("head.bias", ())))
        print(f"VisionTransformer({', '.join(f'{name}={value!r}' for name, value in arguments.items())})")
    return errors.FINISHED


def in_layout(tree: Any, config: Any, layout: str, folder: Any) -> Any:
    """Returns parameters with the names and shapes of another library; raises UserError for what it has not."""
    from mae_jax.errors import UserError
    from mae_jax.interop.hf import to_hf
    from mae_jax.interop.mae import to_mae
    from mae_jax.interop.timm import to_timm
    from mae_jax.ops.patches import PatchGrid

    name, grid = config.method.name, PatchGrid.of(config)
    if name == "moce":
        raise UserError(f"{folder} is a mixture of experts, which no layout of others has: cut one encoder out of "
                        "it with --for-task")
    if name not in ("mae", "supervised"):
        if layout == "hf":
            others = "--layout=timm" if config.model.layer_scale else "--layout=timm or --layout=mae"
            raise UserError(f"{folder} was trained with method.name={name!r}; transformers has MAE's model: use "
                            f"{others} for the encoder")
        tree = {"encoder": tree["encoder"]}  # what their heads and decoders predict, no model of others does
        print(f"the encoder alone, without the parts of method.name={name!r}")
    return {"hf": to_hf, "mae": to_mae, "timm": to_timm}[layout](tree, grid.shape, grid.patch)


def for_task(*args: Any) -> Any:
    """See `customise.customise`; raises UserError without a task."""
    from mae_jax.commands.export.expert_path import customise
    from mae_jax.errors import UserError

    if args[3] is None:
        raise UserError("--for-task needs the task's data: --config=folder --config.data.path=...")
    return customise(*args)
