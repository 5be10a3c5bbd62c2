"""Lines on standard output, printed by process 0 only, and the format of durations."""

import contextlib


def print_once(line: str) -> None:
    """Prints a line on process 0.

    Ignores errors of standard output (a full disk, a closed pipe), so that the run continues.
    """
    import jax  # here, since progress.py imports this module before JAX is needed

    if jax.process_index() == 0:
        with contextlib.suppress(OSError):
            print(line, flush=True)


def clock(seconds: float) -> str:
    """Formats a duration in seconds as '1h02m', '3m10s' or '12s'."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
