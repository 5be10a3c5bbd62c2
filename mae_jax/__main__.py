"""Self-supervised pre-training of Vision Transformers in JAX.

  mae_jax train --config=quickstart --workdir=runs/quickstart

`python -m mae_jax VERB` does the same. `mae_jax VERB --help` shows examples and flags; with --config=RECIPE, it also
shows the recipe's fields.
"""

import importlib
import sys
from typing import NamedTuple

from mae_jax.errors import MISTAKE, did_you_mean


class Command(NamedTuple):
    """A command of the command line.

    Attributes:
      module: name of a module with a function `main`, which returns the exit code, and with a docstring for --help.
      about: one line for the list of commands.
    """

    module: str
    about: str


COMMANDS = {
    "train": Command("mae_jax.commands.train", "train a recipe in a workdir, or resume its run"),
    "eval": Command("mae_jax.commands.train", "evaluate a workdir's newest checkpoint"),
    "replay": Command("mae_jax.commands.train", "recompute one step of a run and show its gradients"),
    "inspect": Command("mae_jax.commands.inspect.command", "check a data set, or store a resized copy of it"),
    "cluster": Command("mae_jax.commands.cluster.command", "cluster images by their features, or patches into tokens"),
    "bench": Command("mae_jax.commands.bench.command", "measure the speed of a recipe on this machine"),
    "plan": Command("mae_jax.commands.plan.command", "estimate memory and time of a train step on any devices"),
    "transfer": Command("mae_jax.commands.transfer.command", "fine-tune and probe one encoder on many data sets"),
    "predict": Command("mae_jax.commands.predict.command", "classify or segment images, or detect objects in them"),
    "embed": Command("mae_jax.commands.embed.command", "write the features of every image of a source"),
    "report": Command("mae_jax.commands.report.command", "write a page about runs, with a map of images"),
    "export": Command("mae_jax.commands.export.command", "write weights for other libraries"),
}


def main() -> None:
    """Runs the command named by the first argument."""
    from mae_jax.commands import cli

    verb = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if verb in (*cli.HELP, "help"):
        verbs = "\n".join(f"  {name:<10}{command.about}" for name, command in COMMANDS.items())
        cli.show(f"{__doc__}\nVerbs:\n{verbs}")
        return
    if verb == "--version":
        cli.show(cli.version())
        return
    if verb not in COMMANDS:
        print(f"error: unknown command {verb!r}; {did_you_mean(verb, COMMANDS)}", file=sys.stderr)
        sys.exit(MISTAKE)
    del sys.argv[1]
    if verb in ("eval", "replay"):
        sys.argv.insert(1, f"--mode={verb}")
    command = importlib.import_module(COMMANDS[verb].module)
    cli.run(command.main, command.__doc__, getattr(command, "REQUIRED", ()))


if __name__ == "__main__":
    main()
