"""Conversion of weights from and to the layouts of other libraries, and export of programs."""
