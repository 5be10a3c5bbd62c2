r"""Fine-tunes or probes one encoder on many data sets, one after the other: one table, one plot.

  mae_jax transfer --config=transfer --names=cifar10,dtd --from=runs/pretrained --to=runs/suite
  mae_jax transfer --config=transfer --names=cars --protocols=finetune,linear,quick \
      --from=vit_l.safetensors --to=runs/cars --config.train.duration='10000 steps'
  mae_jax transfer --config=transfer --names=cifar10 --blocks=0,0.5,1,2,4,all \
      --from=runs/pretrained --to=runs/blocks
  mae_jax transfer --config=quickstart --protocols=quick --from=runs/quickstart --to=runs/quick
  mae_jax transfer --config=transfer --names=pets,digit_scenes,coco=/data/coco,ade20k=/data/ADEChallengeData2016 \
      --protocols=quick,detect:vitdet_b,upernet:ibot --from=runs/vit_b_mae --to=runs/dense

A cell is a data set, a protocol and a number of blocks. It is trained in its own workdir TO/<cell> as by mae_jax.main,
from the encoder of --from, whose shape and image size it takes, and the values that a recipe has for that size; what
--config.<field> says goes before. The protocol `quick` does not train: features are computed once for k-NN, logistic
regression (linear), and a layer that SGD trains at the best of several learning rates (sgd). The protocols `detect`,
`segment` and `upernet` are the recipes of these names, with their arguments after colons, their data sets and sizes of
images. Any recipe will do for --config: its --names and other --protocols are arguments that it knows; without them it
is run as it is. NAME=PATH says where a data set lies. Reported is what a recipe's own `metric(argument)` names, or else
map or top1. A data set that is none of a protocol's is left out there, and named in the table.

The same command goes on, and does not repeat what is finished. A cell that is your mistake (data that are not
prepared) is named under the table, and the others go on. Exit codes: as mae_jax.main; 2 where a cell was a mistake, 3
where a guard stopped one and none was a mistake.

--lrs=1e-4,3e-4,1e-3 first trains every cell once for each, in TO/<cell>/lr_<x>, and chooses by the recipe's
data.val_split or, where it has none, with its argument `held`. The test data are read by the chosen one alone, which is
trained anew as the recipe says.
"""

from absl import flags
from ml_collections import config_flags

from mae_jax.commands import cli

REQUIRED = ("config", "from", "to")
CONFIG = cli.define_config()
FROM = flags.DEFINE_string("from", "", "the encoder: a workdir, one step's folder in it, or an exported *.safetensors")
TO = flags.DEFINE_string("to", "", "folder of the cells and of results.json, results.md and transfer.png")
NAMES = flags.DEFINE_list("names", [], "data sets, as arguments of the recipe: cifar10,dtd; coco=/data/coco")
PROTOCOLS = flags.DEFINE_list("protocols", [], "arguments of the recipe: finetune,linear; quick: no training; "
                              "recipes of their own: detect, upernet:ibot, segment")
BLOCKS = flags.DEFINE_list("blocks", [], "how many of the last blocks to fine-tune: 0,0.5,1,2,4,all")
LRS = flags.DEFINE_list("lrs", [], "learning rates (optim.lr) to choose from on a part of the training data")


def main() -> int:
    from mae_jax.commands.transfer.protocols import Recipe, plan
    from mae_jax.commands.transfer.suite import Suite, rates
    from mae_jax.runtime.signals import SignalHandler

    flag = flags.FLAGS["config"]
    recipe = Recipe(config_flags.get_config_filename(flag), config_flags.get_override_values(flag))
    suite = Suite(recipe, FROM.value, TO.value, rates(LRS.value))
    cells, left_out = plan(recipe, NAMES.value, PROTOCOLS.value, BLOCKS.value)
    suite.check(cells)  # a misspelt argument stops all before anything runs
    with SignalHandler():  # also between two trainings a signal ends with its own code
        return suite.run(cells, left_out)
