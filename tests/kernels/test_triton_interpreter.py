"""Runs the tests of the Triton kernels in one process with TRITON_INTERPRET=1 (see ``tests/triton_interpreter.py``)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
HERE = Path(__file__).parent
FILES = sorted(
    path
    for path in HERE.glob("test_triton_*.py")
    if path.stem not in ("test_triton_interpreter", "test_triton_compile")
)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is the process inside")
def test_kernels_in_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    for name in ("PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER"):
        environment.pop(name, None)
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", *map(str, FILES)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=HERE)
    if done.returncode == 5 and "does not work with numpy" in done.stdout:
        pytest.skip("this Triton's interpreter does not work with this numpy")
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, done.stdout[-2000:]
    # Every file has at least this many tests: an inner run that collects nothing must not pass.
    assert int(passed.group(1)) >= 3 * len(FILES)
