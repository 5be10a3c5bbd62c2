"""A trained encoder asked about images: features of any source, predictions, and arrays from Python."""
