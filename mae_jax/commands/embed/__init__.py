"""`mae_jax embed`."""
