"""Eight CPU devices, strict promotion, and one table of tolerances for the whole suite."""

import gc
import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
# With a thread per core, devices that wait for each other can leave none to run the last one: XLA then aborts.
os.environ.setdefault("NPROC", "16")

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_collection_finish():
    """Tracing makes and drops many objects: looking for garbage among all others took a tenth of the tests' time."""
    gc.freeze()
    gc.set_threshold(100_000, 50, 50)


@pytest.fixture(autouse=True, scope="module")
def no_caches_of_other_files():
    """Programs of earlier tests make each collection of garbage slow, and some tests make thousands."""
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def x64():
    """float64 arrays, for this test only."""
    before = jax.config.read("jax_enable_x64")
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)
