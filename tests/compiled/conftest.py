"""What tests of compiled programs share."""

import jax
import pytest


@pytest.fixture
def one_device(monkeypatch):
    """As in a process that has one: rows are taken in blocks."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    jax.clear_caches()
