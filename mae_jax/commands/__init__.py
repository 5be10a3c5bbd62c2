"""The commands, one module each: `mae_jax VERB`."""
