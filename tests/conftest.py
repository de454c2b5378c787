"""Shared by all tests: one compute thread per worker, and no test reaches a hub."""

import os

# pytest -n 2 runs two processes on machines of two cores: with torch's default they would use four threads.
if os.environ.get("PYTEST_XDIST_WORKER"):
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# Tests that need a Hub start their own server on loopback and set HF_ENDPOINT in a subprocess.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


def pytest_make_parametrize_id(val, argname):
    """Name bytes by their argument: every worker must collect the same names, and packed bytes hold the time."""
    return argname if isinstance(val, bytes) else None
