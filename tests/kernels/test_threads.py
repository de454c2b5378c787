"""on_threads: Python functions on torch's own threads."""

from __future__ import annotations

import threading

import pytest
import torch
import util

from zoo_kernels import _native
from zoo_kernels.runtime import instruction_set, on_threads


@pytest.fixture(params=["library", "python"])
def kind(request, monkeypatch):
    if request.param == "python":
        monkeypatch.setattr(_native, "_load", lambda: "there is none")
    elif _native.unavailable():
        pytest.skip(_native.unavailable())
    before = torch.get_num_threads()
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("count", [0, 1, 2, 20])
def test_results_are_in_order(kind, threads, count):
    torch.set_num_threads(threads)
    assert on_threads(lambda i: i * i, count) == [i * i for i in range(count)]


def test_functions_run_at_the_same_time(kind):
    torch.set_num_threads(2)
    both = threading.Barrier(2, timeout=20)
    assert on_threads(lambda i: both.wait() >= 0, 2) == [True, True]


def test_the_first_error_is_raised_and_nothing_hangs(kind):
    torch.set_num_threads(2)

    def some(i: int) -> int:
        if i % 3 == 1:
            raise LookupError(f"number {i}")
        return i

    for _ in range(3):
        with pytest.raises(LookupError, match="number 1"):
            on_threads(some, 8)
    assert on_threads(lambda i: i, 3) == [0, 1, 2]


def test_inside_each_other_and_with_operators_inside(kind):
    torch.set_num_threads(2)
    x = torch.randn(300, 300)
    found = on_threads(lambda i: on_threads(lambda j: (x * i).sum() + j, 3), 4)
    for i, row in enumerate(found):
        for j, value in enumerate(row):
            torch.testing.assert_close(value, (x * i).sum() + j)


def test_in_a_thread_of_its_own_and_after_a_fork(native):
    code = """
import os, threading, torch
from zoo_kernels.runtime import on_threads
torch.set_num_threads(2)
found = []
t = threading.Thread(target=lambda: found.append(on_threads(lambda i: i + 1, 5)))
t.start(); t.join()
child = os.fork() if hasattr(os, "fork") else 0
if child == 0:
    print(found == [[1, 2, 3, 4, 5]] and on_threads(lambda i: i, 4) == [0, 1, 2, 3], flush=True)
    os._exit(0)
os.waitpid(child, 0)
"""
    assert util.run_python(code).split()[-1] == "True"


def test_the_instruction_set_is_the_library_s(kind):
    assert instruction_set() == (_native.isa() if kind == "library" else "")
