"""Fixtures of the kernel tests."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # `import util` under --import-mode=importlib

from hypothesis import HealthCheck, settings

settings.register_profile("kernels", deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
settings.load_profile("kernels")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _where_it_is_built(request):
    """What is tested on each back end is not on "native" in a checkout where the library was not built."""
    given = getattr(request.node, "callspec", None)
    if given is not None and "native" in (given.params.get("backend"), given.params.get("name")):
        request.getfixturevalue("native")


@pytest.fixture
def native():
    """The tests of the native library run where it is built; where it is not, they say so."""
    from zoo_kernels import _native

    reason = _native.unavailable()
    if reason is not None:
        pytest.skip(reason)
    return _native


@pytest.fixture
def made_on_gpu(monkeypatch):
    """Tensors, and the random numbers in them, are made on the GPU unless a test says otherwise."""
    generator = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda device="cuda": generator(device=device))
    with torch.device("cuda"):
        yield
