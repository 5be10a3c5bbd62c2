"""TensorFlow for reading data on the host: quiet, and never on a GPU. Import `tf` only from here."""

import contextlib
import os
import re
from collections.abc import Iterator

from mae_jax.errors import UserError

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before the import; failures still raise


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Discards output to file descriptor 2: on import, TensorFlow's C++ prints lines that no setting turns off."""
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

        tf.config.set_visible_devices([], "GPU")  # JAX needs all GPU memory
        tf.config.set_visible_devices([], "TPU")
except ImportError as error:
    raise UserError(f"this source needs TensorFlow ({error}); run: pip install tensorflow, or read cached batches, "
                    "with data.source='batches'") from error


def options(workers: int = 1) -> tf.data.Options:
    """Returns tf.data options without autotuning: bounded memory, deterministic order."""
    options = tf.data.Options()
    options.autotune.enabled = False
    options.deterministic = True
    # These pipelines gain nothing, and noop_elimination (TensorFlow 2.21) crashes the process on nested streams.
    options.experimental_optimization.apply_default_optimizations = False
    options.threading.private_threadpool_size = workers + 1  # one more for batching
    options.threading.max_intra_op_parallelism = 1
    return options


UNREADABLE = (tf.errors.OpError, UnicodeDecodeError)  # the latter if TensorFlow's message quotes the record


def reason(error: Exception) -> str:
    """Returns TensorFlow's error message in one line, without node names."""
    if not isinstance(error, tf.errors.OpError):
        return "a record is no tf.train.Example"
    return re.sub(r"^({{.*?}} ?)+| ?\[(Op:|{{).*$", "", error.message.splitlines()[0])
