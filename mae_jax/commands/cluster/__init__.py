"""`mae_jax cluster`: k-means of images' features, or a vocabulary of patches."""
