"""Pure functions of arrays, shared by all methods."""
