import numpy as np
import pytest

from mae_jax.data.tensorflow_cpu import tf
from mae_jax.errors import BUG, MISTAKE, explain, pluralize, printable


def test_names_from_data_are_printed_as_one_plain_line():
    assert printable("cat/été 1.jpg") == "cat/été 1.jpg"
    assert printable("a\nb\x1b[31m\udce9") == r"a\nb\x1b[31m\udce9"
    printable("\udce9\u202e").encode("ascii")


def test_things_are_counted_in_words():
    assert [pluralize(n, "file") for n in (0, 1, 2)] == ["0 files", "1 file", "2 files"]


class JaxRuntimeError(RuntimeError):
    """As JAX's own, by its name."""


def import_error(name):
    return ImportError(f"cannot import name 'x' from {name!r}", name=name)


@pytest.mark.parametrize(("error", "line"), [
    (PermissionError(13, "Permission denied", "/a"), "Permission denied: '/a'"), (OSError(), "OSError"),
    (OSError(28, "No space left on device"), "No space"), (MemoryError(), "data.threads"),
    (np.zeros, "data.threads"), (JaxRuntimeError("RESOURCE_EXHAUSTED: 40 GiB\nmore"), "batch_size"),
    (RuntimeError("Unable to initialize backend 'cuda': busy"), "in use by another process"),
    (import_error("tensorflow_datasets"), "pip check"),
    (ModuleNotFoundError("No module named 'cv2'", name="cv2"), "cv2"),
    (tf.errors.PermissionDeniedError(None, None, "gs://a: 403"), "gs://a: 403"),
    (tf.errors.ResourceExhaustedError(None, None, "/a; Too many open files"), "Too many open files")])
def test_what_the_machine_lacks_is_no_bug(error, line):
    if error is np.zeros:
        with pytest.raises(MemoryError) as caught:
            np.zeros((2**40, 2**10))
        error = caught.value
    code, text = explain(error)
    assert code == MISTAKE
    assert text.startswith("error: ")
    assert line in text
    assert "\n" not in text
    assert "bug" not in text


@pytest.mark.parametrize("error", [
    ValueError("x"), RuntimeError("x"), RecursionError("x"), JaxRuntimeError("INTERNAL: x"),
    import_error("mae_jax.ops"), tf.errors.InvalidArgumentError(None, None, "x"), KeyError("x")])
def test_what_is_our_fault_is_told_as_a_bug(error):
    code, text = explain(error)
    assert code == BUG
    assert text.endswith("this is a bug in mae_jax; please report it with the lines above")
