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

from absl import flags

from mae_jax.commands import cli
from mae_jax.interop.layouts import OURS, layouts

REQUIRED = ("from", "to")
FROM = flags.DEFINE_string("from", "", "workdir, or one step's folder in it")
TO = flags.DEFINE_string("to", "", "the file to write, *.safetensors, which replaces one that is there; "
                         "with --layout=hf, or for a whole checkpoint, a folder, whose other files stay")
CONFIG = cli.define_config()
FOR_TASK = flags.DEFINE_enum("for-task", "", ["", "vote", "probe", "random"], "which path of a mixture of experts")
SEED = flags.DEFINE_integer("seed", 0, "of --for-task=random", lower_bound=0)
CLUSTERS = flags.DEFINE_string("clusters", "", "of --for-task: the folder of clusters, where it was moved")
LAYOUT = flags.DEFINE_string("layout", OURS, f"whose names the arrays have: {', '.join(layouts())}")


def main() -> int:
    from mae_jax.commands.export.weights import export

    return export(FROM.value, TO.value, LAYOUT.value, CONFIG.value, FOR_TASK.value, SEED.value, CLUSTERS.value)
