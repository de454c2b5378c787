"""Large new tensors on a CPU: from memory that an earlier one of the same pass has left, or in pages of 2 MiB.

The C library takes large memory from the system and gives it back, every time; each first touch of a page is then a
visit to the kernel. Seen with a network over a large image: a fifth of all processor time.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import mmap
import sys
import threading
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

LARGE = 8 << 20  # bytes; what is taken anew every time is of this order
_local = threading.local()


@contextlib.contextmanager
def reusing() -> Iterator[None]:
    """Inside, in this thread, memory of a tensor of :func:`empty` that nothing refers to any more serves the next one.

    It is given back at the end. Nested uses are one.
    """
    if getattr(_local, "left", None) is not None or not hasattr(torch._C, "_storage_Use_Count"):
        yield
        return
    _local.left = []
    try:
        yield
    finally:
        _local.left = None


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    """``torch.empty(shape, dtype=dtype)`` on the CPU, which is cheaper to write to for the first time."""
    size = math.prod(shape) * dtype.itemsize
    if size < LARGE:
        return torch.empty(shape, dtype=dtype)
    left: list[tuple[torch.UntypedStorage, int]] | None = getattr(_local, "left", None)
    if left is None:
        x = torch.empty(shape, dtype=dtype)
        _advise(x.untyped_storage())
        return x
    # The smallest that is free and large enough, of at most twice the size: what stays of it may stay long.
    free = [s for s, alone in left if size <= s.nbytes() <= 2 * size and _references(s) == alone]
    if free:
        storage = min(free, key=torch.UntypedStorage.nbytes)
    else:
        storage = torch.UntypedStorage(size)
        _advise(storage)
        left.append((storage, _references(storage)))
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    return torch.empty(0, dtype=dtype).set_(storage, 0, shape, strides)  # type: ignore[call-overload]


def _references(storage: torch.UntypedStorage) -> int:
    return torch._C._storage_Use_Count(storage._cdata)


def _advise(storage: torch.UntypedStorage) -> None:
    """Ask for huge pages; an advice, where it cannot be followed nothing changes."""
    call = _madvise()
    if call is not None:
        start = -(-storage.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        stop = (storage.data_ptr() + storage.nbytes()) // mmap.PAGESIZE * mmap.PAGESIZE
        call(start, stop - start, mmap.MADV_HUGEPAGE)


@functools.cache
def _madvise() -> Callable[..., int] | None:
    """libc's, or None where there is no such thing."""
    if sys.platform != "linux" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    call = getattr(ctypes.CDLL(None), "madvise", None)
    if call is not None:
        call.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return call
