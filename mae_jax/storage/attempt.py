"""Actions whose failure is only a warning."""

import logging
import time
from collections.abc import Callable
from typing import Any

from mae_jax.errors import root_cause

logger = logging.getLogger(__name__)


def attempt(what: str, action: Callable[[], Any], tries: int = 1) -> bool:
    """Runs an action up to `tries` times; returns whether it succeeded, and logs a warning if it did not.

    Several tries help to remove the folder of a failed save, into which other writers may still put files.

    Args:
      what: the action, for the warning: 'could not {what}: ...'.
      action: may raise any exception.
      tries: number of tries, 0.2 s apart.
    """
    for left in reversed(range(tries)):
        try:
            action()
        except Exception as error:
            if left:
                time.sleep(0.2)
            else:
                logger.warning("could not %s: %s", what, root_cause(error))
        else:
            return True
    return False
