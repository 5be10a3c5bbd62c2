"""Memory use of this process."""

import resource
import sys


def peak_memory() -> int:
    """Returns the peak resident memory of this process so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
