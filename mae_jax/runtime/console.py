"""Lines on standard output, once however many processes there are."""

import contextlib


def print_once(line: str) -> None:
    """Prints a line, once however many processes there are.

    Where standard output goes to a full disk or to a program that has ended, the run goes on.
    """
    import jax  # here, since progress.py imports this before JAX is needed

    if jax.process_index() == 0:
        with contextlib.suppress(OSError):
            print(line, flush=True)


def clock(seconds: float) -> str:
    """Returns '1h02m', '3m10s' or '12s'."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
