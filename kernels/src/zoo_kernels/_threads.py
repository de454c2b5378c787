"""Python functions on the threads that torch's own operators run on."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from . import _native

Result = TypeVar("Result")
_WORK = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64)


def on_threads(function: Callable[[int], Result], count: int) -> list[Result]:
    """``[function(0), ..., function(count - 1)]``, on up to ``torch.get_num_threads()`` threads at the same time.

    For functions that leave the interpreter for long, such as a search by scipy. torch's threads spin for milliseconds
    after each of its operators; threads beside them would fight them for the processors, so these are the ones that
    work (without the native library, threads of Python's). What a function raises is raised here, the lowest number's
    where several do.
    """
    threads = min(_native.threads(), count)
    if threads <= 1:
        return [function(i) for i in range(count)]
    entry = _native.entry("zk_parallel")
    if entry is None:
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(function, range(count)))
    found: list[Any] = [None] * count
    failed: dict[int, BaseException] = {}

    def one(_context: Any, i: int) -> None:
        try:
            found[i] = function(i)
        except BaseException as error:  # it cannot pass through the library; it is raised below
            failed[i] = error

    entry.restype, entry.argtypes = None, (ctypes.c_int64, ctypes.c_int64, _WORK, ctypes.c_void_p)
    entry(threads, count, _WORK(one), None)
    if failed:
        raise failed[min(failed)]
    return found
