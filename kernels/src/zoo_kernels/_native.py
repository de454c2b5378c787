"""Loading the native CPU library and calling into it: plain C ABI through ctypes, no link to torch or Python.

An entry point takes an array of 64-bit integers (pointers, sizes, strides), laid out as the C++ side's struct; see
``kernels/native/zk.h``. Without the library nothing here fails: :func:`unavailable` says why it is missing.
"""

from __future__ import annotations

import ctypes
import functools
import os
import struct
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import build

ABI = 2  # the library's zk_abi()
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3, torch.int8: 4}
_BITS = {"baseline": 1, "avx2": 2, "avx512": 4, "neon": 8}


def library_path() -> Path:
    """The library in the package, or another build of it (with sanitizers, say) that ZOO_KERNELS_LIBRARY names."""
    other = os.environ.get("ZOO_KERNELS_LIBRARY")
    return Path(other) if other else build.PACKAGE / build.LIBRARY


@functools.cache
def _load() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    if sys.maxsize < 2**32:
        return "the native library needs a 64-bit platform"
    path = library_path()
    if not path.exists():
        note = build.PACKAGE / "native_missing.txt"
        if note.exists():
            return f"the native library was not built at installation: {note.read_text().strip()}"
        how = "run `python -m zoo_kernels.build`" if build.SOURCES.is_dir() else "install a wheel of ssm-zoo-kernels"
        return f"the native library is not built ({path.name} is missing); {how}"
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return f"the native library does not load: {error}"
    library.zk_abi.restype = ctypes.c_int64
    library.zk_isas.restype = ctypes.c_int64
    library.zk_sources.restype = ctypes.c_char_p
    if library.zk_abi() != ABI:
        return (
            f"the native library has interface {library.zk_abi()}, {ABI} is needed; run `python -m zoo_kernels.build`"
        )
    return library


def known() -> list[str]:
    """The instruction sets that this processor has, the best one last."""
    library = _load()
    if isinstance(library, str):
        raise RuntimeError(library)
    found = library.zk_isas()
    return [name for name, bit in _BITS.items() if found & bit]


@functools.cache
def isa() -> str:
    """The instruction set in use: the best that the processor has, or what ZOO_KERNELS_ISA says."""
    wanted = os.environ.get("ZOO_KERNELS_ISA")
    if wanted:
        if wanted not in known():
            raise ValueError(
                f"the environment variable ZOO_KERNELS_ISA is {wanted!r}; this processor has {', '.join(known())}"
            )
        return wanted
    return known()[-1]


def instruction_set() -> str:
    """:func:`isa`, or "" where nothing native can run here."""
    return "" if isinstance(_load(), str) else isa()


def unavailable() -> str | None:
    """Why nothing native can run here, or None."""
    library = _load()
    return library if isinstance(library, str) else None


def missing(*names: str) -> str | None:
    """Why these entry points cannot be called, or None."""
    library = _load()
    if isinstance(library, str):
        return library
    for name in names:
        if not hasattr(library, f"zk_{name}__{isa()}"):
            return f"the native library has no {name} for {isa()}; run `python -m zoo_kernels.build`"
    return None


def entry(name: str) -> Any:
    """A function of the library that has no instruction set, or None where there is no library."""
    library = _load()
    return None if isinstance(library, str) else getattr(library, name)


@functools.cache
def _packer(count: int) -> Callable[..., bytes]:
    return struct.Struct(f"{count}q").pack


@functools.cache
def function(name: str) -> Callable[..., None]:
    """Entry point ``name`` as a Python function of its array's numbers (None is a null pointer)."""
    reason = missing(name)
    if reason is not None:
        raise RuntimeError(reason)
    entry = getattr(_load(), f"zk_{name}__{isa()}")
    entry.restype, entry.argtypes = ctypes.c_int64, (ctypes.c_char_p,)

    def call(*numbers: int | None) -> None:
        # bytes are packed in a third of the time that an array of ctypes takes
        status = entry(_packer(len(numbers))(*[0 if n is None else n for n in numbers]))
        if status:
            raise MemoryError(f"zoo_kernels: {name} could not allocate its scratch memory")

    return call


def threads() -> int:
    return torch.get_num_threads()


def pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def strided(x: Tensor | None, axes: int = 4) -> tuple[int, ...]:
    """What the C++ ``Strided`` holds: pointer, dtype, and strides of the first ``axes`` axes (0 where of size 1).

    The last axis must be contiguous: see :func:`rows`.
    """
    if x is None:
        return (0,) * (2 + axes)
    strides, shape = x.stride()[:-1], x.shape
    if 1 in shape:
        strides = tuple(0 if size == 1 else stride for size, stride in zip(shape, strides, strict=False))
    return (x.data_ptr(), DTYPES[x.dtype], *strides, *(0,) * (axes - len(strides)))


def rows(x: Tensor) -> Tensor:
    """x itself where its last axis is contiguous, else a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def wrong_dtypes(names: Iterable[str], tensors: Iterable[Tensor | None]) -> str | None:
    """Why these tensors cannot be read natively, or None: real floating point on a CPU only."""
    for name, x in zip(names, tensors, strict=True):
        if x is None:
            continue
        if not x.is_cpu:
            return f"{name} is on {x.device}; the native library runs on a CPU"
        if x.dtype not in DTYPES:
            return f"{name} is {str(x.dtype).removeprefix('torch.')}, which only the reference computes with"
    return None


def describe() -> dict[str, Any]:
    """For ``zoo_kernels.status()``."""
    library = _load()
    if isinstance(library, str):
        return {"available": False, "reason": library}
    built = library.zk_sources().decode()
    stale = build.SOURCES.is_dir() and built != build.digest()
    return {
        "available": True,
        "library": str(library_path()),
        "isa": isa(),
        "threads": threads(),
        "stale": stale,  # the sources beside it have changed since it was built
    }
