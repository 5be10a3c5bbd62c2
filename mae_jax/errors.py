"""Exceptions with their exit codes and messages, and helpers for the text of messages."""

import difflib
import re
import traceback
from collections.abc import Iterable

PLUG_INS: set[str] = set()  # top-level packages of plug-ins; filled by `mae_jax.plugins`


class UserError(Exception):
    """An error that the user can fix. Its text is printed as one line, without a traceback; the exit code is 2."""


class GuardError(Exception):
    """A guard stopped the run (non-finite gradients, too many unreadable images). The exit code is 3."""


def printable(text: str) -> str:
    """Returns text from data in one line, with characters that are not printable replaced by their escapes."""
    if text.isprintable():  # the common case, which must be fast
        return text
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def pluralize(count: int, what: str) -> str:
    """Returns '1 image', '2 images'."""
    return f"{count} {what}{'s' * (count != 1)}"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Returns the end of an error message: the known name nearest to `word`, if any is close, then all known names."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known: {', '.join(known) if known else 'none'}"


def root_cause(error: BaseException) -> str:
    """Returns the root of a chain of exceptions as one line, without the specs that TensorStore appends."""
    while error.__cause__:
        error = error.__cause__
    specs = r" \[\w+(?:\[\d+\])?=|\. See full TensorStore|\. Tensorstore KvStore"
    text = re.split(specs, " ".join(str(error).split()))[0]
    return f"{type(error).__name__}: {text[:600]}"


LESS_MEMORY = "take fewer data.workers or data.threads, a smaller data.shuffle_mb, data.prefetch or batch_size"
LESS_DEVICE_MEMORY = ("take a smaller batch_size, train.accumulate, model.remat or mesh.fsdp; mae_jax plan computes "
                      "what fits")
TF_OF_MACHINE = ("PermissionDeniedError", "NotFoundError", "ResourceExhaustedError", "UnavailableError",
                 "UnauthenticatedError", "DeadlineExceededError")  # raised by TensorFlow for files and buckets
FINISHED, BUG, MISTAKE, GUARD, STOPPED = 0, 1, 2, 3, 75  # exit codes; 75: EX_TEMPFAIL of sysexits.h, run it again


def explain(error: BaseException) -> tuple[int, str]:
    """Returns the exit code of an error and its message: one line, preceded by a traceback for bugs of this package."""
    if isinstance(error, UserError):
        return MISTAKE, f"error: {error}"
    if isinstance(error, GuardError):
        return GUARD, f"stopped: {error}"
    if isinstance(error, KeyboardInterrupt):
        return STOPPED, "stopped before the command was done"
    if why := _of_machine(error):
        return MISTAKE, f"error: {why}"
    trace = "".join(traceback.format_exception(error))
    where = _plug_in(error) or "mae_jax; please report it with the lines above"
    return BUG, f"{trace}this is a bug in {where}"


def _of_machine(error: BaseException) -> str:
    """Returns a message for faults of the machine, the network or the installation; '' for any other error."""
    kind, text = type(error), " ".join(str(error).split())[:1000] or type(error).__name__
    top = kind.__module__.split(".")[0]
    # Missing permissions, a full disk, a missing folder, a bucket that does not answer.
    if isinstance(error, OSError) or top in ("aiohttp", "gcsfs", "google"):
        return text
    if isinstance(error, MemoryError):
        return f"out of memory ({text}); {LESS_MEMORY}"
    if kind.__name__ in ("JaxRuntimeError", "XlaRuntimeError") and "RESOURCE_EXHAUSTED" in text:
        return f"out of memory on a device; {LESS_DEVICE_MEMORY} ({root_cause(error)})"
    if isinstance(error, RuntimeError) and text.startswith("Unable to initialize backend"):
        return f"{text}: the devices are in use by another process, or JAX does not fit their driver"
    if top == "tensorflow" and kind.__name__ in TF_OF_MACHINE:
        return text
    if isinstance(error, ImportError) and (error.name or "").split(".")[0] != "mae_jax" and not _plug_in(error):
        return f"{text}; a package is missing or has an incompatible version: run pip check"
    return ""


def _plug_in(error: BaseException) -> str:
    """Returns the first plug-in in the error's traceback; '' for none."""
    names = (str(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_tb(error.__traceback__))
    return next((f"the plug-in {name}, not in mae_jax" for name in names if name.split(".")[0] in PLUG_INS), "")
