"""Our own parameter tree, as it is."""

from mae_jax.interop.layouts import Layout

LAYOUT = Layout(
    to=lambda params, config: params,
    from_=lambda state, config: state,
    recognizes=lambda names: "encoder" in names,
)
