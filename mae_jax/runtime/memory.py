"""Memory of this process."""

import resource
import sys


def peak_memory() -> int:
    """Returns the most bytes that this process has held so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
