"""Inference with a trained encoder: features and predictions of images from files, sources or arrays."""
