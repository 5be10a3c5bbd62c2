"""Sources: where examples are stored, one module each."""
