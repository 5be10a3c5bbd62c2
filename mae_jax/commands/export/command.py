r"""Exports a run for other libraries: a complete folder, read back and compared before it appears.

  mae_jax export --from=runs/quickstart --layout=hf --to=exports/hf
  mae_jax export --from=runs/finetune --layout=timm --to=exports/timm
  mae_jax export --from=runs/quickstart/checkpoints/4000 --layout=mae --to=exports/quickstart.pth
  mae_jax export --from=runs/quickstart --layout=stablehlo --to=gs://BUCKET/program

transformers reads --layout=hf (ViTMAEForPreTraining, ViTForImageClassification, UperNetForSemanticSegmentation or
ViTModel), and timm reads --layout=timm (encoder and classifier). --layout=mae has the names of the published MAE code,
--layout=upernet those of mmsegmentation, --layout=detectron2 those of Detectron2; --layout=stablehlo is a program of
jax.export, --layout=onnx (the extra `onnx`) one for onnxruntime. Each folder has a README.md. A --to that ends in
.safetensors (mae_jax, the default, timm, mae, upernet and detectron2) or .pth (mae, upernet and detectron2) is a file
of the weights alone. The batch norm of a probe is folded into its head.

  mae_jax export --from=runs/quickstart --to=gs://BUCKET/quickstart/

The default layout copies the newest good checkpoint as a whole into a folder, with its config.json, and verifies it by
reading it back. `init_from`, --mode=eval and training read the copy.

  mae_jax export --from=runs/moce --for-task=vote --config=folder --to=pets.safetensors \
      --config.data.path=/path/to/pets

--for-task extracts one dense encoder from a mixture of experts (method.name=moce), for the training images of the
config: the path of experts with the most votes (vote), the best by a linear probe on a tenth of the images (probe), or
another one as a control (random, --seed). The result is an ordinary masked autoencoder.
"""

from absl import flags

from mae_jax.commands import cli
from mae_jax.interop.layouts import OURS, layouts

REQUIRED = ("from", "to")
FROM = flags.DEFINE_string("from", "", "workdir, or one step's folder in it")
TO = flags.DEFINE_string("to", "", "folder to write, local or gs://, whose other files stay; or a file of "
                         "weights alone, *.safetensors or *.pth, which is replaced")
CONFIG = cli.define_config()
FOR_TASK = flags.DEFINE_enum("for-task", "", ["", "vote", "probe", "random"], "path of a mixture of experts to extract")
SEED = flags.DEFINE_integer("seed", 0, "seed of --for-task=random", lower_bound=0)
CLUSTERS = flags.DEFINE_string("clusters", "", "folder of clusters for --for-task, if it was moved")
LAYOUT = flags.DEFINE_string("layout", OURS, f"layout of the weights: {', '.join(layouts())}")


def main() -> int:
    from mae_jax.commands.export.weights import export

    return export(FROM.value, TO.value, LAYOUT.value, CONFIG.value, FOR_TASK.value, SEED.value, CLUSTERS.value)
