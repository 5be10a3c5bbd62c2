"""What may fail without harm: tried, and told where it did."""

import time
from collections.abc import Callable
from typing import Any

from absl import logging

from mae_jax.errors import root_cause


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
                logging.warning("could not %s: %s", what, root_cause(error))
        else:
            return True
    return False
