"""`python -m mae_jax.main`: the same as `mae_jax train`, and with --mode=eval or --mode=replay as these commands."""

from mae_jax.commands import cli, train

if __name__ == "__main__":
    cli.run(train.main, train.__doc__, train.REQUIRED)
