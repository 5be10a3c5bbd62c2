"""`mae_jax plan`: memory and time of a train step on devices that need not be present."""
