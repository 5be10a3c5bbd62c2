"""Writes the parameters of a run as one safetensors file, which `init_from` and other libraries read.

  python -m mae_jax.export --from=runs/quickstart --to=quickstart.safetensors
  python -m mae_jax.export --from=runs/quickstart/checkpoints/800 --to=quickstart.safetensors
"""

import json

from absl import flags

from mae_jax import cli

FROM = flags.DEFINE_string("from", "", "workdir, or one step's folder in it")
TO = flags.DEFINE_string("to", "", "the file to write, *.safetensors")


def main() -> int:
    from mae_jax import params, workdir
    from mae_jax.checkpoint import load_params, save_params
    from mae_jax.errors import UserError

    if not TO.value.endswith(".safetensors"):
        raise UserError(f"--to={TO.value}: the file's name must end in .safetensors")
    source = workdir.locate(FROM.value)
    root = source.parent.parent if source.parent.name == "checkpoints" else source
    config = workdir.read_config(root)
    tree = load_params(source)
    save_params(TO.value, tree, {"config": json.dumps(config.to_dict())})
    flat = params.flatten(tree)
    print(f"{TO.value}: {len(flat)} arrays, {sum(x.size for x in flat.values()):,} parameters")
    return cli.FINISHED


if __name__ == "__main__":
    cli.run(main, __doc__, required=("from", "to"))
