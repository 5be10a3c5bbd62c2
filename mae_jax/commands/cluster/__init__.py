"""`mae_jax cluster`: k-means of image features, or a vocabulary of patches."""
