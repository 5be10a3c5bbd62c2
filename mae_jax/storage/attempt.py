"""What may fail without harm: tried, and told where it did."""

import logging
import time
from collections.abc import Callable
from typing import Any

from mae_jax.errors import root_cause

logger = logging.getLogger(__name__)


def attempt(what: str, action: Callable[[], Any], tries: int = 1) -> bool:
    """Does something that may fail without harm; a warning says so.

    More than one try, because a failed save's other writers may still be putting files into the folder to remove.
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
