"""What `config.plugins` names: registers everything of `things`."""

from handmade import things

from mae_jax.plugins import register

register("methods", "echo", things.Echo)
register("sources", "dark", things.dark)
register("color_policies", "negative", things.negative)
register("layouts", "hand", things.HAND)
