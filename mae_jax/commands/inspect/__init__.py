"""`mae_jax inspect`: counts, broken images, throughput and a grid of a data set."""
