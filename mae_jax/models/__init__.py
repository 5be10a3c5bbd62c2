"""Flax modules of the encoder and decoder; the only folder that imports flax."""
