"""Losses and their targets: pure functions of arrays."""
