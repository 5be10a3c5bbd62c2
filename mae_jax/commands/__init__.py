"""The commands of `mae_jax VERB`, one module or package each."""
