"""`mae_jax predict`."""
