"""A package of plug-ins, for tests."""
