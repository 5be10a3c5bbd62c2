"""`mae_jax export`: weights in other libraries' layouts, one expert path, or a copied checkpoint."""
