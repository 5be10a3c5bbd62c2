"""Fixtures of all tests."""

import gc
import importlib.metadata
import logging
import os
import sys
from collections.abc import Iterator

# Before JAX is imported: where libtpu is installed, every process would look for a TPU, one at a time.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests' programs run for milliseconds, and XLA's optimizations would compile for seconds, in the processes that tests
# start as well. `XLA_FLAGS= python -m pytest` tests what users run.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true" + (
    # JAX 0.11 and later end at this flag, which they do not know.
    " --xla_cpu_use_fusion_emitters=false" if importlib.metadata.version("jaxlib").startswith("0.10.") else ""))

import jax
import pytest

from mae_jax import errors, plugins
from tests.gcs.server import Server, environment, serving


@pytest.hookimpl(tryfirst=True)  # before markers are selected by
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "_gcs_server" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.bucket)


def pytest_collection_finish() -> None:
    """Has garbage collected rarely, and not in what is imported by now: it took a tenth of all time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not has_gpu():
        pytest.skip("JAX finds no GPU; where there is one: JAX_PLATFORMS= python -m pytest -m gpu")


def has_gpu() -> bool:
    try:
        return bool(jax.devices("gpu"))
    except RuntimeError:
        return False


@pytest.fixture(scope="session", autouse=True)
def _shared_compilations(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Programs that are compiled again, by another run of the same shapes, come from a cache on disk."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("xla")))
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    yield
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", before)


@pytest.fixture
def _restored_logging() -> Iterator[None]:
    """`cli.guarded` sets logging up for a command; other tests want it as pytest left it."""
    logger = logging.getLogger("mae_jax")
    before = logger.level, logger.propagate, list(logger.handlers)
    yield
    logger.level, logger.propagate, logger.handlers[:] = before


@pytest.fixture(scope="session")
def _gcs_server() -> Iterator[Server]:
    with serving("bucket") as server:
        yield server


@pytest.fixture(scope="module")
def _in_gcs(_gcs_server: Server) -> Iterator[Server]:
    """Clients of Google Cloud Storage, in this process and in those that tests start, find the test server."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment(_gcs_server.url).items():
            patch.setenv(name, value)
        yield _gcs_server


@pytest.fixture
def gcs(_in_gcs: Server) -> Iterator[Server]:
    """The test server, with a bucket called 'bucket' and without faults."""
    _in_gcs.clear()
    yield _in_gcs
    _in_gcs.clear()


@pytest.fixture
def no_plugins(monkeypatch):
    """Forgets, now and afterwards, which plug-ins there are."""
    monkeypatch.setattr(plugins, "_registered", {kind: {} for kind in plugins.KINDS})
    monkeypatch.setattr(plugins, "_printed", set())
    monkeypatch.setattr(plugins, "_recorded", {})
    monkeypatch.setattr(plugins, "_loaded", set())
    monkeypatch.setattr(errors, "PLUG_INS", set())
    monkeypatch.setattr(plugins, "PLUG_INS", errors.PLUG_INS)
    plugins._entry_points.cache_clear()
    modules = set(sys.modules)
    yield
    plugins._entry_points.cache_clear()
    for name in set(sys.modules) - modules:
        del sys.modules[name]


@pytest.fixture
def site(no_plugins, monkeypatch, tmp_path):
    """An empty folder of packages that are found."""
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path
