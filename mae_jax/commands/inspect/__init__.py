"""`mae_jax inspect`: counts, broken files, throughput and a grid of a data set."""
