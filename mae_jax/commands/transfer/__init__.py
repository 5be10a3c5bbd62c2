"""`mae_jax transfer`: fine-tunes and probes one encoder on many data sets."""
