"""The layout of mae_jax's own parameter tree, which is written and read unchanged."""

from mae_jax.interop.layouts import Layout

LAYOUT = Layout(
    to=lambda params, config: params,
    from_=lambda state, config: state,
    recognizes=lambda names: "encoder" in names,
    loading=lambda exported: """from mae_jax.storage.checkpoint import load_params

params = load_params("FOLDER")  # nested dict of arrays; a run starts from them with --config.init_from=FOLDER""",
)
