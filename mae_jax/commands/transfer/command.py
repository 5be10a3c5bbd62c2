r"""Fine-tunes or probes one encoder on many data sets, one after the other; writes one table and one plot.

  mae_jax transfer --config=transfer --names=cifar10,dtd --from=runs/pretrained --to=runs/suite
  mae_jax transfer --config=transfer --names=cars --protocols=finetune,linear,quick \
      --from=vit_l.safetensors --to=runs/cars --config.train.duration='10000 steps'
  mae_jax transfer --config=transfer --names=cifar10 --blocks=0,0.5,1,2,4,all \
      --from=runs/pretrained --to=runs/blocks
  mae_jax transfer --config=quickstart --protocols=quick --from=runs/quickstart --to=runs/quick
  mae_jax transfer --config=transfer --names=pets,digit_scenes,coco=/data/coco,ade20k=/data/ADEChallengeData2016 \
      --protocols=quick,detect:vitdet_b,upernet:ibot --from=runs/vit_b_mae --to=runs/dense

A cell is a data set, a protocol and a number of blocks. It is trained in its own workdir TO/<cell>, as by mae_jax.main,
from the encoder of --from. It takes the encoder's shape and image size, and the recipe's values for that size;
--config.<field> overrides them. The protocol `quick` does not train: it computes features once for k-NN, logistic
regression (linear), and a linear layer that SGD trains at the best of several learning rates (sgd). The protocols
`detect`, `segment` and `upernet` are the recipes of these names, with arguments after colons, and have their own data
sets and image sizes. --config may be any recipe: --names and other --protocols are arguments of it; without them it is
run as it is. NAME=PATH gives the path of a data set. The table reports the metrics of the recipe's own
`metric(argument)`, or else map or top1. A data set that a protocol does not have is left out there, and the table says
so.

The same command resumes, and does not repeat finished cells. A cell that fails by your mistake (data that are not
prepared) is listed under the table, and the others continue. Exit codes: as mae_jax.main; 2 if a cell was a mistake, 3
if a guard stopped one and none was a mistake.

--lrs=1e-4,3e-4,1e-3 first trains every cell once at each rate, in TO/<cell>/lr_<x>, and chooses by the recipe's
data.val_split or, if it has none, with its argument `held`. Then the cell is trained anew at the chosen rate, as in the
recipe. Only this training reads the test data.
"""

from absl import flags
from ml_collections import config_flags

from mae_jax.commands import cli

REQUIRED = ("config", "from", "to")
CONFIG = cli.define_config()
FROM = flags.DEFINE_string("from", "", "the encoder: a workdir, one step's folder in it, or an export of mae_jax")
TO = flags.DEFINE_string("to", "", "folder of the cells and of results.json, results.md and transfer.png")
NAMES = flags.DEFINE_list("names", [], "data sets, as arguments of the recipe: cifar10,dtd; coco=/data/coco")
PROTOCOLS = flags.DEFINE_list("protocols", [], "arguments of the recipe: finetune,linear; quick: no training; "
                              "recipes of their own: detect, upernet:ibot, segment")
BLOCKS = flags.DEFINE_list("blocks", [], "numbers of the last blocks to fine-tune: 0,0.5,1,2,4,all")
LRS = flags.DEFINE_list("lrs", [], "learning rates (optim.lr) to select from, on a part of the training data")


def main() -> int:
    from mae_jax.commands.transfer.protocols import Recipe, plan
    from mae_jax.commands.transfer.suite import Suite, rates
    from mae_jax.runtime.signals import SignalHandler

    flag = flags.FLAGS["config"]
    recipe = Recipe(config_flags.get_config_filename(flag), config_flags.get_override_values(flag))
    suite = Suite(recipe, FROM.value, TO.value, rates(LRS.value))
    cells, left_out = plan(recipe, NAMES.value, PROTOCOLS.value, BLOCKS.value)
    suite.check(cells)  # a misspelt argument stops all before anything runs
    with SignalHandler():  # a signal between two trainings also has its own exit code
        return suite.run(cells, left_out)
