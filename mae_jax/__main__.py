"""`python -m mae_jax VERB` and the console script `mae_jax VERB`: imports the one command and runs it."""

import importlib
import sys

from mae_jax.errors import MISTAKE, nearest

COMMANDS = {  # verb → module: its docstring is the text of --help, `main` returns the exit code
    "train": "mae_jax.commands.train",
    "eval": "mae_jax.commands.train",
    "replay": "mae_jax.commands.train",
    "inspect": "mae_jax.commands.inspect.command",
    "cluster": "mae_jax.commands.cluster.command",
    "bench": "mae_jax.commands.bench",
    "plan": "mae_jax.commands.plan.command",
    "transfer": "mae_jax.commands.transfer.command",
    "export": "mae_jax.commands.export.command",
}


def main() -> None:
    """Runs the command that the first argument names."""
    verb = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if verb in ("-h", "--help", "-help", "help"):
        print(f"{__doc__}\n\nVerbs: {', '.join(COMMANDS)}. mae_jax VERB --help shows an example of each.")
        return
    if verb not in COMMANDS:
        print(f"error: unknown command {verb!r}; {nearest(verb, COMMANDS)}", file=sys.stderr)
        sys.exit(MISTAKE)
    del sys.argv[1]
    if verb in ("eval", "replay"):
        sys.argv.insert(1, f"--mode={verb}")
    from mae_jax.commands import cli

    command = importlib.import_module(COMMANDS[verb])
    cli.run(command.main, command.__doc__, getattr(command, "REQUIRED", ()))


if __name__ == "__main__":
    main()
