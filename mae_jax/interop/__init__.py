"""Weights in and out, in the layouts of other libraries; NumPy only."""
