"""Pure JAX functions that any method may use."""
