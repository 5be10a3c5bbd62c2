"""TensorFlow as the host's reader of data: quiet, and never on a GPU. Import `tf` from here only."""

import contextlib
import os
import re
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


def options(workers: int = 1) -> tf.data.Options:
    """Nothing that adapts itself: memory is what threads and prefetch say, and the order is fixed."""
    options = tf.data.Options()
    options.autotune.enabled = False
    options.deterministic = True
    # Nothing here gains from them, and noop_elimination (TensorFlow 2.21) crashes the process on nested streams.
    options.experimental_optimization.apply_default_optimizations = False
    options.threading.private_threadpool_size = workers + 1  # one for the batching
    options.threading.max_intra_op_parallelism = 1
    return options


UNREADABLE = (tf.errors.OpError, UnicodeDecodeError)  # the latter, where TensorFlow's message quotes the record


def reason(error: Exception) -> str:
    """Returns TensorFlow's account in one line, without the names of its nodes."""
    if not isinstance(error, tf.errors.OpError):
        return "a record is no tf.train.Example"
    return re.sub(r"^({{.*?}} ?)+| ?\[(Op:|{{).*$", "", error.message.splitlines()[0])
