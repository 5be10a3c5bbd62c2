"""Flax modules: encoder, decoder, heads and experts. No other package imports Flax."""
