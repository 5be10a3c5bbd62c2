"""`mae_jax bench`."""
