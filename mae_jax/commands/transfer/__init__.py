"""`mae_jax transfer`: fine-tunings and probes of one encoder on many data sets."""
