"""Readers: from a source to batches, with random access, from record streams, or from cached batches."""
