"""TensorFlow as the host's reader of data: quiet, and never on a GPU. Import `tf` from here only."""

import contextlib
import os
from collections.abc import Iterator

from mae_jax.errors import UserError

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before the import; failures come as exceptions all the same


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Drops what is written to file descriptor 2: on import TensorFlow's C++ prints lines that no setting turns off."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


try:
    with _silence():
        import tensorflow as tf

        tf.config.set_visible_devices([], "GPU")  # JAX needs the card's whole memory
        tf.config.set_visible_devices([], "TPU")
except ImportError as error:
    raise UserError(f"reading pictures needs TensorFlow ({error}): pip install tensorflow; "
                    "without it, data.source='batches' reads cached batches") from error
